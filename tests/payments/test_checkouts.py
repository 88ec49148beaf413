"""What a checkout freezes, and what it refuses."""

from __future__ import annotations

import asyncio
from datetime import date, time, timedelta
from typing import Any

import pytest

from caravan import calendar
from caravan.db import Database, Tx
from caravan.errors import DomainError, NotFound
from caravan.ids import new_id
from caravan.payments import coins, operations, store
from caravan.payments.operations import create_payment, retry_payment
from tests.builders import PROVIDERS, RULES, a_course, a_paid_checkout, a_payment, a_student, an_order
from tests.payments.helpers import in_tx, rows, somebody_waits, state, tell


async def test_what_was_sold_is_frozen_and_the_raw_input_kept(db: Database) -> None:
    async def work(tx: Tx) -> Any:
        student_id, course_id = await a_student(tx, timezone="Europe/London"), await a_course(tx)
        order = an_order(tx, student_id, course_id, time_slot="18:00-19:00", raw={"preferredTimeSlot": "18:00-19:00"})
        created = await create_payment(tx, order, RULES, PROVIDERS, account_id=None)
        await tx.execute("update courses set session_minutes = 45, weekdays = '{1}'")
        await tx.execute("update course_tiers set amount_cents = 1")
        return order, created

    order, created = await in_tx(db, work)
    (kept,) = await rows(db, "select * from checkouts")
    assert kept["slot_start"] == time(18)
    assert kept["start_date"] == order.start_date
    assert (kept["session_minutes"], kept["weekdays"]) == (60, [1, 2, 3, 4, 5, 6, 7])
    assert (kept["price_cents"], kept["currency"], kept["sessions"]) == (360_000, "INR", 30)
    assert (kept["timezone"], kept["learning_mode"], kept["group_size"]) == ("Europe/London", "online", 1)
    assert kept["raw"] == {"preferredTimeSlot": "18:00-19:00"}
    assert created.checkout["provider"] == "sandbox"
    (payment,) = await rows(db, "select metadata, status from payments")
    assert payment["status"] == "created"
    assert payment["metadata"] == {
        "courseId": str(order.course_id),
        "sessionCount": 30,
        "timeSlot": "6:00 PM",
        "startDate": order.start_date.isoformat(),
        "learningMode": "online",
        "groupSize": 1,
        "cartItemId": None,
    }


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"course_id": new_id()}, "COURSE_NOT_FOUND"),
        ({"session_count": 29}, "TIER_UNKNOWN"),
        ({"group_size": 3}, "TIER_UNKNOWN"),
        ({"group_size": 2}, "GROUP_SIZE_NOT_OFFERED"),
        ({"learning_mode": "center"}, "MODE_NOT_OFFERED"),
        ({"time_slot": "25:00"}, "INVALID_SLOT"),
        ({"time_slot": "18:00-18:45"}, "INVALID_SLOT"),
        ({"expected_amount_cents": 359_999}, "PRICE_CHANGED"),
        ({"coins": 3601}, "COINS_EXCEED_PRICE"),
        ({"coins": 1}, "COINS_INSUFFICIENT"),
    ],
)
async def test_what_the_catalogue_does_not_sell_is_refused(db: Database, changes: dict[str, Any], code: str) -> None:
    with pytest.raises(DomainError) as refusal:
        await in_tx(db, lambda tx: a_payment(tx, **changes))
    assert refusal.value.code == code
    if code == "PRICE_CHANGED":
        assert refusal.value.extra == {"amountCents": 360_000, "currency": "INR"}
    assert await rows(db, "select 1 from checkouts") == []


async def test_a_retired_course_is_refused(db: Database) -> None:
    async def work(tx: Tx) -> None:
        course_id = await a_course(tx)
        await tx.execute("update courses set retired_at = now()")
        await a_payment(tx, course_id=course_id)

    with pytest.raises(operations.CourseRetired):
        await in_tx(db, work)


@pytest.mark.parametrize(
    ("days", "error"),
    [(-2, calendar.StartInPast), (0, calendar.StartTooSoon), (92, calendar.StartTooFar)],
)
async def test_a_start_that_nobody_should_be_sold_is_refused(db: Database, days: int, error: type[DomainError]) -> None:
    async def work(tx: Tx) -> None:
        tx.now = tx.now.replace(hour=12)  # 17:30 in India: today's 6 PM is within the notice
        await a_payment(tx, start_date=tx.now.date() + timedelta(days=days), time_slot="6:00 PM")

    with pytest.raises(error):
        await in_tx(db, work)


async def test_home_without_a_place_is_sold_and_waits_later(db: Database) -> None:
    async def work(tx: Tx) -> None:
        await a_payment(tx, await a_student(tx, location=None), learning_mode="home")

    await in_tx(db, work)


# --- open, equal, paid, again ---


async def test_an_equal_open_checkout_is_named_unless_again(db: Database) -> None:
    student_id, course_id = await in_tx(db, lambda tx: _student_and_course(tx))
    first = await in_tx(db, lambda tx: a_payment(tx, student_id, course_id))
    with pytest.raises(operations.CheckoutOpen) as refusal:
        await in_tx(db, lambda tx: a_payment(tx, student_id, course_id, time_slot="06:00"))
    told = dict(refusal.value.extra)
    assert date.fromisoformat(str(told.pop("startDate")))
    assert told == {
        "checkoutId": str(first.checkout_id),
        "paymentId": str(first.id),
        "sessionCount": 30,
        "learningMode": "online",
        "groupSize": 1,
        "amountCents": first.amount_cents,
        "currency": "INR",
    }
    second = await in_tx(db, lambda tx: a_payment(tx, student_id, course_id, again=True))
    assert second.checkout_id != first.checkout_id
    await in_tx(db, lambda tx: a_payment(tx, student_id, course_id, time_slot="7 AM"))  # another slot is not equal


async def test_a_checkout_that_is_paid_or_over_is_not_open(db: Database) -> None:
    student_id, course_id = await in_tx(db, lambda tx: _student_and_course(tx))
    await in_tx(db, lambda tx: a_paid_checkout(tx, student_id, course_id))
    await in_tx(db, lambda tx: a_payment(tx, student_id, course_id))
    await rows(db, "update checkouts set expires_at = now() returning 1")
    await in_tx(db, lambda tx: a_payment(tx, student_id, course_id))


async def test_another_attempt_keeps_the_price_and_terms(db: Database) -> None:
    first = await in_tx(db, a_payment)
    await tell(db, "payment.failed", first.id)
    await rows(db, "update course_tiers set amount_cents = 1 returning 1")
    again = await in_tx(db, lambda tx: _retry(tx, first.checkout_id))
    assert (again.checkout_id, again.amount_cents) == (first.checkout_id, 360_000)
    await tell(db, "payment.succeeded", again.id)
    with pytest.raises(operations.CheckoutPaid):
        await in_tx(db, lambda tx: _retry(tx, first.checkout_id))


async def test_no_other_attempt_is_asked_for_while_money_waits_to_be_accepted(db: Database) -> None:
    first = await in_tx(db, a_payment)
    await tell(db, "payment.succeeded", first.id, 1)
    with pytest.raises(operations.CheckoutPaid):
        await in_tx(db, lambda tx: _retry(tx, first.checkout_id))


async def test_another_attempt_needs_a_checkout_that_is_not_over(db: Database) -> None:
    first = await in_tx(db, a_payment)
    with pytest.raises(NotFound):
        await in_tx(db, lambda tx: _retry(tx, new_id()))
    await rows(db, "update checkouts set expires_at = now() returning 1")
    with pytest.raises(operations.CheckoutExpired):
        await in_tx(db, lambda tx: _retry(tx, first.checkout_id))


async def test_the_newest_attempt_alone_keeps_coins(db: Database) -> None:
    async def buy(tx: Tx) -> Any:
        student_id = await a_student(tx)
        await coins.grant_coins(tx, student_id, 10, "welcome")
        return await a_payment(tx, student_id, coins=10)

    first = await in_tx(db, buy)
    again = await in_tx(db, lambda tx: _retry(tx, first.checkout_id))
    assert (again.coins, again.amount_cents) == (10, 359_000)
    assert await in_tx(db, lambda tx: coins.count_available(tx, first.student_id)) == 0


async def test_an_earlier_attempt_that_succeeds_has_the_coins_that_a_later_one_kept(db: Database) -> None:
    async def buy(tx: Tx) -> Any:
        student_id = await a_student(tx)
        await coins.grant_coins(tx, student_id, 10, "welcome")
        return await a_payment(tx, student_id, coins=10)

    first = await in_tx(db, buy)
    await in_tx(db, lambda tx: _retry(tx, first.checkout_id))
    await in_tx(db, lambda tx: operations.capture(tx, first.id, 359_000, "INR"))
    taken = await rows(
        db,
        "select kind, coins from coin_entries where payment_id = %(id)s and kind in ('captured', 'shortfall')",
        id=first.id,
    )
    assert taken == [{"kind": "captured", "coins": 10}]


async def test_trying_again_and_a_late_success_never_wait_for_each_other_in_a_circle(db: Database) -> None:
    async def buy(tx: Tx) -> Any:
        student_id = await a_student(tx)
        await coins.grant_coins(tx, student_id, 10, "welcome")
        return await a_payment(tx, student_id, coins=10)

    first = await in_tx(db, buy)
    async with db.transaction() as tx:
        await store.lock_checkout(tx, first.checkout_id)
        capture = asyncio.create_task(in_tx(db, lambda tx: operations.capture(tx, first.id, 359_000, "INR")))
        await somebody_waits(tx)
        async with asyncio.timeout(0.5):  # deadlocks are looked for after a second
            assert (await _retry(tx, first.checkout_id)).coins == 10
    assert await capture


async def test_a_clash_with_the_students_own_time_is_named(db: Database) -> None:
    student_id, course_id = await in_tx(db, lambda tx: _student_and_course(tx))
    paid = await in_tx(db, lambda tx: a_paid_checkout(tx, student_id, course_id))
    purchase_id = await in_tx(db, lambda tx: _booked(tx, paid.id, date.today() + timedelta(days=10)))
    with pytest.raises(operations.StudentConflict) as refusal:
        await in_tx(db, lambda tx: a_payment(tx, student_id, time_slot="6:30 AM", again=True))
    assert refusal.value.extra == {"purchaseId": str(purchase_id), "courseId": str(course_id)}
    await in_tx(db, lambda tx: a_payment(tx, student_id, time_slot="7:00 AM"))
    await rows(db, "update bookings set live = false returning 1")
    await in_tx(db, lambda tx: a_payment(tx, student_id, time_slot="6:30 AM"))


async def test_a_total_of_zero_is_captured_at_once(db: Database) -> None:
    async def buy(tx: Tx) -> Any:
        student_id = await a_student(tx)
        await coins.grant_coins(tx, student_id, 3600, "a prize")
        return await create_payment(
            tx, an_order(tx, student_id, await a_course(tx), coins=3600), RULES, {}, account_id=None
        )

    created = await in_tx(db, buy)
    assert (created.payment.status, created.payment.amount_cents) == ("succeeded", 0)
    assert created.checkout == {"provider": "none"}
    assert (await state(db, created.payment.id))["payer"]


# --- what the tests above stand on ---


async def _student_and_course(tx: Tx) -> Any:
    return await a_student(tx), await a_course(tx)


async def _retry(tx: Tx, checkout_id: Any) -> Any:
    return (await retry_payment(tx, checkout_id, RULES, PROVIDERS, account_id=None)).payment


async def _booked(tx: Tx, payment_id: Any, day: date) -> Any:
    """A purchase of a payment with one live booking, 6 to 7 in India."""
    names = {"id": new_id(), "payment": payment_id, "trainer": new_id(), "booking": new_id(), "day": day}
    await tx.execute("insert into trainers (id, name) values (%(trainer)s, 'Ravi')", names)
    await tx.execute(
        "insert into student_course_purchases (id, checkout_id, payment_id, student_id, course_id, purchase_tier,"
        " session_minutes, weekdays, learning_mode, group_size, timezone, slot_start, start_date, metadata)"
        " select %(id)s, c.id, c.paid_by, c.student_id, c.course_id, c.sessions, c.session_minutes, c.weekdays,"
        " c.learning_mode, c.group_size, c.timezone, c.slot_start, c.start_date, '{}'"
        " from checkouts c where c.paid_by = %(payment)s",
        names,
    )
    await tx.execute(
        "insert into bookings (id, kind, purchase_id, trainer_id, student_id, starts, minutes, during)"
        " select %(booking)s, 'package', p.id, %(trainer)s, p.student_id, array[s.at], 60,"
        " tstzmultirange(tstzrange(s.at, s.at + interval '1 hour'))"
        " from student_course_purchases p, (select (%(day)s::date + time '06:00') at time zone 'Asia/Kolkata' as at) s"
        " where p.id = %(id)s",
        names,
    )
    return names["id"]
