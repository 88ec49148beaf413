"""What becomes of a client of librdkafka: closed in its thread, whatever happens; a process never waits for it."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest

from caravan.db import Database
from caravan.eventlog.kafka_client import Kafka
from caravan.eventlog.kafka_log import KafkaConsumer
from caravan.eventlog.kafka_thread import ClientThread
from caravan.eventlog.relay import Relay
from caravan.eventlog.subscription import register_groups
from caravan.eventlog.workers import Worker
from tests.conformance.conftest import kafka, kafka_of, mock_kafka
from tests.conformance.logs import CREATE_EFFECTS, Group
from tests.kafka.mock import MockKafka

__all__ = ["kafka", "mock_kafka"]


async def until(true: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


async def create(db: Database, group: Group) -> None:
    async with db.transaction() as tx:
        await tx.execute(CREATE_EFFECTS)
        await register_groups(tx, [group.subscription])


async def test_calls_are_made_in_order_and_the_last_one_surely() -> None:
    thread, made, begun, go = ClientThread("test"), list[str](), threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        go.wait(10.0)

    first = asyncio.create_task(thread.call(wait))
    second = asyncio.create_task(thread.call(made.append, "second"))
    await until(begun.is_set)
    first.cancel()
    second.cancel()  # not begun yet: it never is
    await asyncio.wait({first, second})
    closed = thread.end(lambda: made.append("closed"))
    go.set()
    await asyncio.wait_for(asyncio.wrap_future(closed), 10)
    assert made == ["closed"]
    with pytest.raises(ZeroDivisionError):
        await ClientThread("test").call(lambda: 1 // 0)


def test_a_process_ends_while_a_call_hangs() -> None:
    program = (
        "import time; from caravan.eventlog.kafka_thread import ClientThread;"
        "ClientThread('hangs').end(lambda: time.sleep(60))"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=30)


async def test_who_is_cancelled_in_the_middle_of_a_turn_closes_its_client(db: Database, kafka: Kafka) -> None:
    group = Group()
    await create(db, group)
    worker = Worker(service="effect-worker", group="effects", build="test", name="effects-1")
    member = KafkaConsumer(db, group.subscription, worker, kafka)
    running = asyncio.create_task(member.run(asyncio.Event()))
    await until(lambda: member._reader is not None and bool(member._reader._ours))
    reader = member._reader
    assert reader
    running.cancel()
    await asyncio.wait({running})
    await until(lambda: all(each.done() for each in member._closing))
    with pytest.raises(RuntimeError, match="closed"):
        reader._client.poll(0)


async def test_who_is_cancelled_before_it_has_a_client_leaves_none(db: Database, mock_kafka: MockKafka) -> None:
    before = set(threading.enumerate())
    mock_kafka.down()
    try:
        kafka, group = kafka_of(mock_kafka.address, "", "classic"), Group()
        await create(db, group)
        names = ("effects-1", "relay-1")
        consumer, relay = (Worker(service="any", group="effects", build="test", name=name) for name in names)
        members = KafkaConsumer(db, group.subscription, consumer, kafka), Relay(db, relay, kafka)

        def ours() -> list[threading.Thread]:
            return [each for each in threading.enumerate() if each not in before and each.name.startswith("kafka ")]

        running = [asyncio.create_task(member.run(asyncio.Event())) for member in members]
        await until(lambda: len(ours()) > 1)
        for task in running:
            task.cancel()
        await asyncio.wait(running)
        await until(lambda: not ours())
    finally:
        mock_kafka.up()
