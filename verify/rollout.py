"""A roll-out under load: the release before the newest migration, and this one, side by side on this one's schema.

The earlier release is taken from the history of the clone: the commit before the one that added the newest migration.
It runs alone, the schema changes under it, both run for a while (in full: a minute), it is stopped, this one goes on.
"""

from __future__ import annotations

import asyncio
import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from caravan.db import Database
from caravan.db.migrate import migrate, migrations
from harness.processes import end_with_parent, free_port
from verify.history import plan_orders
from verify.kills import ROOMY, settle
from verify.load import Line, Load, NotSent
from verify.parts import Context
from verify.report import PartResult
from verify.scratch import PREFIX, ScratchServer
from verify.waiting import until_quiet
from verify.world import SETTINGS, sandbox

GIT = shutil.which("git") or "git"
ROOT = Path(__file__).parents[1]
CLIENTS = 6
ALONE, JOINED, BOTH = 0.2, 0.45, 0.8  # of the orders: when the schema changes, when both answer, when the earlier ends
START_SECONDS_MAX = 90.0
PHASE_SECONDS_MAX = 60.0  # beyond what the load itself is given
QUIET_SECONDS_MAX = 90.0
STOP_SECONDS_MAX = 20.0
POLL_SECONDS = 0.05
LOG_TAIL_CHARACTERS = 1500
PROCESSES = 5  # of a release, as the database knows them: four workers and the reconciler

WORKERS = """
import asyncio, signal
from caravan import telemetry
from caravan.apps.bootstrap import open_platform
from caravan.apps.services import BACKGROUND
from caravan.apps.worker import run_workers
from caravan.settings import load_settings

async def main():
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with open_platform(load_settings()) as platform:
        await run_workers(platform, BACKGROUND, stop)

telemetry.configure_logging(json=True)
asyncio.run(main())
"""


class Ended(Exception):
    """A process of a release is not what it should be; the message has the end of its log."""


async def run(context: Context) -> PartResult:
    result = context.result()
    orders, seconds = context.pick((160, 0.0), (3_000, 60.0))
    result.must_fire = ("schema changed", "ran side by side", "the earlier stopped")
    result.good_min = int(0.9 * orders)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    try:
        source = take_earlier(folder)
        if source is None:
            lack = "the history of the newest migration (a clone that is not shallow)"
            if os.environ.get("CI") == "true":
                result.failed.append(f"CI must have it: {lack}")
            else:
                result.skipped = f"needs {lack}"
            return result
        with ScratchServer(durable=True, settings=ROOMY) as server:
            database = server.databases.create_empty()
            before, now = Release("before", database.url, folder, source), Release("now", database.url, folder, None)
            before.migrate()
            try:
                async with database.database() as db:
                    await RollOut(context, result, db, database.url, before, now).run(orders, seconds)
            except Ended as ended:
                result.violated(str(ended))
            finally:
                before.kill()
                now.kill()
            for release in (before, now):
                release.judge(result)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return result


def git(*arguments: str) -> bytes | None:
    done = subprocess.run([GIT, "-C", str(ROOT), *arguments], capture_output=True, check=False)
    return done.stdout if done.returncode == 0 else None


def take_earlier(folder: Path) -> Path | None:
    """The source of the release before the newest migration; None where the clone has no such history."""
    newest = f"src/caravan/db/migrations/{migrations()[-1].name}"
    added = git("log", "--diff-filter=A", "--format=%H", "--", newest) or b""
    commit = added.decode().split()[-1:]
    packed = git("archive", f"{commit[0]}^", "src") if commit else None
    if packed is None:
        return None
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        archive.extractall(folder / "earlier", filter="data")
    return folder / "earlier" / "src"


class Release:
    """The web and the workers of one release, in two processes. `log`: what they said."""

    def __init__(self, name: str, url: str, folder: Path, source: Path | None) -> None:
        self.name, self.port = name, free_port()
        self.log = folder / f"{name}.log"
        assert SETTINGS.sandbox_webhook_secret
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("CARAVAN_", "POSTGRES_", "KAFKA_", "REDIS_"))}
        self._environment = kept | {
            "POSTGRES_URL": url,
            "CARAVAN_WORKER_NAME": name,
            "CARAVAN_DATA_DIR": str(folder / f"{name}-data"),
            "CARAVAN_SANDBOX_WEBHOOK_SECRET": SETTINGS.sandbox_webhook_secret,
            "CARAVAN_LOG_JSON": "true",
            **({"PYTHONPATH": str(source)} if source else {}),
        }
        self._processes: list[subprocess.Popen[bytes]] = []

    def migrate(self) -> None:
        subprocess.run(
            [sys.executable, "-m", "caravan", "migrate"], env=self._environment, check=True, capture_output=True
        )

    def start(self) -> None:
        with self.log.open("ab") as log:
            self._processes = [
                self._begin(log, "-m", "caravan", "serve", "payment-service", "--port", str(self.port)),
                self._begin(log, "-c", WORKERS),
            ]

    def _begin(self, log: IO[bytes], *command: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, *command], stdout=log, stderr=log, env=self._environment, preexec_fn=end_with_parent
        )

    async def until_up(self, db: Database) -> None:
        """Until it answers and its four workers and its reconciler have taken their work."""
        line = Line()
        async with asyncio.timeout(START_SECONDS_MAX):
            while True:
                self.look()
                try:
                    status, _ = await line.ask(self.port, "GET", "/healthz", {})
                    if status == 200 and await self.count_workers(db) == PROCESSES:
                        break
                except NotSent:
                    pass
                await asyncio.sleep(POLL_SECONDS)
        line.close()

    async def count_workers(self, db: Database) -> int:
        named = "select count(*) as n from workers where name like %(name)s and expires_at > clock_timestamp()"
        return (await db.all(named, {"name": f"%@{self.name}"}))[0]["n"]

    def look(self) -> None:
        """Raises Ended where a process of it has ended."""
        if any(process.poll() is not None for process in self._processes):
            raise Ended(f"a process of release {self.name!r} ended by itself: {self._tail()}")

    def stop(self) -> None:
        """As a roll-out does; what was at work is finished or taken over."""
        self.look()
        for process in self._processes:
            process.send_signal(signal.SIGTERM)
        if any(process.wait(STOP_SECONDS_MAX) for process in self._processes):
            raise Ended(f"release {self.name!r} did not stop well: {self._tail()}")

    def kill(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.kill()
                process.wait()

    def judge(self, result: PartResult) -> None:
        """No error in its log, whichever schema it met."""
        told = self.log.read_text()
        bad = [line for line in told.splitlines() if "Traceback" in line or '"level": "error"' in line]
        for line in bad:
            result.violated(f"release {self.name!r} logged: {line[:LOG_TAIL_CHARACTERS]}")

    def _tail(self) -> str:
        return self.log.read_text()[-LOG_TAIL_CHARACTERS:]


@dataclass(slots=True)
class RollOut:
    """The walk from one release to the next, while families order and pay."""

    context: Context
    result: PartResult
    db: Database
    url: str
    before: Release
    now: Release
    _allowed: float = ALONE
    _ports: list[int] = field(default_factory=list[int])

    async def run(self, number: int, seconds: float) -> None:
        """`seconds`: how long both releases are to answer at least; the orders of that time are spread over it."""
        self.before.start()
        orders = await plan_orders(self.db, number, self.context.dice("orders"))
        await self.before.until_up(self.db)
        self._ports = [self.before.port]
        load = Load(orders, lambda: self._ports, sandbox(), self.context.dice("clients"), clients=CLIENTS)
        load.may = lambda: load.progress < self._allowed
        running = asyncio.create_task(load.run())
        try:
            side_by_side = await self._walk(load, seconds)
            async with asyncio.timeout(PHASE_SECONDS_MAX + seconds):
                await running
        finally:
            running.cancel()
        quiet_seconds, left = await until_quiet(self.db, QUIET_SECONDS_MAX)
        if left:
            self.result.violated(left)
        await settle(self.db, self.result, orders, load)
        self.result.cases = number
        self.result.extra |= {
            "side_by_side_seconds": round(side_by_side, 1),
            "slowest_answer_seconds": round(load.slowest_seconds, 2),
            "quiet_seconds": round(quiet_seconds, 1),
            "answers": dict(sorted(load.answers.items())),
        }

    async def _walk(self, load: Load, seconds: float) -> float:
        """Through the phases; how long both releases answered, in seconds."""
        await self._reach(load, ALONE)
        self._allowed = JOINED  # the earlier release alone, while the schema changes under it
        if migrations()[-1].name in await migrate(self.url):
            self.result.fired["schema changed"] += 1
        self.now.start()
        await self._reach(load, JOINED)
        await self.now.until_up(self.db)
        self._ports = [self.before.port, self.now.port]
        began = time.monotonic()
        while (passed := time.monotonic() - began) < seconds:
            self._allowed = JOINED + (BOTH - JOINED) * passed / seconds
            self._look(load)
            await asyncio.sleep(POLL_SECONDS)
        self._allowed = BOTH
        await self._reach(load, BOTH)
        if await self.before.count_workers(self.db) == await self.now.count_workers(self.db) == PROCESSES:
            self.result.fired["ran side by side"] += 1
        side_by_side = time.monotonic() - began
        self.before.stop()
        self.result.fired["the earlier stopped"] += 1
        self._ports, self._allowed = [self.now.port], 2.0
        return side_by_side

    async def _reach(self, load: Load, share: float) -> None:
        """Until so much of the load is done; the last few of a phase may still be asking."""
        async with asyncio.timeout(PHASE_SECONDS_MAX):
            while load.done < share * len(load.orders) - CLIENTS:
                self._look(load)
                await asyncio.sleep(POLL_SECONDS)

    def _look(self, load: Load) -> None:
        self.before.look()
        self.now.look()
        if load.errors:
            raise Ended(f"an answer that must never be: {load.errors[0]}")
