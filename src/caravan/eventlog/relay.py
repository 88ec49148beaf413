"""outbox-relay: what the outbox says goes to Kafka's topics, in order; nothing is taken for sent before Kafka says so.

The relay is a group of the log in PostgreSQL: its members hold leases on cursors and read windows. A page is handed to
an idempotent producer that never gives up on a record; when every delivery report is in, the cursor moves. So a record
may come twice (a relay that died before its cursor moved, one that was frozen while another took over), but whoever
sends begins at a stored place and leaves nothing out: what comes for the first time is in order.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import UUID

import msgspec
import structlog
from confluent_kafka import KafkaError, KafkaException, Message, Producer

from caravan.db import Database
from caravan.db.wake import Wake
from caravan.eventlog import postgres_log
from caravan.eventlog.carrier import RELAY_GROUP, register_relay
from caravan.eventlog.codec import Envelope
from caravan.eventlog.consumer import KNOWN_TYPES, Consumer
from caravan.eventlog.kafka_client import (
    DEAD_LETTER_TOPIC,
    RECORD_BYTES_MAX,
    Kafka,
    KafkaUnavailable,
    Line,
    unavailable,
)
from caravan.eventlog.kafka_dead_letters import list_unmirrored, mark_mirrored
from caravan.eventlog.kafka_records import headers_of, value_of
from caravan.eventlog.kafka_thread import ClientThread
from caravan.eventlog.postgres_log import Cursor
from caravan.eventlog.subscription import Subscription
from caravan.eventlog.workers import HEARTBEAT_SECONDS, Worker
from caravan.events import BY_TYPE

PAGE_EVENTS_MAX = 1000
REPORT_SECONDS = 1.0  # how long one turn waits for the delivery reports of its page
DROP_SECONDS = 1.5  # less than a worker has for stopping
LOOK_SECONDS = 2.0  # how long one turn waits for a broker to show itself
MIRRORED_MAX = 100
OTHER_TOPIC = "purchase-status"  # of a type that this release does not know; each group parks it

log: structlog.stdlib.BoundLogger = structlog.get_logger()

Reported = Callable[[KafkaError | None, Message], None]


class Undeliverable(Exception):
    """Kafka refuses this very record, and would again."""


def _place(cursor: Cursor) -> tuple[object, ...]:
    return cursor.window_start, cursor.window_end, cursor.last_id, cursor.life


@dataclass(slots=True)
class Flight:
    """A page on its way. `place`: where its cursor stood; `failed`: the first bad report."""

    place: tuple[object, ...]
    moved: Cursor
    events: int
    reported: int = 0
    failed: KafkaError | None = None

    def report(self, error: KafkaError | None, _message: Message) -> None:
        self.reported += 1
        self.failed = self.failed or error


@dataclass(slots=True)
class Outlet:
    """A producer and its thread. Whatever became of `open`, `end` it."""

    kafka: Kafka
    line: Line
    thread: ClientThread = field(default_factory=lambda: ClientThread("kafka relay"))
    producer: Producer | None = None

    async def open(self) -> None:
        """Raises KafkaUnavailable and BadSettings, as ensure_topics does."""
        if self.producer is None:
            await self.thread.call(self._open)

    def _open(self) -> None:
        self.kafka.ensure_topics(LOOK_SECONDS)
        self.producer = Producer(
            self.kafka.common(
                self.line,
                **{
                    "enable.idempotence": True,
                    "acks": "all",
                    "message.timeout.ms": 0,  # never give up on one: what comes behind it must not overtake
                    "linger.ms": 100,  # a page goes out whole, as few batches: `wait` flushes, which does not linger
                    "compression.type": "lz4",
                    "message.max.bytes": RECORD_BYTES_MAX,
                    "partitioner": "murmur2_random",  # as the Java clients do
                    "allow.auto.create.topics": False,
                },
            )
        )

    async def send(self, records: Sequence[dict[str, Any]], report: Reported) -> None:
        """Queue `records` (the arguments of `produce`). Raises Undeliverable for one that the client refuses."""
        producer = self.producer
        assert producer is not None

        def queue() -> None:
            for record in records:
                try:
                    producer.produce(**record, on_delivery=report)
                except KafkaException as error:
                    said: KafkaError = error.args[0]
                    raise Undeliverable(f"{said.name()}: {said.str()}") from None
                except BufferError:  # another flight fills it
                    raise KafkaUnavailable("Kafka: the relay's queue is full, nobody takes from it") from None

        await self.thread.call(queue)

    async def wait(self, seconds: float) -> None:
        """Until all that was sent is reported, or for `seconds`."""
        producer = self.producer
        assert producer is not None
        await self.thread.call(producer.flush, seconds)

    def end(self) -> Future[object]:
        """What is queued is taken back, where it has not gone out yet; the next producer begins at the stored place."""
        return self.thread.end(self._end)

    def _end(self) -> None:
        producer, self.producer = self.producer, None
        if producer is not None:
            producer.purge(in_queue=True, in_flight=True)
            producer.flush(REPORT_SECONDS)


class Relay(Consumer):
    """One relay; several share the cursors."""

    def __init__(self, db: Database, worker: Worker, kafka: Kafka, *, wake: Wake | None = None) -> None:
        nothing = Subscription(group=RELAY_GROUP, service="outbox-relay", label="OutboxRelay", handlers={})
        super().__init__(db, nothing, worker, wake=wake, page_events_max=PAGE_EVENTS_MAX)
        self._types = KNOWN_TYPES
        self._kafka = kafka
        self._line = Line(worker.name)
        self._outlet = Outlet(kafka, self._line)
        self._flights: dict[UUID, Flight] = {}
        self._mirror_at = 0.0

    async def run(self, stop: asyncio.Event) -> None:
        try:
            await super().run(stop)
        finally:
            self._outlet.end()

    async def enter(self) -> None:
        async with self.db.transaction(self.worker.service) as tx:
            await register_relay(tx)
        await super().enter()

    async def run_once(self) -> int:
        await self._outlet.open()
        done = await super().run_once()
        await self._mirror_if_due()
        return done

    async def leave(self) -> None:
        await self._drop()
        await super().leave()

    async def _drop(self) -> None:
        """Send anew, from the stored places on; a producer that does not come back is not waited for."""
        self._flights.clear()
        outlet, self._outlet = self._outlet, Outlet(self._kafka, self._line)
        await asyncio.wait({asyncio.wrap_future(outlet.end())}, timeout=DROP_SECONDS)

    # -------------------------------------------------------------- one page

    async def _page(self, cursor: Cursor) -> int:
        """Send the next page, or wait on for the one that is in the air; the number of events got past.

        No transaction is open meanwhile: Kafka may be away for hours.
        """
        flight = self._flights.get(cursor.id)
        if flight is None or flight.place != _place(cursor):
            flight = await self._depart(cursor)
        if flight is None:
            return 0
        await self._outlet.wait(REPORT_SECONDS)
        if flight.failed is not None:
            await self._start_over(flight.failed)
        if flight.reported < flight.events:
            raise KafkaUnavailable(str(unavailable(self._line.last or KafkaError(KafkaError._TIMED_OUT))))
        self._line.well()
        async with self.db.transaction(self.worker.service) as tx:
            locked = await postgres_log.lock_cursor(tx, cursor, self.worker.name, self.worker.incarnation)
            moved = replace(flight.moved, partitions=locked.partitions)
            await postgres_log.move_cursor(tx, moved)
        del self._flights[cursor.id]
        self._cursors[cursor.id] = moved
        self._flowed(cursor.id, self._limit(cursor.id), flight.events)
        return flight.events

    async def _depart(self, cursor: Cursor) -> Flight | None:
        """Read a page and queue it; None where the rest of the window is nobody's."""
        limit = self._limit(cursor.id)
        async with self.db.transaction(self.worker.service) as tx:
            cursor, page = await self._read(tx, cursor, limit)
        moved = cursor.finished() if len(page) < limit else replace(cursor, last_id=page[-1][0])
        if not page:
            self._cursors[cursor.id] = moved
            return None
        self._batch_began = time.perf_counter()
        flight = Flight(_place(cursor), moved, len(page))
        await self._outlet.send([self._record(envelope) for _position, envelope in page], flight.report)
        self._flights[cursor.id] = flight
        return flight

    def _record(self, envelope: Envelope) -> dict[str, Any]:
        kind = BY_TYPE.get(envelope.type)
        return {
            "topic": self._kafka.named(kind.topic if kind else OTHER_TOPIC),
            "key": envelope.partitionkey.encode(),
            "value": value_of(envelope),
            "headers": headers_of(envelope),
        }

    async def _start_over(self, error: KafkaError) -> None:
        """A bad report says that a record will never arrive by itself: everything in the air is sent anew, in order."""
        await self._drop()
        if error.code() == KafkaError.MSG_SIZE_TOO_LARGE:
            raise Undeliverable(f"{error.name()}: {error.str()}")
        raise unavailable(error, self._line.last)

    # -------------------------------------------------------------- dead letters

    async def _mirror_if_due(self) -> None:
        now = asyncio.get_running_loop().time()
        if now < self._mirror_at:
            return
        self._mirror_at = now + HEARTBEAT_SECONDS
        async with self.db.transaction(self.worker.service, read_only=True) as tx:
            letters = await list_unmirrored(tx, MIRRORED_MAX)
        if not letters:
            return
        sent: list[KafkaError | None] = []
        await self._outlet.send([self._letter(each) for each in letters], lambda error, _message: sent.append(error))
        await self._outlet.wait(REPORT_SECONDS)
        if len(sent) == len(letters) and not any(sent):
            async with self.db.transaction(self.worker.service) as tx:
                await mark_mirrored(tx, [each["id"] for each in letters])

    def _letter(self, row: dict[str, Any]) -> dict[str, Any]:
        told = ("consumer_group", "event_id", "event_type", "correlation_id", "code", "error", "attempts")
        headers = [(f"dead_letter_{name}", str(row[name]).encode()) for name in told if row[name] is not None]
        return {
            "topic": self._kafka.named(DEAD_LETTER_TOPIC),
            "key": str(row["event_id"]).encode(),
            "value": msgspec.json.encode(row["envelope"]),
            "headers": [("dead_letter_id", str(row["id"]).encode()), *headers],
        }
