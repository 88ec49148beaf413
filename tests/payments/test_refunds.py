"""Money goes back: all of it, or a part that names its sessions."""

from __future__ import annotations

from typing import Any

import pytest

from caravan.db import Database, Tx
from caravan.errors import DomainError, NotFound
from caravan.ids import new_id
from caravan.payments import coins, refunds
from caravan.payments.refunds import Refund, refund_by_operator, refund_payment
from tests.builders import PROVIDERS, a_course, a_paid_checkout, a_payment, a_student
from tests.payments.helpers import in_tx, rows, said, state, tell


async def refund(db: Database, payment: Any, **how: Any) -> Refund:
    given: dict[str, Any] = {"amount_cents": None, "sessions": None, "note": "asked for", "source": "admin"} | how
    return await in_tx(db, lambda tx: refund_payment(tx, payment.id, **given))


async def test_all_of_it_ends_the_delivery(db: Database) -> None:
    payment = await in_tx(db, a_paid_checkout)
    given = await refund(db, payment)
    assert (given.amount_cents, given.full, given.new) == (360_000, True, True)
    after = await state(db, payment.id)
    assert (after["status"], after["refunded_cents"], after["undelivered"]) == ("refunded", 360_000, False)
    (event,) = await rows(db, "select data from outbox where type = 'PURCHASE_REFUNDED'")
    assert (event["data"]["full"], event["data"]["amountCents"]) == (True, 360_000)
    with pytest.raises(refunds.NotCaptured):
        await refund(db, payment)


async def test_the_same_refund_again_changes_nothing(db: Database) -> None:
    payment, other = await in_tx(db, a_paid_checkout), await in_tx(db, a_paid_checkout)
    first = await refund(db, payment, amount_cents=60_000, sessions=5, provider_refund_id="r1")
    again = await refund(db, payment, amount_cents=60_000, sessions=5, provider_refund_id="r1")
    assert (again.id, again.new, again.sessions) == (first.id, False, 5)
    assert (await state(db, payment.id))["refunded_cents"] == 60_000
    assert await said(db, payment.id) == ["PURCHASE_CONFIRMED", "PURCHASE_REFUNDED"]
    with pytest.raises(refunds.RefundIdTaken):
        await refund(db, other, amount_cents=60_000, sessions=5, provider_refund_id="r1")


async def test_what_is_left_is_the_whole(db: Database) -> None:
    payment = await in_tx(db, a_paid_checkout)
    part = await refund(db, payment, amount_cents=60_000, sessions=[29, 30])
    assert (part.full, part.sessions, part.session_seqs) == (False, 2, [29, 30])
    assert (await state(db, payment.id))["status"] == "partially_refunded"
    assert (await state(db, payment.id))["undelivered"]
    rest = await refund(db, payment, amount_cents=300_000)
    assert rest.full
    assert (await state(db, payment.id))["status"] == "refunded"


@pytest.mark.parametrize(
    ("how", "code"),
    [
        ({"amount_cents": 360_001}, "REFUND_TOO_LARGE"),
        ({"amount_cents": 0, "sessions": 1}, "REFUND_AMOUNT_INVALID"),
        ({"amount_cents": -1, "sessions": 1}, "REFUND_AMOUNT_INVALID"),
        ({"amount_cents": 1}, "REFUND_SESSIONS_REQUIRED"),
        ({"amount_cents": 1, "sessions": 31}, "REFUND_SESSIONS_INVALID"),
        ({"amount_cents": 1, "sessions": -1}, "REFUND_SESSIONS_INVALID"),
        ({"amount_cents": 1, "sessions": [0]}, "REFUND_SESSIONS_INVALID"),
        ({"amount_cents": 1, "sessions": [31]}, "REFUND_SESSIONS_INVALID"),
        ({"amount_cents": 1, "sessions": [7, 7]}, "REFUND_SESSIONS_INVALID"),
    ],
)
async def test_what_cannot_be_refunded(db: Database, how: dict[str, Any], code: str) -> None:
    payment = await in_tx(db, a_paid_checkout)
    with pytest.raises(DomainError) as refusal:
        await refund(db, payment, **how)
    assert refusal.value.code == code
    assert await rows(db, "select 1 from refunds") == []


async def test_too_much_is_said_in_money(db: Database) -> None:
    payment = await in_tx(db, a_paid_checkout)
    with pytest.raises(refunds.RefundTooLarge) as refusal:
        await refund(db, payment, amount_cents=9_999_900)
    assert refusal.value.detail == "₹99,999 is more than the ₹3,600 that is left."
    assert refusal.value.extra == {"remainingCents": 360_000}


async def test_sessions_are_taken_away_once(db: Database) -> None:
    payment = await in_tx(db, a_paid_checkout)
    await refund(db, payment, amount_cents=1, sessions=[30])
    with pytest.raises(refunds.RefundSessionsInvalid):
        await refund(db, payment, amount_cents=1, sessions=[30])
    await refund(db, payment, amount_cents=1, sessions=29)
    with pytest.raises(refunds.RefundSessionsInvalid):
        await refund(db, payment, amount_cents=1, sessions=1)
    await refund(db, payment, amount_cents=1, sessions=0)  # a gift


async def test_nothing_came_nothing_goes_back(db: Database) -> None:
    payment = await in_tx(db, a_payment)
    with pytest.raises(refunds.NotCaptured):
        await refund(db, payment)
    with pytest.raises(NotFound):
        await in_tx(db, lambda tx: refund_payment(tx, new_id(), note="no", source="admin"))


async def test_a_provider_knows_no_sessions(db: Database) -> None:
    payment = await in_tx(db, a_paid_checkout)
    part = await refund(db, payment, amount_cents=100, source="provider", provider_refund_id="r1", note=None)
    assert (part.full, part.sessions) == (False, 0)


async def test_an_operators_refund_and_the_providers_word_of_it_are_one(db: Database) -> None:
    payment = await in_tx(db, a_paid_checkout)
    await in_tx(
        db, lambda tx: refund_by_operator(tx, PROVIDERS, payment.id, amount_cents=100, sessions=0, note="sorry")
    )
    (row,) = await rows(db, "select provider, provider_refund_id, source, note from refunds")
    assert (row["provider"], row["source"], row["note"]) == ("sandbox", "admin", "sorry")
    await tell(db, "payment.refunded", payment.id, 100, refundId=row["provider_refund_id"])
    assert (await state(db, payment.id))["refunded_cents"] == 100


async def test_coins_come_back_with_the_whole_and_a_total_of_zero_can_be_refunded(db: Database) -> None:
    async def buy(tx: Tx) -> Any:
        student_id = await a_student(tx)
        await coins.grant_coins(tx, student_id, 3600, "a prize")
        return await a_payment(tx, student_id, await a_course(tx), coins=3600)

    payment = await in_tx(db, buy)
    assert await in_tx(db, lambda tx: coins.count_available(tx, payment.student_id)) == 0
    given = await in_tx(db, lambda tx: refund_by_operator(tx, PROVIDERS, payment.id, note="asked for"))
    assert (given.full, given.amount_cents) == (True, 0)
    assert (await state(db, payment.id))["status"] == "refunded"
    assert await in_tx(db, lambda tx: coins.count_available(tx, payment.student_id)) == 3600
    with pytest.raises(refunds.NotCaptured):
        await refund(db, payment)


async def test_a_refund_whose_commit_was_not_answered_is_not_made_twice(db: Database) -> None:
    payment = await in_tx(db, a_paid_checkout)
    refund_id = new_id()

    async def work(tx: Tx) -> Any:
        return await refund_by_operator(
            tx, PROVIDERS, payment.id, amount_cents=100, sessions=1, note="sorry", refund_id=refund_id
        )

    async with db.transaction() as tx:  # committed, but the answer is lost
        await work(tx)
    again = await in_tx(db, work)
    assert (again.id, again.new) == (refund_id, False)
    assert (await state(db, payment.id))["refunded_cents"] == 100
    assert len(await rows(db, "select 1 from refunds")) == 1
