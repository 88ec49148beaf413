"""Finding a trainer, booking all or nothing, and why a purchase waits."""

from __future__ import annotations

import asyncio
from datetime import date, datetime, time, timedelta
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import pytest
from structlog.testing import capture_logs

from caravan import deliveries
from caravan.allocations import handlers
from caravan.allocations.operations import (
    AllocationNotWaiting,
    AllocationRefused,
    Settled,
    approve,
    settle_allocations,
)
from caravan.db import Database, Tx
from caravan.deliveries import Reason, Stage
from caravan.events import BookingReleased, CourseUpdated, PurchaseCreated, StudentUpdated, TrainerUpdated
from caravan.ids import new_id
from caravan.purchases.operations import choose_slot
from tests.builders import a_course, a_purchase, a_refund, a_student, a_trainer, open_time

INDIA = ZoneInfo("Asia/Kolkata")
NOTICE = timedelta(hours=12)


async def settle(tx: Tx, purchase: UUID) -> Settled:
    return (await settle_allocations(tx, [purchase]))[purchase]


async def allocation(tx: Tx, purchase: UUID) -> dict[str, Any]:
    return await tx.one(
        "select a.*, b.starts, b.kind from trainer_allocations a left join bookings b on b.id = a.booking_id"
        " where a.purchase_id = %(id)s and a.status <> 'cancelled'",
        {"id": purchase},
    )


async def reason(tx: Tx, purchase: UUID) -> tuple[str, Any] | None:
    rows = await tx.tuples(
        "select reason, detail from undelivered join student_course_purchases using (payment_id) where id = %(id)s",
        {"id": purchase},
    )
    return rows[0] if rows else None


async def payment_of(tx: Tx, purchase: UUID) -> UUID:
    return await tx.value("select payment_id from student_course_purchases where id = %(id)s", {"id": purchase})


def heard(tx: Tx, kind: str) -> list[Any]:
    return [event for event in tx.outgoing if event.type == kind]


@pytest.mark.parametrize("tier", [10, 20, 30])
async def test_a_package_is_booked_whole_with_the_decision_kept(db: Database, tier: int) -> None:
    async with db.transaction() as tx:
        course = await a_course(tx)
        trainer = await a_trainer(tx, course)
        start = (tx.now.astimezone(INDIA) + timedelta(days=5)).date()
        purchase = await a_purchase(tx, await a_student(tx), course, sessions=tier, start=start)
        tx.outgoing.clear()
        outcome = await settle(tx, purchase)
        found = await allocation(tx, purchase)
        assert outcome == Settled("allocated", found["id"], trainer)
        assert (found["status"], found["trainer_id"], found["kind"]) == ("approved", trainer, "package")
        assert found["starts"] == [
            datetime.combine(start + timedelta(days=n), time(6), tzinfo=INDIA) for n in range(tier)
        ]
        assert found["metadata"] == {
            "sessionCount": tier,
            "schedule": {"timeSlot": "6:00 AM", "date": start.isoformat()},
        }
        assert found["decision"]["shortlist"] == {"open": 1, "free": 1}
        assert "counts" not in found["decision"]  # nobody looked at everybody
        assert found["decision"]["candidates"] == [{"trainerId": str(trainer), "load": 0, "distanceKm": None}]
        assert found["decision"]["chosen"] == str(trainer)
        (said,) = tx.outgoing
        assert (said.type, said.booking_id, said.session_count) == ("TRAINER_ALLOCATED", found["booking_id"], tier)
        assert await settle(tx, purchase) == Settled("unchanged", found["id"], trainer)
        assert len(tx.outgoing) == 1
        assert await tx.value("select count(*) from bookings") == 1


async def test_each_filter_counts_who_is_left(db: Database) -> None:
    async with db.transaction() as tx:
        course = await a_course(tx, minutes=60)
        student = await a_student(tx, location=(28.6139, 77.2090))
        await a_trainer(tx)  # teaches something else
        await a_trainer(tx, course, active=False)
        await a_trainer(tx, course, modes=["online"])
        await a_trainer(tx, course, open_days=None)  # has not said when
        await a_trainer(tx, course, open_days=8)  # known for a part of the time only
        busy = await a_trainer(tx, course)
        await settle_with(tx, busy)
        await a_trainer(tx, course, location=(28.70, 77.2090), radius_km=9.5)  # 9.57 km away
        await a_trainer(tx, course, location=None)
        purchase = await a_purchase(tx, student, course, mode="home")
        assert (await settle(tx, purchase)).reason == Reason.NO_TRAINER_AVAILABLE
        counts = {"teaches": 7, "active": 6, "offersMode": 5, "open": 3, "free": 2, "withinRadius": 0}
        assert (await allocation(tx, purchase))["decision"]["counts"] == counts
        stored = await reason(tx, purchase)
        assert stored
        assert stored[1] == {"counts": counts}
        near = await a_trainer(tx, course, location=(28.70, 77.2090), radius_km=9.6)
        assert (await settle(tx, purchase)).trainer_id == near
        decision = (await allocation(tx, purchase))["decision"]
        counts = {"teaches": 8, "active": 7, "offersMode": 6, "open": 4, "free": 3, "withinRadius": 1}
        assert decision["counts"] == counts
        assert decision["candidates"] == [{"trainerId": str(near), "load": 0, "distanceKm": 9.6}]
        assert "28." not in str(decision | {"asOf": None})  # whose seconds may be 28


async def settle_with(tx: Tx, trainer: UUID, **terms: Any) -> UUID:
    """Another family's purchase of a course that only this trainer teaches, booked."""
    course = await a_course(tx)
    await tx.execute(
        "insert into trainer_courses (trainer_id, course_id) values (%(trainer)s, %(course)s)",
        {"trainer": trainer, "course": course},
    )
    purchase = await a_purchase(tx, await a_student(tx), course, **terms)
    assert (await settle(tx, purchase)).trainer_id == trainer
    return purchase


async def test_least_loaded_then_nearest_then_id(db: Database) -> None:
    async with db.transaction() as tx:
        course = await a_course(tx)
        loaded = await a_trainer(tx, course)
        far = await a_trainer(tx, course, location=(28.65, 77.2090))
        near = await a_trainer(tx, course, location=(28.62, 77.2090))
        await settle_with(tx, loaded, slot=time(9))
        home = await a_purchase(tx, await a_student(tx), course, mode="home")
        assert (await settle(tx, home)).trainer_id == near
        assert [c["trainerId"] for c in (await allocation(tx, home))["decision"]["candidates"]] == [
            str(near),
            str(far),
            str(loaded),
        ]
        online = await a_purchase(tx, await a_student(tx), course, slot=time(12))
        assert (await settle(tx, online)).trainer_id == far  # near has ten now
        tie = await a_purchase(tx, await a_student(tx), course, slot=time(15))
        assert (await settle(tx, tie)).trainer_id == loaded  # ten each: online, the lowest id


async def test_a_batch_shares_out_trainers_and_the_longest_waiting_goes_first(db: Database) -> None:
    async with db.transaction() as tx:
        course = await a_course(tx)
        trainers = {await a_trainer(tx, course) for _ in range(30)}
        purchases = [await a_purchase(tx, await a_student(tx), course) for _ in range(32)]
        first, second = purchases[30:]
        await tx.execute(
            "update undelivered set since = since - interval '1 hour' where payment_id = any(%(ids)s)",
            {"ids": [await payment_of(tx, first), await payment_of(tx, second)]},
        )
        with capture_logs() as lines:
            settled = await settle_allocations(tx, purchases)
    (told,) = [line for line in lines if line["event"] == "Purchases wait"]
    assert (told["count"], told["reasons"]) == (2, {"NO_TRAINER_AVAILABLE": 2})
    assert {outcome.trainer_id for outcome in settled.values()} - {None} == trainers
    assert settled[first].trainer_id
    assert settled[second].trainer_id
    assert [settled[p].reason for p in purchases if not settled[p].trainer_id] == [Reason.NO_TRAINER_AVAILABLE] * 2


async def test_who_has_waited_longest_gets_the_trainer_who_becomes_free(db: Database) -> None:
    async with db.transaction() as tx:
        course = await a_course(tx)
        trainers = [await a_trainer(tx, course) for _ in range(30)]
        booked = [await a_purchase(tx, await a_student(tx), course) for _ in trainers]
        await settle_allocations(tx, booked)
        waiting = [await a_purchase(tx, await a_student(tx), course) for _ in range(10)]
        late = [await a_purchase(tx, await a_student(tx), course) for _ in range(10)]
        await tx.execute(
            "update undelivered set since = since - interval '1 hour' where payment_id = any(%(ids)s)",
            {"ids": [await payment_of(tx, waiting[7])]},
        )
        await settle_allocations(tx, waiting)
        await handlers.undo_refunded(tx, [await a_refund(tx, await payment_of(tx, booked[3]))])
        settled = await settle_allocations(tx, [*late, *waiting])
    assert [p for p in settled if settled[p].action == "allocated"] == [waiting[7]]


async def test_no_trainer_waits_with_the_counts_and_goes_on_when_one_comes(db: Database) -> None:
    async with db.transaction() as tx:
        course = await a_course(tx)
        purchase = await a_purchase(tx, await a_student(tx), course)
        tx.outgoing.clear()
        for _ in range(2):
            assert (await settle(tx, purchase)).reason == Reason.NO_TRAINER_AVAILABLE
        waiting = await allocation(tx, purchase)
        assert (waiting["status"], waiting["trainer_id"]) == ("waiting", None)
        stored = await reason(tx, purchase)
        assert stored
        assert stored[0] == "NO_TRAINER_AVAILABLE"
        assert stored[1]["counts"]["teaches"] == 0
        (blocked,) = heard(tx, "PURCHASE_BLOCKED")
        assert (blocked.stage, blocked.purchase_id) == ("purchased", purchase)
        trainer = await a_trainer(tx, course)
        await handlers.resume_waiting(tx, [TrainerUpdated(trainer_id=trainer, changed=("courses",))])
        found = await allocation(tx, purchase)
        assert (found["id"], found["status"], found["trainer_id"]) == (waiting["id"], "approved", trainer)
        assert await reason(tx, purchase) == (None, None)
        assert len(heard(tx, "PURCHASE_UNBLOCKED")) == 1


async def test_home_needs_a_location_and_nobody_looks_for_trainers_before(db: Database) -> None:
    async with db.transaction() as tx:
        course = await a_course(tx)
        await a_trainer(tx, course)
        student = await a_student(tx, location=None)
        purchase = await a_purchase(tx, student, course, mode="home")
        online = await a_purchase(tx, student, course, slot=time(9))
        assert (await settle(tx, purchase)).reason == Reason.STUDENT_LOCATION_MISSING
        assert (await settle(tx, online)).action == "allocated"
        assert "counts" not in (await allocation(tx, purchase))["decision"]
        await handlers.resume_waiting(tx, [StudentUpdated(student_id=student, changed=("name",))])
        await tx.execute("update students set latitude = 28.61, longitude = 77.21")
        await handlers.resume_waiting(tx, [StudentUpdated(student_id=student, changed=("name",))])
        assert (await allocation(tx, purchase))["status"] == "waiting"
        await handlers.resume_waiting(tx, [StudentUpdated(student_id=student, changed=("latitude", "longitude"))])
        assert (await allocation(tx, purchase))["status"] == "approved"


@pytest.mark.parametrize("together", [True, False])
async def test_a_busy_student_waits_and_the_clash_is_named(db: Database, together: bool) -> None:
    async with db.transaction() as tx:
        course, other = await a_course(tx), await a_course(tx, minutes=30)
        await a_trainer(tx, course)
        await a_trainer(tx, other)
        student = await a_student(tx)
        first = await a_purchase(tx, student, course)
        second = await a_purchase(tx, student, other, minutes=30, slot=time(6, 30))
        if not together:
            await settle_allocations(tx, [first])
        await settle_allocations(tx, [first, second])
        assert await reason(tx, second) == ("STUDENT_CONFLICT", {"purchaseId": str(first)})
        # The clash ends.
        event = await a_refund(tx, await payment_of(tx, first))
        tx.outgoing.clear()
        await handlers.undo_refunded(tx, [event])
        await handlers.resume_waiting(tx, heard(tx, "BOOKING_RELEASED"))
        assert (await allocation(tx, second))["status"] == "approved"


async def test_another_slot_ends_a_clash_too(db: Database) -> None:
    async with db.transaction() as tx:
        course = await a_course(tx)
        await a_trainer(tx, course)
        await a_trainer(tx, course)
        student = await a_student(tx)
        first, second = await a_purchase(tx, student, course), await a_purchase(tx, student, course)
        settled = await settle_allocations(tx, [first, second])
        assert settled[second].reason == Reason.STUDENT_CONFLICT
        await choose_slot(tx, second, time_slot="7:00 AM", notice=NOTICE)
        assert (await settle(tx, second)).action == "allocated"


async def test_a_start_gone_by_rolls_forward_and_stays_on_record(db: Database) -> None:
    async with db.transaction() as tx:
        course = await a_course(tx, weekdays=[1, 3, 5])
        await a_trainer(tx, course)
        gone = date(2026, 1, 9)
        purchase = await a_purchase(tx, await a_student(tx), course, sessions=20, start=gone, weekdays=[1, 3, 5])
        await settle(tx, purchase)
        found = await allocation(tx, purchase)
        assert len(found["starts"]) == 20
        assert found["starts"][0] >= tx.now + NOTICE
        assert found["starts"][0] < tx.now + NOTICE + timedelta(days=4)
        assert {start.astimezone(INDIA).isoweekday() for start in found["starts"]} == {1, 3, 5}
        assert {start.astimezone(INDIA).time() for start in found["starts"]} == {time(6)}
        assert found["metadata"]["schedule"]["date"] == "2026-01-09"
        assert await tx.value("select start_date from student_course_purchases") == gone


async def test_the_notice_is_the_callers(db: Database) -> None:
    async with db.transaction() as tx:
        course = await a_course(tx)
        await a_trainer(tx, course)
        purchase = await a_purchase(tx, await a_student(tx), course, start=date(2026, 1, 9))
        await settle_allocations(tx, [purchase], notice=timedelta(days=30))
        assert (await allocation(tx, purchase))["starts"][0] >= tx.now + timedelta(days=30)


async def test_holidays_are_skipped_and_extend(db: Database) -> None:
    async with db.transaction() as tx:
        course = await a_course(tx)
        await a_trainer(tx, course)
        start = (tx.now.astimezone(INDIA) + timedelta(days=3)).date()
        await tx.execute("insert into holidays values (%(day)s, 'Diwali')", {"day": start + timedelta(days=4)})
        purchase = await a_purchase(tx, await a_student(tx), course, start=start)
        await settle(tx, purchase)
        days = [moment.astimezone(INDIA).date() for moment in (await allocation(tx, purchase))["starts"]]
        assert days == [start + timedelta(days=n) for n in range(11) if n != 4]


async def test_sixteen_at_once_for_one_slot_of_one_trainer(db: Database) -> None:
    async with db.transaction() as tx:
        course = await a_course(tx)
        trainer = await a_trainer(tx, course)
        purchases = [await a_purchase(tx, await a_student(tx), course) for _ in range(16)]
    async with Database(db.url, max_connections=16) as crowd:
        results = await asyncio.gather(*(crowd.transact(lambda tx, p=p: settle(tx, p)) for p in purchases))
    assert sorted(result.action for result in results) == ["allocated"] + ["waiting"] * 15
    async with db.transaction() as tx:
        assert await tx.values("select trainer_id from bookings where live") == [trainer]
        assert await tx.value("select count(*) from undelivered where reason = 'NO_TRAINER_AVAILABLE'") == 15


async def test_sixteen_at_once_share_sixteen_trainers(db: Database) -> None:
    """Everybody's first choice is the same; the losers go on to the next in the same pass."""
    async with db.transaction() as tx:
        course = await a_course(tx)
        for _ in range(16):
            await a_trainer(tx, course)
        purchases = [await a_purchase(tx, await a_student(tx), course) for _ in range(16)]
    async with Database(db.url, max_connections=16) as crowd:
        results = await asyncio.gather(*(crowd.transact(lambda tx, p=p: settle(tx, p)) for p in purchases))
    assert {result.action for result in results} == {"allocated"}
    assert len({result.trainer_id for result in results}) == 16


async def test_the_same_purchase_at_once_is_settled_once(db: Database) -> None:
    async with db.transaction() as tx:
        course = await a_course(tx)
        await a_trainer(tx, course)
        await a_trainer(tx, course)
        purchases = [await a_purchase(tx, await a_student(tx), course, slot=time(6 + n)) for n in range(6)]
    orders = [purchases, purchases[::-1]] * 3
    await asyncio.gather(*(db.transact(lambda tx, order=order: settle_allocations(tx, order)) for order in orders))
    async with db.transaction() as tx:
        assert await tx.value("select count(*) from bookings") == 6
        assert await tx.value("select count(*) from outbox where type = 'TRAINER_ALLOCATED'") == 6


async def test_a_held_purchase_is_left_alone(db: Database) -> None:
    async with db.transaction() as tx:
        course = await a_course(tx)
        await a_trainer(tx, course)
        purchase = await a_purchase(tx, await a_student(tx), course)
        payment = await payment_of(tx, purchase)
        await deliveries.hold(tx, payment, Stage.PURCHASED, "wait")
        assert (await settle(tx, purchase)).action == "held"
        await deliveries.release_hold(tx, payment, Stage.PURCHASED)
        assert (await settle(tx, purchase)).action == "allocated"


async def test_the_handler_books_what_was_created(db: Database) -> None:
    async with db.transaction() as tx:
        course = await a_course(tx)
        trainer = await a_trainer(tx, course)
        purchase = await a_purchase(tx, await a_student(tx), course)
        await handlers.allocate_trainers(tx, heard(tx, PurchaseCreated.type))
        assert (await allocation(tx, purchase))["trainer_id"] == trainer


async def test_released_time_and_courses_resume_those_who_wait_for_them(db: Database) -> None:
    async with db.transaction() as tx:
        course = await a_course(tx)
        trainer = await a_trainer(tx, course)
        first, second = [await a_purchase(tx, await a_student(tx), course) for _ in range(2)]
        await settle_allocations(tx, [first, second])
        tx.outgoing.clear()
        await handlers.undo_refunded(tx, [await a_refund(tx, await payment_of(tx, first))])
        (released,) = heard(tx, BookingReleased.type)
        assert released.trainer_id == trainer
        await handlers.resume_waiting(tx, [released])
        assert (await allocation(tx, second))["trainer_id"] == trainer
        third = await a_purchase(tx, await a_student(tx), course)
        await settle(tx, third)
        await a_trainer(tx, course)
        await handlers.resume_waiting(tx, [CourseUpdated(course_id=course, changed=("weekdays",))])
        assert (await allocation(tx, third))["status"] == "approved"


async def test_an_operator_gives_a_waiting_one_to_a_trainer_by_the_same_rules(db: Database) -> None:
    async with db.transaction() as tx:
        course = await a_course(tx)
        student = await a_student(tx)
        purchase = await a_purchase(tx, student, course)
        waiting = await settle(tx, purchase)
        assert waiting.allocation_id
        busy, good, other = [await a_trainer(tx, course) for _ in range(3)]
        await settle_with(tx, busy)
        away = await a_trainer(tx, course, open_days=2)

    async def refused(trainer: UUID | None) -> str:
        assert waiting.allocation_id
        with pytest.raises(AllocationRefused) as refusal:
            async with db.transaction() as tx:
                await approve(tx, waiting.allocation_id, trainer)
        assert "counts" in refusal.value.extra
        return refusal.value.problem_code

    assert await refused(busy) == "TRAINER_CONFLICT"
    assert await refused(away) == "NO_TRAINER_AVAILABLE"
    assert await refused(new_id()) == "NO_TRAINER_AVAILABLE"
    async with db.transaction() as tx:
        assert (await allocation(tx, purchase))["decision"]["counts"]["teaches"] == 0  # as it was
        given = await approve(tx, waiting.allocation_id, other)
        assert (given.action, given.trainer_id) == ("allocated", other)
        assert (await approve(tx, waiting.allocation_id)).action == "unchanged"
    with pytest.raises(AllocationNotWaiting):
        async with db.transaction() as tx:
            await approve(tx, waiting.allocation_id, good)


async def test_a_trainer_with_just_one_free_hour_too_few_is_not_half_booked(db: Database) -> None:
    async with db.transaction() as tx:
        course = await a_course(tx)
        trainer = await a_trainer(tx, course)
        start = datetime.combine((tx.now + timedelta(days=3)).astimezone(INDIA).date(), time(6), tzinfo=INDIA)
        last_end = start + timedelta(days=9, hours=1)
        purchase = await a_purchase(tx, await a_student(tx), course, start=start.date())
        await open_time(tx, trainer, start, last_end - timedelta(minutes=1))
        assert (await settle(tx, purchase)).action == "waiting"
        assert await tx.value("select count(*) from bookings") == 0
        await open_time(tx, trainer, start, last_end)
        assert (await settle(tx, purchase)).action == "allocated"
