"""A topic as bad as it gets: records twice, out of order, poisoned, under rebalances and with the broker killed.

Two members of a group stay, a third one comes and goes every half second; the broker is killed in between. In the end
each good event has had its effect exactly once, and each bad one is among the dead letters, once.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

from confluent_kafka import Producer

from caravan.db import Database, Tx
from caravan.eventlog.codec import Envelope
from caravan.eventlog.kafka_client import Kafka
from caravan.eventlog.kafka_log import KafkaConsumer
from caravan.eventlog.kafka_records import headers_of, value_of
from caravan.eventlog.subscription import Subscription, register_groups
from caravan.eventlog.workers import Worker
from caravan.events import PurchaseConfirmed
from caravan.ids import new_id
from caravan.settings import Settings
from tests.kafka.server import KafkaServer, missing
from verify.parts import Context
from verify.report import PartResult
from verify.scratch import PREFIX

GROUP = "stream"
PARTITIONS = 8
TWICE = 0.05
OUT_OF_ORDER = 0.05
NO_EVENT = 0.008  # bytes that are none
POISON = 0.002  # an event that its handler cannot stand; each costs some tries alone
REBALANCE_SECONDS = 0.5
PATIENCE_SECONDS = 300.0
POLL_SECONDS = 0.2
DOWN_SECONDS = (0.2, 2.0)
EPOCH = datetime(2026, 1, 1, tzinfo=UTC)

CREATE_EFFECTS = "create table effects (payment_id uuid not null)"
INSERT_EFFECTS = "insert into effects select unnest(%(ids)b::uuid[])"
COUNT = """
select (select count(distinct payment_id) from effects) + (select count(*) from dead_letters) as done
"""


async def run(context: Context) -> PartResult:
    result = context.result()
    if lack := missing():
        if os.environ.get("CI") == "true":
            result.failed.append(f"CI must have it: {lack}")
        else:
            result.skipped = lack
        return result
    events, kills, rebalance_seconds = context.pick((3_000, 2, 8.0), (100_000, 20, 60.0))
    result.must_fire = ("Kafka killed", "rebalance", "twice", "out of order", "no event", "poison")
    result.good_min = int(0.95 * events)
    stream = plan(events, context.dice("stream"), result)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    server = KafkaServer(folder)
    try:
        await asyncio.to_thread(server.start)
        async with context.server.create().database() as db:
            await _play(result, db, server, stream, kills, rebalance_seconds, context.dice("faults"))
            await _judge(result, db, stream)
    finally:
        await asyncio.to_thread(server.kill)
        shutil.rmtree(folder, ignore_errors=True)
    result.cases = len(stream.records)
    return result


@dataclass(slots=True)
class Stream:
    """`records` as they are produced; of each event whether it is good."""

    records: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    good: set[UUID] = field(default_factory=set[UUID])
    poison: set[UUID] = field(default_factory=set[UUID])
    bad: int = 0


def plan(events: int, dice: random.Random, result: PartResult) -> Stream:
    stream = Stream()
    students = [new_id() for _ in range(max(10, events // 20))]
    placed: list[tuple[float, dict[str, Any]]] = []
    for number in range(events):
        event = PurchaseConfirmed(
            payment_id=new_id(), student_id=dice.choice(students), course_id=new_id(), checkout_id=new_id()
        )
        record, chance = _record(event), dice.random()
        if chance < NO_EVENT:
            record |= {"value": dice.randbytes(20), "headers": []}
            stream.bad += 1
            result.fired["no event"] += 1
        elif chance < NO_EVENT + POISON:
            stream.poison.add(event.payment_id)
            result.fired["poison"] += 1
        else:
            stream.good.add(event.payment_id)
            if dice.random() < TWICE:
                placed.append((number + dice.uniform(0, 2000), record))
                result.fired["twice"] += 1
        late = dice.random() < OUT_OF_ORDER
        result.fired["out of order"] += late
        placed.append((number + (dice.uniform(-500, 500) if late else 0), record))
    stream.records = [record for _place, record in sorted(placed, key=lambda each: each[0])]
    return stream


def _record(event: PurchaseConfirmed) -> dict[str, Any]:
    envelope = Envelope(
        id=new_id(),
        source="verify",
        type=event.type,
        subject=event.subject,
        time=EPOCH,
        data={
            "paymentId": str(event.payment_id),
            "studentId": str(event.student_id),
            "courseId": str(event.course_id),
            "checkoutId": str(event.checkout_id),
        },
        correlationid=event.correlation_id,
        partitionkey=str(event.student_id),
    )
    return {"key": envelope.partitionkey.encode(), "value": value_of(envelope), "headers": headers_of(envelope)}


# ------------------------------------------------------------------ play


async def _play(
    result: PartResult,
    db: Database,
    server: KafkaServer,
    stream: Stream,
    kills: int,
    rebalance_seconds: float,
    dice: random.Random,
) -> None:
    kafka = Kafka(Settings(kafka_broker=server.address, kafka_partitions=PARTITIONS))
    await asyncio.to_thread(kafka.ensure_topics, 10.0)

    async def apply(tx: Tx, heard: Sequence[PurchaseConfirmed]) -> None:
        await tx.execute(INSERT_EFFECTS, {"ids": [event.payment_id for event in heard]})
        if any(event.payment_id in stream.poison for event in heard):
            raise ValueError("poison")

    subscription = Subscription(GROUP, "stream-worker", "StreamWorker", {PurchaseConfirmed: apply})
    async with db.transaction() as tx:
        await tx.execute(CREATE_EFFECTS)
        await register_groups(tx, [subscription])
    crew = Crew(db, subscription, kafka)
    wanted = len(stream.good) + len(stream.poison) + stream.bad
    started = time.monotonic()
    producing = asyncio.create_task(asyncio.to_thread(_produce, server.address, kafka, stream))
    await crew.come("stays-1")
    await crew.come("stays-2")
    faults = asyncio.create_task(_kill_now_and_then(result, server, kills, rebalance_seconds / kills, dice))
    guest = 0
    while time.monotonic() - started < rebalance_seconds or not faults.done():
        await (crew.go(f"guest-{guest}") if f"guest-{guest}" in crew.running else crew.come(f"guest-{guest + 1}"))
        guest += f"guest-{guest + 1}" in crew.running
        result.fired["rebalance"] += 1
        await asyncio.sleep(REBALANCE_SECONDS)
    await faults
    calm = time.monotonic()
    while time.monotonic() - calm < PATIENCE_SECONDS:
        async with db.transaction("verify", read_only=True) as tx:
            if await tx.value(COUNT) >= wanted:
                break
        await asyncio.sleep(POLL_SECONDS)
    result.extra["calm_seconds"] = round(time.monotonic() - calm, 1)
    await producing
    result.extra["stream_seconds"] = round(time.monotonic() - started, 1)
    await crew.disband(result)


async def _kill_now_and_then(
    result: PartResult, server: KafkaServer, kills: int, lives_seconds: float, dice: random.Random
) -> None:
    """Each life of the broker is as long, however slowly it starts here: it must get something done."""
    for _ in range(kills):
        await asyncio.sleep(lives_seconds)
        await asyncio.to_thread(server.kill)
        result.fired["Kafka killed"] += 1
        await asyncio.sleep(dice.uniform(*DOWN_SECONDS))
        await asyncio.to_thread(server.start)


def _produce(address: str, kafka: Kafka, stream: Stream) -> None:
    """As another program would: idempotently, so that only the planned ones are there twice."""
    producer = Producer(
        {"bootstrap.servers": address, "enable.idempotence": True, "message.timeout.ms": 0, "log_level": 0}
    )
    topic = kafka.named(PurchaseConfirmed.topic)
    for record in stream.records:
        while True:
            try:
                producer.produce(topic, **record)
                break
            except BufferError:
                producer.poll(0.1)
    producer.flush(PATIENCE_SECONDS)


@dataclass(slots=True)
class Crew:
    """Members that run as the product's do; they come and go cleanly."""

    db: Database
    subscription: Subscription
    kafka: Kafka
    running: dict[str, tuple[asyncio.Event, asyncio.Task[None]]] = field(
        default_factory=dict[str, tuple[asyncio.Event, "asyncio.Task[None]"]]
    )
    leaving: list[asyncio.Task[None]] = field(default_factory=list[asyncio.Task[None]])

    async def come(self, name: str) -> None:
        worker = Worker(service="stream-worker", group=GROUP, build="verify", name=name)
        stop = asyncio.Event()
        member = KafkaConsumer(self.db, self.subscription, worker, self.kafka)
        self.running[name] = stop, asyncio.create_task(member.run(stop), name=name)

    async def go(self, name: str) -> None:
        stop, task = self.running.pop(name)
        stop.set()
        self.leaving.append(task)

    async def disband(self, result: PartResult) -> None:
        for name in list(self.running):
            await self.go(name)
        for ended in await asyncio.gather(*self.leaving, return_exceptions=True):
            with suppress(asyncio.CancelledError):
                if isinstance(ended, BaseException):
                    result.violated(f"a member ended with {type(ended).__name__}: {ended}")


async def _judge(result: PartResult, db: Database, stream: Stream) -> None:
    async with db.transaction("verify", read_only=True) as tx:
        effects = Counter(await tx.values("select payment_id from effects"))
        letters = Counter(await tx.values("select correlation_id from dead_letters where code = 'HANDLER_FAILED'"))
        malformed: int = await tx.value("select count(*) from dead_letters where code = 'MALFORMED'")
    result.good = len(stream.good & effects.keys())
    twice = sum(number > 1 for number in effects.values())
    lost, strange = len(stream.good - effects.keys()), len(effects.keys() - stream.good)
    if twice or lost or strange:
        result.violated(f"of {len(stream.good)} events {lost} had no effect, {twice} several, {strange} a wrong one")
    if letters != Counter(map(str, stream.poison)):
        result.violated(f"{len(stream.poison)} events were poison; {letters.total()} dead letters say so")
    if malformed != stream.bad:
        result.violated(f"{stream.bad} records were no events; {malformed} dead letters say so")
    result.extra |= {"records": len(stream.records), "dead_letters": letters.total() + malformed}
