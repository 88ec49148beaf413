"""A member that gets nowhere: ended by its watchdog, or overtaken by another one in the middle of its batch."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from caravan.db import Database, Tx
from caravan.eventlog import kafka_log, kafka_reader
from caravan.eventlog.kafka_client import Kafka, KafkaUnavailable
from caravan.eventlog.kafka_log import Stuck
from caravan.eventlog.kafka_reader import Reader
from caravan.events import PurchaseConfirmed, PurchaseCreated
from tests.conformance.conftest import hasty, kafka
from tests.conformance.logs import Group, Log, confirmed, effects, say

__all__ = ["hasty", "kafka"]

PATIENCE_SECONDS = 60.0


@pytest.fixture
async def log(db: Database, kafka: Kafka, hasty: None) -> AsyncIterator[Log]:
    log = Log("kafka", db, kafka)
    yield log
    await log.close()


async def turn_until_stuck(log: Log) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        await log.turn(log.members)


@pytest.mark.parametrize("answers", [True, False])
async def test_who_is_handed_nothing_while_events_wait_ends(
    log: Log, db: Database, monkeypatch: pytest.MonkeyPatch, answers: bool
) -> None:
    """Also where its client can't even tell how many wait, though somebody answers."""
    monkeypatch.setattr(kafka_log, "STUCK_SECONDS", 1.0)
    monkeypatch.setattr(kafka_log, "WATCH_SECONDS", 0.1)
    monkeypatch.setattr(Reader, "take", lambda _reader, _limit, seconds: time.sleep(seconds) or [])

    def behind(_reader: Reader, _seconds: float) -> int:
        if answers:
            return 1
        error = KafkaUnavailable("Kafka: _UNKNOWN_PARTITION")
        error.away = False
        raise error

    monkeypatch.setattr(Reader, "behind", behind)
    await log.member(Group())
    await say(db, confirmed())
    with pytest.raises(Stuck, match=r"1 events wait in Kafka, the oldest for"):
        await turn_until_stuck(log)


async def test_nobody_ends_for_a_broker_that_is_away(log: Log, db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kafka_log, "STUCK_SECONDS", 0.0)
    monkeypatch.setattr(kafka_log, "WATCH_SECONDS", 0.0)
    monkeypatch.setattr(Reader, "take", lambda _reader, _limit, seconds: time.sleep(seconds) or [])

    def fail(_reader: Reader, _seconds: float) -> int:
        raise KafkaUnavailable("Kafka: nobody answers at KAFKA_BROKER")

    monkeypatch.setattr(Reader, "behind", fail)
    member = await log.member(Group())
    await say(db, confirmed())
    for _ in range(3):
        with pytest.raises(KafkaUnavailable):
            await member.run_once()


async def test_what_could_not_come_during_an_outage_is_not_late_after_it(
    log: Log, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Back, a broker answers before it knows its partitions again."""
    monkeypatch.setattr(kafka_log, "STUCK_SECONDS", 1.0)
    monkeypatch.setattr(kafka_log, "WATCH_SECONDS", 0.0)
    monkeypatch.setattr(Reader, "take", lambda _reader, _limit, seconds: time.sleep(seconds) or [])
    away = True

    def fail(_reader: Reader, _seconds: float) -> int:
        error = KafkaUnavailable("Kafka: away, then back")
        error.away = away
        raise error

    monkeypatch.setattr(Reader, "behind", fail)
    member = await log.member(Group())
    await say(db, confirmed())
    deadline = time.monotonic() + 1.5
    while time.monotonic() < deadline:
        with pytest.raises(KafkaUnavailable):
            await member.run_once()
    away = False
    with pytest.raises(KafkaUnavailable):
        await member.run_once()
    with pytest.raises(Stuck):
        await turn_until_stuck(log)


class Slow(Group):
    """Its handler stays where it is, behind its effect, until it may go on."""

    def __init__(self) -> None:
        super().__init__()
        self.began, self.may = asyncio.Event(), asyncio.Event()

    async def apply(self, tx: Tx, events: Sequence[PurchaseConfirmed | PurchaseCreated]) -> None:
        await super().apply(tx, events)
        self.began.set()
        await self.may.wait()


async def test_a_session_that_is_lost_in_the_middle_of_a_batch_takes_no_effect_twice(
    log: Log, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    impatient: dict[str, Any] = {**kafka_reader.CONSUMER, "max.poll.interval.ms": 1000}
    monkeypatch.setattr(kafka_reader, "CONSUMER", impatient)
    slow = Slow()
    first = await log.member(slow, "effects-1")
    said = await say(db, *(confirmed() for _ in range(20)))
    working = asyncio.create_task(_turns(log, first))
    await asyncio.wait_for(slow.began.wait(), PATIENCE_SECONDS)
    monkeypatch.setattr(kafka_reader, "CONSUMER", {**impatient, "max.poll.interval.ms": 300_000})
    second = await log.member(Group(), "effects-2")
    theirs = asyncio.create_task(_turns(log, second))
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not await log.share([second]):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)
    assert await effects(db) == []  # the second one has them, and waits for the first one's claims
    slow.may.set()
    said += await say(db, *(confirmed() for _ in range(20)))
    while len(await effects(db)) < 40:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)
    for task in (working, theirs):
        task.cancel()
    await asyncio.wait((working, theirs))
    await log.settle(second)
    assert sorted(await effects(db)) == sorted(said)


async def _turns(log: Log, member: Any) -> None:
    while True:
        await log.turn([member])
