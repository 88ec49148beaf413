"""Procrastinate: jobs in a table of the same database, fetched one by one, run side by side; its own psycopg pool for
the queue, asyncpg for the work."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any
from uuid import UUID

import asyncpg
from procrastinate import App, PsycopgConnector

from bench.peers.work import CONNECTION_SETTINGS, fulfil

PACKAGE = "procrastinate"
OWN_POOL = False
GUARANTEE = "at most once unless stalled jobs are retried by hand; the effects once, guarded by a constraint"
WAYS = (
    {"jobs": 8, "queue_connections": 4},
    {"jobs": 16, "queue_connections": 8},
    {"jobs": 32, "queue_connections": 8},
)


def _app(url: str, connections: int) -> App:
    return App(connector=PsycopgConnector(conninfo=url, min_size=connections, max_size=connections))


async def prepare(url: str, payments: Sequence[UUID], way: dict[str, Any], redis: str) -> None:
    app = _app(url, 1)

    @app.task(name="fulfil")
    async def _fulfil(payment_id: str) -> None: ...

    async with app.open_async():
        await app.schema_manager.apply_schema_async()
        for first in range(0, len(payments), 1000):
            await _fulfil.batch_defer_async(*[{"payment_id": str(id_)} for id_ in payments[first : first + 1000]])
    connection = await asyncpg.connect(url)
    await connection.execute("vacuum analyze")
    await connection.close()


def work(url: str, way: dict[str, Any], redis: str, go: Callable[[], None]) -> None:
    import uvloop

    logging.disable(logging.INFO)  # a line per job would be its own benchmark
    uvloop.run(_work(url, way, go))


async def _work(url: str, way: dict[str, Any], go: Callable[[], None]) -> None:
    jobs = way["jobs"]
    pool = await asyncpg.create_pool(url, min_size=jobs, max_size=jobs, server_settings=CONNECTION_SETTINGS)
    app = _app(url, way["queue_connections"])

    @app.task(name="fulfil")
    async def _fulfil(payment_id: str) -> None:
        async with pool.acquire() as connection, connection.transaction():
            await fulfil(connection.fetch, UUID(payment_id))

    async with app.open_async():
        await asyncio.to_thread(go)
        # Finished jobs are deleted, which its authors advise for a queue that is to stay small and fast.
        await app.run_worker_async(concurrency=jobs, delete_jobs="successful", install_signal_handlers=False)
    await asyncio.Event().wait()
