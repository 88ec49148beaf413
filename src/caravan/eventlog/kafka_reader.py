"""One membership in a Kafka consumer group. Everything here blocks: each reader has a `thread` of its own.

Offsets are committed for what `done` was told, never for what was merely read, and only for partitions that are ours
at that moment. A partition without an offset starts at its beginning: by a seek, for `auto.offset.reset` is `error`.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable
from contextlib import suppress
from typing import Any

import structlog
from confluent_kafka import OFFSET_BEGINNING, KafkaError, KafkaException, Message, TopicPartition
from confluent_kafka import Consumer as Client

from caravan.eventlog.kafka_client import ASK_SECONDS, Kafka, Line, in_words, unavailable
from caravan.eventlog.kafka_records import Record, read_record
from caravan.eventlog.kafka_thread import ClientThread
from caravan.events import BY_TYPE

# Each topic is shared out evenly, and a student's partitions of all topics are one member's. (Others balance the number
# of partitions: all of a busy topic may be one member's.) Since Kafka 4 the broker does it, member by member, and when
# it was away everybody goes on at once; heartbeats and sessions are its own settings (group.consumer.*) then. Before,
# everybody stops to share anew: a member that is silent for 6 s, as short as brokers allow, loses its partitions.
CONSUMER = {"group.protocol": "consumer", "group.remote.assignor": "range"}
CLASSIC = {
    "group.protocol": "classic",
    "partition.assignment.strategy": "range",
    "session.timeout.ms": 6000,
    "heartbeat.interval.ms": 500,
}
CLOSE_SECONDS = 1.5  # less than a worker has for stopping
LEAVE_SECONDS = 5.0  # for giving the partitions back, which needs nobody's answer
SERVE_SECONDS = 0.02
COMMIT_SECONDS = 1.0  # how much is done again, and known, where a worker is killed
FETCH_WAIT_MS = 1000  # how long a broker keeps a question that it has no answer to; an answer goes out at once
BUSY_RECORDS = 64  # a poll that brought so many: more are on their way,
GATHER_SECONDS = 0.02  # and the next one is given the time to bring them as well
END = -1  # of a partition, asked by time

log: structlog.stdlib.BoundLogger = structlog.get_logger()

Place = tuple[str, int]


class OffsetGone(Exception):
    """Kafka no longer has what comes next for the group in `places`."""

    def __init__(self, places: list[Place]) -> None:
        super().__init__(", ".join(f"{topic}/{partition}" for topic, partition in places))
        self.places = places


class Reader:
    """`open` it, then `take`; whatever became of that, `close` gives everything back."""

    def __init__(self, kafka: Kafka, group: str, topics: Iterable[str], types: Collection[str], name: str) -> None:
        """`types`: what the group hears; other events that we know are not opened."""
        self.thread = ClientThread(f"kafka {name}")
        self._kafka = kafka
        self._topics = [kafka.named(topic) for topic in topics]
        self._line = Line(name)
        self._others = frozenset(each.encode() for each in BY_TYPE.keys() - set(types))
        self._offsets: dict[Place, int] = {}  # behind what is done, of our partitions
        self._moved: set[Place] = set()  # those that Kafka has not been told of
        self._told_at = 0.0
        self._found: list[Record] = []  # by this poll so far
        self._busy = False
        self._ours: set[Place] = set()
        self._leaving = False
        self._config = kafka.common(
            self._line,
            **{
                "group.id": kafka.named(group),
                "enable.auto.commit": False,
                "enable.auto.offset.store": False,
                "auto.offset.reset": "error",
                **(CLASSIC if kafka.settings.kafka_group_protocol == "classic" else CONSUMER),
                "fetch.wait.max.ms": FETCH_WAIT_MS,
                "queued.min.messages": 2000,
                "topic.metadata.refresh.interval.ms": 30_000,
                "allow.auto.create.topics": False,
            },
        )
        self._open: Client | None = None

    def open(self, seconds: float) -> None:
        """Look at the topics and join. Raises KafkaUnavailable, BadSettings."""
        self._kafka.ensure_topics(seconds)
        self._open = Client(self._config)
        self._open.subscribe(self._topics, on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_lost)

    @property
    def _client(self) -> Client:
        assert self._open is not None
        return self._open

    def take(self, limit: int, seconds: float) -> list[Record]:
        """What is there, at most `limit` records, and what others hear between them; waits `seconds` for one.

        Raises KafkaUnavailable, OffsetGone.
        """
        self._tell_if_due()
        self._found = []
        try:
            first = self._client.poll(seconds)
            messages = [] if first is None else [first]
            until = time.monotonic() + (GATHER_SECONDS if self._busy else 0)
            while messages:
                self._found += self._read(messages)
                wanted = limit - sum(not record.others for record in self._found)
                if wanted <= 0:
                    break
                # (It waits for `wanted` records, also where few come.)
                messages = self._client.consume(wanted, max(0, until - time.monotonic()))
        except KafkaException as error:
            raise unavailable(error, self._line.last) from None
        self._busy = len(self._found) >= BUSY_RECORDS
        if self._found:
            self._line.well()
        return self._found

    def _read(self, messages: list[Message]) -> list[Record]:
        records: list[Record] = []
        for message in messages:
            if (error := message.error()) is not None:
                self._judge(error, message)
                continue
            topic, partition, offset = message.topic(), message.partition(), message.offset()
            assert topic is not None
            assert partition is not None
            assert offset is not None
            if (topic, partition) in self._ours:  # else it was revoked while we polled
                headers: Any = message.headers()
                key, value = message.key(), message.value()
                records.append(read_record(topic, partition, offset, key, value, headers, self._others))
        return records

    def done(self, records: Iterable[Record]) -> None:
        """Their effects are durable: Kafka is told soon, without waiting; on leaving a partition it is told again."""
        for record in records:
            place = (record.topic, record.partition)
            if place in self._ours:
                self._offsets[place] = record.offset + 1
                self._moved.add(place)
        self._tell_if_due()

    def behind(self, seconds: float = ASK_SECONDS) -> int:
        """How many records of our partitions are still to come. Raises KafkaUnavailable."""
        try:
            # First whether anybody answers: of a broker that is away the client has forgotten what partitions there
            # are, and what it says of them then (_UNKNOWN_PARTITION) sounds like trouble of its own.
            self._client.list_topics(timeout=seconds)
            if not self._ours:
                self._line.well()
                return 0
            positions = self._client.position([TopicPartition(*place) for place in self._ours])
            ends = self._client.offsets_for_times(
                [TopicPartition(place.topic, place.partition, END) for place in positions], timeout=seconds
            )
        except KafkaException as error:
            raise unavailable(error, self._line.last) from None
        self._line.well()
        at = {(place.topic, place.partition): place.offset for place in positions if place.offset >= 0}
        return sum(max(0, end.offset - at.get((end.topic, end.partition), end.offset)) for end in ends)

    def begin_anew(self, places: list[Place]) -> None:
        """From the oldest record that Kafka has. Raises KafkaUnavailable."""
        self._let_offsets_go(places)
        try:
            for topic, partition in places:
                low, _high = self._client.get_watermark_offsets(
                    TopicPartition(topic, partition), timeout=ASK_SECONDS, cached=False
                ) or (0, 0)
                if (topic, partition) in self._ours:
                    self._client.commit(offsets=[TopicPartition(topic, partition, low)], asynchronous=False)
                    self._client.seek(TopicPartition(topic, partition, low))
        except KafkaException as error:
            raise unavailable(error, self._line.last) from None

    @property
    def trouble(self) -> str | None:
        """What is wrong with the connection, in words."""
        return None if self._line.last is None else f"Kafka: {in_words(self._line.last)}"

    def close(self) -> None:
        """Tell what is done, and leave the group: others go on at once."""
        if self._open is None:
            return
        if self._line.last is None:  # else nobody is there to be told: what is done comes again, and is known
            self._commit(self._ours, wait=True)
        if self._give_back():
            self._client.close()
        else:
            log.warning("Kafka: a client is dropped that did not leave its group in time", client=self._line.who)
            self._open = None  # its last reference: destroyed without another word, here and now

    # -------------------------------------------------------------- within

    def _give_back(self) -> bool:
        """Leave the group while the client still lives; whether it did.

        One that is closed with partitions, or with a rebalance on its way, calls us back when its end may have begun:
        what it asks itself then is never answered, and it holds the interpreter meanwhile, so that the whole process
        stands still for good (librdkafka's issues 4041 and 4884; seen). Without partitions it has nothing to say.
        """
        self._leaving = True
        with suppress(KafkaException):
            self._client.unsubscribe()
        until = time.monotonic() + LEAVE_SECONDS
        while time.monotonic() < until:
            with suppress(KafkaException):
                if self._client.poll(SERVE_SECONDS) is None and not self._client.assignment():
                    return True
        return False

    def _tell_if_due(self) -> None:
        """A commit per page would be a tenth of what a busy broker does for us."""
        now = time.monotonic()
        if self._moved and now >= self._told_at + COMMIT_SECONDS:
            self._told_at = now
            moved, self._moved = self._moved, set()
            self._commit(moved, wait=False)

    def _commit(self, places: set[Place], *, wait: bool) -> None:
        offsets = [TopicPartition(*place, self._offsets[place]) for place in places if place in self._offsets]
        if not offsets:
            return
        try:
            if wait:
                self._client.commit(offsets=offsets, asynchronous=False)
            else:
                self._client.commit(offsets=offsets, asynchronous=True)
        except KafkaException as error:
            # The group moved on without us, or nobody is there: what is done comes again, and is known.
            log.debug("offsets not committed", client=self._line.who, error=str(error))

    def _on_assign(self, client: Client, given: list[TopicPartition]) -> None:
        self._ours |= {(each.topic, each.partition) for each in given}
        try:
            stored = client.committed(given, timeout=ASK_SECONDS) if given and not self._leaving else given
        except KafkaException:
            stored = given  # the client asks itself, later; one without an offset is then an error, see _judge
        else:
            for each in stored:
                if each.offset < 0:
                    each.offset = OFFSET_BEGINNING
        if self._kafka.settings.kafka_group_protocol == "classic":
            client.assign(stored)
        else:
            client.incremental_assign(stored)

    def _on_revoke(self, _client: Client, taken: list[TopicPartition]) -> None:
        places = {(each.topic, each.partition) for each in taken}
        self._commit(places, wait=False)  # a broker that is away must not hold up the turn
        self._forget(places)

    def _on_lost(self, _client: Client, lost: list[TopicPartition]) -> None:
        """They are somebody else's already: too late to say anything."""
        self._forget({(each.topic, each.partition) for each in lost})

    def _forget(self, places: set[Place]) -> None:
        """Also what this poll has found there: it comes to whoever has them now, perhaps to us again, in order."""
        self._ours -= places
        self._found = [each for each in self._found if (each.topic, each.partition) not in places]
        self._let_offsets_go(places)

    def _let_offsets_go(self, places: Iterable[Place]) -> None:
        for place in places:
            self._moved.discard(place)
            self._offsets.pop(place, None)

    def _judge(self, error: KafkaError, message: Any) -> None:
        if error.code() == KafkaError._AUTO_OFFSET_RESET:
            place = (message.topic(), message.partition())
            try:
                [stored] = self._client.committed([TopicPartition(*place)], timeout=ASK_SECONDS)
            except KafkaException as refused:
                raise unavailable(refused, self._line.last) from None
            if stored.offset >= 0:
                raise OffsetGone([place])
            self._client.seek(TopicPartition(*place, OFFSET_BEGINNING))
        elif error.fatal() or error.code() == KafkaError.UNKNOWN_TOPIC_OR_PART:
            raise unavailable(error, self._line.last)
        elif error.code() == KafkaError._MAX_POLL_EXCEEDED:
            log.warning("Kafka gave our partitions to others: a batch took too long", client=self._line.who)
        else:
            log.debug("Kafka said", client=self._line.who, error=error.str())
