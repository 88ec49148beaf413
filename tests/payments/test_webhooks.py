"""What providers tell us: who is believed, what is stored, and what it does."""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta
from typing import Any

import pytest
from standardwebhooks.webhooks import Webhook

from caravan.db import Database, Tx
from caravan.ids import new_id
from caravan.payments import operations, webhooks
from caravan.payments.providers import SandboxProvider, SignatureInvalid, WebhookMalformed
from tests.builders import PROVIDERS, RULES, SANDBOX, SANDBOX_SECRET, a_course, a_payment, a_student, an_order
from tests.payments.helpers import body_of, in_tx, rows, said, somebody_waits, state, tell

OTHER_SECRET = "whsec_" + "QUJD" * 12


def signed(secret: str, body: bytes, at: datetime, id_: str = "msg_1") -> dict[str, str]:
    """As the reference library signs, not as we do."""
    return {
        "webhook-id": id_,
        "webhook-timestamp": str(int(at.timestamp())),
        "webhook-signature": Webhook(secret).sign(id_, at, body.decode()),
    }


# --- who is believed ---


NOW = datetime.fromisoformat("2026-01-09T00:00:00+00:00")
BODY = body_of("payment.succeeded", new_id())


@pytest.mark.parametrize("seconds", [0, -299, 299])
def test_a_signature_within_the_window_is_believed(seconds: int) -> None:
    event = SANDBOX.verify(signed(SANDBOX_SECRET, BODY, NOW + timedelta(seconds=seconds)), BODY, NOW)
    assert (event.event_id, event.type, event.amount_cents) == ("msg_1", "payment.succeeded", 360_000)


@pytest.mark.parametrize("seconds", [-301, 301, -31_536_000, 31_536_000])
def test_a_signature_outside_the_window_is_refused_on_both_sides(seconds: int) -> None:
    with pytest.raises(SignatureInvalid):
        SANDBOX.verify(signed(SANDBOX_SECRET, BODY, NOW + timedelta(seconds=seconds)), BODY, NOW)


def test_every_changed_byte_of_the_body_is_refused() -> None:
    headers = signed(SANDBOX_SECRET, BODY, NOW)
    for position in range(len(BODY)):
        changed = bytearray(BODY)
        changed[position] ^= 1
        with pytest.raises(SignatureInvalid):
            SANDBOX.verify(headers, bytes(changed), NOW)


def test_the_library_believes_what_we_sign() -> None:
    at = datetime.now(NOW.tzinfo)
    Webhook(SANDBOX_SECRET).verify(BODY, SANDBOX.sign("msg_1", at, BODY))


def test_several_secrets_and_several_signatures() -> None:
    rotated = SandboxProvider([OTHER_SECRET, SANDBOX_SECRET])
    rotated.verify(signed(SANDBOX_SECRET, BODY, NOW), BODY, NOW)
    rotated.verify(signed(OTHER_SECRET, BODY, NOW), BODY, NOW)
    with pytest.raises(SignatureInvalid):
        SANDBOX.verify(signed(OTHER_SECRET, BODY, NOW), BODY, NOW)
    headers = signed(SANDBOX_SECRET, BODY, NOW)
    headers["webhook-signature"] = f"v1,AAAA v1a,xyz {headers['webhook-signature']}"
    SANDBOX.verify(headers, BODY, NOW)


@pytest.mark.parametrize(
    "change",
    [
        {"webhook-signature": ""},
        {"webhook-signature": "v1"},
        {"webhook-signature": "v1,"},
        {"webhook-signature": "v1,é"},
        {"webhook-signature": ",,, ,"},
        {"webhook-id": "msg_2"},
        {"webhook-id": ""},
        {"webhook-id": "a" * 256},
        {"webhook-timestamp": ""},
        {"webhook-timestamp": "nan"},
        {"webhook-timestamp": "1e9"},
        {"webhook-timestamp": "-1"},
        {"webhook-timestamp": "9" * 11},
        {"webhook-timestamp": "٣" * 10},
    ],
)
def test_odd_headers_are_refused(change: dict[str, str]) -> None:
    with pytest.raises(SignatureInvalid):
        SANDBOX.verify(signed(SANDBOX_SECRET, BODY, NOW) | change, BODY, NOW)


def test_a_missing_header_is_refused() -> None:
    for name in ("webhook-id", "webhook-timestamp", "webhook-signature"):
        headers = signed(SANDBOX_SECRET, BODY, NOW)
        del headers[name]
        with pytest.raises(SignatureInvalid):
            SANDBOX.verify(headers, BODY, NOW)


PAYMENT_ID = new_id()
MALFORMED: list[bytes] = [
    b"",
    b"null",
    b"[]",
    b"{}",
    b"\xff",
    b'{"type": "\xff"}',
    b'{"type": 1}',
    b'{"type": "a\\u0000b"}',
    b'{"type": "\\ud800"}',
    b'{"type": "payment.succeeded"}',
    b'{"type": "x", "timestamp": "yesterday"}',
    b'{"type": "x", "timestamp": "2026-01-09T00:00:00"}',
    b'{"type": "x", "data": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    body_of("payment.succeeded", "not a uuid"),
    body_of("payment.succeeded", PAYMENT_ID, None),
    body_of("payment.succeeded", PAYMENT_ID, -1),
    body_of("payment.succeeded", PAYMENT_ID, 10**16),
    body_of("payment.succeeded", PAYMENT_ID, amountCents=1.5),
    body_of("payment.succeeded", PAYMENT_ID, amountCents="360000"),
    body_of("payment.succeeded", PAYMENT_ID, amountCents=True),
    body_of("payment.succeeded", PAYMENT_ID, currency="rupees"),
    body_of("payment.succeeded", PAYMENT_ID, currency="INR\n"),
    body_of("payment.succeeded", PAYMENT_ID, currency=None),
    body_of("payment.refunded", PAYMENT_ID),
    body_of("payment.refunded", PAYMENT_ID, refundId=""),
    body_of("payment.refunded", PAYMENT_ID, refundId="a\u0000b"),
]


@pytest.mark.parametrize("body", MALFORMED, ids=range(len(MALFORMED)))
async def test_a_signed_body_that_says_nothing_sensible_is_refused_and_not_stored(db: Database, body: bytes) -> None:
    async def work(tx: Tx) -> None:
        await webhooks.receive_webhook(tx, SANDBOX, SANDBOX.sign("msg_1", tx.now, body), body)

    with pytest.raises(WebhookMalformed):
        await in_tx(db, work)
    assert await rows(db, "select 1 from webhook_events") == []


# --- what is stored, and what it does ---


async def outcomes(db: Database) -> list[str | None]:
    found = await rows(db, "select outcome from webhook_events order by received_at, event_id")
    return [row["outcome"] for row in found]


async def test_an_unknown_type_is_stored_and_ignored(db: Database) -> None:
    payment = await in_tx(db, a_payment)
    assert await tell(db, "payment.disputed", payment.id, note="later")
    assert await outcomes(db) == ["ignored"]
    assert (await state(db, payment.id))["status"] == "created"


async def test_success_is_captured_once_and_said_once(db: Database) -> None:
    payment = await in_tx(db, a_payment)
    assert await tell(db, "payment.succeeded", payment.id, id_="msg_1")
    assert not await tell(db, "payment.succeeded", payment.id, id_="msg_1")
    assert await tell(db, "payment.succeeded", payment.id, id_="msg_2")
    assert await outcomes(db) == ["applied", "already"]
    assert await said(db, payment.id) == ["PURCHASE_CONFIRMED"]
    assert await state(db, payment.id) == {
        "status": "succeeded",
        "captured_cents": 360_000,
        "refunded_cents": 0,
        "reason": None,
        "undelivered": True,
        "payer": True,
    }
    (stored,) = await rows(db, "select body from webhook_events where event_id = 'msg_1'")
    assert stored["body"] == body_of("payment.succeeded", payment.id)


async def test_a_second_success_with_another_amount_changes_nothing_and_is_visible(db: Database) -> None:
    payment = await in_tx(db, a_payment)
    await tell(db, "payment.succeeded", payment.id)
    await tell(db, "payment.succeeded", payment.id, 360_001)
    assert await outcomes(db) == ["applied", "differs"]
    assert (await state(db, payment.id))["captured_cents"] == 360_000


async def test_a_webhook_waits_for_its_payment(db: Database) -> None:
    payment_id = new_id()
    await tell(db, "payment.succeeded", payment_id)
    assert await outcomes(db) == [None]

    async def work(tx: Tx) -> None:
        await a_payment(tx, payment_id=payment_id)

    await in_tx(db, work)
    assert await outcomes(db) == ["applied"]
    assert (await state(db, payment_id))["status"] == "succeeded"


async def test_a_webhook_of_another_provider_is_not_the_payments(db: Database) -> None:
    payment = await in_tx(db, a_payment)
    await rows(db, "update payments set provider = 'elsewhere' where id = %(id)s returning 1", id=payment.id)
    await tell(db, "payment.succeeded", payment.id)
    assert (await state(db, payment.id))["status"] == "created"
    assert await outcomes(db) == [None]


async def test_failure_after_success_is_stale_and_success_counts_days_later(db: Database) -> None:
    payment = await in_tx(db, a_payment)
    await tell(db, "payment.failed", payment.id)
    assert (await state(db, payment.id))["status"] == "failed"
    await rows(db, "update checkouts set expires_at = now() - interval '3 days' returning 1")
    await tell(db, "payment.succeeded", payment.id)
    assert (await state(db, payment.id))["payer"]
    await tell(db, "payment.failed", payment.id)
    assert (await state(db, payment.id))["status"] == "succeeded"
    assert await outcomes(db) == ["applied", "applied", "stale"]


async def test_a_refund_waits_for_its_capture(db: Database) -> None:
    payment = await in_tx(db, a_payment)
    await tell(db, "payment.refunded", payment.id, refundId="r1")
    assert await outcomes(db) == [None]

    async def work(tx: Tx) -> None:
        await operations.capture(tx, payment.id, payment.amount_cents, payment.currency)

    await in_tx(db, work)
    assert await outcomes(db) == ["applied"]
    assert await said(db, payment.id) == ["PURCHASE_CONFIRMED", "PURCHASE_REFUNDED"]
    assert (await state(db, payment.id))["status"] == "refunded"
    assert not (await state(db, payment.id))["undelivered"]


async def test_a_refund_that_cannot_be_is_refused_visibly(db: Database) -> None:
    payment = await in_tx(db, a_payment)
    await tell(db, "payment.succeeded", payment.id)
    await tell(db, "payment.refunded", payment.id, 360_001, refundId="r1")
    await tell(db, "payment.refunded", payment.id, 360_000, refundId="r2", currency="USD")
    assert await outcomes(db) == ["applied", "refused: REFUND_TOO_LARGE", "refused: CURRENCY_MISMATCH"]
    assert (await state(db, payment.id))["refunded_cents"] == 0


async def test_a_bug_leaves_the_word_stored_and_it_is_taken_up_again(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    payment = await in_tx(db, a_payment)

    async def broken(*_: Any) -> bool:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(webhooks, "capture_once", broken)
        assert await tell(db, "payment.succeeded", payment.id)
    assert await outcomes(db) == ["failing: ZeroDivisionError"]
    assert (await state(db, payment.id))["status"] == "created"
    assert await in_tx(db, webhooks.apply_pending_webhooks) == 1
    assert await in_tx(db, webhooks.apply_pending_webhooks) == 0
    assert (await state(db, payment.id))["status"] == "succeeded"
    assert await said(db, payment.id) == ["PURCHASE_CONFIRMED"]


async def test_money_that_matches_no_payment_is_listed_after_a_while(db: Database) -> None:
    payment_id = new_id()
    await tell(db, "payment.succeeded", payment_id)
    await tell(db, "payment.failed", new_id())

    async def unclaimed(tx: Tx) -> list[webhooks.Unclaimed]:
        return await webhooks.list_unclaimed(tx, timedelta(minutes=15))

    assert await in_tx(db, unclaimed) == []
    await rows(db, "update webhook_events set received_at = received_at - interval '15 minutes' returning 1")
    (one,) = await in_tx(db, unclaimed)
    assert (one.payment_id, one.amount_cents, one.currency) == (payment_id, 360_000, "INR")


async def test_a_webhook_and_its_payments_creation_never_miss_each_other(db: Database) -> None:
    """The webhook comes while the creation is not committed: it waits for it, and applies."""
    payment_id = new_id()
    async with db.transaction("payment-service") as tx:
        student_id, course_id = await a_student(tx), await a_course(tx)
    async with db.transaction("payment-service") as tx:
        order = an_order(tx, student_id, course_id)
        await operations.create_payment(tx, order, RULES, PROVIDERS, account_id=None, payment_id=payment_id)
        webhook = asyncio.create_task(tell(db, "payment.succeeded", payment_id))
        await somebody_waits(tx)
    assert await webhook
    assert (await state(db, payment_id))["payer"]
