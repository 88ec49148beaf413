"""Bodies that once ended as a bug of ours, where a refusal was promised."""

from __future__ import annotations

import json
from datetime import timedelta

import pytest

from caravan.admin import pages
from caravan.db import Database
from caravan.ids import new_id
from caravan.payments import routes as payments
from caravan.payments.providers import WebhookMalformed
from caravan.web import routes as web
from caravan.web.auth import Role
from tests import builders
from tests.clients import ORIGIN, an_account, bearer, client_of, make_app


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
async def test_a_number_that_is_none_in_a_field_that_nobody_reads(db: Database, number: str) -> None:
    headers = await bearer(db, await an_account(db, "asha@example.com", Role.ADMIN))
    async with db.transaction() as tx:
        student, course = await builders.a_student(tx), await builders.a_course(tx)
        start = (tx.now + timedelta(days=4)).date().isoformat()
    order = {"studentId": str(student), "courseId": str(course), "sessionCount": 30, "learningMode": "online"}
    body = json.dumps(order | {"timeSlot": "6:00 AM", "startDate": start})[:-1] + f', "x": [{number}]}}'
    async with client_of(make_app(db, payments.router)) as client:
        answer = await client.post(
            "/api/v1/payments", content=body, headers=headers | {"content-type": "application/json"}
        )
    assert (answer.status_code, answer.json()["code"]) == (422, "INVALID_REQUEST")


@pytest.mark.parametrize("at", ["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00", "1999-12-31T00:00:00Z"])
async def test_a_webhook_from_beyond_the_calendar(db: Database, at: str) -> None:
    body = json.dumps({"type": "payment.failed", "timestamp": at, "data": {"paymentId": str(new_id())}}).encode()
    async with db.transaction() as tx:
        with pytest.raises(WebhookMalformed):
            builders.SANDBOX.verify(builders.SANDBOX.sign("msg_1", tx.now, body), body, tx.now)


def a_form(**fields: bytes) -> dict[str, object]:
    """In UTF-7, which can spell half of a surrogate pair."""
    parts = b"".join(
        b'--b\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n' % (name.encode(), value)
        for name, value in fields.items()
    )
    headers = {"content-type": "multipart/form-data; boundary=b; charset=utf-7", "origin": ORIGIN}
    return {"content": parts + b"--b--\r\n", "headers": headers}


async def test_a_password_in_another_encoding(db: Database) -> None:
    async with client_of(make_app(db, web.router)) as client:
        answer = await client.post("/login", **a_form(email=b"asha@example.com", password=b"+2AA-"))  # pyright: ignore[reportArgumentType]
    assert answer.status_code == 422


@pytest.mark.parametrize("note", [b"note=a%00b", b"note=%00"])
async def test_a_note_with_a_nul(db: Database, note: bytes) -> None:
    headers = await bearer(db, await an_account(db, "asha@example.com", Role.ADMIN))
    async with db.transaction() as tx:
        payment = await builders.a_paid_checkout(tx)
    app = make_app(db, pages.router)
    app.state.subscriptions = {}
    async with client_of(app) as client:
        answer = await client.post(
            f"/admin/payments/{payment.id}/hold",
            content=note,
            headers=headers | {"content-type": "application/x-www-form-urlencoded"},
        )
    assert answer.status_code == 422
