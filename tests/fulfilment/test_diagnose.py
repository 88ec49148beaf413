"""Each reason can arise, is told from its neighbours, shows its facts, and names the one button."""

from __future__ import annotations

from datetime import timedelta

import pytest
from psycopg.types.json import Jsonb

from caravan.db import Database
from caravan.deliveries import Reason
from caravan.fulfilment.diagnose import Finding, Technical, diagnose
from caravan.fulfilment.gaps import Step
from tests.fulfilment import world
from tests.fulfilment.world import Road

NOW = timedelta(0)


async def the_finding(db: Database, road: Road) -> Finding:
    async with db.transaction(read_only=True) as tx:
        (finding,) = await diagnose(tx, payment_id=road.payment_id)
    return finding


def says(finding: Finding, *words: str) -> bool:
    text = " ".join(finding.evidence)
    return all(word in text for word in words)


async def test_delivered_needs_nothing(db: Database) -> None:
    road = await world.a_payment(db)
    await world.purchased(db, road)
    await world.allocated(db, road)
    await world.scheduled(db, road)
    finding = await the_finding(db, road)
    assert (finding.stage, finding.reason, finding.action) == ("scheduled", None, None)
    assert says(finding, str(road.purchase_id), str(road.allocation_id), str(road.trainer_id), "3 scheduled")


async def test_on_its_way_is_no_reason(db: Database) -> None:
    road = await world.a_payment(db)
    await world.said(db, road, "PURCHASE_CONFIRMED", ago=NOW)
    await world.a_worker(db, "PURCHASE_CONFIRMED")
    finding = await the_finding(db, road)
    assert (finding.stage, finding.reason, finding.action) == ("paid", None, None)
    assert says(finding, "On its way")


async def test_webhook_not_received(db: Database) -> None:
    road = await world.a_payment(db, status="pending", ago=timedelta(minutes=10))
    finding = await the_finding(db, road)
    assert (finding.stage, finding.reason) == ("pending", "WEBHOOK_NOT_RECEIVED")


async def test_a_payment_asked_for_just_now_is_not_late(db: Database) -> None:
    assert (await the_finding(db, await world.a_payment(db, status="created", ago=NOW))).reason is None


async def test_failed_payment_owes_nothing(db: Database) -> None:
    finding = await the_finding(db, await world.a_payment(db, status="failed"))
    assert (finding.stage, finding.reason, finding.action) == ("failed", None, None)


async def test_webhook_received_but_not_applied(db: Database) -> None:
    road = await world.a_payment(db, status="created", ago=NOW)
    async with db.transaction() as tx:
        await tx.execute(
            """insert into webhook_events (provider, event_id, type, payment_id, sent_at, body)
               values ('sandbox', 'evt', 'payment.succeeded', %(id)s, now(), '')""",
            {"id": road.payment_id},
        )
    finding = await the_finding(db, road)
    assert finding.reason == "WEBHOOK_NOT_APPLIED"
    assert finding.action is not None
    assert finding.action.name == "repair"


async def test_event_missing(db: Database) -> None:
    finding = await the_finding(db, await world.a_payment(db))
    assert (finding.stage, finding.reason) == ("paid", "EVENT_MISSING")
    assert finding.action is not None
    assert finding.action.name == "repair"
    assert finding.action.path.endswith("/repair")


@pytest.mark.parametrize(
    ("event_type", "stage"),
    [("PURCHASE_CONFIRMED", "paid"), ("PURCHASE_CREATED", "purchased"), ("TRAINER_ALLOCATED", "allocated")],
)
class TestEachHop:
    async def at(self, db: Database, stage: str) -> Road:
        road = await world.a_payment(db)
        if stage != "paid":
            await world.purchased(db, road)
        if stage == "allocated":
            await world.allocated(db, road)
        return road

    async def test_no_worker(self, db: Database, event_type: str, stage: str) -> None:
        road = await self.at(db, stage)
        event_id = await world.said(db, road, event_type, ago=NOW)
        await world.a_worker(db, event_type, alive=False)
        finding = await the_finding(db, road)
        assert (finding.stage, finding.reason) == (stage, "NO_WORKER")
        assert says(finding, str(event_id), world.GROUPS[event_type][1])

    async def test_worker_behind(self, db: Database, event_type: str, stage: str) -> None:
        road = await self.at(db, stage)
        await world.said(db, road, event_type, ago=timedelta(seconds=8))
        await world.a_worker(db, event_type)
        assert (await the_finding(db, road)).reason == "WORKER_BEHIND"

    async def test_handler_failing(self, db: Database, event_type: str, stage: str) -> None:
        road = await self.at(db, stage)
        event_id = await world.said(db, road, event_type, ago=NOW)
        await world.a_worker(db, event_type, failing=event_id)
        finding = await the_finding(db, road)
        assert finding.reason == "HANDLER_FAILING"
        assert says(finding, "KeyError: x")

    async def test_in_dead_letters(self, db: Database, event_type: str, stage: str) -> None:
        road = await self.at(db, stage)
        event_id = await world.said(db, road, event_type)
        dead_letter_id = await world.parked(db, road, event_type, event_id)
        await world.a_worker(db, event_type)
        finding = await the_finding(db, road)
        assert finding.reason == "IN_DEAD_LETTERS"
        assert finding.action is not None
        assert finding.action.path == f"/api/v1/admin/dead-letters/{dead_letter_id}/replay"

    async def test_marked_processed_but_missing(self, db: Database, event_type: str, stage: str) -> None:
        road = await self.at(db, stage)
        event_id = await world.said(db, road, event_type)
        await world.processed(db, road, event_type, event_id)
        finding = await the_finding(db, road)
        expected = "SESSIONS_MISSING" if stage == "allocated" else "MARKED_PROCESSED_BUT_MISSING"
        assert finding.reason == expected
        assert says(finding, str(event_id), "missing")

    async def test_marked_although_the_log_forgot_the_event(self, db: Database, event_type: str, stage: str) -> None:
        road = await self.at(db, stage)
        await world.processed(db, road, event_type)
        expected = "SESSIONS_MISSING" if stage == "allocated" else "MARKED_PROCESSED_BUT_MISSING"
        assert (await the_finding(db, road)).reason == expected


async def test_sessions_missing_also_when_it_was_taken_for_delivered(db: Database) -> None:
    road = await world.a_payment(db, registered=False)
    await world.purchased(db, road)
    await world.allocated(db, road)
    finding = await the_finding(db, road)
    assert (finding.stage, finding.reason) == ("allocated", "SESSIONS_MISSING")
    assert says(finding, "register")


async def test_delivered_but_still_registered(db: Database) -> None:
    road = await world.a_payment(db)
    await world.purchased(db, road)
    await world.allocated(db, road)
    await world.scheduled(db, road, close=False)
    assert (await the_finding(db, road)).reason == "NOT_REGISTERED"


@pytest.mark.parametrize("reason", list(Reason))
async def test_every_business_reason_is_told_with_its_button(db: Database, reason: Reason) -> None:
    road = await world.a_payment(db, reason=reason)
    if reason in (Reason.STUDENT_CONFLICT, Reason.NO_TRAINER_AVAILABLE):
        await world.purchased(db, road)
    finding = await the_finding(db, road)
    assert (finding.reason, finding.technical) == (reason, False)
    assert finding.action is not None
    expected = {
        "OPERATOR_HOLD": "release",
        "AMOUNT_MISMATCH": "accept",
        "PAID_TWICE": "refund",
        "TIER_UNKNOWN": "mend_payment",
        "INVALID_SCHEDULE": "mend_payment",
        "STUDENT_CONFLICT": "mend_purchase",
        "NO_TRAINER_AVAILABLE": "mend_purchase",
        "STUDENT_NOT_FOUND": "refund",
        "COURSE_NOT_FOUND": "refund",
        "STUDENT_LOCATION_MISSING": "enter-location",
        "STAGE_PAUSED": "resume",
    }
    assert finding.action.name == expected.get(reason, "repair")


async def test_another_slot_is_offered_only_while_there_is_no_trainer(db: Database) -> None:
    road = await world.a_payment(db, reason=Reason.STUDENT_CONFLICT)
    await world.purchased(db, road)
    await world.allocated(db, road)
    await world.scheduled(db, road, close=False)
    async with db.transaction() as tx:
        await tx.execute("update tutoring_sessions set status = 'trainer_absent' where seq = 1")
    finding = await the_finding(db, road)
    assert finding.action is not None
    assert (finding.reason, finding.action.name) == ("STUDENT_CONFLICT", "repair")


async def test_a_reason_does_not_outlive_what_was_owed(db: Database) -> None:
    road = await world.a_payment(db, reason=Reason.STUDENT_CONFLICT)
    await world.purchased(db, road)
    await world.allocated(db, road)
    await world.scheduled(db, road, close=False)
    finding = await the_finding(db, road)
    assert (finding.reason, finding.step) == (Technical.NOT_REGISTERED, Step.CLOSE)


async def test_who_enters_where_home_is(db: Database) -> None:
    road = await world.a_payment(db, reason=Reason.STUDENT_LOCATION_MISSING)
    action = (await the_finding(db, road)).action
    assert action is not None
    assert (action.method, action.path) == ("PATCH", f"/api/v1/students/{road.student_id}")
    assert f"/checkout/{road.payment_id}" in (action.hint or "")


async def test_the_question_may_be_asked_by_any_id(db: Database) -> None:
    road = await world.a_payment(db)
    await world.purchased(db, road)
    other = await world.a_payment(db, ago=NOW)
    async with db.transaction(read_only=True) as tx:
        by_student = await diagnose(tx, student_id=road.student_id)
        by_both = await diagnose(tx, student_id=road.student_id, course_id=road.course_id)
        by_wrong_course = await diagnose(tx, student_id=road.student_id, course_id=other.course_id)
        by_course = await diagnose(tx, course_id=road.course_id)
        by_purchase = await diagnose(tx, purchase_id=road.purchase_id)
        recent = await diagnose(tx)
    for found in (by_student, by_both, by_course, by_purchase):
        assert [finding.payment_id for finding in found] == [road.payment_id]
    assert by_wrong_course == []
    assert [finding.payment_id for finding in recent] == [other.payment_id, road.payment_id]


async def test_no_coordinate_is_told(db: Database) -> None:
    road = await world.a_payment(db, reason="STUDENT_LOCATION_MISSING")
    async with db.transaction() as tx:
        await tx.execute(
            "update students set latitude = 12.345, longitude = 77.123 where id = %(s)s", {"s": road.student_id}
        )
    finding = await the_finding(db, road)
    assert "12.345" not in repr(finding)
    assert "77.123" not in repr(finding)


async def some_sessions_gone(db: Database, *, registered: bool = True) -> Road:
    """Two of three sessions stand; the third one's time is booked."""
    road = await world.a_payment(db, registered=registered)
    await world.purchased(db, road)
    await world.allocated(db, road)
    await world.scheduled(db, road, close=False)
    async with db.transaction() as tx:
        await tx.execute("delete from tutoring_sessions where seq = 3")
    return road


async def test_some_sessions_missing(db: Database) -> None:
    finding = await the_finding(db, await some_sessions_gone(db))
    assert (finding.stage, finding.reason) == ("scheduled", "SESSIONS_MISSING")
    assert says(finding, "2 scheduled", "1 owed")


async def test_booked_time_waits_for_a_worker_that_is_not_there(db: Database) -> None:
    road = await some_sessions_gone(db)
    await world.said(db, road, "TRAINER_ALLOCATED")
    assert (await the_finding(db, road)).reason == "NO_WORKER"


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        (
            {"teaches": 30, "active": 29, "offersMode": 28, "open": 1, "free": 0, "withinRadius": 0},
            "Detail: of the trainers, 30 teach the course, 29 active, 28 offering the mode, 1 open then, 0 free,"
            " 0 near enough.",
        ),
        ({"open": 4, "free": 0}, "Detail: of the few trainers that were looked at, 4 open then, 0 free."),
    ],
)
async def test_what_a_search_counted_is_said_in_its_order(db: Database, counts: dict[str, int], said: str) -> None:
    road = await world.a_payment(db, reason=Reason.NO_TRAINER_AVAILABLE)
    await world.purchased(db, road)
    async with db.transaction() as tx:
        await tx.execute("update undelivered set detail = %(detail)s", {"detail": Jsonb({"counts": counts})})
    assert said in (await the_finding(db, road)).evidence


async def test_other_details_are_words_too(db: Database) -> None:
    road = await world.a_payment(db, reason=Reason.STUDENT_CONFLICT)
    async with db.transaction() as tx:
        await tx.execute("update undelivered set detail = %(detail)s", {"detail": Jsonb({"purchaseId": "(x)"})})
    assert "Detail: purchase id (x)." in (await the_finding(db, road)).evidence
