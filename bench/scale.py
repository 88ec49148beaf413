"""Does the past, or the number of trainers, make a fulfilment dearer? Rate, latency and pages at powers of ten."""

from __future__ import annotations

import asyncio
import tempfile
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any
from uuid import UUID

import psycopg

from bench.check import Wrong
from bench.floor import warm
from bench.fulfil import prepare
from bench.history import write_history
from bench.parts import Context, Result
from bench.plots import rates_by_size
from bench.report import spread, table
from bench.runs import LOOK_RARELY_SECONDS, WorkerProcess, fulfil
from bench.server import Server
from caravan.db import Database
from caravan.db.wake import Wake
from caravan.payments.model import Order, Rules
from caravan.payments.operations import capture, create_payment
from caravan.payments.providers import SandboxProvider

RULES = Rules(
    notice=timedelta(hours=12), start_horizon_days=90, checkout_lifetime=timedelta(minutes=30), coin_value_cents=100
)
SECRET = "whsec_" + "A" * 40  # of a provider that is never called
LATENCY_SECONDS_MAX = 30.0


@dataclass(slots=True)
class Point:
    """One size: what was measured there, in the order of the runs."""

    size: int
    template: str
    per_second: list[float] = field(default_factory=list[float])
    latency_ms: list[float] = field(default_factory=list[float])
    buffers: float = 0.0
    wal_bytes: float = 0.0

    def figures(self) -> dict[str, Any]:
        return {
            "per_second": spread(self.per_second),
            "latency_p50_ms": round(median(self.latency_ms), 2),
            "buffers": self.buffers,
            "wal_bytes": self.wal_bytes,
        }


async def run(context: Context) -> Result:
    # A hundred trainers have room for hundreds; the past says more over several pages.
    n, more, singles, rounds = 400, context.pick(400, 2_000), context.pick(10, 40), context.pick(1, 3)
    sessions = [10**k for k in context.pick((4, 5), (4, 5, 6, 7))]
    trainers = [10**k for k in context.pick((2, 3), (2, 3, 4, 5))]
    result = Result({"payments": {"sessions": more, "trainers": n}, "singles": singles})
    with Server() as server:
        past = [await _with_past(server, context, more, size) for size in sessions]
        await _measure(server, context, past, more, singles, rounds, "sessions")
        for point in past:
            server.drop(point.template)
        people = [await _with_trainers(server, context, n, size) for size in trainers]
        await _measure(server, context, people, n, singles, rounds, "trainers")
    for name, points in (("sessions", past), ("trainers", people)):
        result.figures[name] = {f"1e{len(str(point.size)) - 1}": point.figures() for point in points}
        least, most = points[0], points[-1]
        reached = f"{name}_1e{len(str(most.size)) - 1}"
        result.ratios[reached] = round(median(most.per_second) / median(least.per_second), 3)
        result.ratios[f"{reached}_buffers"] = round(most.buffers / least.buffers, 3)
        result.plots[f"scale-{name}"] = rates_by_size(
            f"fulfilments/s by {name}", [(point.size, median(point.per_second)) for point in points]
        )
        result.lines += table(
            [name, "fulfilments/s", "least", "most", "alone, p50 ms", "buffers", "WAL bytes"],
            [
                [f"{p.size:,}", median(p.per_second), min(p.per_second), max(p.per_second), median(p.latency_ms),
                 p.buffers, p.wal_bytes]
                for p in points
            ],
        )  # fmt: skip
    return result


async def _with_past(server: Server, context: Context, n: int, size: int) -> Point:
    name, began = f"past_{size}", time.monotonic()
    await prepare(server, name, n, context.pick(400, 2_000), context.seed)
    write_history(server.url_of(name), size)
    server.settle(name)
    context.say(f"{size:,} sessions written in {time.monotonic() - began:.0f} s")
    return Point(size, name)


async def _with_trainers(server: Server, context: Context, n: int, size: int) -> Point:
    name, began = f"trainers_{size}", time.monotonic()
    await prepare(server, name, n, size, context.seed)
    context.say(f"{size:,} trainers written in {time.monotonic() - began:.0f} s")
    return Point(size, name)


async def _measure(
    server: Server, context: Context, points: list[Point], n: int, singles: int, rounds: int, name: str
) -> None:
    """Each size in turn, and again; every run on a copy of its own."""
    for _ in range(rounds):
        for point in points:
            url = server.create("run", point.template)
            warm(url)
            done = await fulfil(url, n, whole=False)
            point.per_second.append(done.per_second)
            point.latency_ms += await alone(url, singles)
            context.say(
                f"{point.size:,} {name}: {done.per_second:,.0f} fulfilments/s, alone {median(point.latency_ms):.1f} ms"
            )
    for point in points:
        url = server.create("run", point.template)
        counted = (await fulfil(url, n, whole=False, look=LOOK_RARELY_SECONDS)).counted
        point.buffers, point.wal_bytes = round(counted.buffers / n, 1), round(counted.wal_bytes / n, 1)


# ------------------------------------------------------------------ one at a time

SOMEBODY = """
select s.id, c.id from (select id, row_number() over (order by id) as k from students
    where not exists (select from bookings b where b.student_id = students.id and b.live) order by id limit %s) s
join (select id, row_number() over (order by id) as k from courses) c on c.k = 1 + s.k %% (select count(*) from courses)
"""
ADD_STUDENTS = """
insert into students (id, name, timezone, latitude, longitude)
select new_id(), 'A late student', 'Asia/Kolkata', 12.97, 77.59 from generate_series(1, %s)
"""
SCHEDULED = """
select exists (select from student_feed where student_id = %s and type = 'SESSIONS_SCHEDULED')
"""


async def alone(url: str, count: int) -> list[float]:
    """Milliseconds from a payment's commit to the student's word that all is booked, with nothing else going on."""
    found: list[float] = []
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="caravan-bench-")))
        process = await WorkerProcess.start(url, "bench", folder)
        stack.callback(process.kill)
        wake = Wake(url)
        db = await stack.enter_async_context(Database(url, on_hints=wake.send))
        await wake.start(listen=False)
        stack.push_async_callback(wake.stop)
        connection = await stack.enter_async_context(await psycopg.AsyncConnection.connect(url, autocommit=True))
        await connection.execute(ADD_STUDENTS, [count])
        buyers = await (await connection.execute(SOMEBODY, [count])).fetchall()
        process.order("go")
        for student_id, course_id in buyers:
            began = await _buy(db, student_id, course_id)
            while not await _exists(connection, student_id):
                process.check()
                if time.monotonic() > began + LATENCY_SECONDS_MAX:
                    raise Wrong("a single payment was not delivered in time")
                await asyncio.sleep(0.0005)
            found.append((time.monotonic() - began) * 1000)
        await process.stop()
    return found


async def _buy(db: Database, student_id: UUID, course_id: UUID) -> float:
    """A captured payment; when its transaction was committed."""
    async with db.transaction("payment-service") as tx:
        order = Order(
            student_id=student_id, course_id=course_id, session_count=20, learning_mode="online", group_size=1,
            time_slot="10:00 AM", start_date=tx.now.date() + timedelta(days=4), raw={},
        )  # fmt: skip
        sandbox = SandboxProvider([SECRET])
        payment = (await create_payment(tx, order, RULES, {"sandbox": sandbox}, account_id=None)).payment
        await capture(tx, payment.id, payment.amount_cents, payment.currency)
    return time.monotonic()


async def _exists(connection: psycopg.AsyncConnection[Any], student_id: UUID) -> bool:
    row = await (await connection.execute(SCHEDULED, [student_id])).fetchone()
    return bool(row and row[0])
