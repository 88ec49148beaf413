"""Does it get on? `/healthz` says that the process lives; `/readyz` that its work progresses; `/metrics` in figures."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from dataclasses import dataclass, field

import psycopg
import psycopg_pool
from prometheus_client import REGISTRY, Gauge, generate_latest

from caravan.db import Database, Tx
from caravan.db.migrate import migrations
from caravan.eventlog.lag import list_lag
from caravan.eventlog.workers import list_workers

ANSWER_SECONDS_MAX = 3.0
STALE_SECONDS = 10.0  # without a completed turn, or stuck on one event, for so long: no progress

LAG_MESSAGES = Gauge("caravan_lag_messages", "Events that a group has not got past.", ["group"])
LAG_SECONDS = Gauge("caravan_lag_seconds", "Age of the oldest event that a group has not got past.", ["group"])
WORKERS_ALIVE = Gauge("caravan_workers_alive", "Workers of a group with a live lease.", ["group"])
UNDELIVERED = Gauge("caravan_undelivered_payments", "Captured payments that are not delivered, by reason.", ["reason"])
UNDELIVERED_CENTS = Gauge("caravan_undelivered_cents", "Money captured and not delivered.", ["currency"])
UNDELIVERED_AGE = Gauge("caravan_undelivered_oldest_seconds", "Age of the oldest undelivered payment.")
DEAD_LETTERS = Gauge("caravan_dead_letters", "Events that were given up and wait for an operator.")


@dataclass(slots=True)
class Readiness:
    """`problems` are sentences for whoever watches; none: ready."""

    problems: list[str] = field(default_factory=list[str])

    @property
    def ready(self) -> bool:
        return not self.problems

    def document(self) -> dict[str, object]:
        return {"status": "ready" if self.ready else "not ready", "problems": self.problems}


async def check_ready(db: Database, services: Collection[str]) -> Readiness:
    """The database and the schema; and of the worker services among `services`: alive, turning, nothing stuck."""
    try:
        async with asyncio.timeout(ANSWER_SECONDS_MAX), db.transaction("readyz", read_only=True) as tx:
            problems = await _schema_problems(tx)
            return Readiness(problems or await _worker_problems(tx, services))
    except (TimeoutError, psycopg.Error, psycopg_pool.PoolTimeout):
        return Readiness(["the database does not answer"])


APPLIED = "select number from schema_migrations"


async def _schema_problems(tx: Tx) -> list[str]:
    applied = set(await tx.values(APPLIED))
    known = {migration.number for migration in migrations()}
    if known - applied:
        return ["the database's schema is older than this release: run `caravan migrate`"]
    return ["the database's schema is newer than this release"] if applied - known else []


async def _worker_problems(tx: Tx, services: Collection[str]) -> list[str]:
    problems: list[str] = []
    for lag in await list_lag(tx):
        if lag.service not in services:
            continue
        if not lag.workers_alive:
            problems.append(f"{lag.service} is not running; {lag.messages} events wait")
        elif lag.progress_age_seconds is not None and lag.progress_age_seconds > STALE_SECONDS:
            problems.append(f"{lag.service} has not turned for {lag.progress_age_seconds:.0f} s")
    for worker in await list_workers(tx):
        if worker.service in services and worker.alive and worker.failing_since:
            stuck = (tx.now - worker.failing_since).total_seconds()
            if stuck > STALE_SECONDS:
                problems.append(f"{worker.service} has been failing for {stuck:.0f} s")
    return problems


UNDELIVERED_BY_REASON = "select coalesce(reason, 'none') as reason, count(*)::int as n from undelivered group by 1"
UNDELIVERED_BY_CURRENCY = "select currency, sum(amount_cents)::int8 as cents from undelivered group by 1"
UNDELIVERED_OLDEST = "select coalesce(extract(epoch from clock_timestamp() - min(since)), 0)::float8 from undelivered"
DEAD_LETTERS_PARKED = "select count(*) from dead_letters where status = 'parked'"


async def render_metrics(db: Database) -> bytes:
    """This process's own metrics, and the platform's as the database has them now."""
    async with db.transaction("metrics", read_only=True) as tx:
        for lag in await list_lag(tx):
            LAG_MESSAGES.labels(lag.group).set(lag.messages)
            LAG_SECONDS.labels(lag.group).set(lag.seconds)
            WORKERS_ALIVE.labels(lag.group).set(lag.workers_alive)
        UNDELIVERED.clear()
        for row in await tx.all(UNDELIVERED_BY_REASON):
            UNDELIVERED.labels(row["reason"]).set(row["n"])
        UNDELIVERED_CENTS.clear()
        for row in await tx.all(UNDELIVERED_BY_CURRENCY):
            UNDELIVERED_CENTS.labels(row["currency"]).set(row["cents"])
        UNDELIVERED_AGE.set(await tx.value(UNDELIVERED_OLDEST))
        DEAD_LETTERS.set(await tx.value(DEAD_LETTERS_PARKED))
    return generate_latest(REGISTRY)
