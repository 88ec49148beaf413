"""DBOS: a durable workflow per payment, of three steps, each a transaction whose effects may be asked for again.

Its datasources, whose transactions commit together with the step's checkpoint, came to half the rate of this (measured
with all other things equal), so its plain steps are what counts.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Sequence
from typing import Any
from uuid import UUID

import psycopg
from dbos import DBOS, DBOSClient, DBOSConfig, SetWorkflowID
from psycopg_pool import AsyncConnectionPool

from bench.peers import work as job
from bench.peers.work import CONNECTION_SETTINGS, Sale, fetch_with

PACKAGE = "dbos"
OWN_POOL = False
GUARANTEE = "a workflow goes on where it stopped: each step at least once, its effects once, guarded by constraints"
# Its benchmarks: no admin server, a pool per process, a short polling interval where the rate counts; a queue without
# shared limits, one with partitions of concurrency 1, or no queue at all (`direct`: each process starts its share).
WAYS = (
    {"how": "direct", "flow": 16, "pool": 16},
    {"how": "queue", "flow": 32, "pool": 16},
    {"how": "partitions", "flow": 32, "pool": 16},
)
APPLICATION, QUEUE, WORKFLOW = "caravan-bench", "fulfilments", "fulfil"
POLLING_SECONDS = 0.02
PARTITIONS = 64
CONNECTING = {
    "options": " ".join(f"-c {name}={value}" for name, value in CONNECTION_SETTINGS.items()),
    "prepare_threshold": 0,
}


def _launch(url: str, pool: int) -> None:
    config: DBOSConfig = {
        "name": APPLICATION,
        "system_database_url": url,
        "run_admin_server": False,
        "sys_db_pool_size": pool,
        "log_level": "ERROR",
        "executor_id": str(os.getpid()),
        "application_version": "1",
    }
    DBOS(config=config)
    DBOS.launch()


async def prepare(url: str, payments: Sequence[UUID], way: dict[str, Any], redis: str) -> None:
    await asyncio.to_thread(_prepare, url, payments, way)


def _prepare(url: str, payments: Sequence[UUID], way: dict[str, Any]) -> None:
    """A queue that lets nobody run anything yet; opening it is the start."""
    _launch(url, 3)
    limits = {"partition_concurrency": 1} if way["how"] == "partitions" else {}
    DBOS.register_queue(
        QUEUE, worker_concurrency=0, polling_interval_sec=POLLING_SECONDS, on_conflict="always_update", **limits
    )
    if way["how"] != "direct":
        client = DBOSClient(system_database_url=url, application_name=APPLICATION)
        for number, payment in enumerate(payments):
            options = {"queue_name": QUEUE, "workflow_name": WORKFLOW, "workflow_id": str(payment), "app_version": "1"}
            if limits:
                options["queue_partition_key"] = str(number % PARTITIONS)
            client.enqueue(options, str(payment))
        client.destroy()
    DBOS.destroy()


def work(url: str, way: dict[str, Any], redis: str, go: Callable[[], None]) -> None:
    import uvloop

    uvloop.run(_work(url, way, go))


async def _work(url: str, way: dict[str, Any], go: Callable[[], None]) -> None:
    pool = AsyncConnectionPool(url, min_size=way["flow"], max_size=way["flow"], kwargs=CONNECTING, open=False)
    await pool.open(wait=True)

    @DBOS.step(name="purchase")
    async def purchase(payment_id: str) -> Sale:
        async with pool.connection() as connection:
            sale = await job.read_sale_again(fetch_with(connection), UUID(payment_id))
            await job.create_purchase(fetch_with(connection), sale)
            return sale

    @DBOS.step(name="allocation")
    async def allocation(sale: Sale) -> Sale:
        async with pool.connection() as connection:
            await job.allocate(fetch_with(connection), sale)
            return sale

    @DBOS.step(name="sessions")
    async def sessions(sale: Sale) -> None:
        async with pool.connection() as connection:
            await job.schedule(fetch_with(connection), sale)

    @DBOS.workflow(name=WORKFLOW)
    async def fulfil(payment_id: str) -> None:
        await sessions(await allocation(await purchase(payment_id)))

    await asyncio.to_thread(_launch, url, way["pool"])
    share = await _read_share(url, way) if way["how"] == "direct" else []
    await asyncio.to_thread(go)
    if way["how"] == "direct":
        flow = asyncio.Semaphore(way["flow"])
        await asyncio.gather(*[_run(fulfil, payment, flow) for payment in share])
    else:
        queue = await DBOS.retrieve_queue_async(QUEUE)
        await queue.set_worker_concurrency_async(way["flow"])
    await asyncio.Event().wait()


async def _read_share(url: str, way: dict[str, Any]) -> list[str]:
    """The payments that this process starts itself."""
    async with await psycopg.AsyncConnection.connect(url) as connection:
        rows = await (await connection.execute("select payment_id::text from undelivered order by 1")).fetchall()
    return [row[0] for row in rows][way["index"] :: way["processes"]]


async def _run(workflow: Callable[[str], Awaitable[None]], payment: str, flow: asyncio.Semaphore) -> None:
    async with flow:
        with SetWorkflowID(payment):
            handle = await DBOS.start_workflow_async(workflow, payment)
        await handle.get_result()
