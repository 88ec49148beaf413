"""Each test runs on the log in PostgreSQL, on librdkafka's mock cluster (classic groups), and on a real Kafka."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from caravan.db import Database
from caravan.eventlog import kafka_log, relay
from caravan.eventlog.kafka_client import Kafka
from caravan.settings import load_settings
from tests.conformance.logs import Log
from tests.kafka.mock import MockKafka
from tests.kafka.server import KafkaServer

PARTITIONS = 4


def _prefix() -> str:
    """Topics and groups of one test's own, whoever else uses the broker."""
    return f"t{secrets.token_hex(4)}-"


@pytest.fixture(scope="session")
def mock_kafka() -> Iterator[MockKafka]:
    with MockKafka() as mock:
        yield mock


def kafka_of(address: str, prefix: str, protocol: str = "consumer") -> Kafka:
    return Kafka(
        load_settings(
            {
                "KAFKA_BROKER": address,
                "CARAVAN_KAFKA_PREFIX": prefix,
                "CARAVAN_KAFKA_PARTITIONS": str(PARTITIONS),
                "CARAVAN_KAFKA_GROUP_PROTOCOL": protocol,
            }
        )
    )


@pytest.fixture
def kafka(kafka_server: KafkaServer) -> Kafka:
    """Topics and groups of this test's own, on the real Kafka."""
    return kafka_of(kafka_server.address, _prefix())


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turns that wait for nothing are short; so is the look at the topics, which the mock only half answers."""
    monkeypatch.setattr(kafka_log, "TAKE_SECONDS", 0.1)
    monkeypatch.setattr(kafka_log, "LOOK_SECONDS", 0.5)
    monkeypatch.setattr(relay, "LOOK_SECONDS", 0.5)
    monkeypatch.setattr(relay, "REPORT_SECONDS", 0.3)


@pytest.fixture(params=["postgres", "mock", "kafka"])
async def log(request: pytest.FixtureRequest, db: Database, hasty: None) -> AsyncIterator[Log]:
    kafka: Any = None
    if request.param == "mock":
        mock: MockKafka = request.getfixturevalue("mock_kafka")
        kafka = kafka_of(mock.address, _prefix(), "classic")
        mock.make_topics([kafka.named(topic) for topic in kafka.topics], PARTITIONS)
    elif request.param == "kafka":
        kafka = request.getfixturevalue("kafka")
    log = Log(request.param, db, kafka)
    yield log
    await log.close()
