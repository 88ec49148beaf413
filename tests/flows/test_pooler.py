"""A purchase by way of a pooler in transaction mode: each transaction on another connection than the one before."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from caravan.apps.bootstrap import open_platform
from caravan.apps.services import BACKGROUND
from caravan.apps.worker import run_workers
from caravan.db import Database
from caravan.settings import Settings
from tests.apps.running import caravan
from tests.pgbouncer import SERVER_CONNECTIONS, PgBouncer, missing
from tests.shop import open_shop

DELIVERED_SECONDS_MAX = 60.0


@pytest.fixture
def pooler(database_url: str) -> Iterator[PgBouncer]:
    if lack := missing():
        pytest.skip(lack)
    folder = Path(tempfile.mkdtemp(prefix="caravan-pgbouncer-"))
    with PgBouncer(database_url, folder) as pooler:
        yield pooler
    shutil.rmtree(folder)


async def test_courses_are_delivered_through_a_pooler(database_url: str, pooler: PgBouncer, tmp_path: Path) -> None:
    settings = Settings(postgres_url=pooler.url, postgres_direct_url=database_url, data_dir=tmp_path)
    async with open_platform(settings) as platform:
        shop = await open_shop(platform.db)
        heard = asyncio.Event()
        platform.wake.subscribe(lambda _keys: heard.set())
        stop = asyncio.Event()
        working = asyncio.create_task(run_workers(platform, BACKGROUND, stop))
        payments = [await shop.bought(slot=f"{hour:02d}:00", again=True) for hour in range(6, 6 + 4)]
        async with asyncio.timeout(DELIVERED_SECONDS_MAX):
            while await shop.rows("select * from undelivered"):  # noqa: ASYNC110 - of other tasks
                await asyncio.sleep(0.05)
            await heard.wait()
        stop.set()
        await working
        for payment in payments:
            assert (await shop.sees(payment))["stage"] == "scheduled"
        assert await shop.violations() == []


async def test_statements_prepared_for_one_connection_would_be_missing_on_the_next(pooler: PgBouncer) -> None:
    """What the setting is for; a pooler that hands prepared statements on (pgbouncer 1.21) would pass this."""
    async with Database(pooler.url, max_connections=8, pooled=True) as db:
        for _ in range(20):
            await asyncio.gather(*(db.all("select 1 as one") for _ in range(2 * SERVER_CONNECTIONS)))


def test_migrating_goes_around_the_pooler(database_url: str, pooler: PgBouncer) -> None:
    given = {"POSTGRES_URL": pooler.url, "CARAVAN_POSTGRES_DIRECT_URL": database_url}
    done = caravan("migrate", **given)
    assert (done.returncode, done.stderr) == (0, "")
    with psycopg.connect(pooler.url) as connection:
        assert connection.execute("select count(*) from pg_locks where locktype = 'advisory'").fetchone() == (0,)


async def test_the_servers_own_zone_is_not_ours_through_a_pooler_either(database_url: str, pooler: PgBouncer) -> None:
    with psycopg.connect(database_url, autocommit=True) as connection:
        name = sql.Identifier(connection.info.dbname)
        connection.execute(sql.SQL("alter database {} set timezone = 'America/New_York'").format(name))
    async with Database(pooler.url, pooled=True) as db, db.transaction() as tx:
        assert tx.now.utcoffset() == timedelta(0)
        assert await tx.value("show timezone") == "UTC"
