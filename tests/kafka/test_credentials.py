"""A broker that asks who is there: right and wrong passwords, and none at all."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from caravan.eventlog.kafka_client import Kafka, KafkaUnavailable
from caravan.settings import load_settings
from tests import needs
from tests.kafka.server import KafkaServer, missing

START_SECONDS_MAX = 120.0
PASSWORD = "right"

ASKS = """
listeners=SASL_PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=SASL_PLAINTEXT://127.0.0.1:{port}
listener.security.protocol.map=SASL_PLAINTEXT:SASL_PLAINTEXT,CONTROLLER:PLAINTEXT
inter.broker.listener.name=SASL_PLAINTEXT
sasl.mechanism.inter.broker.protocol=PLAIN
sasl.enabled.mechanisms=PLAIN
listener.name.sasl_plaintext.plain.sasl.jaas.config=org.apache.kafka.common.security.plain.PlainLoginModule required \
  username="broker" password="b" user_broker="b" user_caravan="{password}";
"""


@pytest.fixture(scope="module")
def asking() -> Iterator[KafkaServer]:
    if lack := missing():
        needs.missing(lack)
    folder = Path(tempfile.mkdtemp(prefix="caravan-kafka-sasl-"))
    server = KafkaServer(folder)
    server.configure(ASKS.format(port=server.port, controller=server.controller, password=PASSWORD))
    server.start(wait=False)
    deadline = time.monotonic() + START_SECONDS_MAX
    while True:
        try:
            kafka(server, PASSWORD).ensure_topics(2.0)
            break
        except KafkaUnavailable:
            assert time.monotonic() < deadline, server.log.read_text()[-2000:]
    yield server
    server.kill()
    shutil.rmtree(folder)


def kafka(server: KafkaServer, password: str | None) -> Kafka:
    environ = {"KAFKA_BROKER": server.address, "CARAVAN_KAFKA_PARTITIONS": "2"}
    if password:
        environ |= {
            "CARAVAN_KAFKA_SECURITY": "sasl_plaintext",
            "CARAVAN_KAFKA_SASL": "PLAIN",
            "CARAVAN_KAFKA_USERNAME": "caravan",
            "CARAVAN_KAFKA_PASSWORD": password,
        }
    return Kafka(load_settings(environ))


def test_the_right_password_opens(asking: KafkaServer) -> None:
    kafka(asking, PASSWORD).ensure_topics(10.0)


def test_a_wrong_password_is_one_line_with_the_settings_name(asking: KafkaServer) -> None:
    with pytest.raises(KafkaUnavailable, match="CARAVAN_KAFKA_PASSWORD") as refused:
        kafka(asking, "wrong").ensure_topics(5.0)
    assert refused.value.away
    assert "wrong" not in str(refused.value)
    assert "\n" not in str(refused.value)


def test_no_password_where_one_is_asked_for_is_one_line(asking: KafkaServer) -> None:
    with pytest.raises(KafkaUnavailable, match="CARAVAN_KAFKA_SECURITY"):
        kafka(asking, None).ensure_topics(5.0)
