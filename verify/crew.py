"""Workers that turn when they are told to, a clock that can be moved, and two processes to share the work.

Used by the parts that decide in which order things happen: orders, races, model.
"""

from __future__ import annotations

import asyncio
import multiprocessing
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

from caravan.apps.subscriptions import SUBSCRIPTIONS
from caravan.db import Database, Tx
from caravan.eventlog.consumer import Consumer
from caravan.eventlog.subscription import Subscription, register_groups
from caravan.eventlog.workers import Worker
from verify.report import PartResult
from verify.scratch import ScratchDatabase

PROCESSES = 2
TURNS_MAX = 5_000

T = TypeVar("T")


class MovedClock(Database):
    """A database whose transactions happen `ahead` of the real time: an outage of days takes no time at all."""

    ahead: timedelta = timedelta(0)

    @asynccontextmanager
    async def transaction(self, source: str = "caravan", *, read_only: bool = False) -> AsyncGenerator[Tx]:
        async with super().transaction(source, read_only=read_only) as tx:
            tx.now += self.ahead
            yield tx


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


@dataclass(frozen=True, slots=True)
class Share:
    """What one process is to do: `numbers` of a part's cases (or rounds, or examples), on a database of its own."""

    part: str
    scale: str
    seed: int
    index: int
    numbers: tuple[int, ...]
    database: ScratchDatabase


async def spread(shares: Sequence[Share], work: Callable[[Share], PartResult]) -> list[PartResult]:
    """Run `work`, a function of a module, over each share, each in a process of its own."""
    if len(shares) == 1:
        return [await asyncio.to_thread(work, shares[0])]
    loop = asyncio.get_running_loop()
    with ProcessPoolExecutor(len(shares), mp_context=multiprocessing.get_context("spawn")) as pool:
        return await asyncio.gather(*(loop.run_in_executor(pool, _quietly, work, share) for share in shares))


def _quietly(work: Callable[[Share], PartResult], share: Share) -> PartResult:
    from verify.__main__ import be_quiet

    be_quiet()
    return work(share)
