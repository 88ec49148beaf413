"""Kafka for this installation: its clients' configuration, its topics, and its troubles in one line each.

Only modules named kafka_* and the relay import confluent_kafka, and only where KAFKA_BROKER is set.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import structlog
from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient
from confluent_kafka.admin._config import ConfigResource
from confluent_kafka.admin._resource import ResourceType
from confluent_kafka.cimpl import NewTopic

from caravan.errors import Transient
from caravan.eventlog.retention import LOG_DAYS
from caravan.events import TOPICS
from caravan.settings import BadSettings, Settings

DEAD_LETTER_TOPIC = "dead-letter-queue"
ASK_SECONDS = 5.0
MS_PER_HOUR = 3_600_000
# A record that the client refuses, so that the broker (1 MB by default) never has to.
RECORD_BYTES_MAX = 1_000_000

log: structlog.stdlib.BoundLogger = structlog.get_logger()

# librdkafka tells every failed connection, each second; `Kafka.heard` says it once, in our words.
_mute = logging.getLogger("caravan.librdkafka")
_mute.addHandler(logging.NullHandler())
_mute.propagate = False


class KafkaUnavailable(Transient):
    """Kafka does not answer, or not as it should; the message names what to look at. Waiting may help.

    `away`: nobody answers or lets us in. Otherwise the trouble may be this client's own.
    """

    away = True


_SENTENCES = {
    KafkaError._AUTHENTICATION: (
        "it refuses the credentials: look at CARAVAN_KAFKA_USERNAME, CARAVAN_KAFKA_PASSWORD and CARAVAN_KAFKA_SECURITY"
    ),
    KafkaError._RESOLVE: "no such host: look at KAFKA_BROKER",
    KafkaError._SSL: "no secure connection: look at CARAVAN_KAFKA_SECURITY and CARAVAN_KAFKA_CA_FILE",
    KafkaError._TRANSPORT: "nobody answers at KAFKA_BROKER, or not as CARAVAN_KAFKA_SECURITY says",
    KafkaError._ALL_BROKERS_DOWN: "nobody answers at KAFKA_BROKER, or not as CARAVAN_KAFKA_SECURITY says",
    KafkaError._TIMED_OUT: "nobody answers at KAFKA_BROKER in time",
    KafkaError._MSG_TIMED_OUT: "nobody answers at KAFKA_BROKER in time",
    KafkaError.TOPIC_AUTHORIZATION_FAILED: "CARAVAN_KAFKA_USERNAME may not use the topics",
    KafkaError.GROUP_AUTHORIZATION_FAILED: "CARAVAN_KAFKA_USERNAME may not use the consumer groups",
    KafkaError.CLUSTER_AUTHORIZATION_FAILED: "CARAVAN_KAFKA_USERNAME may not write idempotently or make topics",
}
_AWAY = frozenset(code for code in _SENTENCES if code < 0)  # the client's own codes, of its connection
# The more exact one stands where several are told of one failure.
_EXACT = (KafkaError._AUTHENTICATION, KafkaError._RESOLVE, KafkaError._SSL)


def in_words(error: KafkaError | None) -> str:
    if error is None:
        return "nobody answers at KAFKA_BROKER"
    return _SENTENCES.get(error.code(), f"{error.name()}: {error.str()}")


def unavailable(error: KafkaException | KafkaError, heard: KafkaError | None = None) -> KafkaUnavailable:
    """What failed, as an error to wait on; `heard`: what the client said meanwhile, often more exact."""
    said = error.args[0] if isinstance(error, KafkaException) else error
    known = said if isinstance(said, KafkaError) else None
    found = KafkaUnavailable("Kafka: " + in_words(heard if heard is not None and heard.code() in _EXACT else known))
    found.away = known is None or known.code() in _AWAY
    return found


@dataclass(slots=True)
class Line:
    """What one client says of its connection: told once when it changes, not each second."""

    who: str
    last: KafkaError | None = None

    def heard(self, error: KafkaError) -> None:
        """librdkafka's error_cb."""
        if self.last is not None and (self.last.code() == error.code() or self.last.code() in _EXACT):
            return
        if self.last is None:
            log.warning(f"Kafka: {in_words(error)}; waiting for it", client=self.who)
        self.last = error

    def well(self) -> None:
        if self.last is not None:
            log.info("Kafka answers again", client=self.who)
            self.last = None


@dataclass(frozen=True, slots=True)
class KafkaSeen:
    """What a cluster has of ours, and what it lacks: names of topics and of groups, as the cluster has them."""

    topics: list[str]
    topics_missing: list[str]
    groups: list[str]
    groups_missing: list[str]


@dataclass(frozen=True, slots=True)
class Kafka:
    """The cluster that KAFKA_BROKER names. Names of topics and groups are the contract's, behind our prefix."""

    settings: Settings
    topics: tuple[str, ...] = field(default=(*TOPICS, DEAD_LETTER_TOPIC))

    def named(self, name: str) -> str:
        """A topic's or a group's name as the cluster has it."""
        return self.settings.kafka_prefix + name

    def common(self, line: Line, **more: Any) -> dict[str, Any]:
        """A client's configuration; `line` hears what happens to its connection."""
        given = self.settings
        return {
            "bootstrap.servers": given.kafka_broker,
            "client.id": f"caravan-{line.who}",
            "security.protocol": given.kafka_security,
            **({"ssl.ca.location": str(given.kafka_ca_file)} if given.kafka_ca_file else {}),
            **(
                {
                    "sasl.mechanisms": given.kafka_sasl,
                    "sasl.username": given.kafka_username,
                    "sasl.password": given.kafka_password,
                }
                if given.kafka_username
                else {}
            ),
            "reconnect.backoff.ms": 50,
            "reconnect.backoff.max.ms": 1000,
            "socket.keepalive.enable": True,
            "error_cb": line.heard,
            "logger": _mute,
            **more,
        }

    def ensure_topics(self, seconds: float = ASK_SECONDS) -> None:
        """Make what is missing, check what is there; blocks.

        Raises KafkaUnavailable, and BadSettings for topics that contradict the settings.
        """
        with self._asking(seconds) as admin:
            names, present = self._list_topics(admin, seconds)
            self._make(admin, [name for name in names if name not in present])
            self._check(admin, present, seconds)

    def look(self, groups: Iterable[str], seconds: float = ASK_SECONDS) -> KafkaSeen:
        """What the cluster has of ours; nothing is made. Blocks; raises as `ensure_topics` does."""
        with self._asking(seconds) as admin:
            names, present = self._list_topics(admin, seconds)
            self._check(admin, present, seconds)
            asked: Any = admin.list_consumer_groups(request_timeout=seconds)
            joined = {each.group_id for each in asked.result(seconds * 2).valid}
            wanted = [self.named(group) for group in groups]
            return KafkaSeen(
                topics=[name for name in names if name in present],
                topics_missing=[name for name in names if name not in present],
                groups=[group for group in wanted if group in joined],
                groups_missing=[group for group in wanted if group not in joined],
            )

    @contextmanager
    def _asking(self, seconds: float) -> Generator[Any]:
        """An admin client; what fails inside is KafkaUnavailable, in words."""
        line = Line("topics")
        # An admin client tells its errors when it is polled; quietly, for whoever asked gets one in words.
        heard: list[KafkaError] = []
        admin: Any = AdminClient(self.common(line, error_cb=heard.append, **{"socket.timeout.ms": int(seconds * 1000)}))
        try:
            yield admin
        except KafkaException as error:
            admin.poll(0)
            exact = next((each for each in heard if each.code() in _EXACT), None)
            raise unavailable(error, exact) from None

    def _list_topics(self, admin: Any, seconds: float) -> tuple[list[str], dict[str, int]]:
        """Our topics' names, and the partitions of those that are there."""
        names = [self.named(name) for name in self.topics]
        found = admin.list_topics(timeout=seconds).topics
        return names, {name: len(found[name].partitions) for name in names if name in found}

    def _check(self, admin: Any, present: dict[str, int], seconds: float) -> None:
        self._check_partitions(present)
        self._check_retention(admin, present, seconds)

    def _make(self, admin: Any, names: list[str]) -> None:
        partitions, hours = self.settings.kafka_partitions, self.settings.kafka_retention_hours
        config = {"retention.ms": str(hours * MS_PER_HOUR)}
        wanted = [NewTopic(name, partitions, config=config) for name in names]
        made: dict[str, Any] = admin.create_topics(wanted, operation_timeout=ASK_SECONDS) if wanted else {}
        for name, future in made.items():
            try:
                future.result(ASK_SECONDS * 2)
                log.info("Kafka topic made", topic=name, partitions=partitions, retention_hours=hours)
            except KafkaException as error:
                said: KafkaError = error.args[0]
                if said.code() == KafkaError.TOPIC_ALREADY_EXISTS:
                    continue  # somebody else was quicker
                if said.retriable() or said.code() in (KafkaError._TIMED_OUT, KafkaError._TRANSPORT):
                    raise
                raise BadSettings(
                    f"KAFKA_BROKER: the topic {name} is missing and cannot be made ({said.str()}): make it with"
                    f" {partitions} partitions (CARAVAN_KAFKA_PARTITIONS)."
                ) from None

    def _check_partitions(self, found: dict[str, int]) -> None:
        """A student's events are in one partition: all topics have as many as was said."""
        wanted = self.settings.kafka_partitions
        for name, partitions in found.items():
            if partitions and partitions != wanted:
                more = f", or give the topic {wanted}" if partitions < wanted else ""  # a topic never gets fewer
                raise BadSettings(
                    f"CARAVAN_KAFKA_PARTITIONS: is {wanted}, but the topic {name} has {partitions} partitions: set it"
                    f" to {partitions}{more}."
                )

    def _check_retention(self, admin: Any, names: Iterable[str], seconds: float) -> None:
        """The outbox, which everything can be recovered from, keeps events longer than Kafka does."""
        resources = [ConfigResource(ResourceType.TOPIC, name) for name in names]
        asked: dict[Any, Any] = admin.describe_configs(resources, request_timeout=seconds) if resources else {}
        for resource, future in asked.items():
            try:
                entries = future.result(ASK_SECONDS * 2)
            except KafkaException:
                return  # who may not ask can't check; not a reason to stop
            kept_ms = int(entries["retention.ms"].value)
            if kept_ms < 0 or kept_ms >= LOG_DAYS * 24 * MS_PER_HOUR:
                kept = "for ever" if kept_ms < 0 else f"{kept_ms // MS_PER_HOUR} hours"
                raise BadSettings(
                    f"CARAVAN_KAFKA_RETENTION_HOURS: the topic {resource.name} keeps its records {kept}, longer than"
                    f" the outbox ({LOG_DAYS} days): set its retention.ms to"
                    f" {self.settings.kafka_retention_hours * MS_PER_HOUR}."
                )
