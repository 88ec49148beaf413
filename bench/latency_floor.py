"""The least that the same road takes: a chain of two processes, written by hand for this and nothing else.

`python -m bench.latency_floor gate URL PLAN_URL HTTP_PORT WS_PORT` pays and pushes, `... worker URL PLAN_URL` does the
three steps, each one statement that knows everything beforehand: no log, no claims, no matching (it is done in a copy
of the database, PLAN_URL). As many durable commits as ours, with the rows of purchase, booking, allocation, sessions
and feed; a NOTIFY after each, without a flush of its own; frames read from the feed. Says `ready`, ends when killed.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any
from uuid import UUID

import psycopg
import uvloop
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from bench.peers.work import FEED, Sale, Statement, allocate, book, create_purchase, fetch_with, read_sale, schedule
from caravan.eventlog.codec import encode_data
from caravan.events import PurchaseConfirmed
from caravan.ids import new_id

# `after`: a relation with the one row where the payment was not captured before.
CAPTURE = Statement(
    f"""
with captured as (
  update payments set status = 'succeeded', captured_cents = amount_cents, captured_currency = currency,
    captured_at = now(), updated_at = now()
  where id = :payment::uuid and status = 'created' returning checkout_id, amount_cents, currency
), paid as (
  update checkouts set paid_by = :payment::uuid where id = (select checkout_id from captured) returning course_id
), registered as (
  insert into undelivered (payment_id, student_id, course_id, amount_cents, currency, since)
  select :payment::uuid, :student::uuid, paid.course_id, captured.amount_cents, captured.currency, now()
  from captured, paid
), {FEED.format(after="captured")}
select count(*)::int from captured
"""  # noqa: S608 - constants
)
READ_FEED = """
select seq, jsonb_build_object('type', 'business-event', 'studentId', student_id, 'seq', seq,
  'event', data || jsonb_build_object('type', type, 'id', event_id, 'time', created_at))::text
from student_feed where student_id = $1::uuid and seq > $2::bigint order by seq
"""
PAID, DONE = "floor_paid", "floor_done"


async def _connect(url: str, *, durable: bool = True) -> psycopg.AsyncConnection[Any]:
    options = "-c jit=off" + ("" if durable else " -c synchronous_commit=off")
    return await psycopg.AsyncConnection.connect(url, autocommit=True, options=options)


async def plan(url: str, *, match: bool) -> dict[str, Sale]:
    """Every payment's sale, by its id; who gets which trainer is tried out in a transaction that is undone."""
    sales: dict[str, Sale] = {}
    async with await psycopg.AsyncConnection.connect(url) as connection:
        await connection.execute("update payments set status = 'succeeded', captured_at = now()")
        await connection.execute("update checkouts c set paid_by = p.id from payments p where p.checkout_id = c.id")
        rows = await (await connection.execute("select id from payments order by id")).fetchall()
        fetch = fetch_with(connection)
        for (payment,) in rows:
            sale = await read_sale(fetch, payment)
            assert sale
            sales[str(payment)] = sale
            if match:
                await create_purchase(fetch, sale)
                await allocate(fetch, sale)
        await connection.rollback()
    return sales


async def tell(connection: psycopg.AsyncConnection[Any], channel: str, queue: asyncio.Queue[str]) -> None:
    """One NOTIFY for whatever has gathered."""
    while True:
        keys = {await queue.get()}
        while not queue.empty():
            keys.add(queue.get_nowait())
        await connection.execute("select pg_notify(%s, %s)", [channel, " ".join(keys)])


# ------------------------------------------------------------------ the gate


class Gate:
    """Takes payments over HTTP, and hands the rows of students' feeds to whoever listens."""

    def __init__(self, writing: list[psycopg.AsyncConnection[Any]], reading: psycopg.AsyncConnection[Any]) -> None:
        self._writing: asyncio.Queue[psycopg.AsyncConnection[Any]] = asyncio.Queue()
        for connection in writing:
            self._writing.put_nowait(connection)
        self._read = fetch_with(reading)
        self.sales: dict[str, Sale] = {}
        self.telling: asyncio.Queue[str] = asyncio.Queue()
        self._sockets: dict[str, tuple[ServerConnection, int]] = {}
        self._news: asyncio.Queue[str] = asyncio.Queue()

    async def pay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while line := await reader.readuntil(b"\r\n\r\n"):
                payment = line.split(b"/")[4].decode()
                connection = await self._writing.get()
                await self._capture(connection, self.sales[payment])
                self._writing.put_nowait(connection)
                self.telling.put_nowait(payment)
                self._news.put_nowait(str(self.sales[payment].student_id))
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
        except asyncio.IncompleteReadError:
            pass

    async def _capture(self, connection: psycopg.AsyncConnection[Any], sale: Sale) -> None:
        event = PurchaseConfirmed(
            payment_id=sale.payment_id,
            student_id=sale.student_id,
            course_id=sale.course_id,
            checkout_id=sale.checkout_id,
        )
        said = {"event_ids": [new_id()], "types": [event.type], "data": [encode_data(event)]}
        await CAPTURE.rows(fetch_with(connection), {"payment": sale.payment_id, "student": sale.student_id, **said})

    async def talk(self, socket: ServerConnection) -> None:
        try:
            async for text in socket:
                for student, after in json.loads(text)["after"].items():
                    self._sockets[student] = socket, after
        except ConnectionClosed:
            pass  # the run is over

    async def hear(self, connection: psycopg.AsyncConnection[Any]) -> None:
        await connection.execute(f"listen {DONE}".encode())
        async for note in connection.notifies():
            for student in note.payload.split():
                self._news.put_nowait(student)

    async def push(self) -> None:
        while True:
            student = await self._news.get()
            if student in self._sockets:
                socket, after = self._sockets[student]
                for seq, frame in await self._read(READ_FEED, UUID(student), after):
                    self._sockets[student] = socket, seq
                    await socket.send(frame)


async def gate(url: str, plan_url: str, http_port: str, ws_port: str) -> None:
    each = Gate([await _connect(url) for _ in range(8)], await _connect(url))
    each.sales = await plan(plan_url, match=False)
    async with asyncio.TaskGroup() as parts:
        parts.create_task(tell(await _connect(url, durable=False), PAID, each.telling))
        parts.create_task(each.hear(await _connect(url)))
        parts.create_task(each.push())
        await asyncio.start_server(each.pay, "127.0.0.1", int(http_port))
        async with serve(each.talk, "127.0.0.1", int(ws_port), compression=None):
            print("ready", flush=True)
            await asyncio.Event().wait()


# ------------------------------------------------------------------ the worker


async def worker(url: str, plan_url: str) -> None:
    """Three commits for each payment, one after the other, several payments side by side."""
    sales = await plan(plan_url, match=True)
    telling: asyncio.Queue[str] = asyncio.Queue()
    paid: asyncio.Queue[str] = asyncio.Queue()

    async def work() -> None:
        fetch = fetch_with(await _connect(url))
        while True:
            sale = sales[await paid.get()]
            for step in (create_purchase, book, schedule):
                await step(fetch, sale)
                telling.put_nowait(str(sale.student_id))

    async with asyncio.TaskGroup() as parts:
        for _ in range(4):
            parts.create_task(work())
        parts.create_task(tell(await _connect(url, durable=False), DONE, telling))
        listening = await _connect(url)
        await listening.execute(f"listen {PAID}".encode())
        print("ready", flush=True)
        async for note in listening.notifies():
            for payment in note.payload.split():
                paid.put_nowait(payment)


if __name__ == "__main__":
    uvloop.run({"gate": gate, "worker": worker}[sys.argv[1]](*sys.argv[2:]))
