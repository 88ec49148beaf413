"""From captured money to a purchase: what is sold, what waits and why, and what refunds do."""

from __future__ import annotations

import asyncio
from datetime import date, time, timedelta
from typing import Any
from uuid import UUID

import pytest
from structlog.testing import capture_logs

from caravan import deliveries
from caravan.calendar import InvalidSlot, StartInPast
from caravan.db import Database, Tx
from caravan.deliveries import Reason, Stage
from caravan.events import CourseUpdated, PurchaseConfirmed, StudentUpdated
from caravan.ids import new_id
from caravan.purchases import handlers
from caravan.purchases.operations import PurchaseNotWaiting, TermsKnown, choose_slot, create_purchases, mend_terms
from tests.builders import a_captured_payment, a_course, a_refund, a_student, somebody_waiting_for_a_lock

NOTICE = timedelta(hours=12)


async def said(tx: Tx) -> list[str]:
    """The types of all events that are committed."""
    return await tx.values("select type from outbox order by id")


async def purchases(tx: Tx) -> list[dict[str, Any]]:
    return await tx.all("select * from student_course_purchases order by payment_id")


async def waits(tx: Tx, payment: UUID) -> tuple[str | None, Any]:
    rows = await tx.tuples("select reason, detail from undelivered where payment_id = %(id)s", {"id": payment})
    return rows[0] if rows else (None, None)


async def test_a_captured_payment_becomes_a_purchase_once(db: Database) -> None:
    async with db.transaction() as tx:
        payment = await a_captured_payment(tx, await a_student(tx), course := await a_course(tx), sessions=30)
    async with db.transaction("purchase-worker") as tx:
        assert list((await create_purchases(tx, [payment, payment, new_id()])).created) == [payment]
    async with db.transaction("purchase-worker") as tx:
        again = await create_purchases(tx, [payment])
        assert (again.created, again.skipped) == ({}, {payment: "exists"})
    async with db.transaction() as tx:
        (purchase,) = await purchases(tx)
        assert purchase["payment_id"] == payment
        assert purchase["course_id"] == course
        assert purchase["purchase_tier"] == 30
        assert purchase["is_active"]
        assert purchase["slot_start"] == time(6)
        assert purchase["metadata"]["tierFrom"] == "checkout"
        assert purchase["metadata"]["timeSlot"] == "6:00 AM"
        assert await said(tx) == ["PURCHASE_CREATED", "COURSE_ACCESS_GRANTED"]
        rows = await tx.all("select source, correlation_id, data from outbox")
        assert {row["source"] for row in rows} == {"purchase-worker"}
        assert {row["correlation_id"] for row in rows} == {str(payment)}
        assert rows[0]["data"]["purchaseId"] == str(purchase["id"])
        assert rows[0]["data"]["sessionCount"] == 30


async def test_many_at_once_make_one(db: Database) -> None:
    async with db.transaction() as tx:
        student, course = await a_student(tx), await a_course(tx)
        payments = [await a_captured_payment(tx, student, course) for _ in range(20)]

    async def create(order: list[UUID]) -> int:
        return len((await db.transact(lambda tx: create_purchases(tx, order))).created)

    counts = await asyncio.gather(*(create(payments if n % 2 else payments[::-1]) for n in range(6)))
    assert sum(counts) == 20
    async with db.transaction() as tx:
        assert len(await purchases(tx)) == 20
        assert (await said(tx)).count("PURCHASE_CREATED") == 20


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"student_id": None}, Reason.STUDENT_NOT_FOUND),
        ({"course_id": new_id()}, Reason.COURSE_NOT_FOUND),
        ({"course_id": None}, Reason.COURSE_NOT_FOUND),
        ({"course_id": None, "metadata": {"courseId": "-" * 36}}, Reason.COURSE_NOT_FOUND),
        ({"sessions": None}, Reason.TIER_UNKNOWN),
        ({"sessions": None, "metadata": {"sessionCount": "30"}}, Reason.TIER_UNKNOWN),
        ({"sessions": None, "metadata": {"sessionCount": True}}, Reason.TIER_UNKNOWN),
        ({"sessions": None, "metadata": {"sessionCount": 0}}, Reason.TIER_UNKNOWN),
        ({"sessions": None, "metadata": {"sessionCount": 30.5}}, Reason.TIER_UNKNOWN),
        ({"sessions": None, "metadata": ["sessionCount"]}, Reason.TIER_UNKNOWN),
        ({"slot": None}, Reason.INVALID_SCHEDULE),
        ({"slot": None, "metadata": {"timeSlot": "sixish"}}, Reason.INVALID_SCHEDULE),
        ({"slot": None, "metadata": {"timeSlot": "18:00-18:45"}}, Reason.INVALID_SCHEDULE),
        ({"starts_in_days": None}, Reason.INVALID_SCHEDULE),
        ({"starts_in_days": None, "metadata": {"startDate": "soon"}}, Reason.INVALID_SCHEDULE),
        ({"zone": "Mars/Olympus"}, Reason.INVALID_SCHEDULE),
        ({"weekdays": []}, Reason.INVALID_SCHEDULE),
        ({"mode": None}, Reason.INVALID_SCHEDULE),
        ({"captured_cents": 119999}, Reason.AMOUNT_MISMATCH),
    ],
)
async def test_what_is_wrong_is_a_stored_reason(db: Database, given: dict[str, Any], reason: Reason) -> None:
    async with db.transaction() as tx:
        student, course = await a_student(tx), await a_course(tx)
        terms: dict[str, Any] = {"student_id": student, "course_id": course} | given
        terms["student_id"] = terms["student_id"] or new_id()
        payment = await a_captured_payment(tx, **terms)
        good = await a_captured_payment(tx, student, course)
    with capture_logs() as lines:
        for _ in range(2):
            async with db.transaction() as tx:
                done = await create_purchases(tx, [payment, good])
                assert done.waiting == {payment: reason}
    (told,) = [line for line in lines if line["event"] == "Purchases wait"]
    assert (told["count"], told["reasons"]) == (1, {str(reason): 1})
    async with db.transaction() as tx:
        assert [row["payment_id"] for row in await purchases(tx)] == [good]  # one bad payment stops nobody else
        assert (await waits(tx, payment))[0] == reason
        assert (await said(tx)).count("PURCHASE_BLOCKED") == 1


async def test_terms_that_the_checkout_lacks_come_from_the_metadata(db: Database) -> None:
    async with db.transaction() as tx:
        course = await a_course(tx, minutes=45, weekdays=[1, 3], modes=["online"])
        payment = await a_captured_payment(
            tx,
            await a_student(tx, timezone="Europe/London"),
            None,
            sessions=None,
            minutes=None,
            weekdays=None,
            mode=None,
            zone=None,
            slot=None,
            starts_in_days=None,
            metadata={
                "courseId": str(course),
                "sessionCount": 20,
                "preferredTimeSlot": "18:00-18:45",
                "date": "2026-01-09",
            },
        )
    async with db.transaction() as tx:
        await create_purchases(tx, [payment])
    async with db.transaction() as tx:
        (purchase,) = await purchases(tx)
    assert purchase["course_id"] == course
    assert purchase["purchase_tier"] == 20
    assert (purchase["session_minutes"], purchase["weekdays"], purchase["timezone"]) == (45, [1, 3], "Europe/London")
    assert (purchase["slot_start"], purchase["start_date"]) == (time(18), date(2026, 1, 9))
    assert purchase["learning_mode"] == "online"
    assert purchase["metadata"]["tierFrom"] == "payment.metadata"


async def test_the_register_learns_the_course_that_only_the_metadata_named(db: Database) -> None:
    """What waits for a trainer of a course is resumed by the register's course."""
    async with db.transaction() as tx:
        course = await a_course(tx)
        payment = await a_captured_payment(tx, await a_student(tx), None, metadata={"courseId": str(course)})
        await create_purchases(tx, [payment])
        await deliveries.block(tx, [deliveries.Block(payment, Stage.PURCHASED, Reason.NO_TRAINER_AVAILABLE)])
        assert await deliveries.list_waiting(tx, [Reason.NO_TRAINER_AVAILABLE], course_ids=[course]) == [payment]


async def test_the_checkout_goes_before_the_metadata(db: Database) -> None:
    async with db.transaction() as tx:
        metadata = {"sessionCount": 30, "timeSlot": "7:00 PM", "startDate": "2020-01-01"}
        payment = await a_captured_payment(tx, await a_student(tx), await a_course(tx), sessions=10, metadata=metadata)
    async with db.transaction() as tx:
        await create_purchases(tx, [payment])
        (purchase,) = await purchases(tx)
    assert (purchase["purchase_tier"], purchase["slot_start"]) == (10, time(6))


async def test_a_second_payment_of_a_checkout_buys_nothing(db: Database) -> None:
    async with db.transaction() as tx:
        student, course = await a_student(tx), await a_course(tx)
        first = await a_captured_payment(tx, student, course)
        checkout = await tx.value("select checkout_id from payments")
        second = await a_captured_payment(tx, student, course, checkout_id=checkout)
    async with db.transaction() as tx:
        done = await create_purchases(tx, [first, second])
        assert done.waiting == {second: Reason.PAID_TWICE}
        assert list(done.created) == [first]


async def test_an_accepted_amount_goes_on(db: Database) -> None:
    async with db.transaction() as tx:
        payment = await a_captured_payment(tx, await a_student(tx), await a_course(tx), captured_cents=100)
    async with db.transaction() as tx:
        await create_purchases(tx, [payment])
    async with db.transaction() as tx:
        await tx.execute("update payments set accepted_at = now()")
        assert list((await create_purchases(tx, [payment])).created) == [payment]
    async with db.transaction() as tx:
        assert await waits(tx, payment) == (None, None)
        assert "PURCHASE_UNBLOCKED" in await said(tx)


@pytest.mark.parametrize(
    ("change", "skip"),
    [
        ("update payments set status = 'refunded', refunded_cents = captured_cents", "refunded"),
        ("update payments set status = 'pending', captured_at = null", "not captured"),
        ("update checkouts set paid_by = null", "not the payer"),
    ],
)
async def test_what_needs_no_purchase_gets_none(db: Database, change: Any, skip: str) -> None:
    async with db.transaction() as tx:
        payment = await a_captured_payment(tx, await a_student(tx), await a_course(tx))
        await tx.execute(change)
        assert (await create_purchases(tx, [payment])).skipped == {payment: skip}
        assert await purchases(tx) == []


async def test_a_hold_stops_it_and_its_release_lets_it_go_on(db: Database) -> None:
    async with db.transaction() as tx:
        payment = await a_captured_payment(tx, await a_student(tx), await a_course(tx))
        await deliveries.hold(tx, payment, Stage.PAID, "look at it")
        assert (await create_purchases(tx, [payment])).skipped == {payment: "held"}
        await deliveries.release_hold(tx, payment, Stage.PAID)
        assert list((await create_purchases(tx, [payment])).created) == [payment]


async def test_a_refund_that_is_on_its_way_is_waited_for_and_seen(db: Database) -> None:
    async with db.transaction() as tx:
        payment = await a_captured_payment(tx, await a_student(tx), await a_course(tx))
    async with db.transaction() as refund:
        await refund.execute("update payments set status = 'refunded', refunded_cents = captured_cents")
        creating = asyncio.create_task(db.transact(lambda tx: create_purchases(tx, [payment])))
        await somebody_waiting_for_a_lock(db)
    assert (await creating).skipped == {payment: "refunded"}


async def test_earlier_partial_refunds_are_taken_off_from_the_start(db: Database) -> None:
    async with db.transaction() as tx:
        payment = await a_captured_payment(tx, await a_student(tx), await a_course(tx), sessions=10)
        await a_refund(tx, payment, sessions=3)
        await a_refund(tx, payment, sessions=4)
        await create_purchases(tx, [payment])
        assert (await purchases(tx))[0]["refunded_sessions"] == 7


async def test_refunds_are_applied_once(db: Database) -> None:
    async with db.transaction() as tx:
        payment = await a_captured_payment(tx, await a_student(tx), await a_course(tx), sessions=10)
        await create_purchases(tx, [payment])
        event = await a_refund(tx, payment, sessions=3)
        for _ in range(2):
            await handlers.apply_refunds(tx, [event])
            assert (await purchases(tx))[0]["refunded_sessions"] == 3
        await handlers.apply_refunds(tx, [await a_refund(tx, payment, sessions=7)])
        assert (await purchases(tx))[0]["refunded_sessions"] == 10
        assert (await purchases(tx))[0]["is_active"]
        event = await a_refund(tx, payment)
        assert event.full
        for _ in range(2):
            await handlers.apply_refunds(tx, [event])
            assert not (await purchases(tx))[0]["is_active"]


async def test_the_handler_creates_and_news_of_a_student_or_course_resumes(db: Database) -> None:
    student, course = new_id(), new_id()
    async with db.transaction() as tx:
        payment = await a_captured_payment(tx, student, None, metadata={"courseId": str(course)})
        confirmed = PurchaseConfirmed(payment_id=payment, student_id=student, course_id=None, checkout_id=new_id())
        await handlers.create_purchases(tx, [confirmed])
        assert (await waits(tx, payment))[0] == Reason.STUDENT_NOT_FOUND
        await a_student(tx, student_id=student)
        await handlers.resume_payments(tx, [StudentUpdated(student_id=student, changed=("name",))])
        assert (await waits(tx, payment))[0] == Reason.COURSE_NOT_FOUND
        await a_course(tx, course_id=course)
        await handlers.resume_payments(tx, [CourseUpdated(course_id=course, changed=("title",))])
        assert len(await purchases(tx)) == 1
        assert await waits(tx, payment) == (None, None)


async def test_unknown_terms_are_mended_and_known_ones_are_not_touched(db: Database) -> None:
    async with db.transaction() as tx:
        payment = await a_captured_payment(tx, await a_student(tx), await a_course(tx), sessions=None, slot=None)
        await create_purchases(tx, [payment])
    with pytest.raises(TermsKnown):
        async with db.transaction() as tx:
            await mend_terms(tx, payment, sessions=20, start_date=date(2030, 1, 1))
    with pytest.raises(InvalidSlot):
        async with db.transaction() as tx:
            await mend_terms(tx, payment, time_slot="18:00-18:30")
    async with db.transaction() as tx:
        assert (await mend_terms(tx, payment, sessions=20)).waiting == {payment: Reason.INVALID_SCHEDULE}
        assert list((await mend_terms(tx, payment, time_slot="6 PM")).created) == [payment]
        (purchase,) = await purchases(tx)
        assert (purchase["purchase_tier"], purchase["slot_start"]) == (20, time(18))
    with pytest.raises(TermsKnown):
        async with db.transaction() as tx:
            await mend_terms(tx, payment, sessions=30)


async def test_a_tier_known_from_the_metadata_is_not_replaced(db: Database) -> None:
    async with db.transaction() as tx:
        payment = await a_captured_payment(
            tx, await a_student(tx), await a_course(tx), sessions=None, slot=None, metadata={"sessionCount": 30}
        )
    with pytest.raises(TermsKnown):
        async with db.transaction() as tx:
            await mend_terms(tx, payment, sessions=10)


async def test_another_slot_is_chosen_while_nobody_is_booked(db: Database) -> None:
    async with db.transaction() as tx:
        payment = await a_captured_payment(tx, await a_student(tx), await a_course(tx))
        purchase = (await create_purchases(tx, [payment])).created[payment]
        soon = (tx.now + timedelta(days=9)).date()
        await choose_slot(tx, purchase, time_slot="7:30 PM", start_date=soon, notice=NOTICE)
        (row,) = await purchases(tx)
        assert (row["slot_start"], row["start_date"]) == (time(19, 30), soon)
        assert row["metadata"]["timeSlot"] == "7:30 PM"
        assert await tx.value("select slot_start from checkouts") == time(6)  # what was asked first
    with pytest.raises(StartInPast):
        async with db.transaction() as tx:
            await choose_slot(tx, purchase, start_date=date(2026, 1, 9), notice=NOTICE)
    async with db.transaction() as tx:
        await tx.execute("update student_course_purchases set is_active = false")
    with pytest.raises(PurchaseNotWaiting):
        async with db.transaction() as tx:
            await choose_slot(tx, purchase, time_slot="8 PM", notice=NOTICE)
