"""A checker that cannot fail proves nothing: each invariant is broken once by hand and must say so."""

from __future__ import annotations

from datetime import timedelta
from typing import LiteralString

import pytest

from caravan.db import Database
from caravan.fulfilment.invariants import INVARIANTS, check
from tests.fulfilment import world
from tests.fulfilment.world import Road


async def broken(db: Database) -> dict[str, str]:
    async with db.transaction(read_only=True) as tx:
        return {violation.name: str(violation) for violation in await check(tx, leeway=timedelta(0))}


async def a_delivered_road(db: Database) -> Road:
    road = await world.a_payment(db)
    await world.purchased(db, road)
    await world.allocated(db, road)
    await world.scheduled(db, road)
    return road


async def test_all_hold_for_a_delivered_a_waiting_and_a_refunded_payment(db: Database) -> None:
    await a_delivered_road(db)
    await world.a_payment(db, reason="NO_TRAINER_AVAILABLE")
    await world.a_payment(db, status="created")
    road = await world.a_payment(db, status="refunded", registered=False)
    async with db.transaction() as tx:
        await tx.execute(
            """insert into refunds (id, payment_id, provider, provider_refund_id, amount_cents, source)
               values (gen_random_uuid(), %(payment_id)s, 'sandbox', 'r1', 360000, 'admin')""",
            road.__dict__,
        )
    assert await broken(db) == {}


async def test_paid_and_forgotten(db: Database) -> None:
    road = await world.a_payment(db)
    assert str(road.payment_id) in (await broken(db))["PaidIsDelivered"]


async def test_the_leeway_is_a_grace(db: Database) -> None:
    await world.a_payment(db, ago=timedelta(seconds=5))
    async with db.transaction(read_only=True) as tx:
        assert await check(tx) == []


# What to break on a delivered road, and what must notice. Constraints that forbid it are dropped first.
BREAKS: dict[str, LiteralString] = {
    "RegisterIsTrue": "delete from tutoring_sessions",
    "RegisterIsMoney": """
        update checkouts set paid_by = null;
        insert into undelivered (payment_id, student_id, amount_cents, currency, since)
          select id, student_id, 1, 'INR', now() from payments;
        update payments set status = 'pending', captured_at = null, captured_cents = null""",
    "CheckoutBoughtOnce": "update checkouts set paid_by = null",
    "AllocationIsBooked": "update bookings set live = false",
    "TierAddsUp": "update student_course_purchases set purchase_tier = 2",
    "RefundedIsUndone": "update student_course_purchases set is_active = false",
    "SlotsAreTheRange": "update bookings set starts = starts[1:2]",
    "SessionsAreTheSlots": "update tutoring_sessions set starts_at = starts_at + interval '5 minutes' where seq = 1",
    "NobodyTwice": """
        update tutoring_sessions set (starts_at, ends_at) =
          (select starts_at, ends_at from tutoring_sessions where seq = 1) where seq = 2""",
    "MoneyAddsUp": "update payments set status = 'partially_refunded', refunded_cents = 100",
    "CoinsAddUp": "update payments set coins = 5",
    "FeedIsGapFree": """
        insert into student_feed_heads select id, 3 from students;
        insert into student_feed (student_id, seq, event_id, type, data, created_at)
          select id, n, gen_random_uuid(), 'X', '{}', now() from students, (values (1), (3)) as v(n)""",
}


@pytest.mark.parametrize("name", BREAKS)
async def test_each_notices_what_breaks_it(db: Database, name: str) -> None:
    await a_delivered_road(db)
    assert await broken(db) == {}
    async with db.transaction() as tx:
        for statement in BREAKS[name].split(";"):
            await tx.connection.execute(statement.encode())
    assert name in await broken(db)


def test_every_invariant_is_broken_once_above() -> None:
    assert {invariant.name for invariant in INVARIANTS} == {*BREAKS, "PaidIsDelivered"}
