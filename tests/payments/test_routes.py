"""HTTP of payments: shapes, whose it is, keys, and the door for webhooks."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import httpx2
import pytest
from structlog.testing import capture_logs

from caravan.db import Database
from caravan.ids import new_id
from caravan.payments import coins
from caravan.payments.routes import WEBHOOK_BYTES_MAX, router
from caravan.settings import Settings
from caravan.web.auth import Role
from tests.builders import SANDBOX, SANDBOX_SECRET, a_course, a_student
from tests.clients import an_account, bearer, client_of, make_app
from tests.payments.helpers import body_of, in_tx, rows


@dataclass
class Shop:
    """A parent, signed in, with a student and a course to buy; and somebody else."""

    client: httpx2.AsyncClient
    headers: dict[str, str]
    stranger: dict[str, str]
    admin: dict[str, str]
    student_id: UUID
    order: dict[str, Any]

    async def buy(self, key: str | None = None, **changes: Any) -> httpx2.Response:
        headers = self.headers | ({"idempotency-key": key} if key else {})
        body = json.dumps(self.order | changes)
        headers |= {"content-type": "application/json"}
        return await self.client.post("/api/v1/payments", content=body, headers=headers)


@pytest.fixture
async def shop(db: Database) -> AsyncIterator[Shop]:
    parent, stranger = await an_account(db, "asha@example.com"), await an_account(db, "other@example.com")
    admin = await an_account(db, "admin@example.com", Role.ADMIN)

    async def prepare(tx: Any) -> tuple[UUID, UUID, str]:
        student_id, course_id = await a_student(tx), await a_course(tx)
        await tx.execute(
            "insert into account_students (account_id, student_id) values (%(account)s, %(student)s)",
            {"account": parent.account_id, "student": student_id},
        )
        await coins.grant_coins(tx, student_id, 3600, "welcome")
        return student_id, course_id, (tx.now + timedelta(days=5)).date().isoformat()

    student_id, course_id, start = await in_tx(db, prepare)
    order = {
        "studentId": str(student_id),
        "courseId": str(course_id),
        "sessionCount": 30,
        "learningMode": "online",
        "groupSize": 1,
        "timeSlot": "6:00 AM",
        "startDate": start,
    }
    app = make_app(db, router, settings=Settings(sandbox_webhook_secret=SANDBOX_SECRET))
    async with client_of(app) as client:
        yield Shop(
            client, await bearer(db, parent), await bearer(db, stranger), await bearer(db, admin), student_id, order
        )


async def test_buy_and_confirm(shop: Shop) -> None:
    made = await shop.buy()
    assert made.status_code == 201
    payment = made.json()
    assert payment == {
        "id": payment["id"],
        "checkoutId": payment["checkoutId"],
        "status": "created",
        "amountCents": 360_000,
        "currency": "INR",
        "coins": 0,
        "checkout": {"provider": "sandbox", "confirmUrl": f"/api/v1/payments/{payment['id']}/confirm"},
    }
    for paid in [await shop.client.post(payment["checkout"]["confirmUrl"], headers=shop.headers) for _ in range(2)]:
        assert paid.status_code == 200
        assert (paid.json()["status"], paid.json()["stage"], paid.json()["reason"]) == ("succeeded", "paid", None)
    seen = await shop.client.get(f"/api/v1/payments/{payment['id']}", headers=shop.headers)
    assert (seen.json()["status"], seen.json()["stage"]) == ("succeeded", "paid")
    assert seen.json()["courseId"] == shop.order["courseId"]


async def test_the_raw_input_is_kept_with_its_aliases(shop: Shop, db: Database) -> None:
    order = {name: value for name, value in shop.order.items() if name not in ("timeSlot", "startDate")}
    order |= {"preferredTimeSlot": " 6 am ", "preferredDate": shop.order["startDate"], "colour": "blue"}
    made = await shop.client.post("/api/v1/payments", json=order, headers=shop.headers)
    assert made.status_code == 201
    (row,) = await rows(db, "select raw, slot_start::text as slot_start from checkouts")
    assert row == {"raw": order, "slot_start": "06:00:00"}


async def test_the_refusals_name_what_to_do_next(shop: Shop) -> None:
    made = (await shop.buy()).json()
    again = await shop.buy()
    assert (again.status_code, again.json()["code"]) == (409, "CHECKOUT_OPEN")
    assert (again.json()["checkoutId"], again.json()["paymentId"]) == (made["checkoutId"], made["id"])
    told = {name: again.json()[name] for name in ("sessionCount", "learningMode", "amountCents", "currency")}
    assert told == {"sessionCount": 30, "learningMode": "online", "amountCents": 360_000, "currency": "INR"}
    dear = await shop.buy(again=True, expectedAmountCents=1)
    assert (dear.status_code, dear.json()["code"], dear.json()["amountCents"]) == (409, "PRICE_CHANGED", 360_000)
    retried = await shop.client.post("/api/v1/payments", json={"checkoutId": made["checkoutId"]}, headers=shop.headers)
    assert (retried.status_code, retried.json()["checkoutId"]) == (201, made["checkoutId"])
    assert retried.json()["id"] != made["id"]


async def test_coins_can_pay_it_all(shop: Shop) -> None:
    made = await shop.buy(coins=3600)
    assert (made.status_code, made.json()["status"], made.json()["amountCents"]) == (201, "succeeded", 0)
    assert made.json()["checkout"] == {"provider": "none"}
    confirmed = await shop.client.post(f"/api/v1/payments/{made.json()['id']}/confirm", headers=shop.headers)
    assert (confirmed.status_code, confirmed.json()["stage"]) == (200, "paid")


@pytest.mark.parametrize(
    "changes",
    [
        {"studentId": None},
        {"studentId": "me"},
        {"sessionCount": "30"},
        {"sessionCount": 30.5},
        {"sessionCount": 0},
        {"sessionCount": 10**30},
        {"learningMode": "moon"},
        {"groupSize": True},
        {"timeSlot": 6},
        {"timeSlot": "a\u0000b"},
        {"startDate": 1767916800},
        {"startDate": "2026-02-30"},
        {"startDate": "someday"},
        {"coins": -1},
        {"coins": 1.5},
        {"coins": 10**9},
        {"expectedAmountCents": "360000"},
        {"again": "yes"},
        {"cartItemId": "first"},
        {"colour": "\ud800"},
    ],
)
async def test_malformed_orders_change_nothing(shop: Shop, db: Database, changes: dict[str, Any]) -> None:
    refused = await shop.buy(**changes)
    assert refused.status_code == 422
    assert refused.json()["code"] in ("INVALID_REQUEST", "INVALID_SLOT")
    assert await rows(db, "select 1 from checkouts") == []


async def test_what_is_not_yours_is_not_there(shop: Shop) -> None:
    payment = (await shop.buy()).json()
    for headers, status in ((shop.stranger, 404), ({}, 401)):
        seen = [
            await shop.client.post("/api/v1/payments", json=shop.order, headers=headers),
            await shop.client.post("/api/v1/payments", json={"checkoutId": payment["checkoutId"]}, headers=headers),
            await shop.client.get(f"/api/v1/payments/{payment['id']}", headers=headers),
            await shop.client.post(f"/api/v1/payments/{payment['id']}/confirm", headers=headers),
        ]
        assert [answer.status_code for answer in seen] == [status] * 4
    anybody = await shop.client.get(f"/api/v1/payments/{new_id()}", headers=shop.admin)
    assert anybody.status_code == 404
    assert (await shop.client.get(f"/api/v1/payments/{payment['id']}", headers=shop.admin)).status_code == 200


async def test_staff_leave_an_audit_row_where_they_act_for_a_family(shop: Shop, db: Database) -> None:
    theirs = (await shop.buy()).json()
    made = await shop.client.post(
        "/api/v1/payments", json=shop.order | {"timeSlot": "9:00 AM", "again": True}, headers=shop.admin
    )
    assert made.status_code == 201
    for _ in range(2):
        for payment in (theirs["id"], made.json()["id"]):
            headers = shop.headers if payment == theirs["id"] else shop.admin
            assert (await shop.client.post(f"/api/v1/payments/{payment}/confirm", headers=headers)).status_code == 200
    kept = await rows(db, "select actor, action, subject_id from audit_log order by at, action")
    admin = {"actor": "admin@example.com", "subject_id": made.json()["id"]}
    assert kept == [admin | {"action": "payments:create"}, admin | {"action": "payments:confirm"}]


async def test_the_same_key_has_the_same_answer(shop: Shop, db: Database) -> None:
    first, second = await shop.buy(key="k1"), await shop.buy(key="k1")
    assert (first.status_code, second.status_code) == (201, 201)
    assert first.json() == second.json()
    other = await shop.buy(key="k1", timeSlot="7:00 AM")
    assert (other.status_code, other.json()["code"]) == (422, "IDEMPOTENCY_KEY_REUSED")
    assert len(await rows(db, "select 1 from payments")) == 1


async def test_one_key_many_times_at_once_buys_once(shop: Shop, db: Database) -> None:
    answers = await asyncio.gather(*(shop.buy(key="k1") for _ in range(32)))
    ended = Counter(answer.json().get("code", "made") for answer in answers)
    assert set(ended) <= {"made", "IDEMPOTENCY_KEY_IN_USE"}
    assert ended["made"] >= 1
    assert len({answer.json()["id"] for answer in answers if answer.status_code == 201}) == 1
    assert len(await rows(db, "select 1 from payments")) == 1


async def test_many_keys_at_once_open_one_checkout(shop: Shop, db: Database) -> None:
    answers = await asyncio.gather(*(shop.buy(key=f"k{number}") for number in range(32)))
    assert Counter(answer.json().get("code", "made") for answer in answers) == {"made": 1, "CHECKOUT_OPEN": 31}
    assert len(await rows(db, "select 1 from payments")) == 1


# --- webhooks ---


async def send(shop: Shop, body: bytes, provider: str = "sandbox", **headers: str) -> httpx2.Response:
    signed = SANDBOX.sign("msg_1", datetime.now(UTC), body) | headers
    return await shop.client.post(f"/api/v1/webhooks/{provider}", content=body, headers=signed)


async def test_a_signed_webhook_pays(shop: Shop) -> None:
    payment = (await shop.buy()).json()
    body = body_of("payment.succeeded", payment["id"])
    assert [(await send(shop, body)).json() for _ in range(2)] == [{"new": True}, {"new": False}]
    seen = await shop.client.get(f"/api/v1/payments/{payment['id']}", headers=shop.headers)
    assert (seen.json()["status"], seen.json()["stage"]) == ("succeeded", "paid")


async def test_other_webhooks_are_refused_and_not_stored(shop: Shop, db: Database) -> None:
    body = body_of("payment.succeeded", new_id())
    forged = {"webhook-signature": "v1,AAAA"}
    for answer, status, code in (
        (await send(shop, body, **forged), 401, "SIGNATURE_INVALID"),
        (await send(shop, body, "paypal"), 404, "PROVIDER_UNKNOWN"),
        (await send(shop, b"{}"), 422, "WEBHOOK_MALFORMED"),
        (await send(shop, b" " * (WEBHOOK_BYTES_MAX + 1)), 413, "BODY_TOO_LARGE"),
    ):
        assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert await rows(db, "select 1 from webhook_events") == []


async def test_an_amount_that_waits_says_so(shop: Shop) -> None:
    payment = (await shop.buy()).json()
    await send(shop, body_of("payment.succeeded", payment["id"], 1))
    seen = await shop.client.get(f"/api/v1/payments/{payment['id']}", headers=shop.headers)
    assert (seen.json()["stage"], seen.json()["reason"]) == ("paid", "AMOUNT_MISMATCH")


async def test_without_a_provider_nothing_is_sold_for_money(db: Database, shop: Shop) -> None:
    async with client_of(make_app(db, router)) as client:
        with capture_logs() as lines:
            answer = await client.post("/api/v1/payments", json=shop.order, headers=shop.headers)
        assert (answer.status_code, answer.json()["code"]) == (503, "PROVIDER_OFF")
        (told,) = [line for line in lines if line["log_level"] in ("warning", "error")]
        assert (told["event"], told["log_level"], told["code"]) == ("request refused", "warning", "PROVIDER_OFF")
        assert "exc_info" not in told
        assert (await client.post("/api/v1/webhooks/sandbox", content=b"{}")).status_code == 404
