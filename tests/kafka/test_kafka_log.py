"""What only a log over Kafka can meet: a broker that comes and goes, records that are no events, offsets gone."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from confluent_kafka import Consumer as Client
from confluent_kafka import Producer, TopicPartition
from confluent_kafka.admin import AdminClient
from psycopg import errors as pg
from structlog.testing import capture_logs

from caravan.db import Database
from caravan.eventlog import carrier, dead_letters, kafka_log, kafka_reader, trail
from caravan.eventlog.carrier import Carrier
from caravan.eventlog.kafka_client import Kafka, KafkaUnavailable
from caravan.eventlog.kafka_records import read_record
from caravan.eventlog.lag import list_lag
from caravan.ids import new_id
from caravan.settings import BadSettings, load_settings
from tests import needs
from tests.conformance.conftest import hasty, kafka, kafka_of, mock_kafka
from tests.conformance.logs import Group, Log, confirmed, effects, say
from tests.kafka.mock import MockKafka
from tests.kafka.server import KafkaServer, missing

__all__ = ["hasty", "kafka", "mock_kafka"]


@pytest.fixture
async def log(db: Database, kafka: Kafka, hasty: None) -> AsyncIterator[Log]:
    log = Log("kafka", db, kafka)
    yield log
    await log.close()


@pytest.fixture
def own_server() -> Iterator[KafkaServer]:
    """A broker that is not started yet."""
    if lack := missing():
        needs.missing(lack)
    folder = Path(tempfile.mkdtemp(prefix="caravan-kafka-own-"))
    server = KafkaServer(folder)
    yield server
    server.kill()
    shutil.rmtree(folder)


def quiet(kafka: Kafka) -> dict[str, Any]:
    return {"bootstrap.servers": kafka.settings.kafka_broker, "log_level": 0}


async def done(db: Database, number: int) -> bool:
    return len(await effects(db)) >= number


async def parked(db: Database) -> list[dead_letters.DeadLetter]:
    async with db.transaction(read_only=True) as tx:
        return await dead_letters.list_dead_letters(tx)


def records(kafka: Kafka, topic: str, number: int) -> list[Any]:
    """A topic's records until `number` events are among them (some come twice), by partition and offset."""
    reader = Client({**quiet(kafka), "group.id": "looking", "auto.offset.reset": "error"})
    partitions = kafka.settings.kafka_partitions
    reader.assign([TopicPartition(kafka.named(topic), each, 0) for each in range(partitions)])
    found: list[Any] = []
    deadline = time.monotonic() + 15
    while len({str(sorted(record.headers())) for record in found}) < number and time.monotonic() < deadline:
        found += [record for record in reader.consume(number, 0.2) if not record.error()]
    reader.close()
    return sorted(found, key=lambda record: (record.partition(), record.offset()))


def committed(kafka: Kafka) -> int:
    """Before how many records the group `effects` stands, by Kafka's word."""
    reader = Client({**quiet(kafka), "group.id": kafka.named("effects")})
    topic = kafka.named("purchase-confirmed")
    places = reader.committed([TopicPartition(topic, each) for each in range(kafka.settings.kafka_partitions)])
    reader.close()
    return sum(max(0, place.offset) for place in places)


async def test_records_say_who_spoke_of_what(log: Log, db: Database) -> None:
    await log.member(Group())
    event = confirmed()
    await say(db, event)
    await log.until(lambda: done(db, 1))
    assert log.kafka
    [record] = await asyncio.to_thread(records, log.kafka, "purchase-confirmed", 1)
    headers = dict(record.headers())
    assert record.key() == str(event.student_id).encode()
    assert headers["ce_type"] == b"PURCHASE_CONFIRMED"
    assert headers["ce_source"] == b"payment-service"
    assert headers["ce_correlationid"] == str(event.payment_id).encode()
    read = read_record(record.topic(), 0, 0, record.key(), record.value(), record.headers())
    assert read.envelope
    assert read.envelope.event() == event


async def test_two_relays_keep_each_students_order(log: Log, db: Database) -> None:
    await log.member(Group())
    first = log.relay
    second = await log.relays("relay-2")
    students = [confirmed().student_id for _ in range(20)]  # some in either relay's half of the log
    said: dict[UUID, list[str]] = {student: [] for student in students}
    for round_ in range(30):
        events = [confirmed(students[(5 * round_ + n) % 20]) for n in range(5)]
        for event in events:
            said[event.student_id].append(str(event.payment_id))
        await say(db, *events)
        await log.turn([second])
    await log.until(lambda: done(db, 150), second, *log.members)
    assert first
    assert first.worker.events_done
    assert second.worker.events_done
    await second.leave()
    assert log.kafka
    found = await asyncio.to_thread(records, log.kafka, "purchase-confirmed", 150)
    for student, payments in said.items():
        theirs = [dict(each.headers()) for each in found if each.key() == str(student).encode()]
        sent = [headers["ce_correlationid"].decode() for headers in theirs]
        assert list(dict.fromkeys(sent)) == payments  # what comes for the first time is in order


async def test_an_absent_broker_is_waited_for_and_drained_in_order(
    db: Database, own_server: KafkaServer, hasty: None
) -> None:
    log = Log("kafka", db, kafka_of(own_server.address, ""))
    group = Group()
    student = confirmed().student_id
    member = await log.member(group)
    said = await say(db, *(confirmed(student) for _ in range(20)))
    await log.turn([member])
    async with db.transaction() as tx:
        lag = {each.group: each for each in await list_lag(tx)}
        assert lag["outbox-relay"].messages == lag["effects"].messages == 20
    own_server.start()
    await log.until(lambda: done(db, 20))
    own_server.kill()
    said += await say(db, *(confirmed(student) for _ in range(20)))
    with pytest.MonkeyPatch.context() as patch:  # a watchdog does not take this for trouble of its own client
        patch.setattr(kafka_log, "STUCK_SECONDS", 0.0)
        patch.setattr(kafka_log, "WATCH_SECONDS", 0.0)
        for _ in range(6):
            await log.turn([member])
    assert not await done(db, 21)
    async with db.transaction() as tx:
        lag = {each.group: each for each in await list_lag(tx)}
        assert lag["outbox-relay"].messages == 20  # not taken for sent
    own_server.start()
    await log.until(lambda: done(db, 40))
    assert await effects(db) == said
    await log.close()


async def test_records_that_are_no_events_are_parked_once_and_block_nobody(log: Log, db: Database) -> None:
    first = await log.member(Group(), "effects-1")
    assert log.kafka
    await log.until(lambda: _has_partitions(first))
    topic, producer = log.kafka.named("purchase-confirmed"), Producer(quiet(log.kafka))
    for partition in range(log.kafka.settings.kafka_partitions):
        producer.produce(topic, b"\x00\xffno event", partition=partition)
        headers: list[tuple[str, str | bytes | None]] = [("ce_id", b"\x00"), ("ce_type", b"x")]
        producer.produce(topic, b'{"a": "\\u0000"}', partition=partition, headers=headers)
    assert await asyncio.to_thread(producer.flush, 10) == 0
    said = await say(db, *(confirmed() for _ in range(20)))
    await log.until(lambda: done(db, 20), first)

    async def all_parked() -> bool:
        return len(await parked(db)) == 8

    await log.until(all_parked, first)
    assert {letter.code for letter in await parked(db)} == {"MALFORMED"}
    assert sorted(await effects(db)) == sorted(said)
    # The whole topic once more: nothing is done or parked twice, even what an operator has discarded meanwhile.
    async with db.transaction() as tx:
        await dead_letters.discard(tx, (await parked(db))[0].id, by="me", note="seen")
    await first.leave()
    log.members.clear()
    admin: Any = AdminClient(quiet(log.kafka))
    for deleted in admin.delete_consumer_groups([log.kafka.named("effects")]).values():
        deleted.result(10)
    second = await log.member(Group(), "effects-2")
    await log.until(lambda: _did(second, 20), second)
    await log.settle(second)
    assert len(await parked(db)) == 7
    assert sorted(await effects(db)) == sorted(said)


async def test_a_record_that_is_no_event_is_told_in_the_log_with_the_payment_that_it_names(
    log: Log, db: Database
) -> None:
    member = await log.member(Group(), "effects-1")
    assert log.kafka
    await log.until(lambda: _has_partitions(member))
    payment = str(new_id())
    headers: list[tuple[str, str | bytes | None]] = [("ce_type", b"x"), ("ce_correlationid", payment.encode())]
    producer = Producer(quiet(log.kafka))
    producer.produce(log.kafka.named("purchase-confirmed"), b"{ no JSON", headers=headers)
    assert await asyncio.to_thread(producer.flush, 10) == 0

    async def is_parked() -> bool:
        return len(await parked(db)) == 1

    with capture_logs() as lines:
        await log.until(is_parked, member)
        await log.settle(member)
    [letter] = await parked(db)
    assert (letter.code, letter.correlation_id) == ("MALFORMED", payment)
    [told] = [line for line in lines if line["event"].endswith("record parked in dead_letters")]
    assert (told["log_level"], told["correlation_id"], told["code"]) == ("error", payment, "MALFORMED")


async def test_dead_letters_are_mirrored(log: Log, db: Database) -> None:
    group, event = Group(), confirmed()
    group.poison = {event.payment_id}
    await log.member(group)
    await say(db, event)

    async def mirrored() -> bool:
        async with db.transaction() as tx:
            return bool(await tx.value("select count(*) from dead_letters where mirrored_at is not null"))

    await log.until(mirrored)
    assert log.kafka
    [record] = await asyncio.to_thread(records, log.kafka, "dead-letter-queue", 1)
    headers = dict(record.headers())
    assert headers["dead_letter_consumer_group"] == b"effects"
    assert headers["dead_letter_code"] == b"HANDLER_FAILED"


async def test_an_offset_that_is_gone_is_made_up_from_the_outbox(log: Log, db: Database) -> None:
    first = await log.member(Group(), "effects-1")
    said = await say(db, *(confirmed() for _ in range(10)))
    await log.until(lambda: done(db, 10), first)
    await first.leave()
    log.members.clear()
    said += await say(db, *(confirmed() for _ in range(30)))
    assert log.relay
    while await log.relay.run_once():
        pass
    # Kafka forgets everything so far, read or not.
    assert log.kafka
    topic, admin = log.kafka.named("purchase-confirmed"), AdminClient(quiet(log.kafka))
    everything = [TopicPartition(topic, each, -1) for each in range(log.kafka.settings.kafka_partitions)]
    for deleted in admin.delete_records(everything).values():
        deleted.result(10)
    second = await log.member(Group(), "effects-2")
    await log.until(lambda: done(db, 40), second)
    said += await say(db, *(confirmed() for _ in range(5)))
    await log.until(lambda: done(db, 45), second)
    assert sorted(await effects(db)) == sorted(said)


async def test_kafka_is_told_of_what_is_done_on_leaving_at_the_latest(
    log: Log, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kafka_reader, "COMMIT_SECONDS", 3600.0)
    first = await log.member(Group(), "effects-1")
    said = await say(db, *(confirmed() for _ in range(20)))
    await log.until(lambda: done(db, 20), first)
    said += await say(db, *(confirmed() for _ in range(20)))
    await log.until(lambda: done(db, 40), first)
    assert log.kafka
    assert await asyncio.to_thread(committed, log.kafka) < 40
    await first.leave()
    log.members.clear()
    assert await asyncio.to_thread(committed, log.kafka) == 40
    assert sorted(await effects(db)) == sorted(said)


class Witness(Client):
    """A client that knows when it is being closed."""

    closing = False

    def close(self) -> None:
        self.closing = True
        super().close()


class Watched(kafka_reader.Reader):
    """Notes what it was told, and whether by a client that was being closed."""

    def __init__(self, kafka: Kafka, name: str) -> None:
        super().__init__(kafka, "watched", ["purchase-confirmed"], [], name)
        self.told: list[tuple[str, bool]] = []

    def _on_assign(self, client: Any, given: list[TopicPartition]) -> None:
        self.told.append(("assign", client.closing))
        super()._on_assign(client, given)

    def _on_revoke(self, client: Any, taken: list[TopicPartition]) -> None:
        self.told.append(("revoke", client.closing))
        super()._on_revoke(client, taken)

    def enter(self) -> None:
        self.open(5.0)
        deadline = time.monotonic() + 20
        while not self._ours and time.monotonic() < deadline:
            self.take(1, 0.05)


async def test_a_client_gives_its_partitions_back_before_it_is_closed(
    kafka: Kafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is called back while it closes may wait for ever, and the whole interpreter with it."""
    monkeypatch.setattr(kafka_reader, "Client", Witness)
    stays, over = Watched(kafka, "stays"), asyncio.Event()
    await stays.thread.call(stays.enter)

    async def stay() -> None:
        while not over.is_set():
            await stays.thread.call(stays.take, 1, 0.02)

    staying = asyncio.create_task(stay())
    guests = [Watched(kafka, f"guest {number}") for number in range(6)]
    for number, guest in enumerate(guests):  # half of them go before they have anything, or just when
        await guest.thread.call(guest.enter if number % 2 else lambda guest=guest: guest.open(5.0))
        await asyncio.wrap_future(guest.thread.end(guest.close))
    over.set()
    await staying
    await asyncio.wrap_future(stays.thread.end(stays.close))
    told = [each for reader in (stays, *guests) for each in reader.told]
    assert ("revoke", False) in guests[1].told
    assert not [each for each in told if each[1]]


async def test_a_client_that_cannot_leave_its_group_is_dropped(kafka: Kafka, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kafka_reader, "Client", Witness)
    monkeypatch.setattr(kafka_reader, "LEAVE_SECONDS", 0)
    reader = Watched(kafka, "stuck")
    await reader.thread.call(reader.enter)
    await asyncio.wrap_future(reader.thread.end(reader.close))
    assert reader.told == [("assign", False)], "not closed: nobody is called back"


async def test_workers_fail_over_to_the_outbox_and_back(
    db: Database, mock_kafka: MockKafka, hasty: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kafka_log, "HEARTBEAT_SECONDS", 0.1)
    kafka = kafka_of(mock_kafka.address, "failover-", "classic")
    mock_kafka.make_topics([kafka.named(topic) for topic in kafka.topics], kafka.settings.kafka_partitions)
    log = Log("mock", db, kafka)
    await log.member(Group())
    said = await say(db, *(confirmed() for _ in range(10)))
    await log.until(lambda: done(db, 10))
    mock_kafka.down()
    try:
        said += await say(db, *(confirmed() for _ in range(10)))
        for _ in range(3):
            await log.turn(log.members)
        assert not await done(db, 11)
        async with db.transaction() as tx:
            assert await carrier.switch_carrier(tx, Carrier.POSTGRES_LOG)
        await log.until(lambda: done(db, 20))
    finally:
        mock_kafka.up()
    async with db.transaction() as tx:
        assert await carrier.switch_carrier(tx, Carrier.KAFKA)
        assert not await carrier.switch_carrier(tx, Carrier.KAFKA)
    said += await say(db, *(confirmed() for _ in range(10)))
    await log.until(lambda: done(db, 30))
    await log.settle()
    assert sorted(await effects(db)) == sorted(said)
    await log.close()


async def test_without_kafka_there_is_nothing_to_fail_over_from(db: Database) -> None:
    async with db.transaction() as tx:
        with pytest.raises(carrier.NoKafka):
            await carrier.switch_carrier(tx, Carrier.POSTGRES_LOG)


async def test_a_place_trails_behind_what_is_done(log: Log, db: Database) -> None:
    group = Group()
    await log.member(group)
    await say(db, *(confirmed() for _ in range(10)))
    await log.until(lambda: done(db, 10))
    walk = trail.Trail(db, "effects", group.subscription.types)
    await walk.step()
    await walk.step()
    assert await _passed(db) == 10
    group.failures = [pg.DeadlockDetected() for _ in range(1000)]
    await say(db, confirmed())
    await walk.step()
    await walk.step()
    assert await _passed(db) == 10  # one is not done
    group.failures.clear()
    await log.until(lambda: done(db, 11))
    await walk.step()
    await walk.step()
    assert await _passed(db) == 11


def test_topics_that_contradict_the_settings_are_one_line(kafka: Kafka) -> None:
    kafka.ensure_topics()
    kafka.ensure_topics()
    environ = {
        "KAFKA_BROKER": str(kafka.settings.kafka_broker),
        "CARAVAN_KAFKA_PREFIX": kafka.settings.kafka_prefix,
        "CARAVAN_KAFKA_PARTITIONS": "9",
    }
    with pytest.raises(BadSettings, match=r"^CARAVAN_KAFKA_PARTITIONS: is 9, but the topic \S+ has 4 partitions"):
        Kafka(load_settings(environ)).ensure_topics()
    environ["CARAVAN_KAFKA_PARTITIONS"] = "2"  # Kafka takes no partition away: nobody is told to
    with pytest.raises(BadSettings, match=r"has 4 partitions: set it to 4\.$"):
        Kafka(load_settings(environ)).ensure_topics()


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"KAFKA_BROKER": "127.0.0.1:1"}, "nobody answers at KAFKA_BROKER"),
        ({"KAFKA_BROKER": "no-such-host.invalid:9092"}, "KAFKA_BROKER"),
    ],
)
def test_a_broker_that_is_not_there_is_one_line(environ: dict[str, str], said: str) -> None:
    with pytest.raises(KafkaUnavailable, match=said):
        Kafka(load_settings(environ)).ensure_topics(1.0)


async def _has_partitions(member: Any) -> bool:
    return member._reader is not None and bool(member._reader._ours)


async def _did(member: Any, number: int) -> bool:
    return member.worker.events_done >= number


async def _passed(db: Database) -> int:
    """How many events lie before the group's place."""
    async with db.transaction() as tx:
        return await tx.value(
            """select count(*) from outbox o join log_cursors c on c.consumer_group = 'effects'
               where pg_visible_in_snapshot(o.xid, c.window_start)"""
        )
