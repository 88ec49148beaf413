"""No answer is a bug's because the database went away: every route asked, its connections cut anywhere."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import httpx2
import psycopg
import pytest

from caravan.apps.web import create_app
from caravan.db import Database, pool
from caravan.db.wake import Wake
from caravan.ids import new_id
from caravan.people.students import link_student
from caravan.settings import Settings
from caravan.web.auth import Role
from tests.builders import SANDBOX, SANDBOX_SECRET, a_course, a_student
from tests.clients import PASSWORD, an_account, bearer, client_of
from tests.cutter import Cutter

SETTINGS = Settings(sandbox_webhook_secret=SANDBOX_SECRET)
CUTS = 6  # places, per request
ENDS = 3  # rounds of all requests
BYTES_MIN = 600  # a connection is made by then, mostly
SEED = 1


@dataclass
class Visit:
    """A parent and somebody of the office, signed in, on an application whose lines to the database may be cut."""

    client: httpx2.AsyncClient
    cutter: Cutter
    parent: dict[str, str]
    admin: dict[str, str]
    student: UUID
    order: dict[str, Any]

    async def ask(self, name: str) -> httpx2.Response:
        """One of REQUESTS."""
        if name == "buy":
            order = self.order | {"again": True}
            return await self.client.post("/api/v1/payments", json=order, headers=self.parent)
        if name == "buy by key":
            headers = self.parent | {"idempotency-key": str(new_id())}
            return await self.client.post("/api/v1/payments", json=self.order | {"again": True}, headers=headers)
        if name == "confirm":
            return await self.client.post(f"/api/v1/payments/{await self.payment()}/confirm", headers=self.parent)
        if name == "webhook":
            now = datetime.now(UTC)
            data = {"paymentId": str(await self.payment()), "amountCents": 360_000, "currency": "INR"}
            said = {"type": "payment.succeeded", "timestamp": now.isoformat(), "data": data}
            body = json.dumps(said).encode()
            headers = SANDBOX.sign(f"msg_{new_id()}", now, body)
            return await self.client.post("/api/v1/webhooks/sandbox", content=body, headers=headers)
        if name == "login":
            given = {"email": "asha@example.com", "password": PASSWORD}
            return await self.client.post("/api/v1/auth/login", json=given)
        path = PATHS[name].format(student=self.student)
        headers = self.admin if "admin" in name else self.parent
        return await self.client.get(path, headers=headers | ({"accept": "text/html"} if "page" in name else {}))

    async def payment(self) -> str:
        """A new one, made over lines that last."""
        limit, self.cutter.bytes_max = self.cutter.bytes_max, None
        made = await self.ask("buy")
        while made.status_code == 503:  # its session was ended; the next one's is not
            made = await self.ask("buy")
        assert made.status_code == 201, made.text
        self.cutter.bytes_max = limit
        return made.json()["id"]


PATHS = {
    "learning": "/api/v1/students/{student}/learning",
    "sessions": "/api/v1/students/{student}/sessions",
    "cart": "/api/v1/students/{student}/cart",
    "courses": "/api/v1/courses",
    "admin overview": "/api/v1/admin/overview",
    "admin diagnose": "/api/v1/admin/diagnose",
    "admin purchases page": "/admin/purchases",
    "home page": "/",
}
REQUESTS = ("buy", "buy by key", "confirm", "webhook", "login", *PATHS)


@pytest.fixture
async def visit(database_url: str, db: Database, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Visit]:
    """What is tried again and again is tried twice: the kind of the last failure matters, not how long it takes."""
    monkeypatch.setattr(pool, "POOL_TIMEOUT_SECONDS", 0.3)
    monkeypatch.setattr(pool, "TRANSACT_ATTEMPTS", 2)
    monkeypatch.setattr(pool, "OUTCOME_ATTEMPTS", 2)
    parent, admin = await an_account(db, "asha@example.com"), await an_account(db, "admin@example.com", Role.ADMIN)
    assert parent.account_id is not None
    async with db.transaction() as tx:
        student, course = await a_student(tx), await a_course(tx)
        await link_student(tx, parent.account_id, student)
        start = (tx.now + timedelta(days=5)).date().isoformat()
    order = {
        "studentId": str(student),
        "courseId": str(course),
        "sessionCount": 30,
        "learningMode": "online",
        "groupSize": 1,
        "timeSlot": "6:00 AM",
        "startDate": start,
    }
    async with Cutter(database_url) as cutter, Database(cutter.url, max_connections=2) as cuttable:
        app = create_app(SETTINGS, cuttable, Wake(cutter.url))
        async with client_of(app) as client:
            yield Visit(client, cutter, await bearer(db, parent), await bearer(db, admin), student, order)


async def test_a_connection_that_is_cut_anywhere_answers_no_bug(visit: Visit) -> None:
    dice = random.Random(SEED)
    seen: Counter[int] = Counter()
    for name in REQUESTS:
        visit.cutter.bytes_max, before = None, visit.cutter.heard
        answer = await visit.ask(name)
        assert answer.status_code < 400, (name, answer.text)
        longest = visit.cutter.heard - before + BYTES_MIN
        for _ in range(CUTS):
            visit.cutter.bytes_max = dice.randrange(BYTES_MIN, BYTES_MIN + longest)
            answer = await visit.ask(name)
            assert answer.status_code < 500 or answer.status_code == 503, (name, visit.cutter.bytes_max, answer.text)
            seen[answer.status_code] += 1
    assert visit.cutter.cut > len(REQUESTS) * CUTS / 2
    assert seen[503] > len(REQUESTS), f"hardly anything failed: this proves nothing: {seen}"
    assert seen[200] + seen[201] > len(REQUESTS), seen


END_SESSIONS = """
select count(pg_terminate_backend(pid)) from pg_stat_activity
where datname = current_database() and application_name = 'caravan'
"""


async def test_a_session_that_is_ended_at_any_moment_answers_no_bug(visit: Visit, database_url: str) -> None:
    dice = random.Random(SEED)
    seen: Counter[int] = Counter()
    ended = 0
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as connection:
        for name in REQUESTS * ENDS:
            asking = asyncio.create_task(visit.ask(name))
            await asyncio.wait({asking}, timeout=dice.uniform(0, 0.04))
            row = await (await connection.execute(END_SESSIONS)).fetchone()
            ended += row[0] if row else 0
            answer = await asking
            assert answer.status_code < 500 or answer.status_code == 503, (name, answer.text)
            seen[answer.status_code] += 1
    assert ended > len(REQUESTS)
    assert seen[200] + seen[201] > len(REQUESTS), seen
