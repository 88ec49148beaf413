"""Everything at once: whatever the order in which the groups, operators and families act, it adds up in the end."""

from __future__ import annotations

import asyncio
import random
from datetime import time, timedelta
from uuid import UUID

import pytest

import caravan.allocations.handlers as allocations
from caravan.admin import worst_day
from caravan.allocations.operations import NOTICE, settle_allocations
from caravan.db import Database, Tx
from caravan.errors import DomainError
from caravan.events import TrainerUpdated
from caravan.purchases.operations import apply_refunds, create_purchases
from caravan.sessions.operations import Outcome, mark_session, sync_sessions
from caravan.web.auth import Actor
from tests.builders import a_captured_payment, a_course, a_refund, a_student, a_trainer

# Whose start went by before it was numbered waits for the family's word, without one session.
MISSED = """select u.payment_id, exists (select from tutoring_sessions t where t.purchase_id = pu.id) as numbered
            from undelivered u join student_course_purchases pu using (payment_id) where u.reason = 'START_PASSED'"""

OUTCOMES: tuple[Outcome, ...] = ("completed", "student_absent", "trainer_absent")

# Each captured payment is delivered, refunded or waiting with a reason; sums, sessions and bookings agree.
BROKEN = {
    "sum": """select payment_id from fulfilments where stage <> 'refunded'
              and total <> completed + student_absent + scheduled + refunded + owed""",
    "asked": "select payment_id from undelivered where reason = 'START_PASSED'",
    "no third case": """select f.payment_id from fulfilments f left join undelivered u using (payment_id)
              where not case when f.stage = 'refunded' then u.payment_id is null
                             when f.owed = 0 then u.payment_id is null
                             else u.reason is not null end""",
    "sessions and bookings": """select * from (
              select booking_id, starts_at from tutoring_sessions where status = 'scheduled' and starts_at > %(now)s) s
              full join (select b.id as booking_id, slot as starts_at from bookings b, unnest(b.starts) slot
                         where b.live and slot > %(now)s) b using (booking_id, starts_at)
              where s is null or b is null""",
    "range and list": """select id from bookings where during <> (
              select range_agg(tstzrange(s, s + make_interval(mins => minutes))) from unnest(starts) s)""",
    "overlap": """select a.id from bookings a join bookings b on a.id < b.id and a.live and b.live
              and a.during && b.during and (a.trainer_id = b.trainer_id or a.student_id = b.student_id)""",
    "numbers": """select purchase_id from tutoring_sessions group by purchase_id having max(seq) <> count(*)""",
    "allocation": """select f.payment_id from fulfilments f left join trainer_allocations a on a.id = f.allocation_id
              where f.stage <> 'refunded' and f.scheduled > 0 and f.owed = 0
                and a.status is distinct from 'approved'""",
    "left": """select b.id from bookings b join trainers t on t.id = b.trainer_id
              where b.live and not t.active and b.starts[cardinality(b.starts)] > %(now)s""",
}


@pytest.mark.parametrize("seed", range(4))
async def test_it_adds_up_whatever_happens_at_once(db: Database, seed: int) -> None:
    dice = random.Random(seed)
    async with db.transaction() as tx:
        courses = [await a_course(tx), await a_course(tx, minutes=90)]
        trainers = [await a_trainer(tx, *courses) for _ in range(5)]
        students = [await a_student(tx) for _ in range(8)]
        payments = [
            await a_captured_payment(
                tx,
                dice.choice(students),
                courses[n % 2],
                minutes=(60, 90)[n % 2],
                slot=time(6 + dice.randrange(4)),
                starts_in_days=dice.choice([-5, 3, 9]),
            )
            for n in range(24)
        ]

    async def some(tx: Tx) -> list[UUID]:
        found = await tx.values("select id from student_course_purchases")
        return dice.sample(found, min(len(found), 6))

    days = 0

    async def act(tx: Tx) -> None:
        nonlocal days
        days += dice.randrange(3) == 0
        tx.now += timedelta(days=days)
        roll = dice.randrange(10)
        if roll < 2:
            await create_purchases(tx, dice.sample(payments, 8))
        elif roll < 5:
            await settle_allocations(tx, await some(tx))
        elif roll < 7:
            await sync_sessions(tx, await some(tx))
        elif roll == 7:
            await a_refund(tx, dice.choice(payments), sessions=dice.choice([None, 0, 1, 2]))
        elif roll == 8:
            for purchase in (await some(tx))[:1]:
                await mark_session(tx, purchase, dice.randrange(1, 11), dice.choice(OUTCOMES))
        else:
            trainer = dice.choice(trainers)
            await tx.execute("update trainers set active = not active where id = %(id)s", {"id": trainer})
            await allocations.resume_waiting(tx, [TrainerUpdated(trainer_id=trainer, changed=("active",))])

    async def busybody() -> None:
        for _ in range(12):
            try:
                await db.transact(act)
            except DomainError:
                pass  # a refusal: nothing left to refund, or the session has not begun

    await asyncio.gather(*(busybody() for _ in range(8)))
    purchases: list[UUID] = []

    async def settle_all() -> None:
        """What the groups and the reconciler do in the end, with whatever they have not heard of yet."""
        for _ in range(3):
            async with db.transaction() as tx:
                tx.now += timedelta(days=days)
                await create_purchases(tx, payments)
                await apply_refunds(tx, payments)
                purchases[:] = await tx.values("select id from student_course_purchases")
                await settle_allocations(tx, purchases)
                await sync_sessions(tx, purchases)

    await settle_all()
    async with db.transaction() as tx:
        tx.now += timedelta(days=days)
        for payment, numbered in await tx.tuples(MISSED):
            assert not numbered
            await worst_day.confirm_start(tx, Actor.system("storm"), payment, "agreed", notice=NOTICE)
    await settle_all()
    async with db.transaction() as tx:
        tx.now += timedelta(days=days)
        for rule, query in BROKEN.items():
            assert await tx.all(query, {"now": tx.now}) == [], rule  # pyright: ignore[reportArgumentType]
        counts = dict(await tx.tuples("select status, count(*) from tutoring_sessions group by status"))
        assert counts.get("scheduled", 0) + counts.get("completed", 0) > 0
        said = len(tx.outgoing)
        await settle_allocations(tx, purchases)
        await sync_sessions(tx, purchases)
        assert len(tx.outgoing) == said  # quiet
