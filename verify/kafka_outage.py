"""Kafka is killed under a load of payments and stays away: checkouts do not notice; back, it is drained in order.

A fleet of real processes, two relays among them. The clocks start when the broker answers again. Order is judged on the
topics themselves: what comes for the first time, by student, stands as the outbox has it.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import quantiles
from typing import Any

from confluent_kafka import OFFSET_BEGINNING, TopicPartition
from confluent_kafka import Consumer as Client

from caravan.apps.services import BACKGROUND, RELAY
from caravan.db import Database
from caravan.events import TOPICS
from tests.kafka.server import KafkaServer, missing
from verify.fleet import WEB, Fleet, make_slots
from verify.history import plan_orders
from verify.kills import ROOMY, settle
from verify.load import Load
from verify.parts import Context
from verify.report import PartResult
from verify.scratch import PREFIX, ScratchServer
from verify.waiting import until_quiet
from verify.world import SETTINGS, sandbox

CREW = (WEB, WEB, *BACKGROUND, RELAY, RELAY)
PARTITIONS = 4
P99_RATIO_MAX = 1.2
FIRST_EVENT_SECONDS_MAX = 2.0
DELIVERED_SECONDS_MAX = 60.0
QUIET_SECONDS_MAX = 180.0
READ_SECONDS_MAX = 60.0
READY_SECONDS_MAX = 60.0
POLL_SECONDS = 0.02
P99_SAMPLES_MIN = 1000  # below, a percentile is chance: it is told, not judged


async def run(context: Context) -> PartResult:
    result = context.result()
    if lack := missing():
        if os.environ.get("CI") == "true":
            result.failed.append(f"CI must have it: {lack}")
        else:
            result.skipped = lack
        return result
    payments, before, away = context.pick((120, 5.0, 8.0), (6000, 40.0, 120.0))
    result.must_fire = ("Kafka killed",)
    result.good_min = int(0.9 * payments)
    dice = context.dice("outage")
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    kafka = KafkaServer(folder)
    try:
        with ScratchServer(settings=ROOMY) as server:
            database = server.create()
            async with database.database() as db:
                orders = await plan_orders(db, payments, dice, unpaid=0)
                await asyncio.to_thread(kafka.start)
                assert SETTINGS.sandbox_webhook_secret
                more = {"kafka_broker": kafka.address, "kafka_partitions": PARTITIONS}
                slots = make_slots(CREW, dice, keeps_name=True)
                async with Fleet(database.url, SETTINGS.sandbox_webhook_secret, slots, more) as fleet:
                    await _until_relaying(db)
                    load = TimedLoad(orders, lambda: fleet.ports, sandbox(), context.dice("clients"), clients=8)
                    started = time.monotonic()
                    rate = payments / (before + away)
                    load.may = lambda: load.done < (time.monotonic() - started) * rate
                    async with asyncio.TaskGroup() as group:
                        group.create_task(load.run())
                        await asyncio.sleep(before)
                        await asyncio.to_thread(kafka.kill)
                        killed = time.monotonic()
                        result.fired["Kafka killed"] += 1
                        await asyncio.sleep(away)
                        await asyncio.to_thread(kafka.start)
                        back = time.monotonic()
                        first = await _first_event(db)
                    quiet, left = await until_quiet(db, QUIET_SECONDS_MAX)
                    delivered = time.monotonic() - back
                    for said in (*fleet.troubles(), *([left] if left else [])):
                        result.violated(said)
                    for said in await asyncio.to_thread(_out_of_order, kafka, await _outbox_order(db)):
                        result.violated(said)
                    await settle(db, result, orders, load)
        _judge(result, load, killed, back, first, delivered)
        result.cases = payments
        result.extra["quiet_seconds"] = round(quiet, 1)
    finally:
        await asyncio.to_thread(kafka.kill)
        shutil.rmtree(folder, ignore_errors=True)
    return result


def _judge(result: PartResult, load: TimedLoad, killed: float, back: float, first: float, delivered: float) -> None:
    well = [seconds for at, seconds in load.asked if at < killed]
    without = [seconds for at, seconds in load.asked if killed <= at < back]
    p99_well, p99_without = _p99(well), _p99(without)
    ratio = p99_without / p99_well if p99_well else 0.0
    failed = {status: number for status, number in load.answers.items() if status not in ("200", "201", "409")}
    result.extra |= {
        "away_seconds": round(back - killed, 1),
        "checkouts_while_away": len(without),
        "failed_checkouts": sum(failed.values()),
        "checkout_p99_ms": {"before": round(p99_well * 1000, 1), "while_away": round(p99_without * 1000, 1)},
        "checkout_p99_ratio": round(ratio, 2),
        "first_event_seconds": round(first, 2),
        "delivered_seconds": round(delivered, 1),
        "answers": dict(sorted(load.answers.items())),
    }
    if failed:
        result.violated(f"checkouts were refused while Kafka was away: {failed}")
    if result.too_long(first, FIRST_EVENT_SECONDS_MAX):
        result.violated(f"the first event came {first:.1f} s after Kafka was back, not within 2 s")
    if result.too_long(delivered, DELIVERED_SECONDS_MAX):
        result.violated(f"delivered {delivered:.0f} s after Kafka was back, not within 60 s")
    if min(len(well), len(without)) >= P99_SAMPLES_MIN and ratio > P99_RATIO_MAX:
        result.violated(f"checkouts took {ratio:.2f} times as long (p99) while Kafka was away")


def _p99(seconds: list[float]) -> float:
    return quantiles(seconds, n=100)[98] if len(seconds) > 1 else 0.0


@dataclass(slots=True)
class TimedLoad(Load):
    """Writes down how long each answer took, and when it was asked for."""

    asked: list[tuple[float, float]] = field(default_factory=list[tuple[float, float]])

    async def _until_told(self, ask: Callable[[int], Awaitable[int]], patient: bool = False) -> Any:
        async def timed(port: int) -> int:
            began = time.monotonic()
            try:
                return await ask(port)
            finally:
                self.asked.append((began, time.monotonic() - began))

        return await Load._until_told(self, timed, patient)


HEARD_VIA_KAFKA = """
select exists (select from workers where service = 'outbox-relay' and expires_at > clock_timestamp())
  and (select count(*) from workers where expires_at > clock_timestamp()) >= %(crew)s
"""


async def _until_relaying(db: Database) -> None:
    """Until everybody is there."""
    deadline = time.monotonic() + READY_SECONDS_MAX
    while time.monotonic() < deadline:
        async with db.transaction("verify", read_only=True) as tx:
            if await tx.value(HEARD_VIA_KAFKA, {"crew": len(CREW) - 2}):
                return
        await asyncio.sleep(POLL_SECONDS)
    raise TimeoutError("the fleet is not complete")


PROCESSED_SINCE = "select exists (select from processed_events where processed_at > %(at)s)"


async def _first_event(db: Database) -> float:
    """How long it takes from now until some group has processed something."""
    began = time.monotonic()
    async with db.transaction("verify", read_only=True) as tx:
        at = tx.now
    while time.monotonic() - began < DELIVERED_SECONDS_MAX:
        async with db.transaction("verify", read_only=True) as tx:
            if await tx.value(PROCESSED_SINCE, {"at": at}):
                break
        await asyncio.sleep(POLL_SECONDS)
    return time.monotonic() - began


OUTBOX_ORDER = "select topic, partition_key, event_id::text from outbox order by id"


async def _outbox_order(db: Database) -> dict[tuple[str, str], list[str]]:
    order: dict[tuple[str, str], list[str]] = defaultdict(list)
    async with db.transaction("verify", read_only=True) as tx:
        for topic, key, event in await tx.tuples(OUTBOX_ORDER):
            order[topic, key].append(event)
    return order


def _out_of_order(kafka: KafkaServer, expected: dict[tuple[str, str], list[str]]) -> list[str]:
    """What is missing from the topics, or stands there in another order than in the outbox. (Each may stand twice.)"""
    reader = Client({"bootstrap.servers": kafka.address, "group.id": "verify", "enable.partition.eof": True})
    places = [TopicPartition(topic, n, OFFSET_BEGINNING) for topic in TOPICS for n in range(PARTITIONS)]
    reader.assign(places)
    found: dict[tuple[str, str], dict[str, None]] = defaultdict(dict)
    ended = 0
    deadline = time.monotonic() + READ_SECONDS_MAX
    while ended < len(places) and time.monotonic() < deadline:
        for record in reader.consume(1000, 0.2):
            if record.error():
                ended += 1
                continue
            key, headers = record.key(), dict(record.headers() or [])
            event = headers["ce_id"]
            assert key is not None
            assert isinstance(event, bytes)
            found[str(record.topic()), key.decode()].setdefault(event.decode())
    reader.close()
    wrong = [place for place, events in expected.items() if list(found.get(place, {})) != events]
    return [f"{topic} of {key} is not in the order of the outbox" for topic, key in wrong]
