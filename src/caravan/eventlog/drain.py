"""Run every group until nothing is left: for tests, and for the demo's rehearsals on a database of its own."""

from __future__ import annotations

from collections.abc import Sequence

from caravan.db import Database
from caravan.eventlog.consumer import Consumer
from caravan.eventlog.subscription import Subscription, register_groups
from caravan.eventlog.workers import Worker

TURNS_MAX = 10_000


class NotDraining(Exception):
    """The groups keep each other busy without end: a loop of events."""


async def drain(db: Database, subscriptions: Sequence[Subscription]) -> int:
    """The number of events handled; returns when every group has got past all that was said."""
    async with db.transaction() as tx:
        await register_groups(tx, subscriptions)
    consumers = [
        Consumer(db, s, Worker(service=s.service, group=s.group, build="drain", name=f"drain/{s.group}"))
        for s in subscriptions
    ]
    for consumer in consumers:
        await consumer.enter()
    try:
        total = 0
        for _ in range(TURNS_MAX):
            done = 0
            for consumer in consumers:
                while turned := await consumer.run_once():
                    done += turned
            total += done
            if not done:
                return total
    finally:
        for consumer in consumers:
            await consumer.leave()
    raise NotDraining(f"still busy after {TURNS_MAX} turns")
