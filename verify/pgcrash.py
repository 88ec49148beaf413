"""PostgreSQL itself crashes under a load of payments, again and again: what was told ok survives, and all goes on soon.

Three ways: an immediate restart (`pg_ctl restart -m immediate`), the postmaster killed, one backend killed (which makes
the postmaster end all others and recover). The clocks start when PostgreSQL accepts connections again.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from statistics import median

import psycopg

from caravan.apps.services import BACKGROUND
from caravan.db import Database
from verify.fleet import TOGETHER, WEB, Fleet, make_slots
from verify.history import Order, plan_orders
from verify.kills import ROOMY, settle
from verify.load import Line, Load, NoAnswer, NotSent
from verify.parts import Context
from verify.report import PartResult
from verify.scratch import ScratchServer
from verify.waiting import until_quiet
from verify.world import SETTINGS, sandbox

HTTP_BACK_SECONDS_MAX = 2.0
PIPELINE_BACK_SECONDS_MAX = 5.0
GIVE_UP_SECONDS = 30.0  # of a measurement that is far beyond its limit
QUIET_SECONDS_MAX = 60.0
POLL_SECONDS = 0.02
WAYS = ("immediate restart", "postmaster killed", "backend killed")
CREW = (WEB, WEB, TOGETHER, *BACKGROUND)


async def run(context: Context) -> PartResult:
    result = context.result()
    crashes, payments = context.pick((3, 120), (50, 2500))
    result.must_fire = WAYS
    result.good_min = int(0.9 * payments)
    dice = context.dice("crashes")
    with ScratchServer(durable=True, settings=ROOMY) as server:
        database = server.create()
        async with database.database() as db:
            orders = await plan_orders(db, payments + crashes, dice, unpaid=0)
            probes, ordered = orders[:crashes], orders[crashes:]
            assert SETTINGS.sandbox_webhook_secret
            async with Fleet(database.url, SETTINGS.sandbox_webhook_secret, make_slots(CREW, dice)) as fleet:
                await _until_answering(fleet)
                load = Load(ordered, lambda: fleet.ports, sandbox(), context.dice("clients"), clients=6)
                crasher = Crasher(server, db, fleet, load, dice, result)
                load.may = lambda: load.progress <= (crasher.crashes + 1) / (crashes + 1)
                async with asyncio.TaskGroup() as group:
                    group.create_task(load.run())
                    await crasher.run(probes)
                quiet_seconds, left = await until_quiet(db, QUIET_SECONDS_MAX)
                for said in (*fleet.troubles(), *([left] if left else [])):
                    result.violated(said)
            await settle(db, result, orders, load)
    result.cases = crasher.crashes
    result.extra |= {
        "http_back_seconds": _figures(crasher.http_back),
        "pipeline_back_seconds": _figures(crasher.pipeline_back),
        "down_seconds": _figures(crasher.down),
        "quiet_seconds": round(quiet_seconds, 1),
        "payments": len(orders),
        "answers": dict(sorted(load.answers.items())),
    }
    return result


def _figures(seconds: list[float]) -> dict[str, float]:
    return {"p50": round(median(seconds), 2), "max": round(max(seconds), 2)} if seconds else {}


async def _until_answering(fleet: Fleet) -> None:
    """Until the first processes of a cold fleet are up: what is measured is how fast they come back."""
    deadline = time.monotonic() + GIVE_UP_SECONDS
    line = Line()
    try:
        while time.monotonic() < deadline:
            try:
                if all([(await line.ask(port, "GET", "/readyz", {}))[0] == 200 for port in fleet.ports]):
                    return
            except (NotSent, NoAnswer):
                pass  # not yet
            await asyncio.sleep(POLL_SECONDS)
    finally:
        line.close()


# ------------------------------------------------------------------ crash, and measure what follows

PICK_BACKEND = """
select pid from pg_stat_activity
where datname = current_database() and backend_type = 'client backend' and pid <> pg_backend_pid()
order by backend_start desc
"""

IS_DELIVERED = """
select exists (select from fulfilments where payment_id = %(payment_id)s and stage = 'scheduled' and owed = 0)
"""


@dataclass(slots=True)
class Crasher:
    """Crashes once per probe, which is an order made and paid as soon as that is possible again."""

    server: ScratchServer
    db: Database
    fleet: Fleet
    load: Load
    dice: random.Random
    result: PartResult
    crashes: int = 0
    http_back: list[float] = field(default_factory=list[float])
    pipeline_back: list[float] = field(default_factory=list[float])
    down: list[float] = field(default_factory=list[float])
    _thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="postgres"))

    async def run(self, probes: list[Order]) -> None:
        loop = asyncio.get_running_loop()
        line = Line()
        ways: list[str] = []
        try:
            for probe in probes:
                ways = ways or self.dice.sample(WAYS, len(WAYS))  # each as often
                await asyncio.sleep(self.dice.uniform(0.3, 2.0))
                way = ways.pop()
                began = time.monotonic()
                accepting = await loop.run_in_executor(self._thread, self._crash, way)
                self.down.append(accepting - began)
                self.result.fired[way] += 1
                await self._measure(line, probe, accepting, way)
                self.crashes += 1
        finally:
            line.close()
            self._thread.shutdown()

    def _crash(self, way: str) -> float:
        """The moment from which PostgreSQL accepts connections again."""
        postgres = self.server.postgres
        if way == "backend killed":
            with psycopg.connect(self.db.url, autocommit=True) as connection:
                pids = [pid for (pid,) in connection.execute(PICK_BACKEND)]
                os.kill(self.dice.choice(pids), signal.SIGKILL)
                try:
                    while True:  # until this session is ended too
                        connection.execute("select pg_sleep(0.01)")
                except psycopg.OperationalError:
                    pass
        else:
            postmaster = int((postgres.home / "data" / "postmaster.pid").read_text().splitlines()[0])
            os.kill(postmaster, signal.SIGQUIT if way == "immediate restart" else signal.SIGKILL)
            postgres.stop()  # it is dead or dying: waits for it, and lets go of the folder
            postgres.start()
        deadline = time.monotonic() + GIVE_UP_SECONDS
        while True:
            try:
                psycopg.connect(self.db.url, connect_timeout=5).close()
                return time.monotonic()
            except psycopg.OperationalError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.005)

    async def _measure(self, line: Line, probe: Order, accepting: float, way: str) -> None:
        await self.load.serve(line, probe, lambda: self._told(probe, accepting, way))
        if probe.payment is None:
            self.result.violated(f"no payment could be made after: {way}")
            return
        while time.monotonic() - accepting < GIVE_UP_SECONDS:
            if await self.db.transact(lambda tx: tx.value(IS_DELIVERED, {"payment_id": probe.payment}), "verify"):
                break
            await asyncio.sleep(POLL_SECONDS)
        seconds = time.monotonic() - accepting
        self.pipeline_back.append(seconds)
        if self.result.too_long(seconds, PIPELINE_BACK_SECONDS_MAX):
            self.result.violated(f"the pipeline was back after {seconds:.1f} s: {way}")

    def _told(self, probe: Order, accepting: float, way: str) -> None:
        seconds = time.monotonic() - accepting
        self.http_back.append(seconds)
        if self.result.too_long(seconds, HTTP_BACK_SECONDS_MAX):
            self.result.violated(f"HTTP was back after {seconds:.1f} s: {way}")
