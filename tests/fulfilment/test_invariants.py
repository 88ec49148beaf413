"""A checker that cannot fail proves nothing: each invariant is broken once by hand and must say so."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import LiteralString

import pytest

from caravan.db import Database
from caravan.fulfilment.invariants import INVARIANTS, Invariant, check
from caravan.payments.refunds import refund_payment
from tests.fulfilment import world
from tests.fulfilment.world import BY_HAND, Road
from tests.shop import open_shop


async def broken(db: Database, invariants: Sequence[Invariant] = INVARIANTS) -> dict[str, str]:
    async with db.transaction(read_only=True) as tx:
        return {violation.name: str(violation) for violation in await check(tx, invariants, leeway=timedelta(0))}


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
    assert await broken(db, BY_HAND) == {}


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
    "TierIsSold": "update checkouts set sessions = 30",
    "PaidAsAsked": "update payments set amount_cents = 1",
    "StatesAreLegal": "update tutoring_sessions set status = 'completed' where seq = 3",
}


@pytest.mark.parametrize("name", BREAKS)
async def test_each_notices_what_breaks_it(db: Database, name: str) -> None:
    await a_delivered_road(db)
    assert await broken(db, BY_HAND) == {}
    await run(db, BREAKS[name])
    assert name in await broken(db)


async def run(db: Database, statements: LiteralString) -> None:
    async with db.transaction() as tx:
        for statement in statements.split(";"):
            await tx.connection.execute(statement.encode())


# States that no legal sequence leads to.
ILLEGAL: tuple[LiteralString, ...] = (
    "update payments set status = 'failed', captured_at = null, captured_cents = null",
    "update student_course_purchases set is_active = false",
    "update checkouts set paid_by = (select id from payments where checkout_id <> checkouts.id)",
    """insert into webhook_events (provider, event_id, type, payment_id, sent_at, body, applied_at, outcome)
       values ('sandbox', 'msg_1', 'payment.succeeded', gen_random_uuid(), now(), '{}', now(), 'applied')""",
    """insert into coin_entries (id, student_id, payment_id, kind, coins)
       select gen_random_uuid(), student_id, id, 'returned', 1 from payments where captured_at is null""",
    """insert into processed_events (consumer_group, event_id, event_type, source) values ('g', new_id(), 'X', 's');
       insert into dead_letters (id, consumer_group, event_id, event_type, envelope, code, error, attempts)
         select new_id(), consumer_group, event_id, 'X', '{}', 'X', 'x', 1 from processed_events
         where event_type = 'X'""",
)


@pytest.mark.parametrize("statements", ILLEGAL)
async def test_illegal_states_are_told(db: Database, statements: LiteralString) -> None:
    await a_delivered_road(db)
    await world.a_payment(db, status="created")
    assert await broken(db, BY_HAND) == {}
    await run(db, statements)
    assert "StatesAreLegal" in await broken(db)


async def test_a_slot_that_had_begun_when_its_refund_was_heard_of_is_no_trainers_time_taken(db: Database) -> None:
    await a_delivered_road(db)
    await run(db, "update student_course_purchases set is_active = false")
    assert "RefundedIsUndone" in await broken(db)
    await run(
        db,
        """update tutoring_sessions set starts_at = now() - interval '5 minutes';
           update bookings set starts = array[now() - interval '5 minutes'],
             during = tstzmultirange(tstzrange(now() - interval '5 minutes', now() + minutes * interval '1 minute'))""",
    )
    assert "RefundedIsUndone" not in await broken(db)


# What to break behind the back of a shop in which one course was delivered, half of another one refunded, and a third
# waits for a trainer.
SILENT_BREAKS: tuple[tuple[str, LiteralString], ...] = (
    ("ChangesAreSaid", "delete from outbox where type = 'PURCHASE_CONFIRMED'"),
    ("ChangesAreSaid", "delete from outbox where type = 'PURCHASE_CREATED'"),
    ("ChangesAreSaid", "delete from outbox where type = 'TRAINER_ALLOCATED'"),
    ("ChangesAreSaid", "delete from outbox where type = 'SESSIONS_SCHEDULED'"),
    ("ChangesAreSaid", "delete from outbox where type = 'PURCHASE_REFUNDED'"),
    ("ChangesAreSaid", "delete from outbox where type = 'PURCHASE_BLOCKED'"),
    ("EventsReachGroups", "delete from processed_events where consumer_group = 'cache-invalidation-workers'"),
    ("ProcessedHasEffect", "delete from tutoring_sessions"),
    ("VisibleIsFed", "delete from student_feed where type = 'TRAINER_ALLOCATED'"),
    (
        "WritesAreAudited",
        """insert into dead_letters (id, consumer_group, event_id, event_type, envelope, code, error, attempts, status,
             resolved_at, resolved_by)
           values (new_id(), 'g', new_id(), 'X', '{}', 'X', 'x', 1, 'replayed', now(), 'cli:root')""",
    ),
    ("PlacesAreKept", "update payments set metadata = '{\"at\": [28.6139, 77.209]}'"),
    ("PlacesAreKept", 'update student_course_purchases set metadata = \'{"near": "(28.6139,77.209)"}\''),
)


@pytest.mark.parametrize(("name", "statements"), SILENT_BREAKS)
async def test_what_should_have_been_said_heard_and_kept(db: Database, name: str, statements: LiteralString) -> None:
    shop = await open_shop(db, trainers=1)
    await run(db, "update students set latitude = 28.6139, longitude = 77.209; update trainers set modes = '{online}'")
    delivered, waiting = await shop.bought(), await shop.bought(slot="6:00 PM", mode="home")
    await shop.work()
    async with db.transaction() as tx:
        await refund_payment(tx, delivered, amount_cents=12000, sessions=1, note="x", source="admin")
    await shop.work()
    assert (await shop.why(waiting)).reason == "NO_TRAINER_AVAILABLE"
    assert await broken(db) == {}
    await run(db, statements)
    assert name in await broken(db)


def test_every_invariant_is_broken_above() -> None:
    silent = {name for name, _ in SILENT_BREAKS}
    assert {invariant.name for invariant in INVARIANTS} == {*BREAKS, *silent, "PaidIsDelivered"}
