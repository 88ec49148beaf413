"""PgQueuer: jobs in a table of the same database, fetched in batches, completed in batches; asyncpg throughout."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any
from uuid import UUID

import asyncpg
from pgqueuer import AsyncpgDriver, AsyncpgPoolDriver, PgQueuer, Queries
from pgqueuer.models import Job

from bench.peers.work import CONNECTION_SETTINGS, fulfil

PACKAGE = "pgqueuer"
OWN_POOL = False
GUARANTEE = "at least once; the effects once, because they are one transaction that a constraint guards"
# Its guide: larger batches for short jobs, one connection for the queue and a pool for the work. `jobs` is the pool.
WAYS = (
    {"batch": 10, "jobs": 8},
    {"batch": 50, "jobs": 8},
    {"batch": 100, "jobs": 16},
)


async def prepare(url: str, payments: Sequence[UUID], way: dict[str, Any], redis: str) -> None:
    connection = await asyncpg.connect(url)
    queries = Queries(AsyncpgDriver(connection))
    await queries.install()
    await queries.optimize_autovacuum()  # `pgq autovac`, as its checklist says
    await queries.enqueue(["fulfil"] * len(payments), [payment.bytes for payment in payments], [0] * len(payments))
    await connection.execute("vacuum analyze")
    await connection.close()


def work(url: str, way: dict[str, Any], redis: str, go: Callable[[], None]) -> None:
    import uvloop

    uvloop.run(_work(url, way, go))


async def _work(url: str, way: dict[str, Any], go: Callable[[], None]) -> None:
    jobs = way["jobs"]
    pool = await asyncpg.create_pool(url, min_size=jobs, max_size=jobs, server_settings=CONNECTION_SETTINGS)
    queue = await asyncpg.create_pool(url, min_size=3, max_size=3, server_settings=CONNECTION_SETTINGS)
    app = PgQueuer(AsyncpgPoolDriver(queue))

    @app.entrypoint("fulfil")
    async def _fulfil(job: Job) -> None:
        assert job.payload
        async with pool.acquire() as connection, connection.transaction():
            await fulfil(connection.fetch, UUID(bytes=job.payload))

    await asyncio.to_thread(go)
    await app.run(batch_size=way["batch"], max_concurrent_tasks=max(2 * way["batch"], 4 * jobs))
    await asyncio.Event().wait()
