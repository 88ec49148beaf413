"""The whole web application on a free port of this machine, with people of every role and two families' things in it.

For the parts that attack it (fuzz, authz). The application is `create_app` with every service, served by the product's
own uvicorn settings in this process, so that faults put in from outside work here too.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from uuid import UUID

import httpx2
from fastapi import FastAPI

from caravan.apps.subscriptions import SUBSCRIPTIONS
from caravan.apps.web import create_app, make_server
from caravan.carts.operations import add_item
from caravan.db import Database, Tx
from caravan.db.wake import Wake
from caravan.eventlog.codec import Envelope, encode_envelope
from caravan.eventlog.subscription import register_groups
from caravan.ids import new_id
from caravan.people.students import create_student
from caravan.people.trainers import create_trainer
from caravan.realtime.gateway import Gateway
from caravan.web.auth import Role, create_account, disable_account, hash_password, issue_token
from verify.scratch import ScratchDatabase
from verify.world import CENTRE, SETTINGS, World, open_world, slot_of

PASSWORD = "correct horse of the proof"  # noqa: S105 - of accounts that live for one run
NAME = "O'Nil <b onmouseover=alert(1)>{{7*7}}</b>"  # of people, courses and notes: no page may take it for markup
ANSWER_SECONDS = 15.0


@dataclass(frozen=True, slots=True)
class Person:
    """Who asks. `token` None: signed out."""

    name: str
    role: Role | None
    token: str | None = None
    account_id: UUID | None = None

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.token}"} if self.token else {}

    @property
    def cookies(self) -> dict[str, str]:
        return {"cookie": f"caravan_session={self.token}"} if self.token else {}


@dataclass(slots=True)
class Cast:
    """`people` by name; `own` and `other`: ids of the first and of the second family's things, by parameter name."""

    people: dict[str, Person] = field(default_factory=dict[str, Person])
    own: dict[str, Any] = field(default_factory=dict[str, Any])
    other: dict[str, Any] = field(default_factory=dict[str, Any])


@dataclass(slots=True)
class Site:
    """The application where it answers."""

    app: FastAPI
    db: Database
    port: int
    client: httpx2.AsyncClient

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@asynccontextmanager
async def serve(database: ScratchDatabase) -> AsyncGenerator[Site]:
    """The site on a scratch database; ended when left."""
    wake = Wake(database.url)
    async with database.database(max_connections=12, on_hints=wake.send) as db:
        await wake.start()
        app = create_app(SETTINGS, db, wake)
        gateway: Gateway = app.state.gateway
        # Named as TCP, so that asyncio switches off the waiting for acknowledgements.
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.bind(("127.0.0.1", 0))
        port = int(listener.getsockname()[1])
        server = make_server(app, SETTINGS)
        stop = asyncio.Event()
        serving = asyncio.create_task(server.serve([listener]))
        pushing = asyncio.create_task(gateway.run(stop))
        try:
            await server.listening.wait()
            limits = httpx2.Limits(max_connections=24, max_keepalive_connections=24)
            async with httpx2.AsyncClient(
                base_url=f"http://127.0.0.1:{port}", timeout=ANSWER_SECONDS, limits=limits
            ) as client:
                yield Site(app, db, port, client)
        finally:
            stop.set()
            server.should_exit = True
            await asyncio.wait({serving, pushing}, timeout=10)
            await wake.stop()


# ------------------------------------------------------------------ who and what is there


async def gather_cast(db: Database) -> Cast:
    """Fill an empty migrated database: two families with a delivered course, a cart and a dead letter each; the
    office; a trainer; and accounts that may not come in any more."""
    async with db.transaction() as tx:
        await register_groups(tx, SUBSCRIPTIONS)
    world = await open_world(db)
    password = await hash_password(PASSWORD)
    cast = Cast()
    for name, role in (
        ("student", Role.STUDENT),
        ("stranger", Role.STUDENT),
        ("childless", Role.STUDENT),
        ("trainer", Role.TRAINER),
        ("support", Role.SUPPORT),
        ("admin", Role.ADMIN),
        ("disabled", Role.ADMIN),
        ("expired", Role.ADMIN),
        ("revoked", Role.ADMIN),
    ):
        cast.people[name] = await db.transact(lambda tx, name=name, role=role: _enter(tx, name, role, password))
    cast.people["nobody"] = Person("nobody", None)
    cast.people["guesser"] = Person("guesser", None, "x" * 43)
    cast.own = await _family(world, cast.people["student"], hour=6)
    cast.other = await _family(world, cast.people["stranger"], hour=9)
    async with db.transaction() as tx:
        trainer = cast.people["trainer"]
        cast.own["trainer_id"] = await create_trainer(
            tx,
            name=NAME,
            course_ids=[world.course],
            account_id=trainer.account_id,
            latitude=CENTRE[0],
            longitude=CENTRE[1],
        )
        cast.other["trainer_id"] = world.trainers[0]
        await disable_account(tx, _id(cast.people["disabled"]))
        token = await issue_token(tx, _id(cast.people["disabled"]))  # one that was left behind
        cast.people["disabled"] = Person("disabled", None, token, cast.people["disabled"].account_id)
        await tx.execute(END_TOKENS, {"account_id": cast.people["expired"].account_id})
        await tx.execute(DROP_TOKENS, {"account_id": cast.people["revoked"].account_id})
    for name in ("expired", "revoked"):
        person = cast.people[name]
        cast.people[name] = Person(name, None, person.token, person.account_id)
    await world.work()
    return cast


END_TOKENS = "update auth_tokens set expires_at = now() - interval '1 second' where account_id = %(account_id)s"
DROP_TOKENS = "delete from auth_tokens where account_id = %(account_id)s"


def _id(person: Person) -> UUID:
    assert person.account_id is not None
    return person.account_id


async def _enter(tx: Tx, name: str, role: Role, password_hash: str) -> Person:
    account = await create_account(tx, email=f"{name}@proof.example", name=NAME, role=role, password_hash=password_hash)
    return Person(name, role, await issue_token(tx, account), account)


DELIVERED = """
select p.id as payment_id, p.checkout_id, pu.id as purchase_id, a.id as allocation_id
from payments p join student_course_purchases pu on pu.payment_id = p.id
join trainer_allocations a on a.purchase_id = pu.id where p.id = %(payment_id)s
"""
INSERT_DEAD_LETTER = """
insert into dead_letters (id, consumer_group, event_id, event_type, correlation_id, envelope, code, error, attempts)
values (%(id)s, 'purchase-creation-workers', %(event_id)s, 'PURCHASE_CONFIRMED', %(payment_id)s::text,
        %(envelope)s::jsonb, 'HANDLER_FAILED', 'by the proof', 1)
"""


async def _family(world: World, person: Person, *, hour: int) -> dict[str, Any]:
    async with world.db.transaction("student-service") as tx:
        student = await create_student(
            tx, name=NAME, latitude=CENTRE[0], longitude=CENTRE[1], account_id=person.account_id
        )
    payment = await world.buy(student, hour=hour)
    await world.pay([payment])
    await world.work()
    open_payment = await world.buy(student, hour=hour + 2)
    [row] = await world.rows(DELIVERED, payment_id=payment)
    async with world.db.transaction("payment-service") as tx:
        item = await add_item(
            tx,
            student,
            world.course,
            session_count=4,
            learning_mode="online",
            group_size=1,
            time_slot=slot_of(hour + 4),
            start_date=(tx.now + timedelta(days=5)).date(),
        )
        letter = new_id()
        data = {"paymentId": payment, "studentId": student, "courseId": world.course, "checkoutId": row["checkout_id"]}
        envelope = Envelope(
            id=new_id(),
            source="payment-service",
            type="PURCHASE_CONFIRMED",
            subject=str(payment),
            time=tx.now,
            data=data,
            partitionkey=str(student),
        )
        await tx.execute(
            INSERT_DEAD_LETTER,
            {"id": letter, "event_id": envelope.id, "payment_id": payment, "envelope": encode_envelope(envelope)},
        )
    return dict(row) | {
        "student_id": student,
        "course_id": world.course,
        "open_payment_id": open_payment,
        "item_id": item.id,
        "dead_letter_id": letter,
        "account_id": person.account_id,
    }


SNAPSHOT_TABLES = """
select table_name from information_schema.tables where table_schema = 'public' and table_type = 'BASE TABLE'
  and table_name not in ('workers', 'auth_tokens', 'login_attempts', 'log_windows')
"""


async def snapshot(db: Database) -> dict[str, str]:
    """Each table's contents, as a hash."""
    async with db.transaction("verify", read_only=True) as tx:
        found: dict[str, str] = {}
        for name in await tx.values(SNAPSHOT_TABLES):
            query: Any = f"select coalesce(md5(string_agg(t::text, E'\\n' order by t::text)), '') from \"{name}\" t"  # noqa: S608 - names of the schema
            found[name] = await tx.value(query)
    return found


# ------------------------------------------------------------------ judging an answer

# What no answer may hold: a trace, a statement, a path of ours, a library's own words.
LEAKS = (
    "Traceback", 'File "', "psycopg", "site-packages", "/src/caravan", "select ", "insert into", "update payments",
    "violates", "constraint", "pg_", "asyncio", "NoneType", "KeyError", "Exception:", "msgspec", "pydantic",
)  # fmt: skip
CODE_CHARACTERS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZ_")


def judge_answer(answer: httpx2.Response, *, program: bool = True, reflected: str = "") -> str | None:
    """What is wrong with an answer, whoever got it; None where nothing is. `program`: not a page that was asked for.

    `reflected`: what the request said itself, which an answer may repeat.
    """
    status = answer.status_code
    if status >= 500 and not (status == 503 and answer.url.path == "/readyz"):
        return f"{status}: {answer.text[:200]}"
    if status < 400:
        return None
    text = answer.text.replace("<select ", "<")  # a form's, no statement
    for leak in LEAKS:
        if leak in text and leak not in reflected:
            return f"{status} tells {leak!r}: {answer.text[:300]}"
    if not program:
        return None
    if answer.headers.get("content-type") != "application/problem+json":
        return f"{status} is no problem document: {answer.headers.get('content-type')} {answer.text[:100]}"
    document = json.loads(answer.text)
    code = str(document.get("code", ""))
    if not code or not set(code) <= CODE_CHARACTERS or document.get("status") != status or not document.get("detail"):
        return f"{status} is an incomplete problem: {answer.text[:200]}"
    return None
