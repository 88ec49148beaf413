"""librdkafka's mock cluster: a real listener inside this process, for the client's logic where there is no broker.

It has no topic creation and no admin answers; so the topics are made here, and `ensure_topics` finds them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from pathlib import Path

import confluent_kafka

CONF_BYTES = 512


def _library() -> ctypes.CDLL:
    """The very library that confluent_kafka has loaded."""
    folder = Path(confluent_kafka.__file__).parents[1] / "confluent_kafka.libs"
    [found] = folder.glob("librdkafka-*.so*")
    library = ctypes.CDLL(str(found))
    for name, result, arguments in (
        ("rd_kafka_conf_new", ctypes.c_void_p, []),
        ("rd_kafka_new", ctypes.c_void_p, [ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t]),
        ("rd_kafka_destroy", None, [ctypes.c_void_p]),
        ("rd_kafka_mock_cluster_new", ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_int]),
        ("rd_kafka_mock_cluster_destroy", None, [ctypes.c_void_p]),
        ("rd_kafka_mock_cluster_bootstraps", ctypes.c_char_p, [ctypes.c_void_p]),
        ("rd_kafka_mock_topic_create", ctypes.c_int, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int, ctypes.c_int]),
        ("rd_kafka_mock_group_initial_rebalance_delay_ms", None, [ctypes.c_void_p, ctypes.c_int32]),
        ("rd_kafka_mock_broker_set_down", ctypes.c_int, [ctypes.c_void_p, ctypes.c_int32]),
        ("rd_kafka_mock_broker_set_up", ctypes.c_int, [ctypes.c_void_p, ctypes.c_int32]),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


class MockKafka:
    """One broker. Use as a context; `down` and `up` as a cable is pulled and put back."""

    def __init__(self) -> None:
        self._library = _library()
        error = ctypes.create_string_buffer(CONF_BYTES)
        self._handle = self._library.rd_kafka_new(0, self._library.rd_kafka_conf_new(), error, CONF_BYTES)
        assert self._handle, error.value
        self._cluster = self._library.rd_kafka_mock_cluster_new(self._handle, 1)
        assert self._cluster
        self._library.rd_kafka_mock_group_initial_rebalance_delay_ms(self._cluster, 0)
        self.address = self._library.rd_kafka_mock_cluster_bootstraps(self._cluster).decode()

    def make_topics(self, names: Iterable[str], partitions: int) -> None:
        for name in names:
            assert self._library.rd_kafka_mock_topic_create(self._cluster, name.encode(), partitions, 1) == 0

    def down(self) -> None:
        assert self._library.rd_kafka_mock_broker_set_down(self._cluster, 1) == 0

    def up(self) -> None:
        assert self._library.rd_kafka_mock_broker_set_up(self._cluster, 1) == 0

    def __enter__(self) -> MockKafka:
        return self

    def __exit__(self, *_: object) -> None:
        self._library.rd_kafka_mock_cluster_destroy(self._cluster)
        self._library.rd_kafka_destroy(self._handle)
