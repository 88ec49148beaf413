"""The test ground itself: what was acknowledged outlives a kill of the broker, on the same port."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Consumer as KafkaClient
from confluent_kafka import Producer, TopicPartition
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from tests import needs
from tests.kafka.server import KafkaServer, missing


def test_a_killed_broker_comes_back_with_its_records(tmp_path: Path) -> None:
    if lack := missing():
        needs.missing(lack)
    with KafkaServer(tmp_path) as server:
        quiet: dict[str, Any] = {"bootstrap.servers": server.address, "log_level": 0}
        admin = AdminClient(quiet)
        for made in admin.create_topics([NewTopic("kept", 1)]).values():
            made.result(10)
        acknowledged: list[int | None] = []
        producer = Producer({**quiet, "acks": "all"})
        for number in range(3):
            producer.produce("kept", str(number), on_delivery=lambda _error, it: acknowledged.append(it.offset()))
        assert producer.flush(10) == 0
        assert acknowledged == [0, 1, 2]
        server.kill()
        server.start()
        reader = KafkaClient({**quiet, "group.id": "test", "auto.offset.reset": "error"})
        reader.assign([TopicPartition("kept", 0, 0)])
        assert [record.value() for record in reader.consume(3, timeout=10)] == [b"0", b"1", b"2"]
        reader.close()


def test_a_broker_that_cannot_start_says_why(tmp_path: Path) -> None:
    if lack := missing():
        needs.missing(lack)
    server = KafkaServer(tmp_path, num_network_threads="none")
    with pytest.raises(Exception, match=r"num\.network\.threads"):
        server.start()
