"""The logs under test, behind one face: members of a group, and whatever carries events from the outbox to them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from caravan.db import Database, Tx
from caravan.errors import is_transient
from caravan.eventlog import outbox
from caravan.eventlog.consumer import Consumer
from caravan.eventlog.kafka_client import Kafka
from caravan.eventlog.kafka_log import KafkaConsumer
from caravan.eventlog.member import Member
from caravan.eventlog.relay import Relay
from caravan.eventlog.subscription import Subscription, register_groups
from caravan.eventlog.workers import Worker
from caravan.events import PurchaseConfirmed, PurchaseCreated
from caravan.ids import new_id

PATIENCE_SECONDS = 30.0

CREATE_EFFECTS = """
create table if not exists effects (nr bigint generated always as identity, payment_id uuid, student_id uuid, said text)
"""


class Group:
    """A group whose effect is a row per event; it fails where it is told to."""

    def __init__(self, name: str = "effects") -> None:
        self.poison: set[UUID] = set()
        self.failures: list[BaseException] = []  # raised one per batch, first come
        self.batches: list[int] = []
        self.says: Callable[[PurchaseConfirmed], Sequence[Any]] | None = None
        self.subscription = Subscription(
            name, "effect-worker", "EffectWorker", {PurchaseConfirmed: self.apply, PurchaseCreated: self.apply}
        )

    async def apply(self, tx: Tx, events: Sequence[PurchaseConfirmed | PurchaseCreated]) -> None:
        self.batches.append(len(events))
        for event in events:
            await tx.execute(
                "insert into effects (payment_id, student_id, said) values (%(p)s, %(s)s, %(said)s)",
                {"p": event.payment_id, "s": event.student_id, "said": event.type},
            )
            if self.says and isinstance(event, PurchaseConfirmed):
                outbox.append(tx, self.says(event))
        if self.failures:
            raise self.failures.pop(0)
        if any(event.payment_id in self.poison for event in events):
            raise ValueError("a bug")


@dataclass
class Log:
    """`kafka` None: the log in PostgreSQL."""

    name: str
    db: Database
    kafka: Kafka | None = None
    relay: Relay | None = None
    members: list[Member] = field(default_factory=list[Member])

    async def relays(self, name: str = "relay-1") -> Relay:
        assert self.kafka is not None
        relay = Relay(self.db, Worker(service="outbox-relay", group="outbox-relay", build="t", name=name), self.kafka)
        await relay.enter()
        return relay

    async def member(self, group: Group, name: str = "effects-1", page: int = 256) -> Member:
        async with self.db.transaction() as tx:
            await tx.execute(CREATE_EFFECTS)
            await register_groups(tx, [group.subscription])
        worker = Worker(service="effect-worker", group=group.subscription.group, build="test", name=name)
        given = (self.db, group.subscription, worker)
        if self.kafka is None:
            member: Member = Consumer(*given, page_events_max=page)
        else:
            member = KafkaConsumer(*given, self.kafka, page_events_max=page)
            if self.relay is None:
                self.relay = await self.relays()
        await member.enter()
        self.members.append(member)
        return member

    async def turn(self, members: Sequence[Member]) -> int:
        """One turn of everybody, at once; what only needs another try is none."""
        carriers: list[Member] = [self.relay] if self.relay else []
        return sum(await asyncio.gather(*(_once(member) for member in [*carriers, *members])))

    async def until(self, condition: Callable[[], Awaitable[bool]], *members: Member) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not await condition():
            assert time.monotonic() < deadline, f"not within {PATIENCE_SECONDS:.0f} s"
            await self.turn(members or self.members)

    async def share(self, members: Sequence[Member]) -> bool:
        """Whether each of them has a part of the log."""
        readers = [member._reader for member in members if isinstance(member, KafkaConsumer)]
        return all(reader is not None and reader._ours for reader in readers)

    async def settle(self, *members: Member) -> None:
        """Until nothing has come for some turns: for what must not happen any more."""
        quiet = 0
        while quiet < (3 if self.kafka else 1):
            quiet = 0 if await self.turn(members or self.members) else quiet + 1

    async def close(self) -> None:
        for member in [*self.members, *([self.relay] if self.relay else [])]:
            with suppress(RuntimeError):  # one that the test has ended itself
                await member.leave()


async def _once(member: Member) -> int:
    try:
        return await member.run_once()
    except Exception as error:
        if not is_transient(error):
            raise
        return 0


def confirmed(student: UUID | None = None) -> PurchaseConfirmed:
    return PurchaseConfirmed(
        payment_id=new_id(), student_id=student or new_id(), course_id=new_id(), checkout_id=new_id()
    )


async def say(db: Database, *events: PurchaseConfirmed) -> list[UUID]:
    async with db.transaction("payment-service") as tx:
        outbox.append(tx, events)
    return [event.payment_id for event in events]


async def effects(db: Database) -> list[UUID]:
    """In the order in which they were written."""
    async with db.transaction() as tx:
        return await tx.values("select payment_id from effects order by nr")
