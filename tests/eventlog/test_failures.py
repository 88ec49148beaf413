"""What a consumer does with the three kinds of failure."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from uuid import UUID

import psycopg
import pytest
from psycopg import errors as pg
from structlog.testing import capture_logs

from caravan.db import Database, Tx
from caravan.db.wake import Wake
from caravan.eventlog import dead_letters, outbox
from caravan.eventlog.consumer import Consumer
from caravan.eventlog.subscription import Subscription
from caravan.eventlog.workers import Worker
from caravan.events import PurchaseConfirmed
from caravan.ids import new_id

CREATE_EFFECTS = "create table if not exists effects (payment_id uuid not null)"


class Group:
    """A group whose effect is a row; it fails on the payments it is told to."""

    def __init__(self) -> None:
        self.poison: set[UUID] = set()
        self.failures: list[BaseException] = []  # raised one per batch, first come
        self.batches: list[int] = []
        self.subscription = Subscription("effects", "effect-worker", "EffectWorker", {PurchaseConfirmed: self.apply})

    async def apply(self, tx: Tx, events: Sequence[PurchaseConfirmed]) -> None:
        self.batches.append(len(events))
        for event in events:
            await tx.execute("insert into effects values (%(id)s)", {"id": event.payment_id})
        if self.failures:
            raise self.failures.pop(0)
        if any(event.payment_id in self.poison for event in events):
            raise ValueError("a bug")

    async def consumer(self, db: Database, wake: Wake | None = None) -> Consumer:
        async with db.transaction() as tx:
            await tx.execute(CREATE_EFFECTS)
        worker = Worker(service="effect-worker", group="effects", build="test", name="effects-1")
        return Consumer(db, self.subscription, worker, wake=wake)


async def say(db: Database, count: int) -> list[UUID]:
    payments = [new_id() for _ in range(count)]
    async with db.transaction("payment-service") as tx:
        outbox.append(
            tx,
            [
                PurchaseConfirmed(payment_id=p, student_id=new_id(), course_id=new_id(), checkout_id=new_id())
                for p in payments
            ],
        )
    return payments


async def effects(db: Database) -> list[UUID]:
    async with db.transaction() as tx:
        return await tx.values("select payment_id from effects")


async def test_one_bug_is_parked_alone_and_the_rest_flows(db: Database) -> None:
    group = Group()
    consumer = await group.consumer(db)
    payments = await say(db, 100)
    group.poison = {payments[37]}
    await consumer.enter()
    while await consumer.run_once():
        pass
    assert sorted(await effects(db)) == sorted(set(payments) - group.poison)
    async with db.transaction() as tx:
        [letter] = await dead_letters.list_dead_letters(tx)
        assert letter.correlation_id == str(payments[37])
        assert (letter.code, letter.attempts, letter.error) == ("HANDLER_FAILED", 3, "ValueError: a bug")
        # Marked as processed exactly where the effect is.
        marked = await tx.values("select correlation_id from processed_events")
    assert sorted(marked) == sorted(str(p) for p in set(payments) - group.poison)
    assert len(group.batches) < 16  # halved down to it, tried three times, and soon back to whole pages


async def test_many_bugs_cost_three_tries_each(db: Database) -> None:
    group = Group()
    consumer = await group.consumer(db)
    payments = await say(db, 40)
    group.poison = set(payments[3:33])
    await consumer.enter()
    while await consumer.run_once():
        pass
    assert sorted(await effects(db)) == sorted(set(payments) - group.poison)
    assert len(group.batches) < 3 * 30 + 16


async def test_a_replay_runs_the_handler_once_and_a_second_one_is_refused(db: Database) -> None:
    group = Group()
    consumer = await group.consumer(db)
    [payment] = await say(db, 1)
    group.poison = {payment}
    await consumer.enter()
    while await consumer.run_once():
        pass
    async with db.transaction() as tx:
        [letter] = await dead_letters.list_dead_letters(tx)

    async def replay() -> None:
        async with db.transaction("admin-service") as tx:
            await dead_letters.replay(tx, letter.id, {"effects": group.subscription}, by="ops", note="fixed")

    with pytest.raises(ValueError, match="a bug"):
        await replay()  # still broken: stays parked, nothing half done
    assert await effects(db) == []
    group.poison = set()
    outcomes = await asyncio.gather(replay(), replay(), return_exceptions=True)
    assert [type(o) for o in outcomes if o] == [dead_letters.DeadLetterResolved]
    assert await effects(db) == [payment]
    with pytest.raises(dead_letters.DeadLetterResolved):
        async with db.transaction() as tx:
            await dead_letters.discard(tx, letter.id, by="ops", note="no")


async def test_unknown_types_newer_versions_and_malformed_events_are_parked(db: Database) -> None:
    group = Group()
    consumer = await group.consumer(db)
    payments = await say(db, 4)
    async with db.transaction() as tx:
        await tx.execute(
            "update outbox set type = 'PURCHASE_TELEPORTED' where correlation_id = %(p)s", {"p": str(payments[0])}
        )
        await tx.execute("update outbox set data_version = 99 where correlation_id = %(p)s", {"p": str(payments[1])})
        await tx.execute("update outbox set data = '{}' where correlation_id = %(p)s", {"p": str(payments[2])})
    await consumer.enter()
    with capture_logs() as lines:
        while await consumer.run_once():
            pass
    assert await effects(db) == [payments[3]]
    async with db.transaction() as tx:
        letters = await dead_letters.list_dead_letters(tx)
    assert {letter.correlation_id: letter.code for letter in letters} == {
        str(payments[0]): "UNKNOWN_TYPE",
        str(payments[1]): "NEWER_VERSION",
        str(payments[2]): "MALFORMED",
    }
    told = [line for line in lines if line["log_level"] == "error"]
    assert {line["event"] for line in told} == {"[EffectWorker] event parked in dead_letters"}
    assert sorted((line["event_id"], line["type"], line["correlation_id"], line["code"]) for line in told) == sorted(
        (str(letter.event_id), letter.event_type, letter.correlation_id, letter.code) for letter in letters
    )


@pytest.mark.parametrize(
    "failure", [pg.SerializationFailure("40001"), pg.DeadlockDetected("40P01"), psycopg.OperationalError("gone")]
)
async def test_a_transient_failure_uses_up_no_attempts(db: Database, failure: Exception) -> None:
    group = Group()
    wake = Wake(db.url)
    consumer = await group.consumer(db, wake)
    payments = await say(db, 3)
    group.failures = [failure] * 6
    stop = asyncio.Event()
    running = asyncio.create_task(consumer.run(stop))
    async with asyncio.timeout(20):
        while len(await effects(db)) < 3:
            await asyncio.wait({running}, timeout=0.02)
    stop.set()
    await running
    assert sorted(await effects(db)) == sorted(payments)
    async with db.transaction() as tx:
        assert await dead_letters.list_dead_letters(tx) == []
        assert await tx.value("select count(*) from workers") == 0  # a clean stop is seen at once
        assert await tx.value("select count(*) from log_cursors where owner is not null") == 0


async def test_a_hint_wakes_a_sleeping_consumer_without_waiting_for_the_poll(db: Database) -> None:
    group = Group()
    wake = Wake(db.url)
    await wake.start()
    db.on_hints = wake.send
    consumer = await group.consumer(db, wake)
    stop, applied = asyncio.Event(), asyncio.Event()
    group.subscription.handlers[PurchaseConfirmed]
    original = group.apply

    async def signalling(tx: Tx, events: Sequence[PurchaseConfirmed]) -> None:
        await original(tx, events)
        applied.set()

    consumer.subscription = Subscription("effects", "effect-worker", "EffectWorker", {PurchaseConfirmed: signalling})
    running = asyncio.create_task(consumer.run(stop))
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(10):
        waits: list[float] = []
        for _ in range(5):
            await asyncio.wait({running}, timeout=0.05)  # let it fall asleep
            applied.clear()
            said_at = loop.time()
            await say(db, 1)
            await applied.wait()
            waits.append(loop.time() - said_at)
    stop.set()
    await running
    await wake.stop()
    assert sorted(waits)[2] < 0.5  # the poll alone would take up to a second each time


def of_partition(partition: int) -> UUID:
    """A student whose events go there."""
    return next(
        student for student in (new_id() for _ in range(10_000)) if outbox.partition_of(str(student)) == partition
    )


async def say_of(db: Database, student_id: UUID) -> UUID:
    payment = new_id()
    async with db.transaction("payment-service") as tx:
        event = PurchaseConfirmed(payment_id=payment, student_id=student_id, course_id=None, checkout_id=new_id())
        outbox.append(tx, [event])
    return payment


async def test_a_bug_is_parked_also_while_the_workers_other_cursor_flows(db: Database) -> None:
    group = Group()
    one, other = await group.consumer(db), await group.consumer(db)
    other.worker.name = "effects-2"
    await one.enter()
    await other.enter()  # takes every second partition
    here, there = of_partition(0), of_partition(1)
    await say_of(db, there)
    assert await other.run_once() == 1  # so that the two cursors stand at different places
    await other.leave()
    await one._join()  # pyright: ignore[reportPrivateUsage] - not before its time has come, otherwise
    assert len(one._cursors) == 2  # pyright: ignore[reportPrivateUsage]
    group.poison = {await say_of(db, here)}
    healthy: list[UUID] = []
    for _ in range(12):
        healthy.append(await say_of(db, there))
        await one.run_once()
    async with db.transaction() as tx:
        letters = await dead_letters.list_dead_letters(tx)
    assert [letter.attempts for letter in letters] == [3]
    assert set(healthy) <= set(await effects(db))


async def test_a_consumer_stops_promptly_also_while_the_database_is_away() -> None:
    async with Database("postgresql://nobody@127.0.0.1:1/nothing") as nowhere:
        worker = Worker(service="effect-worker", group="effects", build="test", name="effects-1")
        stop = asyncio.Event()
        running = asyncio.create_task(Consumer(nowhere, Group().subscription, worker).run(stop))
        await asyncio.wait({running}, timeout=0.1)
        assert not running.done()
        stop.set()
        async with asyncio.timeout(4):
            await running


async def test_letters_that_were_parked_together_are_all_on_some_page(db: Database) -> None:
    group = Group()
    consumer = await group.consumer(db)
    await say(db, 7)
    async with db.transaction() as tx:
        await tx.execute("update outbox set type = 'PURCHASE_TELEPORTED'")
    await consumer.enter()
    while await consumer.run_once():
        pass
    seen: list[UUID] = []
    async with db.transaction() as tx:
        while page := await dead_letters.list_dead_letters(tx, before=seen[-1] if seen else None, limit=3):
            seen += [letter.id for letter in page]
    assert len(seen) == len(set(seen)) == 7


async def test_trouble_that_is_over_is_over_though_nothing_waits(db: Database) -> None:
    group = Group()
    consumer = await group.consumer(db)
    await consumer.enter()
    await consumer._pause_after(pg.AdminShutdown("away"))
    assert consumer.worker.last_error
    assert await consumer.run_once() == 0
    assert consumer.worker.last_error is None
