"""The log in PostgreSQL: nothing lost whatever the order of commits, nobody stalled, order kept per student."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from uuid import UUID

import pytest

from caravan.db import Database, Tx
from caravan.eventlog import outbox, postgres_log, workers
from caravan.eventlog.consumer import Consumer
from caravan.eventlog.drain import drain
from caravan.eventlog.lag import list_lag
from caravan.eventlog.rebase import rebase_if_moved
from caravan.eventlog.subscription import Subscription, register_groups
from caravan.eventlog.workers import Worker
from caravan.events import Event, PurchaseConfirmed, StudentUpdated
from caravan.ids import new_id


class Heard:
    """A group that writes down what it hears, in the order of the commits."""

    def __init__(self, group: str = "listeners") -> None:
        self.events: list[PurchaseConfirmed] = []
        self.subscription = Subscription(group, "listener", "Listener", {PurchaseConfirmed: self.hear})

    async def hear(self, tx: Tx, events: Sequence[PurchaseConfirmed]) -> None:
        self.events.extend(events)

    def consumer(self, db: Database, name: str = "listener-1", page: int = 256) -> Consumer:
        worker = Worker(service="listener", group=self.subscription.group, build="test", name=name)
        return Consumer(db, self.subscription, worker, page_events_max=page)


def confirmed(student: UUID, payment: UUID | None = None) -> PurchaseConfirmed:
    return PurchaseConfirmed(
        payment_id=payment or new_id(), student_id=student, course_id=new_id(), checkout_id=new_id()
    )


async def say(db: Database, *events: Event) -> None:
    async with db.transaction("test") as tx:
        outbox.append(tx, events)


async def test_an_event_is_heard_once_by_each_group(db: Database) -> None:
    first, second = Heard("first"), Heard("second")
    event = confirmed(new_id())
    await say(db, event)
    assert await drain(db, [first.subscription, second.subscription]) == 2
    assert await drain(db, [first.subscription, second.subscription]) == 0
    assert first.events == second.events == [event]


async def test_nothing_is_said_by_a_transaction_that_rolls_back(db: Database) -> None:
    heard = Heard()
    with pytest.raises(ZeroDivisionError):
        async with db.transaction("test") as tx:
            outbox.append(tx, [confirmed(new_id())])
            raise ZeroDivisionError
    assert await drain(db, [heard.subscription]) == 0


async def test_a_savepoint_takes_back_what_its_part_said(db: Database) -> None:
    heard, kept = Heard(), confirmed(new_id())
    async with db.transaction("test") as tx:
        outbox.append(tx, [kept])
        with pytest.raises(ZeroDivisionError):
            async with tx.savepoint():
                outbox.append(tx, [confirmed(new_id())])
                raise ZeroDivisionError
    await drain(db, [heard.subscription])
    assert heard.events == [kept]


async def test_a_commit_that_comes_after_a_later_id_is_not_lost(db: Database) -> None:
    heard = Heard()
    consumer = heard.consumer(db)
    await consumer.enter()
    early, late = confirmed(new_id()), confirmed(new_id())
    async with db.transaction("test") as slow:
        outbox.append(slow, [early])
        assert slow.flush
        await slow.flush(slow)  # it has its id and its transaction's number now
        slow.outgoing.clear()
        await say(db, late)
        assert await consumer.run_once() == 1
        assert heard.events == [late]  # a long writer stalls nobody
    assert await consumer.run_once() == 1
    assert heard.events == [late, early]


async def test_random_commit_orders_lose_nothing_and_keep_each_students_order(db: Database) -> None:
    rng = random.Random(7)
    heard = Heard()
    students = [new_id() for _ in range(12)]
    said: dict[UUID, list[UUID]] = {student: [] for student in students}
    rolled_back: set[UUID] = set()

    async def writer(seed: int) -> None:
        dice = random.Random(seed)
        for _ in range(25):
            student, payment = dice.choice(students), new_id()
            try:
                async with db.transaction("test") as tx:
                    if dice.random() < 0.5:
                        await tx.value("select pg_current_xact_id()")  # an old number, used late
                    outbox.append(tx, [confirmed(student, payment)])
                    assert tx.flush
                    await tx.flush(tx)
                    tx.outgoing.clear()
                    for _ in range(dice.randrange(4)):
                        await tx.value("select pg_sleep(0.001)")
                    if dice.random() < 0.1:
                        rolled_back.add(payment)
                        raise ZeroDivisionError
                    said[student].append(payment)  # under the student's lock: in the order of the commits
            except ZeroDivisionError:
                continue

    consumers = [heard.consumer(db, f"listener-{n}", page=5) for n in range(3)]
    for consumer in consumers:
        await consumer.enter()
    writers = [asyncio.create_task(writer(rng.randrange(10**6))) for _ in range(6)]

    async def consume(consumer: Consumer) -> None:
        while not all(task.done() for task in writers):
            await consumer.run_once()

    await asyncio.gather(*writers, *(consume(consumer) for consumer in consumers))
    while sum([await consumer.run_once() for consumer in consumers]):
        pass
    assert len(heard.events) == 6 * 25 - len(rolled_back)
    for student in students:
        assert [e.payment_id for e in heard.events if e.student_id == student] == said[student]


async def test_the_feed_of_a_student_is_gap_free_under_concurrent_writers(db: Database) -> None:
    student = new_id()
    await asyncio.gather(*(say(db, confirmed(student), confirmed(student)) for _ in range(20)))
    async with db.transaction() as tx:
        seqs = await tx.values("select seq from student_feed where student_id = %(s)s order by seq", {"s": student})
    assert seqs == list(range(1, 41))


async def test_events_that_no_student_sees_keep_the_order_but_take_no_number(db: Database) -> None:
    student = new_id()
    await say(db, StudentUpdated(student_id=student, changed=("name",)), confirmed(student))
    async with db.transaction() as tx:
        assert await tx.values("select seq from student_feed") == [1]
        assert await tx.value("select count(*) from outbox") == 2


async def test_a_second_worker_takes_half_and_a_third_takes_over_what_a_dead_one_held(db: Database) -> None:
    heard = Heard()
    one, two = heard.consumer(db, "one"), heard.consumer(db, "two")
    await one.enter()
    await two.enter()
    assert await _owners(db) == {"one": 8, "two": 8}
    async with db.transaction() as tx:  # `two` died: its lease is over by the database's clock
        await tx.execute("update workers set expires_at = now() - interval '1 s' where name = 'two'")
    three = heard.consumer(db, "three")
    await three.enter()
    assert await _owners(db) == {"one": 8, "three": 8}
    for _ in range(30):
        await say(db, confirmed(new_id()))
    assert await two.run_once() == 0  # fenced: it does nothing with what it thinks is its own
    assert await one.run_once() + await three.run_once() == 30


async def test_a_restart_under_the_same_name_takes_its_lease_back_at_once(db: Database) -> None:
    heard = Heard()
    before = heard.consumer(db, "one")
    await before.enter()
    await say(db, confirmed(new_id()))
    again = heard.consumer(db, "one")
    await again.enter()
    assert await again.run_once() == 1
    assert await before.run_once() == 0
    with pytest.raises(workers.Superseded):
        async with db.transaction() as tx:
            await workers.beat(tx, before.worker)


async def test_a_turn_looks_beyond_a_window_whose_rest_is_empty(db: Database) -> None:
    heard = Heard()
    consumer = heard.consumer(db, page=1)
    await consumer.enter()
    await say(db, confirmed(new_id()))
    assert await consumer.run_once() == 1  # a full page: the window is still open
    await say(db, confirmed(new_id()))
    assert await consumer.run_once() == 1
    assert await consumer.run_once() == 0


async def test_what_is_stored_is_where_the_reader_goes_on(db: Database) -> None:
    """Behind a page that is full, and behind one that ends its window: SQL moves the one, Python the other."""
    consumer = Heard().consumer(db, page=2)
    await consumer.enter()
    await say(db, *[confirmed(new_id()) for _ in range(5)])
    for inside in (True, True, False):
        assert await consumer.run_once()
        [cursor] = consumer._cursors.values()  # pyright: ignore[reportPrivateUsage]
        assert (cursor.window_end is not None) is inside
        owner = {"group": "listeners", "owner": consumer.worker.name, "incarnation": consumer.worker.incarnation}
        async with db.transaction() as tx:
            [(cursor_id, partitions, *place)] = await tx.tuples(postgres_log.LIST_OWN_CURSORS, owner)
        assert postgres_log.Cursor(cursor_id, tuple(partitions), *place) == cursor


async def test_a_window_is_found_by_its_index_also_after_one_large_batch(db: Database) -> None:
    """The planner then takes one transaction for the whole log."""
    async with db.transaction("payment-service") as tx:
        outbox.append(tx, [confirmed(new_id()) for _ in range(2_000)])
    async with db.connection() as connection:
        await connection.execute("analyze outbox")
    async with db.transaction() as tx:
        next_id = await tx.value("select pg_snapshot_xmax(pg_current_snapshot())::text::bigint")
        start = f"{next_id}:{next_id + 2}:{next_id},{next_id + 1}"
        params = {"start": start, "partitions": [0], "types": [PurchaseConfirmed.type], "known": []}
        plan = "\n".join(await tx.values("explain " + postgres_log.FIND_WINDOW, params))
    assert plan.count("on outbox_0") == 2
    assert "Seq Scan on outbox_0" not in plan


async def test_lag_is_told_also_for_a_group_whose_worker_never_ran(db: Database) -> None:
    heard = Heard()
    async with db.transaction() as tx:
        await register_groups(tx, [heard.subscription])
    await say(db, confirmed(new_id()), confirmed(new_id()))
    async with db.transaction() as tx:
        [lag] = await list_lag(tx)
    assert (lag.messages, lag.workers_alive, lag.state) == (2, 0, "down")
    consumer = heard.consumer(db, page=1)
    await consumer.enter()
    await consumer.run_once()
    async with db.transaction() as tx:
        [lag] = await list_lag(tx)
    assert (lag.messages, lag.workers_alive, lag.state) == (1, 1, "working")
    await consumer.run_once()
    async with db.transaction() as tx:
        [lag] = await list_lag(tx)
    assert (lag.messages, lag.state) == (0, "idle")


async def test_positions_survive_a_move_to_another_cluster(db: Database) -> None:
    heard, other = Heard(), Heard("others")
    await say(db, confirmed(new_id()))
    await drain(db, [heard.subscription, other.subscription])
    waiting = [confirmed(new_id()), confirmed(new_id())]
    await say(db, *waiting)
    await drain(db, [other.subscription])
    async with db.transaction() as tx:  # as restored from a cluster that was far ahead
        await tx.execute("update outbox set xid = (xid::text::bigint + 5000000000)::text::xid8")
        await tx.execute(
            "update log_cursors set window_start = ((pg_snapshot_xmin(window_start)::text::bigint + 5000000000)::text"
            " || ':' || (pg_snapshot_xmax(window_start)::text::bigint + 5000000000)::text || ':')::pg_snapshot"
        )
        await tx.execute("update installation set system_identifier = 1")
    assert await rebase_if_moved(db)
    assert not await rebase_if_moved(db)
    fresh = confirmed(new_id())
    await say(db, fresh)
    await drain(db, [heard.subscription, other.subscription])
    assert heard.events[1:] == [*waiting, fresh]
    assert other.events[1:] == [*waiting, fresh]


async def _owners(db: Database) -> dict[str, int]:
    async with db.transaction() as tx:
        return dict(await tx.tuples("select owner, sum(cardinality(partitions))::int from log_cursors group by owner"))
