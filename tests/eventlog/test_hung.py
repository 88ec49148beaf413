"""A worker whose handler never comes back: its lease ends although it beats, and at last it ends itself."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from caravan.db import Database, Tx
from caravan.eventlog import consumer, member, outbox, workers
from caravan.eventlog.consumer import Consumer, Hung
from caravan.eventlog.subscription import Subscription
from caravan.eventlog.workers import Worker, WorkerRow, list_workers
from caravan.events import CourseUpdated
from caravan.ids import new_id


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases of tenths of a second."""
    monkeypatch.setattr(consumer, "HEARTBEAT_SECONDS", 0.05)
    monkeypatch.setattr(member, "HEARTBEAT_SECONDS", 0.05)
    monkeypatch.setattr(member, "HUNG_SECONDS", 0.2)
    monkeypatch.setattr(workers, "LEASE_SECONDS", 0.3)


async def hang(db: Database) -> Consumer:
    """A consumer whose handler hangs as soon as it runs."""

    async def never(tx: Tx, events: Sequence[CourseUpdated]) -> None:
        await asyncio.Event().wait()

    subscription = Subscription("hanging", "hanging-worker", "HangingWorker", {CourseUpdated: never})
    async with db.transaction() as tx:
        outbox.append(tx, [CourseUpdated(course_id=new_id(), changed=("title",))])
    return Consumer(db, subscription, Worker(service="hanging-worker", group="hanging", build="test", name="hanging-1"))


async def _row(db: Database) -> WorkerRow | None:
    async with db.transaction(read_only=True) as tx:
        return next(iter(await list_workers(tx)), None)


@pytest.mark.usefixtures("hasty")
async def test_a_hung_worker_loses_its_lease_while_it_beats(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(member, "HOPELESS_BEATS", 10_000)
    running = asyncio.create_task((await hang(db)).run(asyncio.Event()))
    try:
        async with asyncio.timeout(10):
            while (row := await _row(db)) is None or row.alive:
                assert not running.done()
            beaten = row.heartbeat_at
            while (row := await _row(db)) is not None and row.heartbeat_at == beaten:
                assert not running.done()
        assert row is not None
        assert not row.alive
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


@pytest.mark.usefixtures("hasty")
async def test_a_hopeless_worker_ends(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(member, "HOPELESS_BEATS", 6)
    async with asyncio.timeout(10):
        with pytest.raises(Hung):
            await (await hang(db)).run(asyncio.Event())


@pytest.mark.usefixtures("hasty")
async def test_an_idle_worker_keeps_its_lease(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(member, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(member, "HOPELESS_BEATS", 6)
    subscription = Subscription("idle", "idle-worker", "IdleWorker", {})
    worker = Worker(service="idle-worker", group="idle", build="test", name="idle-1")
    stop = asyncio.Event()
    running = asyncio.create_task(Consumer(db, subscription, worker).run(stop))
    beats: set[object] = set()
    async with asyncio.timeout(10):
        while len(beats) < 10:
            row = await _row(db)
            if row is not None:
                beats.add(row.heartbeat_at)
                assert row.alive
    stop.set()
    await running
