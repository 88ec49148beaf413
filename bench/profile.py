"""Where a fulfilment's time goes, stage by stage: `python -m bench.profile --payments 2000 --trainers 200`.

One stage after the other in this process, each with all payments waiting before it: seconds, the processors' time here
and in the server, what it asked of the server, its dearest statements, and (`--python N`) its dearest functions.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import io
import logging
import pstats
import time
from typing import Any

import psycopg
import structlog

from bench.check import check
from bench.counting import Counted, backend_cpu_seconds, count_since, read_counters, top_statements
from bench.market import add_captured_payments, build_market
from bench.report import table
from bench.server import Server
from caravan.apps.subscriptions import SUBSCRIPTIONS
from caravan.db import Database
from caravan.eventlog.consumer import Consumer
from caravan.eventlog.subscription import Subscription, register_groups
from caravan.eventlog.workers import Worker


async def profile_stage(
    url: str, subscription: Subscription, python: int
) -> tuple[float, float, float, Counted, list[tuple[Any, ...]], str]:
    """(seconds, client CPU seconds, server CPU seconds, counts, statements, functions)."""
    before = read_counters(url)
    profiler = cProfile.Profile()
    async with Database(url, max_connections=1) as db:
        worker = Worker(service=subscription.service, group=subscription.group, build="profile", name="profile")
        consumer = Consumer(db, subscription, worker)
        await consumer.enter()
        async with db.connection() as connection:
            pid = connection.info.backend_pid
        server, client, clock = backend_cpu_seconds(pid), time.process_time(), time.monotonic()
        if python:
            profiler.enable()
        while await consumer.run_once():
            pass
        profiler.disable()
        clock, client = time.monotonic() - clock, time.process_time() - client
        server = backend_cpu_seconds(pid) - server
        await consumer.leave()
    counted = count_since(url, before)
    said = io.StringIO()
    if python:
        pstats.Stats(profiler, stream=said).sort_stats("tottime").print_stats(python)
    return clock, client, server, counted, top_statements(url, 12), said.getvalue()


async def profile(url: str, n: int, python: int) -> None:
    async with Database(url) as db, db.transaction() as tx:
        await register_groups(tx, SUBSCRIPTIONS)
    stages: list[list[Any]] = []
    details: list[str] = []
    for subscription in SUBSCRIPTIONS:
        clock, client, server, counted, statements, functions = await profile_stage(url, subscription, python)
        per = counted.per(n)
        us = 1_000_000 / n
        stages.append([subscription.label, clock * us, client * us, server * us, *per.values()])
        details.append(f"\n== {subscription.label}: dearest statements (µs of the server per fulfilment; calls; rows)")
        details += table(
            ["µs", "plan µs", "calls", "rows", "buffers/f", "WAL/f", "statement"],
            [
                [ms * 1000 / n, plan * 1000 / n, calls, rows, pages / n, wal / n, text]
                for ms, plan, calls, rows, pages, wal, text in statements
            ],
        )
        details += [functions] * bool(functions)
    total = ["all", *[sum(stage[k] for stage in stages) for k in range(1, len(stages[0]))]]
    header = ["stage", "µs", "client µs", "server µs", "commits", "statements", "WAL bytes", "buffers"]
    print(f"per fulfilment, of {n}:")
    print("\n".join(table(header, [*stages, total])))
    print("\n".join(details))
    await check(url, n)


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.profile")
    parser.add_argument("--payments", type=int, default=2000)
    parser.add_argument("--trainers", type=int, default=200)
    parser.add_argument("--python", type=int, default=0, help="how many functions to show, under cProfile (slower)")
    parser.add_argument("--seed", type=int, default=1)
    chosen = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    with Server(counting=True) as server:
        url = server.create("profile")
        asyncio.run(_run(url, chosen))


async def _run(url: str, chosen: argparse.Namespace) -> None:
    await build_market(url, trainers=chosen.trainers, seed=chosen.seed)
    await add_captured_payments(url, chosen.payments, chosen.seed)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("checkpoint")
    await profile(url, chosen.payments, chosen.python)


if __name__ == "__main__":
    main()
