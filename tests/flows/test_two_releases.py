"""A roll-out under load: the release before the newest migration, and this one, side by side on this one's schema.

The earlier release is taken from the history of the clone: the commit before the one that added the newest migration.
"""

from __future__ import annotations

import asyncio
import io
import random
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import IO

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from caravan.db import Database
from caravan.db.migrate import migrate, migrations
from caravan.fulfilment.invariants import check
from harness.processes import end_with_parent, free_port
from tests.apps.running import environment
from verify.history import judge, plan_orders
from verify.load import Line, Load, NotSent
from verify.waiting import until_quiet
from verify.world import SETTINGS, sandbox

ROOT = Path(__file__).parents[2]
ORDERS = 160
CLIENTS = 6
START_SECONDS_MAX = 90.0
PHASE_SECONDS_MAX = 60.0
QUIET_SECONDS_MAX = 90.0
STOP_SECONDS_MAX = 20.0

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


def git(*arguments: str) -> bytes | None:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, check=False)
    return done.stdout if done.returncode == 0 else None


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source of the release before the newest migration."""
    newest = f"src/caravan/db/migrations/{migrations()[-1].name}"
    added = git("log", "--diff-filter=A", "--format=%H", "--", newest) or b""
    commit = added.decode().split()[-1:]
    packed = git("archive", f"{commit[0]}^", "src") if commit else None
    if packed is None:
        pytest.skip(f"needs the history of {newest} (a clone that is not shallow)")
    folder = tmp_path_factory.mktemp("earlier")
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        archive.extractall(folder, filter="data")
    return folder / "src"


@pytest.fixture
def empty_url(postgres_url: str) -> Iterator[str]:
    name = sql.Identifier("two_releases")
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(sql.SQL("create database {}").format(name))
    yield make_conninfo(postgres_url, dbname="two_releases")
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(sql.SQL("drop database {} with (force)").format(name))


class Release:
    """The web and the workers of one release, in two processes. `log`: what they said."""

    def __init__(self, name: str, url: str, folder: Path, source: Path | None) -> None:
        self.name, self.port = name, free_port()
        self.log = folder / f"{name}.log"
        assert SETTINGS.sandbox_webhook_secret
        self._environment = environment(
            POSTGRES_URL=url,
            CARAVAN_WORKER_NAME=name,
            CARAVAN_SANDBOX_WEBHOOK_SECRET=SETTINGS.sandbox_webhook_secret,
            CARAVAN_LOG_JSON="true",
            **({"PYTHONPATH": str(source)} if source else {}),
        )
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
                    if status == 200 and await self.count_workers(db) == 5:
                        break
                except NotSent:
                    pass
                await asyncio.sleep(0.1)
        line.close()

    async def count_workers(self, db: Database) -> int:
        named = "select count(*) as n from workers where name like %(name)s"
        return (await db.all(named, {"name": f"%@{self.name}"}))[0]["n"]

    def look(self) -> None:
        """Fails where one has ended."""
        assert all(process.poll() is None for process in self._processes), self.log.read_text()[-3000:]

    def stop(self) -> None:
        """As a roll-out does; what was at work is finished or taken over."""
        self.look()
        for process in self._processes:
            process.send_signal(signal.SIGTERM)
        assert [process.wait(STOP_SECONDS_MAX) for process in self._processes] == [0, 0], self.log.read_text()[-3000:]

    def kill(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.kill()
                process.wait()


async def test_the_release_before_works_beside_this_one_on_its_schema(
    earlier: Path, empty_url: str, tmp_path: Path
) -> None:
    before, now = Release("before", empty_url, tmp_path, earlier), Release("now", empty_url, tmp_path, None)
    before.migrate()
    try:
        async with Database(empty_url) as db:
            await _roll_out(db, empty_url, before, now)
    finally:
        before.kill()
        now.kill()
    for release in (before, now):
        told = release.log.read_text()
        assert "Traceback" not in told, told
        assert '"level": "error"' not in told, told


async def _roll_out(db: Database, url: str, before: Release, now: Release) -> None:
    dice = random.Random(1)
    before.start()
    orders = await plan_orders(db, ORDERS, dice)
    await before.until_up(db)
    ports, allowed = [before.port], 0.2
    load = Load(orders, lambda: ports, sandbox(), dice, clients=CLIENTS)
    load.may = lambda: load.progress < allowed
    running = asyncio.create_task(load.run())

    async def reach(share: float) -> None:
        async with asyncio.timeout(PHASE_SECONDS_MAX):
            while load.done < share * ORDERS - CLIENTS:
                before.look()
                assert not load.errors, load.errors
                await asyncio.sleep(0.05)

    try:
        await reach(allowed)
        allowed = 0.45  # the earlier release alone, while the schema changes under it
        assert migrations()[-1].name in await migrate(url)
        now.start()
        await reach(allowed)
        await now.until_up(db)
        ports, allowed = [before.port, now.port], 0.8  # both
        await reach(allowed)
        assert await before.count_workers(db) == 5
        before.stop()
        ports, allowed = [now.port], 2.0
        async with asyncio.timeout(PHASE_SECONDS_MAX):
            await running
    finally:
        running.cancel()

    _seconds, left = await until_quiet(db, QUIET_SECONDS_MAX)
    assert left is None
    async with db.transaction("verify", read_only=True) as tx:
        judgement = await judge(tx, orders)
        broken = await check(tx, leeway=timedelta(0))
    assert [*load.errors, *judgement.wrong, *map(str, broken)] == []
    assert judgement.delivered > 0.9 * ORDERS
