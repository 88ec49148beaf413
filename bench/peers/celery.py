"""Celery with Redis: jobs in another server, acknowledged late; a pool of processes, psycopg for the work."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any
from uuid import UUID

import psycopg
from celery import Celery, signals
from redis import Redis
from redis.exceptions import ResponseError

from bench.peers.work import CONNECTION_SETTINGS, fetch_at_once, finish, fulfil

PACKAGE = "celery"
OWN_POOL = True
GUARANTEE = "at least once while Redis keeps its memory (acks_late); the effects once, guarded by a constraint"
# Its guide: processes for work like this, and many short tasks fetched ahead. `each`: children per process of the race,
# because one that waits for a commit uses no processor.
WAYS = (
    {"each": 2, "prefetch": 64},
    {"each": 4, "prefetch": 64},
    {"each": 4, "prefetch": 4},
)
WAITING, QUEUE = "waiting", "celery"


def _app(redis: str, prefetch: int = 4) -> Celery:
    app = Celery("bench", broker=redis)
    app.conf.update(
        task_acks_late=True,
        task_reject_on_worker_lost=True,
        task_ignore_result=True,
        worker_prefetch_multiplier=prefetch,
        worker_enable_remote_control=False,
        worker_hijack_root_logger=False,
        broker_connection_retry_on_startup=True,
    )
    return app


async def prepare(url: str, payments: Sequence[UUID], way: dict[str, Any], redis: str) -> None:
    """Into a list that nobody reads yet: renaming it is the start."""
    server = Redis.from_url(redis)
    server.flushall()
    app = _app(redis)
    with app.producer_pool.acquire(block=True) as producer:
        for payment in payments:
            app.send_task("fulfil", args=[str(payment)], queue=WAITING, routing_key=WAITING, producer=producer)
    assert server.llen(WAITING) == len(payments)


def work(url: str, way: dict[str, Any], redis: str, go: Callable[[], None]) -> None:
    warnings.filterwarnings("ignore", message="You're running the worker with superuser")
    app = _app(redis, way["prefetch"])
    mine: list[psycopg.Connection[Any]] = []

    @signals.worker_process_init.connect(weak=False)
    def _connect(**_: Any) -> None:
        options = " ".join(f"-c {name}={value}" for name, value in CONNECTION_SETTINGS.items())
        mine[:] = [psycopg.connect(url, options=options, prepare_threshold=0)]

    @signals.worker_ready.connect(weak=False)
    def _start(**_: Any) -> None:
        go()
        try:
            Redis.from_url(redis).rename(WAITING, QUEUE)
        except ResponseError:
            pass  # another process did

    @app.task(name="fulfil")
    def _fulfil(payment_id: str) -> None:
        with mine[0].transaction():
            finish(fulfil(fetch_at_once(mine[0]), UUID(payment_id)))

    app.Worker(
        concurrency=way["processes"] * way["each"],
        pool="prefork",
        optimization="fair",
        loglevel="ERROR",
        without_gossip=True,
        without_mingle=True,
        without_heartbeat=True,
    ).start()
