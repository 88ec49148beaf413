"""Sockets over a real server and a real database: order, resume, resync, access, bounds."""

from __future__ import annotations

import asyncio
import json
import logging
import socket as sockets
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
import uvicorn
from fastapi import APIRouter, FastAPI
from httpx2 import AsyncClient
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from caravan.apps.connections import WebSocketLine
from caravan.apps.web import Server
from caravan.db import Database, Tx
from caravan.db.redis import Redis
from caravan.db.wake import Wake
from caravan.eventlog import outbox
from caravan.events import CourseAccessGranted
from caravan.ids import new_id
from caravan.realtime import conversation, routes
from caravan.realtime import gateway as gateways
from caravan.realtime.access import Visitor
from caravan.realtime.gateway import Gateway
from caravan.settings import Settings
from caravan.web.auth import Role, create_account, disable_account, issue_token, revoke_token

DEADLINE_SECONDS = 10


@dataclass
class Person:
    account_id: UUID
    token: str
    students: list[UUID]

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"}


@dataclass
class House:
    """A server with nothing but the realtime routes."""

    db: Database
    gateway: Gateway
    wake: Wake
    port: int
    numbers: list[int] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.port}/ws"

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def person(self, *, students: int = 1, role: Role = Role.STUDENT) -> Person:
        async with self.db.transaction() as tx:
            self.numbers.append(1)
            email = f"person{len(self.numbers)}@example.com"
            account = await create_account(tx, email=email, name="A person", role=role, password_hash="x")
            ids = [new_id() for _ in range(students)]
            for student in ids:
                await tx.execute("insert into students (id, name) values (%(id)s, 'A student')", {"id": student})
                await tx.execute(
                    "insert into account_students (account_id, student_id) values (%(account)s, %(student)s)",
                    {"account": account, "student": student},
                )
            return Person(account, await issue_token(tx, account), ids)

    async def say(self, student: UUID, count: int = 1) -> None:
        """`count` events of a student, each in a transaction of its own."""
        for _ in range(count):
            async with self.db.transaction("purchase-worker") as tx:
                event = CourseAccessGranted(payment_id=new_id(), student_id=student, course_id=new_id())
                outbox.append(tx, [event])

    async def trim(self, student: UUID, up_to: int) -> None:
        async with self.db.transaction() as tx:
            await tx.execute(
                "delete from student_feed where student_id = %(student)s and seq <= %(up_to)s",
                {"student": student, "up_to": up_to},
            )


@pytest.fixture
async def house(db: Database, database_url: str) -> AsyncIterator[House]:
    async with serve(db, database_url) as house:
        yield house


@asynccontextmanager
async def serve(
    db: Database, database_url: str, *more: APIRouter, hints: bool = True, redis: Redis | None = None
) -> AsyncGenerator[House]:
    wake = Wake(database_url, redis)
    db.on_hints = wake.send if hints else None
    gateway = Gateway(db, wake)
    app = FastAPI()
    for router in (routes.router, *more):
        app.include_router(router)
    app.state.db, app.state.gateway = db, gateway
    app.state.settings = Settings(_env_file=None)  # pyright: ignore[reportCallIssue]
    config = uvicorn.Config(app, log_config=None, ws=WebSocketLine, ws_per_message_deflate=False, lifespan="off")
    server = Server(config)
    # Named TCP, or asyncio leaves Nagle's algorithm on and each answer waits 40 ms for an acknowledgement.
    listener = sockets.socket(proto=sockets.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    stop = asyncio.Event()
    tasks = [asyncio.create_task(server.serve(sockets=[listener])), asyncio.create_task(gateway.run(stop))]
    try:
        async with asyncio.timeout(DEADLINE_SECONDS):
            await server.listening.wait()
        yield House(db, gateway, wake, listener.getsockname()[1])
    finally:
        server.should_exit = True
        stop.set()
        await asyncio.gather(*tasks)
        listener.close()
        db.on_hints = None


async def read(ws: ClientConnection) -> dict[str, Any]:
    async with asyncio.timeout(DEADLINE_SECONDS):
        return json.loads(await ws.recv())


async def read_seqs(ws: ClientConnection, count: int) -> list[int]:
    frames = [await read(ws) for _ in range(count)]
    assert {frame["type"] for frame in frames} == {"business-event"}
    return [frame["seq"] for frame in frames]


async def close_code(ws: ClientConnection, seconds: float = DEADLINE_SECONDS) -> int | None:
    async with asyncio.timeout(seconds):
        with pytest.raises(ConnectionClosed):
            while True:
                await ws.recv()
    return ws.close_code


async def test_a_stream_that_nobody_resumed_begins_after_the_present(house: House) -> None:
    person = await house.person()
    await house.say(person.students[0], 2)
    async with connect(house.url, additional_headers=person.headers) as ws:
        assert await read(ws) == {"type": "hello", "students": {str(person.students[0]): 2}}
        await house.say(person.students[0], 2)
        frame = await read(ws)
        assert frame["seq"] == 3
        assert frame["studentId"] == str(person.students[0])
        assert frame["event"]["type"] == "COURSE_ACCESS_GRANTED"
        assert {"paymentId", "purchaseId", "courseId", "id", "time"} <= frame["event"].keys()
        assert await read_seqs(ws, 1) == [4]


async def test_what_is_said_while_the_stream_waits_for_a_resume_is_not_lost(house: House) -> None:
    person = await house.person()
    async with connect(house.url, additional_headers=person.headers) as ws:
        await house.say(person.students[0], 3)
        assert (await read(ws))["students"] == {str(person.students[0]): 0}
        assert await read_seqs(ws, 3) == [1, 2, 3]


async def test_resume_gives_every_event_once_in_order_while_more_are_said(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateways, "POLL_SECONDS", 60)  # it needs no help
    person = await house.person()
    student = person.students[0]
    await house.say(student, 150)  # more than a queue holds
    async with connect(house.url, additional_headers=person.headers) as ws:
        await ws.send('{"type": "resume", "after": 0}')
        saying = asyncio.create_task(house.say(student, 50))
        assert await read_seqs(ws, 200) == list(range(1, 201))
        await saying
    async with connect(house.url, additional_headers=person.headers) as ws:
        await ws.send('{"type": "resume", "after": 197}')
        assert await read_seqs(ws, 3) == [198, 199, 200]


async def test_resync_where_the_past_is_trimmed_or_never_was(house: House) -> None:
    person = await house.person()
    student = person.students[0]
    await house.say(student, 5)
    await house.trim(student, 3)
    for after in (0, 2, 99):
        async with connect(house.url, additional_headers=person.headers) as ws:
            await ws.send(json.dumps({"type": "resume", "after": after}))
            assert await read(ws) == {"type": "resync", "studentId": str(student), "seq": 5}
            await house.say(student)
            assert await read_seqs(ws, 1) == [6]
        async with house.db.transaction() as tx:  # back to five, for the next one
            await tx.execute("delete from student_feed where seq = 6")
            await tx.execute("update student_feed_heads set seq = 5")
    async with connect(house.url, additional_headers=person.headers) as ws:
        await ws.send('{"type": "resume", "after": 3}')
        assert await read_seqs(ws, 2) == [4, 5]


async def test_the_poll_finds_what_no_hint_told_of(db: Database, database_url: str) -> None:
    async with serve(db, database_url, hints=False) as house:
        person = await house.person()
        async with connect(house.url, additional_headers=person.headers) as ws:
            assert (await read(ws))["type"] == "hello"  # so nothing else makes the gateway look
            for seq in (1, 2):
                await house.say(person.students[0])
                assert await read_seqs(ws, 1) == [seq]


async def test_a_parent_of_two_hears_both_and_numbers_are_per_student(house: House) -> None:
    person = await house.person(students=2)
    first, second = person.students
    await house.say(first, 2)
    await house.say(second, 1)
    async with connect(house.url, additional_headers=person.headers) as ws:
        await ws.send('{"type": "resume", "after": 0}')
        assert (await read(ws))["code"] == "STUDENT_REQUIRED"
        await ws.send(json.dumps({"type": "resume", "after": {str(first): 1, str(second): 0}}))
        frames = [await read(ws), await read(ws)]
        assert {(frame["studentId"], frame["seq"]) for frame in frames} == {(str(first), 2), (str(second), 1)}
        await ws.send(json.dumps({"type": "resume", "after": 0, "studentId": str(first)}))
        assert await read_seqs(ws, 2) == [1, 2]


async def test_nobody_hears_of_somebody_elses_student(house: House) -> None:
    mine, other = await house.person(), await house.person()
    async with connect(house.url, additional_headers=mine.headers) as ws:
        await ws.send(json.dumps({"type": "resume", "after": 0, "studentId": str(other.students[0])}))
        assert (await read(ws))["code"] == "NOT_FOUND"
        await ws.send('{"type": "resume", "after": 0}')
        await house.say(other.students[0])
        await house.say(mine.students[0])
        frame = await read(ws)
        assert (frame["studentId"], frame["seq"]) == (str(mine.students[0]), 1)


@pytest.mark.parametrize(
    "frame",
    ["", "null", "[]", "{", '{"type": "nope"}', '{"type": "resume"}', '{"type": "resume", "after": -1}', b"\x00\x01",
     '{"type": "resume", "after": 9223372036854775808}', '{"type": "resume", "after": {"x": 1}}', "x" * 5000,
     '{"type": "resume", "after": 1.5}', "[" * 4000],
)  # fmt: skip
async def test_a_bad_frame_is_answered_and_many_end_the_socket(house: House, frame: str | bytes) -> None:
    person = await house.person()
    async with connect(house.url, additional_headers=person.headers) as ws:
        await ws.send(frame)
        answer = await read(ws)
        assert answer["type"] == "error"
        assert answer["code"] in ("FRAME_MALFORMED", "FRAME_TOO_LARGE")
        await ws.send('{"type": "resume", "after": 0}')  # still good
        await house.say(person.students[0])
        assert await read_seqs(ws, 1) == [1]
        for _ in range(5):
            await ws.send(frame)
        assert await close_code(ws) == 1008


async def test_too_many_frames_end_the_socket(house: House) -> None:
    person = await house.person()
    async with connect(house.url, additional_headers=person.headers) as ws:
        for _ in range(conversation.FRAMES_PER_MINUTE_MAX + 1):
            await ws.send('{"type": "resume", "after": 0}')
        assert await close_code(ws) == 1008


async def test_a_ticket_opens_one_socket_and_is_in_no_log(house: House, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "uvicorn.error")
    person = await house.person()
    async with AsyncClient() as http:
        answer = await http.post(f"{house.origin}/api/v1/realtime/tickets", headers=person.headers)
    assert answer.status_code == 201
    ticket = answer.json()["ticket"]
    async with connect(f"{house.url}?ticket={ticket}") as ws:
        await ws.send('{"type": "resume", "after": 0}')
        await house.say(person.students[0])
        assert await read_seqs(ws, 1) == [1]
    with pytest.raises(InvalidStatus) as refused:
        await connect(f"{house.url}?ticket={ticket}")
    assert refused.value.response.status_code == 401
    assert json.loads(refused.value.response.body)["code"] == "TICKET_REFUSED"
    assert "WebSocket" in caplog.text
    assert ticket not in caplog.text
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_a_late_ticket_is_refused(house: House) -> None:
    person = await house.person()
    async with AsyncClient() as http:
        answer = await http.post(f"{house.origin}/api/v1/realtime/tickets", headers=person.headers)
    async with house.db.transaction() as tx:
        await tx.execute(
            "update realtime_tickets set expires_at = expires_at - %(late)s", {"late": timedelta(seconds=31)}
        )
    with pytest.raises(InvalidStatus):
        await connect(f"{house.url}?ticket={answer.json()['ticket']}")


async def test_a_cookie_counts_only_from_our_own_pages(house: House) -> None:
    person = await house.person()
    cookie = {"Cookie": f"caravan_session={person.token}"}
    async with connect(house.url, additional_headers=cookie, origin=house.origin) as ws:  # pyright: ignore[reportArgumentType]
        assert (await read(ws))["type"] == "hello"
    for origin in ("https://evil.example", None, "null"):
        with pytest.raises(InvalidStatus) as refused:
            await connect(house.url, additional_headers=cookie, origin=origin)  # pyright: ignore[reportArgumentType]
        assert refused.value.response.status_code == 403


@pytest.mark.parametrize(("headers", "status"), [({}, 401), ({"Authorization": "Bearer nonsense"}, 401)])
async def test_strangers_are_refused_before_the_handshake(house: House, headers: dict[str, str], status: int) -> None:
    with pytest.raises(InvalidStatus) as refused:
        await connect(house.url, additional_headers=headers)
    assert refused.value.response.status_code == status


async def test_a_trainer_has_no_feed(house: House) -> None:
    trainer = await house.person(role=Role.TRAINER, students=0)
    with pytest.raises(InvalidStatus) as refused:
        await connect(house.url, additional_headers=trainer.headers)
    assert refused.value.response.status_code == 403


async def test_a_disabled_account_and_an_ended_sign_in_lose_their_sockets(house: House) -> None:
    disabled, signed_out, stays = await house.person(), await house.person(), await house.person()
    async with (
        connect(house.url, additional_headers=disabled.headers) as first,
        connect(house.url, additional_headers=signed_out.headers) as second,
        connect(house.url, additional_headers=stays.headers) as third,
    ):
        async with house.db.transaction() as tx:
            await disable_account(tx, disabled.account_id)
            await revoke_token(tx, signed_out.token)
        assert await close_code(first) == 4401
        assert await close_code(second) == 4401
        await third.ping()
    assert gateways.RECHECK_SECONDS + gateways.POLL_SECONDS < 10


async def test_a_student_who_comes_or_goes_is_heard_or_not(house: House) -> None:
    person = await house.person()
    other = await house.person()
    added = other.students[0]
    async with connect(house.url, additional_headers=person.headers) as ws:
        await read(ws)
        async with house.db.transaction() as tx:
            await tx.execute("update account_students set account_id = %(me)s where student_id = %(added)s",
                             {"me": person.account_id, "added": added})  # fmt: skip
            await tx.execute("delete from account_students where student_id = %(gone)s", {"gone": person.students[0]})
        await house.gateway._recheck()
        await house.say(person.students[0])
        await house.say(added)
        frame = await read(ws)
        assert (frame["studentId"], frame["seq"]) == (str(added), 1)


async def test_a_socket_that_leaves_while_it_is_rechecked_is_forgotten(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway, student = house.gateway, new_id()
    socket = gateway.join(Visitor(b"token", {}))

    async def recheck(_tx: Tx, _hashes: object) -> dict[bytes, Visitor]:
        gateway.leave(socket)
        return {b"token": Visitor(b"token", {student: 0})}  # a student was added meanwhile

    monkeypatch.setattr(gateways, "recheck", recheck)
    await gateway._recheck()
    assert str(student) not in gateway._by_student


async def test_a_client_that_does_not_read_costs_a_bounded_queue_and_is_dropped(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversation, "SEND_SECONDS", 0.5)
    slow, quick = await house.person(), await house.person()
    async with house.db.transaction() as tx:  # ten megabytes of feed
        await tx.execute(
            """with fed as (insert into student_feed (student_id, seq, event_id, type, data, created_at)
                 select %(student)s, n, new_id(), 'COURSE_ACCESS_GRANTED', jsonb_build_object('pad', repeat('x', 5000)),
                        now() from generate_series(1, 2000) n)
               insert into student_feed_heads (student_id, seq) values (%(student)s, 2000)""",
            {"student": slow.students[0]},
        )
    async with (
        connect(house.url, additional_headers=slow.headers, max_queue=1) as stuck,
        connect(house.url, additional_headers=quick.headers) as fine,
    ):
        await stuck.send('{"type": "resume", "after": 0}')
        await fine.send('{"type": "resume", "after": 0}')
        while house.gateway.sockets == 2:
            assert all(len(socket.queue) <= gateways.QUEUE_FRAMES_MAX for socket in house.gateway._sockets)
            await asyncio.sleep(0.01)  # to look in between; what ends the loop is the server's own deadline
        await house.say(quick.students[0])
        assert await read_seqs(fine, 1) == [1]
        seqs: list[int] = []
        with pytest.raises(ConnectionClosed):  # what it has is still a gap-free beginning
            while True:
                seqs.append((await read(stuck))["seq"])
        assert seqs == list(range(1, len(seqs) + 1))
        assert len(seqs) < 2000
    async with connect(house.url, additional_headers=slow.headers) as ws:
        await ws.send(json.dumps({"type": "resume", "after": len(seqs)}))
        assert await read_seqs(ws, 2000 - len(seqs)) == list(range(len(seqs) + 1, 2001))
