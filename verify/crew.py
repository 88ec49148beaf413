"""Workers that turn when they are told to, a clock that can be moved, and two processes to share the work.

Used by the parts that decide in which order things happen: orders, races, model.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta

from psycopg import sql

from caravan.admin import worst_day
from caravan.apps.subscriptions import SUBSCRIPTIONS
from caravan.db import Database, Tx
from caravan.eventlog.consumer import Consumer
from caravan.eventlog.subscription import Subscription, register_groups
from caravan.eventlog.workers import Worker
from caravan.web.auth import Actor
from verify.processes import in_processes
from verify.report import PartResult
from verify.scratch import ScratchDatabase

TURNS_MAX = 5_000
OPERATOR = Actor.system("verify")


class MovedClock(Database):
    """A database whose transactions happen `ahead` of the real time: an outage of days takes no time at all."""

    ahead: timedelta = timedelta(0)

    async def __aenter__(self) -> MovedClock:
        await self.open()
        return self

    @asynccontextmanager
    async def transaction(
        self, source: str = "caravan", *, read_only: bool = False, named: bool = False, few: bool = False
    ) -> AsyncGenerator[Tx]:
        async with super().transaction(source, read_only=read_only, named=named, few=few) as tx:
            tx.now += self.ahead
            yield tx


LIST_LATE = """
select u.payment_id, pu.start_date > (%(soonest)s at time zone 'UTC')::date + 1 as asked_too_early
from undelivered u join student_course_purchases pu on pu.payment_id = u.payment_id
where u.reason = 'START_PASSED' and not u.held order by u.payment_id
"""


async def agree_to_starts(db: Database, notice: timedelta) -> int:
    """Families agree to the next possible start where we were too late for the one they chose; how many did."""
    late = await db.transact(lambda tx: tx.tuples(LIST_LATE, {"soonest": tx.now + notice}), "verify")
    for payment, asked_too_early in late:
        assert not asked_too_early, f"the start that was chosen for {payment} is still possible"
        await db.transact(
            lambda tx, payment=payment: worst_day.confirm_start(tx, OPERATOR, payment, "verify", notice=notice),
            "admin-service",
        )
    return len(late)


class StillBusy(Exception):
    """The groups keep each other busy without end."""


class Crew:
    """One worker per group; each turns when it is told to. A context manager."""

    def __init__(self, db: Database, subscriptions: Sequence[Subscription] = SUBSCRIPTIONS, *, name: str = "crew"):
        self.db = db
        self.consumers = {
            s.group: Consumer(db, s, Worker(service=s.service, group=s.group, build="verify", name=f"{name}/{s.group}"))
            for s in subscriptions
        }
        self._subscriptions = subscriptions

    @property
    def groups(self) -> list[str]:
        return list(self.consumers)

    async def __aenter__(self) -> Crew:
        async with self.db.transaction() as tx:
            await register_groups(tx, self._subscriptions)
        for consumer in self.consumers.values():
            await consumer.enter()
        return self

    async def __aexit__(self, *_: object) -> None:
        for consumer in self.consumers.values():
            await consumer.leave()

    async def turn(self, group: str) -> int:
        """One turn of a group: a page of what waits for it; how many events that were."""
        return await self.consumers[group].run_once()

    async def drain(self, but: str | None = None) -> int:
        """All groups (`but` one) until nothing waits for them."""
        total = 0
        for _ in range(TURNS_MAX):
            done = 0
            for group in self.groups:
                if group != but:
                    done += await self.turn(group)
            total += done
            if not done:
                return total
        raise StillBusy


# What stays when a database is emptied: who reads the log, and where; and what migrations have filled.
KEPT = ("cities", "consumer_groups", "log_cursors", "workers", "installation", "schema_migrations")
LIST_TABLES = """
select c.relname from pg_class c join pg_namespace n on n.oid = c.relnamespace
where n.nspname = 'public' and c.relkind in ('r', 'p') and not c.relispartition and c.relname <> all(%(kept)s)
"""


async def wipe(db: Database) -> None:
    """Empty a scratch database between cases, so that each is alone; the log's readers stay where they are."""
    async with db.transaction("verify") as tx:
        tables = await tx.values(LIST_TABLES, {"kept": list(KEPT)})
        # Without triggers, so neither foreign keys nor the append-only audit log mind.
        deletes = [sql.SQL("delete from {}").format(sql.Identifier(table)) for table in tables]
        await tx.execute("set local session_replication_role = replica")
        await tx.connection.execute(sql.SQL("; ").join(deletes))


@dataclass(frozen=True, slots=True)
class Share:
    """What one process is to do: `numbers` of a part's cases (or rounds, or examples), on a database of its own."""

    part: str
    scale: str
    seed: int
    index: int
    numbers: tuple[int, ...]
    database: ScratchDatabase


async def spread(shares: Sequence[Share], work: Callable[[Share], Awaitable[PartResult]]) -> list[PartResult]:
    """Run `work`, a function of a module, over each share: one alone here, several each in a process of its own."""
    for share in shares:
        share.database.check()
    return [await work(shares[0])] if len(shares) == 1 else await in_processes(work, shares)
