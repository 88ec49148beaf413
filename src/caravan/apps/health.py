"""Does it get on? `/healthz` says that the process lives; `/readyz` that its work progresses (in figures: metrics)."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from dataclasses import dataclass, field

import psycopg
import psycopg_pool

from caravan.db import Database, Tx
from caravan.db.migrate import APPLIED, migrations, newer_than_we_know
from caravan.eventlog.lag import list_lag
from caravan.eventlog.workers import list_workers

ANSWER_SECONDS_MAX = 3.0
STALE_SECONDS = 10.0  # without a completed turn, or stuck on one event, for so long: no progress


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


async def _schema_problems(tx: Tx) -> list[str]:
    applied = [(row["number"], row["name"], row["needs"]) for row in await tx.all(APPLIED)]
    if {migration.number for migration in migrations()} - {number for number, _name, _needs in applied}:
        return ["the database's schema is older than this release: run `caravan migrate`"]
    newer = newer_than_we_know(applied)
    return [f"the database's schema is newer than this release ({newer})"] if newer else []


async def _worker_problems(tx: Tx, services: Collection[str]) -> list[str]:
    problems: list[str] = []
    for lag in await list_lag(tx):
        if lag.service not in services:
            continue
        if not lag.workers_alive:
            problems.append(f"{lag.service} is not running; {lag.waiting}")
        elif lag.progress_age_seconds is not None and lag.progress_age_seconds > STALE_SECONDS:
            problems.append(f"{lag.service} has not turned for {lag.progress_age_seconds:.0f} s")
    for worker in await list_workers(tx):
        if worker.service in services and worker.alive and worker.failing_since:
            stuck = (tx.now - worker.failing_since).total_seconds()
            if stuck > STALE_SECONDS:
                problems.append(f"{worker.service} has been failing for {stuck:.0f} s")
    return problems
