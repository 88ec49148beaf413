"""What operators see: found by anything somebody may read out, paged without gaps, and every line says who."""

from __future__ import annotations

import json
from uuid import UUID

import pytest

from caravan.admin import purchases
from caravan.ids import new_id
from caravan.web.auth import Role
from tests.admin.conftest import NOTE, Desk
from tests.builders import a_student
from tests.clients import an_account
from tests.fulfilment import world


async def test_the_timeline_tells_it_all_and_who(desk: Desk) -> None:
    payment = await desk.shop.bought()
    await desk.shop.work()
    await desk.do("POST", f"payments/{payment}/refund", NOTE)
    await desk.shop.work()
    found = await desk.get(f"purchases/{payment}")
    by_id = await desk.get(f"purchases/{found['purchaseId']}")
    assert by_id["timeline"] == found["timeline"]
    lines = [(line["kind"], line["actor"], line["said"]) for line in found["timeline"]]
    expected = [
        ("payment", "sandbox", "Captured ₹3,600"),
        ("event", "payment-service", "PURCHASE_CONFIRMED"),
        ("processed", "purchase-creation-workers", "Processed PURCHASE_CONFIRMED"),
        ("event", "purchase-worker", "PURCHASE_CREATED"),
        ("event", "allocation-worker", "TRAINER_ALLOCATED"),
        ("event", "session-worker", "SESSIONS_SCHEDULED"),
        ("by hand", "asha@example.com", "refund: by a test"),
        ("refund", "admin", "Gave back ₹3,600"),
        ("event", "admin-service", "PURCHASE_REFUNDED"),
    ]
    places = [lines.index(line) for line in expected]
    assert places[:6] == sorted(places[:6])
    assert min(places[6:]) > places[5]
    assert any(kind == "webhook" and "applied" in said for kind, _, said in lines)
    assert [line["at"] for line in found["timeline"]] == sorted(line["at"] for line in found["timeline"])
    assert found["stage"] == "refunded"
    assert all(session["status"] == "cancelled" for session in found["sessions"])


async def test_the_timeline_writes_money_and_numbers_as_every_page_does(desk: Desk) -> None:
    payment = await desk.shop.bought()
    await desk.shop.work()
    await desk.do("POST", f"payments/{payment}/refund", NOTE | {"amountCents": 12_050, "sessions": 1})
    await desk.shop.run("update payments set amount_cents = 360000_00, coins = 1, captured_currency = 'USD'")
    said = [line["said"] for line in (await desk.get(f"purchases/{payment}"))["timeline"]]
    assert "Asked to pay ₹3,60,000 through sandbox, with 1 coin" in said
    assert "Captured $3,600" in said
    assert "Gave back ₹120.50, 1 session" in said
    assert not [line for line in said if "INR" in line or "{}" in line]


async def test_a_dead_letter_is_in_the_timeline_and_replayed_once(desk: Desk) -> None:
    payment = await desk.shop.bought()
    await desk.shop.run("alter table student_course_purchases add constraint broken check (purchase_tier < 3)")
    await desk.shop.work("purchase-worker")
    found = await desk.diagnosis(payment)
    assert (found["reason"], found["action"]["name"]) == ("IN_DEAD_LETTERS", "replay")
    [letter] = (await desk.get("dead-letters"))["items"]
    assert letter["event"]["type"] == "PURCHASE_CONFIRMED"
    path = f"dead-letters/{letter['id']}/replay"
    assert await desk.refused("POST", path, NOTE) == (409, "REPLAY_FAILED")
    assert (await desk.get("dead-letters"))["items"][0]["status"] == "parked"
    assert await desk.audit() == []
    await desk.shop.run("alter table student_course_purchases drop constraint broken")
    done = await desk.do("POST", path, NOTE)
    assert (done["status"], done["resolvedBy"]) == ("replayed", "asha@example.com")
    assert await desk.refused("POST", path, NOTE) == (409, "DEAD_LETTER_RESOLVED")
    await desk.shop.work()
    assert (await desk.diagnosis(payment))["stage"] == "scheduled"
    said = [
        line["said"] for line in (await desk.get(f"purchases/{payment}"))["timeline"] if line["kind"] == "dead letter"
    ]
    assert len(said) == 2
    assert (await desk.get("dead-letters"))["items"] == []
    assert len((await desk.get("dead-letters", status="all"))["items"]) == 1


async def test_repair_replays_what_was_given_up(desk: Desk) -> None:
    payment = await desk.shop.bought()
    await desk.shop.run("alter table student_course_purchases add constraint broken check (purchase_tier < 3)")
    await desk.shop.work("purchase-worker")
    assert await desk.refused("POST", f"payments/{payment}/repair", NOTE) == (409, "REPLAY_FAILED")
    await desk.shop.run("alter table student_course_purchases drop constraint broken")
    done = await desk.do("POST", f"payments/{payment}/repair", NOTE)
    assert (done["step"], done["stage"]) == ("replay", "purchased")
    assert (await desk.get("dead-letters"))["items"] == []


async def test_a_dead_letter_is_discarded(desk: Desk) -> None:
    payment = await desk.shop.bought()
    await desk.shop.run("alter table student_course_purchases add constraint broken check (purchase_tier < 3)")
    await desk.shop.work("purchase-worker")
    [letter] = (await desk.get("dead-letters"))["items"]
    done = await desk.do("POST", f"dead-letters/{letter['id']}/discard", NOTE)
    assert (done["status"], done["note"]) == ("discarded", "by a test")
    [row] = await desk.audit()
    assert (row["action"], row["before"]["status"], row["after"]["status"]) == ("discard", "parked", "discarded")
    await desk.shop.run("alter table student_course_purchases drop constraint broken")
    found = await desk.diagnosis(payment)
    assert (found["reason"], found["action"]["name"]) == ("IN_DEAD_LETTERS", "repair")
    done = await desk.do("POST", f"payments/{payment}/repair", NOTE)
    assert (done["step"], done["stage"]) == ("create_purchase", "purchased")


async def test_search_by_anything(desk: Desk) -> None:
    payment = await desk.shop.bought()
    await desk.shop.work()
    async with desk.shop.db.transaction() as tx:
        somebody = await a_student(tx, "Zoë_100%")
    other = await desk.shop.bought(student=somebody)
    parent = await an_account(desk.shop.db, "parent@example.com", Role.STUDENT)
    await desk.shop.run("update accounts set phone = '+911234567890' where id = %(id)s", id=parent.account_id)
    await desk.shop.run(
        "insert into account_students (account_id, student_id) values (%(a)s, %(s)s)",
        a=parent.account_id,
        s=desk.shop.student,
    )
    purchase = await desk.get(f"purchases/{payment}")
    first = [payment, desk.shop.student, purchase["purchaseId"], purchase["allocations"][0]["id"]]
    for text in [*first, "parent@example.com", "PARENT@example", "+911234567890", "asha"]:
        items = (await desk.get("purchases", q=str(text)))["items"]
        assert [item["paymentId"] for item in items] == [str(payment)], text
    for text in ["zoë", "_100%"]:
        items = (await desk.get("purchases", q=text))["items"]
        assert [item["paymentId"] for item in items] == [str(other)], text
    for text in ["nobody", "a%a", str(new_id())]:
        assert (await desk.get("purchases", q=text))["items"] == []
    assert len((await desk.get("purchases", q=str(desk.shop.course)))["items"]) == 2


async def test_search_by_words_in_any_order(desk: Desk) -> None:
    await desk.shop.run("update students set name = 'Asha Devi Rao'")
    payment = await desk.shop.bought()
    for text in ("Rao Asha", "  rao   ASHA ", "dev rao"):
        items = (await desk.get("purchases", q=text))["items"]
        assert [item["paymentId"] for item in items] == [str(payment)], text
    for text in ("Rao Bela", "Asha % Rao"):
        assert (await desk.get("purchases", q=text))["items"] == []


async def test_search_by_the_first_characters_of_an_id(desk: Desk) -> None:
    mine = UUID("5eed0000-1111-7000-8000-000000000001")
    await desk.shop.buy(payment_id=mine)
    await desk.shop.pay(mine)
    await desk.shop.work()
    async with desk.shop.db.transaction() as tx:
        somebody = await a_student(tx, "Bela", student_id=UUID("abcdef01-2222-7000-8000-000000000001"))
    other = await desk.shop.bought(student=somebody)
    purchase = (await desk.get(f"purchases/{mine}"))["purchaseId"]
    for text, payment in [
        ("5eed00", mine), ("5EED0000-11", mine), (purchase[:-1], mine), ("abcdef", other), ("abcdef01-2222", other),
    ]:  # fmt: skip
        items = (await desk.get("purchases", q=text))["items"]
        assert [item["paymentId"] for item in items] == [str(payment)], text
    for text in ("5eed0", "5eed01", "00-1111-7000", "5eed00zz"):
        assert (await desk.get("purchases", q=text))["items"] == [], text
    assert (await desk.get("purchases", q="5eed00", stage="paid"))["items"] == []
    first = await desk.get("purchases", q=str(other)[:6], limit=1)
    assert len(first["items"]) == 1


async def test_lists_by_stage_and_reason(desk: Desk) -> None:
    delivered = await desk.shop.bought()
    await desk.shop.work()
    stuck = await desk.shop.bought(slot="9:00 AM")
    await desk.shop.buy(slot="11:00 AM")
    assert {i["paymentId"] for i in (await desk.get("purchases"))["items"]} == {str(delivered), str(stuck)}
    for query, expected in [
        ({"stage": "scheduled"}, [delivered]),
        ({"stage": "paid"}, [stuck]),
        ({"stage": "purchased"}, []),
        ({"reason": "NO_WORKER"}, [stuck]),
        ({"reason": "NO_TRAINER_AVAILABLE"}, []),
        ({"stage": "paid", "reason": "NO_WORKER"}, [stuck]),
        ({"stage": "allocated", "reason": "NO_WORKER"}, []),
    ]:
        items = (await desk.get("purchases", **query))["items"]
        assert [item["paymentId"] for item in items] == [str(payment) for payment in expected], query
    await desk.do("POST", f"payments/{stuck}/hold", NOTE)
    [item] = (await desk.get("purchases", reason="OPERATOR_HOLD"))["items"]
    assert (item["paymentId"], item["action"]["name"], item["studentName"]) == (str(stuck), "release", "Asha")
    assert (await desk.refused("GET", "purchases?stage=nonsense"))[0] == 422
    assert (await desk.refused("GET", "purchases?cursor=nonsense")) == (422, "CURSOR_INVALID")


async def test_pages_have_no_gaps_and_no_doubles(desk: Desk) -> None:
    payments = [str((await world.a_payment(desk.shop.db)).payment_id) for _ in range(5)]
    for query in ({}, {"stage": "paid"}, {"reason": "EVENT_MISSING"}):
        seen: list[str] = []
        cursor: dict[str, str] = {}
        while True:
            page = await desk.get("purchases", limit=2, **query, **cursor)
            seen += [item["paymentId"] for item in page["items"]]
            if page["nextCursor"] is None:
                break
            cursor = {"cursor": page["nextCursor"]}
        assert seen == sorted(payments, reverse=True), query


async def test_overview_counts_the_money(desk: Desk) -> None:
    delivered = await desk.shop.bought()
    await desk.shop.work()
    await desk.shop.bought(slot="9:00 AM")
    wrong = await desk.shop.buy(slot="11:00 AM")
    await desk.shop.webhook(wrong, cents=350000)
    await desk.shop.buy(slot="1:00 PM")
    await desk.shop.webhook(new_id(), cents=777)
    await desk.shop.run("update webhook_events set received_at = received_at - interval '20 minutes'")
    await desk.shop.run("update undelivered set since = since - interval '90 seconds'")
    seen = await desk.get("overview")
    undelivered = seen["undelivered"]
    assert (undelivered["count"], undelivered["amountCents"]) == (2, 710000)
    assert undelivered["byReason"] == {"AMOUNT_MISMATCH": 1, "NO_WORKER": 1}
    assert 90 <= undelivered["oldestSeconds"] < 120
    assert (seen["unclaimed"]["count"], seen["unclaimed"]["amountCents"]) == (1, 777)
    expected = {"asked": 1, "paid": 2, "purchased": 0, "allocated": 0, "scheduled": 1, "refunded": 0}
    assert seen["funnel"] == {"lastDay": expected, "lastWeek": expected}
    await desk.do("POST", f"payments/{delivered}/refund", NOTE)
    assert (await desk.get("overview"))["funnel"]["lastDay"]["refunded"] == 1


async def test_an_empty_house(desk: Desk) -> None:
    undelivered = (await desk.get("overview"))["undelivered"]
    assert (undelivered["count"], undelivered["oldestSeconds"], undelivered["byReason"]) == (0, 0, {})
    assert (await desk.get("diagnose"))["items"] == []
    assert (await desk.get("purchases")) == {"items": [], "nextCursor": None}


async def test_workers_and_lag(desk: Desk) -> None:
    await desk.shop.work()
    await desk.shop.bought()
    await world.a_worker(desk.shop.db, "PURCHASE_CONFIRMED")
    [worker] = (await desk.get("workers"))["items"]
    assert (worker["service"], worker["alive"]) == ("purchase-worker", True)
    lag = {item["group"]: item for item in (await desk.get("lag"))["items"]}
    assert lag["purchase-creation-workers"]["messages"] == 1
    assert lag["trainer-allocation-workers"]["workersAlive"] == 0


@pytest.mark.parametrize("path", ["overview", "diagnose", "purchases", "purchases/{}", "allocations", "dead-letters"])
async def test_no_coordinates_anywhere(desk: Desk, path: str) -> None:
    payment = await desk.shop.bought(mode="home")
    await desk.shop.work()
    text = json.dumps(await desk.get(path.format(payment)))
    for number in ("28.6139", "77.209"):
        assert number not in text


async def test_diagnose_answers_in_the_contracts_shape(desk: Desk) -> None:
    payment = await desk.shop.bought()
    await desk.shop.run("update outbox set occurred_at = occurred_at - interval '1 minute'")
    [item] = (await desk.get("diagnose", studentId=str(desk.shop.student), courseId=str(desk.shop.course)))["items"]
    assert (item["paymentId"], item["purchaseId"], item["stage"]) == (str(payment), None, "paid")
    assert item["reason"] == "NO_WORKER"
    assert item["action"]["name"] == "repair"
    assert item["action"]["path"] == f"/api/v1/admin/payments/{payment}/repair"
    assert all(isinstance(line, str) for line in item["evidence"])


async def test_a_rare_stage_is_found_beyond_the_first_candidates(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(purchases, "CANDIDATES_MAX", 3)
    expected: list[str] = []
    for number in range(10):
        road = await world.a_payment(desk.shop.db)
        if number in (0, 1, 5):
            await world.purchased(desk.shop.db, road)
            await world.allocated(desk.shop.db, road)
            await world.scheduled(desk.shop.db, road)
            expected.append(str(road.payment_id))
    for query, count in (({"stage": "scheduled"}, 3), ({"reason": "EVENT_MISSING"}, 7)):
        seen: list[str] = []
        cursor: dict[str, str] = {}
        while True:
            page = await desk.get("purchases", limit=1, **query, **cursor)
            seen += [item["paymentId"] for item in page["items"]]
            if page["nextCursor"] is None:
                break
            cursor = {"cursor": page["nextCursor"]}
        assert len(seen) == len(set(seen)) == count, query
        assert set(seen) == set(expected) or count == 7
