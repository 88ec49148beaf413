"""Whose time is taken: the database decides, a lost race is an answer."""

from __future__ import annotations

import asyncio
import random
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import pytest

from caravan.bookings import Series, Wish, insert_bookings, lock_purchases, release_slots
from caravan.db import Database, Tx
from caravan.ids import new_id
from tests.builders import a_course, a_purchase, a_student, a_trainer
from tests.payments.helpers import somebody_waits

CONSISTENT = """
select count(*) filter (where during <> (
  select range_agg(tstzrange(s, s + make_interval(mins => minutes))) from unnest(starts) s)) from bookings
"""


def daily(first: datetime, count: int, minutes: int = 60) -> Series:
    return Series(tuple(first + timedelta(days=n) for n in range(count)), minutes)


async def a_wish(tx: Tx, trainer: UUID, series: Series, **changes: Any) -> Wish:
    student = await a_student(tx)
    purchase = await a_purchase(tx, student, await a_course(tx))
    wish: dict[str, Any] = {
        "id": new_id(),
        "kind": "package",
        "purchase_id": purchase,
        "trainer_id": trainer,
        "student_id": student,
        "series": series,
    }
    return Wish(**(wish | changes))


async def test_all_slots_or_none_and_neighbours_are_no_overlap(db: Database) -> None:
    async with db.transaction() as tx:
        trainer, other, start = await a_trainer(tx), await a_trainer(tx), tx.now + timedelta(days=2)
        first = await a_wish(tx, trainer, daily(start, 10))
        last_slot_only = await a_wish(tx, trainer, daily(start + timedelta(days=9, minutes=59), 10))
        neighbour = await a_wish(tx, trainer, daily(start + timedelta(hours=1), 10))
        busy_student = await a_wish(tx, other, daily(start, 1, 10), student_id=first.student_id)
        assert await insert_bookings(tx, [first]) == {first.id}
        assert await insert_bookings(tx, [last_slot_only, neighbour, busy_student]) == {neighbour.id}
        assert await insert_bookings(tx, []) == set()
        assert await tx.value(CONSISTENT) == 0
        row = await tx.one("select * from bookings where id = %(id)s", {"id": first.id})
        assert (tuple(row["starts"]), row["minutes"], row["live"]) == (first.series.starts, 60, True)


async def test_a_payment_is_locked_before_its_purchase(db: Database) -> None:
    """As a refund does, so that the two wait for each other in a row and never in a circle."""
    async with db.transaction() as tx:
        purchase = await a_purchase(tx, await a_student(tx), await a_course(tx))

    async def lock(tx: Tx) -> None:
        await lock_purchases(tx, [purchase])

    async with db.transaction() as refund:
        await refund.execute("select from payments for no key update")
        locking = asyncio.create_task(db.transact(lock))
        await somebody_waits(refund)
        await refund.execute("select from student_course_purchases for update nowait")
    await locking


async def test_slots_that_touch_stay_separate_in_the_list(db: Database) -> None:
    async with db.transaction() as tx:
        start = tx.now + timedelta(days=2)
        wish = await a_wish(tx, await a_trainer(tx), Series((start, start + timedelta(hours=1)), 60))
        await insert_bookings(tx, [wish])
        assert await tx.value("select cardinality(starts) from bookings") == 2
        assert await tx.value(CONSISTENT) == 0


async def test_released_slots_are_free_again_and_said_so_once(db: Database) -> None:
    async with db.transaction() as tx:
        trainer, start = await a_trainer(tx), tx.now + timedelta(days=2)
        wish = await a_wish(tx, trainer, daily(start, 3))
        await insert_bookings(tx, [wish])
        tx.outgoing.clear()
        second, third = wish.series.starts[1:]
        for _ in range(2):
            await release_slots(tx, [(wish.id, second), (wish.id, start - timedelta(days=1)), (new_id(), second)])
        (said,) = tx.outgoing
        assert (said.booking_id, said.trainer_id, said.student_id) == (wish.id, trainer, wish.student_id)
        assert said.correlation_id == str(await tx.value("select payment_id from student_course_purchases"))
        assert await tx.value("select starts from bookings") == [start, third]
        assert await tx.value(CONSISTENT) == 0
        assert len(await insert_bookings(tx, [await a_wish(tx, trainer, daily(second, 1))])) == 1
        assert await release_slots(tx, [(wish.id, start), (wish.id, third)]) == {wish.id}
        assert await tx.values("select live from bookings where id = %(id)s", {"id": wish.id}) == [False]
        assert await release_slots(tx, [(wish.id, start), (wish.id, third)]) == set()


@pytest.mark.parametrize("seed", range(3))
async def test_crossing_batches_never_overlap_and_raise_nothing(db: Database, seed: int) -> None:
    """Eight at once, each with twenty wishes for few trainers and students, of lengths that don't fit a grid."""
    dice = random.Random(seed)
    async with db.transaction() as tx:
        trainers = [await a_trainer(tx) for _ in range(4)]
        people = [await a_wish(tx, trainers[0], daily(tx.now, 1)) for _ in range(12)]
        start = tx.now.replace(minute=0, second=0, microsecond=0) + timedelta(days=2)

    def wish() -> Wish:
        one = dice.choice(people)
        first = start + timedelta(days=dice.randrange(5), minutes=15 * dice.randrange(40))
        series = daily(first, dice.choice([5, 10]), dice.choice([45, 60, 90]))
        return Wish(new_id(), "package", one.purchase_id, dice.choice(trainers), one.student_id, series)

    batches = [[wish() for _ in range(20)] for _ in range(8)]
    won = await asyncio.gather(*(db.transact(lambda tx, batch=batch: insert_bookings(tx, batch)) for batch in batches))
    async with db.transaction() as tx:
        assert await tx.value("select count(*) from bookings") == sum(map(len, won)) > 0
        assert await tx.value(CONSISTENT) == 0
        overlaps = """select count(*) from bookings a join bookings b on a.id < b.id and a.during && b.during
            and (a.trainer_id = b.trainer_id or a.student_id = b.student_id)"""
        assert await tx.value(overlaps) == 0
