"""A command's way to the database: one asyncio run, one pool, hints sent before it ends, trouble in one line."""

from __future__ import annotations

import asyncio
import getpass
import sys
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import TypeVar

import psycopg
import psycopg_pool

from caravan import telemetry
from caravan.cli.options import database_settings, fail, fail_for_lack_of_database
from caravan.db import Database
from caravan.db.migrate import check_schema
from caravan.db.wake import CHANNEL, EVERYTHING, PAYLOAD_BYTES_MAX
from caravan.errors import DomainError
from caravan.settings import Settings
from caravan.web import audit
from caravan.web.auth import Actor

T = TypeVar("T")


def run(data: Path | None, work: Callable[[Database, Settings], Awaitable[T]]) -> T:
    """Run `work` on the installation's database. What it refuses is one line and exit code 1."""
    settings = database_settings(data)

    telemetry.configure_logging(json=settings.log_json, stream=sys.stderr, level="WARNING")
    audit.use_build(settings.build)
    try:
        return asyncio.run(_run(settings, work))
    except DomainError as error:
        fail(str(error), error.problem_code)
    except (psycopg.OperationalError, psycopg_pool.PoolTimeout) as error:
        fail_for_lack_of_database(data, error)


async def _run(settings: Settings, work: Callable[[Database, Settings], Awaitable[T]]) -> T:
    assert settings.postgres_url is not None
    await check_schema(settings.postgres_url)
    telling: set[asyncio.Task[None]] = set()

    def tell(keys: Iterable[str]) -> None:
        telling.add(asyncio.get_running_loop().create_task(_tell(db, frozenset(keys))))

    pooled = settings.postgres_direct_url is not None
    async with Database(settings.postgres_url, max_connections=3, on_hints=tell, pooled=pooled) as db:
        done = await work(db, settings)
        await asyncio.gather(*telling)
    return done


async def _tell(db: Database, changed: frozenset[str]) -> None:
    """Wake the workers and the sockets."""
    payload = " ".join(sorted(changed))
    async with db.connection() as connection:
        await connection.execute(
            "select pg_notify(%s, %s)", (CHANNEL, payload if len(payload) <= PAYLOAD_BYTES_MAX else EVERYTHING)
        )


def actor() -> Actor:
    """Who types, for the audit log."""
    return Actor.system(f"cli:{getpass.getuser()}")
