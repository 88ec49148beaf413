"""Each button moves what it should, asks for a note, leaves one audit row, and is refused with the reason as code."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from uuid import UUID

import pytest

from caravan.fulfilment.reconciler import Reconciler
from caravan.ids import new_id
from caravan.web.auth import Role
from tests.admin.conftest import NOTE, Desk
from tests.shop import SETTINGS


async def test_repair_says_what_it_did(desk: Desk) -> None:
    payment = await desk.shop.bought()
    done = await desk.do("POST", f"payments/{payment}/repair", NOTE)
    assert (done["stageBefore"], done["stage"], done["step"]) == ("paid", "purchased", "create_purchase")
    assert done["did"] == f"Created purchase {done['purchaseId']}."
    await desk.shop.work()
    done = await desk.do("POST", f"payments/{payment}/repair", NOTE)
    assert (done["step"], done["stage"]) == (None, "scheduled")
    first, second = await desk.audit()
    assert (first["action"], first["actor"], first["note"]) == ("repair", "asha@example.com", "by a test")
    assert (first["before"]["stage"], first["after"]["stage"]) == ("paid", "purchased")
    assert second["after"] == second["before"] | {"did": "Delivered: nothing to do."}
    assert await desk.shop.violations() == []


@pytest.mark.parametrize("body", [None, {}, {"note": ""}, {"note": "   "}, {"note": None}])
@pytest.mark.parametrize(
    "path",
    ["payments/{}/repair", "payments/{}/refund", "payments/{}/hold", "payments/{}/release", "payments/{}/accept",
     "dead-letters/{}/replay", "dead-letters/{}/discard"],
)  # fmt: skip
async def test_a_write_says_why(desk: Desk, path: str, body: object) -> None:
    payment = await desk.shop.bought()
    assert await desk.refused("POST", path.format(payment), body) == (422, "NOTE_REQUIRED")
    assert await desk.audit() == []


async def test_what_does_not_exist_is_not_found(desk: Desk) -> None:
    nothing = new_id()
    for action in ("repair", "refund", "hold", "release", "accept"):
        assert (await desk.refused("POST", f"payments/{nothing}/{action}", NOTE))[0] == 404
    assert await desk.refused("PATCH", f"payments/{nothing}", NOTE | {"sessionCount": 3}) == (404, "PAYMENT_NOT_FOUND")
    slot = NOTE | {"timeSlot": "7 AM"}
    assert await desk.refused("PATCH", f"purchases/{nothing}", slot) == (404, "PURCHASE_NOT_FOUND")
    for action in ("approve", "sessions"):
        assert await desk.refused("POST", f"allocations/{nothing}/{action}") == (404, "ALLOCATION_NOT_FOUND")
    for action in ("replay", "discard"):
        answer = await desk.refused("POST", f"dead-letters/{nothing}/{action}", NOTE)
        assert answer == (404, "DEAD_LETTER_NOT_FOUND")
    assert await desk.refused("GET", f"purchases/{nothing}") == (404, "PURCHASE_NOT_FOUND")


async def test_full_refund_ends_the_purchase_and_frees_the_trainer(desk: Desk) -> None:
    payment = await desk.shop.bought()
    await desk.shop.work()
    refund = await desk.do("POST", f"payments/{payment}/refund", NOTE)
    assert (refund["amountCents"], refund["full"]) == (360000, True)
    await desk.shop.work()
    assert (await desk.diagnosis(payment))["stage"] == "refunded"
    assert await desk.shop.rows("select from bookings where live and upper(during) > now()") == []
    assert await desk.refused("POST", f"payments/{payment}/refund", NOTE) == (409, "NOT_REFUNDABLE")
    [row] = await desk.audit()
    assert (row["before"]["refundedCents"], row["after"]["refundedCents"]) == (0, 360000)
    assert await desk.shop.violations() == []


async def test_partial_refund_takes_the_named_sessions(desk: Desk) -> None:
    payment = await desk.shop.bought()
    await desk.shop.work()
    part = NOTE | {"amountCents": 24000}
    assert await desk.refused("POST", f"payments/{payment}/refund", part) == (422, "REFUND_SESSIONS_REQUIRED")
    refund = await desk.do("POST", f"payments/{payment}/refund", part | {"sessions": [29, 30]})
    assert (refund["sessionSeqs"], refund["full"]) == ([29, 30], False)
    await desk.shop.work()
    purchase = await desk.get(f"purchases/{payment}")
    assert purchase["sessionCounts"]["scheduled"] == 28
    assert purchase["sessionCounts"]["refunded"] == 2
    assert await desk.shop.violations() == []


async def test_a_wrong_amount_is_accepted(desk: Desk) -> None:
    payment = await desk.shop.buy()
    await desk.shop.webhook(payment, cents=350000)
    found = await desk.diagnosis(payment)
    assert (found["reason"], found["action"]["name"]) == ("AMOUNT_MISMATCH", "accept")
    assert await desk.refused("POST", f"payments/{payment}/repair", NOTE) == (409, "AMOUNT_MISMATCH")
    await desk.do("POST", f"payments/{payment}/accept", NOTE)
    await desk.shop.work()
    assert (await desk.diagnosis(payment))["stage"] == "scheduled"
    assert await desk.refused("POST", f"payments/{payment}/accept", NOTE) == (409, "NOTHING_TO_ACCEPT")
    assert len(await desk.audit()) == 1


async def test_money_that_came_twice_is_paid_out_in_coins(desk: Desk) -> None:
    first = await desk.shop.buy()
    [row] = await desk.shop.rows("select checkout_id from payments")
    second = await desk.shop.buy(again=True, slot="8:00 AM")
    await desk.shop.run(
        "update payments set checkout_id = %(checkout)s where id = %(id)s", checkout=row["checkout_id"], id=second
    )
    await desk.shop.pay(first)
    await desk.shop.pay(second)
    found = await desk.diagnosis(second)
    assert (found["reason"], found["action"]["name"]) == ("PAID_TWICE", "refund")
    assert await desk.refused("POST", f"payments/{first}/refund", NOTE | {"asCoins": True}) == (409, "NOT_PAID_TWICE")
    await desk.do("POST", f"payments/{second}/refund", NOTE | {"asCoins": True})
    assert (await desk.diagnosis(second))["stage"] == "refunded"
    [coins] = await desk.shop.rows("select coins from coin_entries where kind = 'granted'")
    assert coins["coins"] == 3600


async def test_hold_stops_everything_and_release_goes_on(desk: Desk) -> None:
    payment = await desk.shop.bought()
    found = await desk.do("POST", f"payments/{payment}/hold", NOTE)
    assert (found["reason"], found["action"]["name"]) == ("OPERATOR_HOLD", "release")
    assert await desk.refused("POST", f"payments/{payment}/hold", NOTE) == (409, "ALREADY_HELD")
    assert await desk.refused("POST", f"payments/{payment}/repair", NOTE) == (409, "OPERATOR_HOLD")
    await desk.shop.work()
    assert (await desk.diagnosis(payment))["stage"] == "paid"
    found = await desk.do("POST", f"payments/{payment}/release", NOTE)
    assert (found["stage"], found["reason"]) == ("purchased", None)
    await desk.shop.work()
    assert (await desk.diagnosis(payment))["stage"] == "scheduled"
    assert await desk.refused("POST", f"payments/{payment}/release", NOTE) == (409, "NOT_HELD")
    assert await desk.refused("POST", f"payments/{payment}/hold", NOTE) == (409, "NOTHING_TO_HOLD")
    assert [row["action"] for row in await desk.audit()] == ["hold", "release"]


async def test_a_hold_ends_with_what_it_held(desk: Desk) -> None:
    payment = await desk.shop.bought()
    await desk.shop.work("purchase-worker")
    await desk.do("POST", f"payments/{payment}/hold", NOTE)
    await desk.do("POST", f"payments/{payment}/refund", NOTE | {"amountCents": 100, "sessions": 30})
    await desk.do("POST", f"payments/{payment}/repair", NOTE)
    found = await desk.diagnosis(payment)
    assert (found["reason"], found["action"]) == (None, None)
    said = await desk.shop.rows("select type from outbox where data ->> 'reason' = 'OPERATOR_HOLD' order by id")
    assert [row["type"] for row in said] == ["PURCHASE_BLOCKED", "PURCHASE_UNBLOCKED"]


async def test_what_owes_nothing_is_not_held(desk: Desk) -> None:
    payment = await desk.shop.bought()
    await desk.shop.work("purchase-worker")
    await desk.do("POST", f"payments/{payment}/refund", NOTE | {"amountCents": 100, "sessions": 30})
    assert await desk.refused("POST", f"payments/{payment}/hold", NOTE) == (409, "NOTHING_TO_HOLD")


async def test_release_finds_the_reason_again(desk: Desk) -> None:
    payment = await desk.shop.buy()
    await desk.shop.webhook(payment, cents=350000)
    await desk.do("POST", f"payments/{payment}/hold", NOTE)
    assert (await desk.do("POST", f"payments/{payment}/release", NOTE))["reason"] == "AMOUNT_MISMATCH"


async def test_an_unknown_tier_is_mended(desk: Desk) -> None:
    payment = await desk.shop.bought()
    await desk.shop.run("update checkouts set sessions = null")
    await desk.shop.run("update payments set metadata = metadata - 'sessionCount'")
    await desk.shop.work()
    found = await desk.diagnosis(payment)
    assert (found["reason"], found["action"]["name"]) == ("TIER_UNKNOWN", "mend_payment")
    await desk.do("PATCH", f"payments/{payment}", NOTE | {"sessionCount": 10})
    await desk.shop.work()
    assert (await desk.get(f"purchases/{payment}"))["sessionCounts"]["scheduled"] == 10
    again = await desk.refused("PATCH", f"payments/{payment}", NOTE | {"sessionCount": 20})
    assert again == (409, "TERMS_KNOWN")


async def test_a_clash_is_mended_by_another_slot(desk: Desk) -> None:
    await desk.shop.bought()
    await desk.shop.work()
    second = await desk.shop.buy(slot="8:00 AM")
    await desk.shop.run("update checkouts set slot_start = '06:00' where paid_by is null")
    await desk.shop.pay(second)
    await desk.shop.work()
    found = await desk.diagnosis(second)
    assert (found["reason"], found["action"]["name"]) == ("STUDENT_CONFLICT", "mend_purchase")
    body = NOTE | {"timeSlot": "9:00 AM"}
    found = await desk.do("PATCH", f"purchases/{found['purchaseId']}", body)
    assert (found["stage"], found["reason"]) == ("allocated", None)
    await desk.shop.work()
    assert (await desk.diagnosis(second))["stage"] == "scheduled"


async def purchase_without_trainer(desk: Desk) -> tuple[UUID, str]:
    """A purchase that the allocation worker has not looked at: its payment and its own id."""
    payment = await desk.shop.bought()
    await desk.shop.work("purchase-worker")
    return payment, (await desk.diagnosis(payment))["purchaseId"]


async def test_auto_assign_by_purchase_and_again(desk: Desk) -> None:
    payment, purchase = await purchase_without_trainer(desk)
    given = await desk.do("POST", "allocations/auto-assign", {"purchaseId": purchase})
    assert given["status"] == "approved"
    assert UUID(given["trainerId"]) in desk.shop.trainers
    assert await desk.do("POST", "allocations/auto-assign", {"purchaseId": purchase}) == given
    assert len(await desk.audit()) == 1
    await desk.shop.work()
    assert (await desk.diagnosis(payment))["stage"] == "scheduled"
    assert await desk.do("POST", "allocations/auto-assign", {"purchaseId": purchase}) == given


async def test_auto_assign_by_student_and_course_as_the_runbook_does(desk: Desk) -> None:
    _payment, purchase = await purchase_without_trainer(desk)
    start = (await desk.get(f"purchases/{purchase}"))["terms"]["startDate"]
    body = {
        "studentId": str(desk.shop.student), "courseId": str(desk.shop.course), "timeSlot": "6:00 AM", "date": start
    }  # fmt: skip
    assert (await desk.do("POST", "allocations/auto-assign", body))["purchaseId"] == purchase
    stranger = body | {"studentId": str(new_id())}
    assert await desk.refused("POST", "allocations/auto-assign", stranger) == (404, "PURCHASE_NOT_FOUND")
    assert (await desk.refused("POST", "allocations/auto-assign", {}))[0] == 422


async def test_auto_assign_at_another_slot(desk: Desk) -> None:
    _payment, purchase = await purchase_without_trainer(desk)
    body = {"purchaseId": purchase, "timeSlot": "18:00-19:00"}
    await desk.do("POST", "allocations/auto-assign", body)
    terms = (await desk.get(f"purchases/{purchase}"))["terms"]
    assert (terms["slotStart"], terms["soldSlotStart"]) == ("18:00:00", "06:00:00")


async def test_auto_assign_tells_the_reason_and_stores_it(desk: Desk) -> None:
    payment, purchase = await purchase_without_trainer(desk)
    await desk.shop.run("delete from trainer_time")
    body = {"purchaseId": purchase}
    assert await desk.refused("POST", "allocations/auto-assign", body) == (409, "NO_TRAINER_AVAILABLE")
    assert (await desk.diagnosis(payment))["reason"] == "NO_TRAINER_AVAILABLE"
    assert await desk.refused("POST", "allocations/auto-assign", body) == (409, "NO_TRAINER_AVAILABLE")
    assert len(await desk.audit()) == 1
    await desk.do("POST", f"payments/{payment}/hold", NOTE)
    assert await desk.refused("POST", "allocations/auto-assign", body) == (409, "OPERATOR_HOLD")


async def test_auto_assign_for_a_refunded_purchase(desk: Desk) -> None:
    payment, purchase = await purchase_without_trainer(desk)
    await desk.do("POST", f"payments/{payment}/refund", NOTE)
    await desk.shop.work()
    assert await desk.refused("POST", "allocations/auto-assign", {"purchaseId": purchase}) == (409, "PURCHASE_ENDED")


async def test_approve_moves_a_waiting_allocation_or_leaves_it(desk: Desk) -> None:
    payment = await desk.shop.bought()
    times = await desk.shop.rows("select * from trainer_time")
    await desk.shop.run("delete from trainer_time")
    await desk.shop.work()
    [waiting] = (await desk.get("allocations", status="waiting"))["items"]
    assert (waiting["reason"], waiting["trainerId"]) == ("NO_TRAINER_AVAILABLE", None)
    path = f"allocations/{waiting['id']}/approve"
    assert await desk.refused("POST", path) == (409, "NO_TRAINER_AVAILABLE")
    assert await desk.refused("POST", f"allocations/{waiting['id']}/sessions") == (409, "ALLOCATION_NOT_APPROVED")
    assert await desk.audit() == []
    for time in times:
        await desk.shop.run("insert into trainer_time values (%(trainer_id)s, %(open)s, %(computed_at)s)", **time)
    wanted = str(desk.shop.trainers[1])
    approved = await desk.do("POST", path, {"trainerId": wanted})
    assert (approved["trainerId"], approved["status"]) == (wanted, "approved")
    made = await desk.do("POST", f"allocations/{waiting['id']}/sessions")
    assert made == {"created": 30, "cancelled": 0, "owed": 0}
    made = await desk.do("POST", f"allocations/{waiting['id']}/sessions", NOTE)
    assert made["created"] == 0
    assert [row["action"] for row in await desk.audit()] == ["approve", "create sessions"]
    assert (await desk.diagnosis(payment))["stage"] == "scheduled"
    assert (await desk.get("allocations", status="waiting"))["items"] == []
    assert await desk.shop.violations() == []


async def test_a_session_is_marked_and_an_absence_made_up(desk: Desk) -> None:
    payment = await desk.shop.bought()
    await desk.shop.work()
    purchase = (await desk.diagnosis(payment))["purchaseId"]
    body = NOTE | {"status": "trainer_absent"}
    path = f"purchases/{purchase}/sessions/1"
    assert await desk.refused("POST", path, body) == (409, "SESSION_NOT_BEGUN")
    assert (await desk.refused("POST", f"purchases/{purchase}/sessions/31", body))[0] == 404
    assert (await desk.refused("POST", f"purchases/{purchase}/sessions/999", body))[0] == 422
    assert (await desk.refused("POST", path, NOTE | {"status": "cancelled"}))[0] == 422
    await begin_first_session(desk)
    await desk.do("POST", path, body)
    await desk.shop.work()
    counts = (await desk.get(f"purchases/{purchase}"))["sessionCounts"]
    assert (counts["scheduled"], counts["owed"]) == (30, 0)
    assert await desk.shop.violations() == []


async def begin_first_session(desk: Desk) -> None:
    """The first session was yesterday: in the booking's list and range, and in the sessions."""
    [booking] = await desk.shop.rows("select id, starts from bookings where live")
    starts = [booking["starts"][0] - timedelta(days=7), *booking["starts"][1:]]
    await desk.shop.run(
        """update bookings set starts = %(starts)s,
             during = (select range_agg(tstzrange(s, s + make_interval(mins => minutes))) from unnest(%(starts)s) s)""",
        starts=starts,
    )
    await desk.shop.run(
        """update tutoring_sessions set starts_at = starts_at - interval '7 days', ends_at = ends_at - interval '7 days'
           where seq = 1"""
    )


async def test_support_lets_things_go_on_but_moves_no_money(desk: Desk) -> None:
    support = await desk.as_role(Role.SUPPORT)
    payment = await desk.shop.bought()
    for path in ("overview", "diagnose", "purchases", f"purchases/{payment}", "workers", "lag", "dead-letters"):
        await support.get(path)
    for action in ("refund", "accept"):
        assert await support.refused("POST", f"payments/{payment}/{action}", NOTE) == (403, "NOT_ALLOWED")
    assert await support.refused("POST", f"dead-letters/{new_id()}/discard", NOTE) == (403, "NOT_ALLOWED")
    await support.do("POST", f"payments/{payment}/repair", NOTE)


@pytest.mark.parametrize("role", [Role.STUDENT, Role.TRAINER])
async def test_others_have_no_business_here(desk: Desk, role: Role) -> None:
    stranger = await desk.as_role(role)
    for path in ("overview", "diagnose", "purchases", "allocations", "dead-letters", "workers", "lag"):
        assert await stranger.refused("GET", path) == (403, "NOT_ALLOWED")
    assert await stranger.refused("POST", f"payments/{new_id()}/refund", NOTE) == (403, "NOT_ALLOWED")


@pytest.mark.parametrize("date", ["0001-01-01", "9999-12-31", "2026-02-30", "tomorrow", "", 5])
@pytest.mark.parametrize("slot", ["6:00 AM", "25:00", "", "6:00 AM\x00", "🕕"])
async def test_odd_dates_and_slots_are_refused_not_crashed_on(desk: Desk, date: object, slot: str) -> None:
    _payment, purchase = await purchase_without_trainer(desk)
    body = {"timeSlot": slot, "startDate": date, "note": "odd"}
    for method, path, more in [
        ("PATCH", f"purchases/{purchase}", {}),
        ("POST", "allocations/auto-assign", {"purchaseId": purchase}),
    ]:
        answer = await desk.ask(method, path, body | more)
        assert answer.status_code in (200, 409, 422), answer.text


@pytest.mark.parametrize("date", ["0001-01-01", "9999-12-31"])
async def test_an_odd_start_of_imported_money_waits(desk: Desk, date: str) -> None:
    payment = await desk.shop.bought()
    await desk.shop.run("update checkouts set start_date = null, slot_start = null")
    await desk.shop.run("update payments set metadata = metadata - 'startDate' - 'timeSlot'")
    await desk.shop.work()
    assert (await desk.diagnosis(payment))["reason"] == "INVALID_SCHEDULE"
    answer = await desk.ask("PATCH", f"payments/{payment}", NOTE | {"startDate": date, "timeSlot": "6 AM"})
    assert answer.status_code in (200, 422), answer.text
    await desk.shop.work()
    assert await desk.shop.violations() == []


@pytest.mark.parametrize(
    "body",
    [
        {"amountCents": -1}, {"amountCents": 1.5}, {"amountCents": "100"}, {"amountCents": 10**15}, {"sessions": -1},
        {"sessions": [0]}, {"sessions": [1, 1], "amountCents": 5}, {"sessions": ["1"]}, {"asCoins": "yes"},
        {"asCoins": True, "amountCents": 5}, {"amountCents": 360001}, {"amountCents": 0},
        {"amountCents": 5, "sessions": 31}, {"note": "x" * 2001}, [], "text", 5,
    ],
)  # fmt: skip
async def test_odd_refunds_are_refused(desk: Desk, body: object) -> None:
    payment = await desk.shop.bought()
    asked = {**NOTE, **body} if isinstance(body, dict) else body
    status, _code = await desk.refused("POST", f"payments/{payment}/refund", asked)
    assert status == 422
    assert (await desk.diagnosis(payment))["stage"] == "paid"


async def test_two_presses_at_once_do_one_step_each(desk: Desk) -> None:
    payment = await desk.shop.bought()
    answers = await asyncio.gather(*(desk.do("POST", f"payments/{payment}/repair", NOTE) for _ in range(4)))
    assert sorted(answer["stageBefore"] for answer in answers) == ["allocated", "paid", "purchased", "scheduled"]
    assert await desk.shop.violations() == []
    assert len(await desk.audit()) == 4


@pytest.mark.parametrize("worked", [(), ("purchase-worker",), ("purchase-worker", "allocation-worker")])
async def test_a_part_that_takes_all_sessions_leaves_nothing_owed(desk: Desk, worked: tuple[str, ...]) -> None:
    payment = await desk.shop.bought()
    if worked:
        await desk.shop.work(*worked)
    await desk.do("POST", f"payments/{payment}/refund", NOTE | {"amountCents": 350000, "sessions": 30})
    await desk.shop.work()
    await Reconciler(desk.shop.db, SETTINGS).run_once()
    assert (await desk.diagnosis(payment))["reason"] is None
    assert await desk.shop.rows("select from undelivered") == []
    assert await desk.shop.violations() == []


async def test_a_part_and_then_the_rest_add_up_to_what_was_bought(desk: Desk) -> None:
    payment = await desk.shop.bought()
    await desk.shop.work()
    await desk.do("POST", f"payments/{payment}/refund", NOTE | {"amountCents": 12000, "sessions": 1})
    await desk.shop.work()
    assert (await desk.get(f"purchases/{payment}"))["sessionCounts"]["refunded"] == 1
    await desk.do("POST", f"payments/{payment}/refund", NOTE)
    await desk.shop.work()
    counts = (await desk.get(f"purchases/{payment}"))["sessionCounts"]
    assert (counts["refunded"], counts["owed"], counts["scheduled"]) == (30, 0, 0)
    assert await desk.shop.violations() == []


async def test_a_refund_sent_twice_with_one_key_gives_money_back_once(desk: Desk) -> None:
    payment = await desk.shop.bought()
    part = NOTE | {"amountCents": 120000, "sessions": 10}
    key = {"Idempotency-Key": "refund-1"}
    answers = [await desk.ask("POST", f"payments/{payment}/refund", part, headers=key) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert answers[0].json() == answers[1].json()
    other = await desk.ask("POST", f"payments/{payment}/refund", part | {"sessions": 9}, headers=key)
    assert (other.status_code, other.json()["code"]) == (422, "IDEMPOTENCY_KEY_REUSED")
    assert await desk.shop.rows("select amount_cents from refunds") == [{"amount_cents": 120000}]
    assert len(await desk.audit()) == 1
