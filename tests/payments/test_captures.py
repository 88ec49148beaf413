"""Money came: what it pays, and what it waits for."""

from __future__ import annotations

from typing import Any

import pytest

from caravan import deliveries
from caravan.db import Database, Tx
from caravan.deliveries import Stage
from caravan.errors import NotFound
from caravan.ids import new_id
from caravan.payments import captures, coins, operations, refunds
from tests.builders import PROVIDERS, RULES, a_payment, a_student
from tests.payments.helpers import in_tx, rows, said, state, tell


@pytest.mark.parametrize(("cents", "currency"), [(359_999, "INR"), (360_001, "INR"), (360_000, "USD")])
async def test_another_amount_waits_until_it_is_accepted(db: Database, cents: int, currency: str) -> None:
    payment = await in_tx(db, a_payment)
    await tell(db, "payment.succeeded", payment.id, cents, currency=currency)
    assert await state(db, payment.id) | {"refunded_cents": 0} == {
        "status": "succeeded",
        "captured_cents": cents,
        "refunded_cents": 0,
        "reason": "AMOUNT_MISMATCH",
        "undelivered": True,
        "payer": None,
    }
    assert await said(db, payment.id) == ["PURCHASE_BLOCKED"]
    await in_tx(db, lambda tx: captures.accept_amount(tx, payment.id))
    assert await said(db, payment.id) == ["PURCHASE_BLOCKED", "PURCHASE_UNBLOCKED", "PURCHASE_CONFIRMED"]
    assert (await state(db, payment.id))["payer"]
    with pytest.raises(captures.NothingToAccept):
        await in_tx(db, lambda tx: captures.accept_amount(tx, payment.id))


async def two_attempts(db: Database) -> tuple[Any, Any]:
    async def work(tx: Tx) -> tuple[Any, Any]:
        first = await a_payment(tx)
        second = await operations.retry_payment(tx, first.checkout_id, RULES, PROVIDERS, account_id=None)
        return first, second.payment

    return await in_tx(db, work)


async def test_a_checkout_is_bought_once_and_the_second_money_is_visible(db: Database) -> None:
    first, second = await two_attempts(db)
    await tell(db, "payment.succeeded", second.id)
    await tell(db, "payment.succeeded", first.id)
    assert (await state(db, second.id))["payer"]
    assert (await state(db, first.id))["reason"] == "PAID_TWICE"
    assert await said(db, first.id) == ["PURCHASE_BLOCKED"]
    with pytest.raises(captures.NothingToAccept):
        await in_tx(db, lambda tx: captures.accept_amount(tx, first.id))


async def test_the_right_amount_overtakes_a_wrong_one(db: Database) -> None:
    """Whichever comes first, the attempt that paid as asked buys, and the other is paid twice."""
    first, second = await two_attempts(db)
    await tell(db, "payment.succeeded", first.id, 1)
    assert (await state(db, first.id))["reason"] == "AMOUNT_MISMATCH"
    await tell(db, "payment.succeeded", second.id)
    assert (await state(db, second.id))["payer"]
    assert (await state(db, first.id))["reason"] == "PAID_TWICE"


async def test_the_second_money_goes_back_as_coins(db: Database) -> None:
    first, second = await two_attempts(db)
    await tell(db, "payment.succeeded", first.id)
    await tell(db, "payment.succeeded", second.id)

    async def pay_out(tx: Tx) -> refunds.Refund:
        return await refunds.refund_as_coins(tx, second.id, coin_value_cents=100, note="asked for it")

    refund = await in_tx(db, pay_out)
    assert (refund.amount_cents, refund.full) == (360_000, True)
    assert await state(db, second.id) | {"payer": None} == {
        "status": "refunded",
        "captured_cents": 360_000,
        "refunded_cents": 360_000,
        "reason": None,
        "undelivered": False,
        "payer": None,
    }
    assert await in_tx(db, lambda tx: coins.count_available(tx, second.student_id)) == 3600
    with pytest.raises(refunds.NotCaptured):
        await in_tx(db, pay_out)
    with pytest.raises(refunds.NotPaidTwice):
        await in_tx(db, lambda tx: refunds.refund_as_coins(tx, first.id, coin_value_cents=100, note="no"))


async def test_no_fraction_of_a_coin_is_paid_out(db: Database) -> None:
    first, second = await two_attempts(db)
    await tell(db, "payment.succeeded", first.id)
    await tell(db, "payment.succeeded", second.id)
    with pytest.raises(refunds.NotWholeCoins):
        await in_tx(db, lambda tx: refunds.refund_as_coins(tx, second.id, coin_value_cents=7, note="odd"))


async def test_captured_money_that_nobody_decided_on_is_settled(db: Database) -> None:
    """Imported rows, or a hold that covered the reason: settling finds what is true, again and again."""
    payment = await in_tx(db, a_payment)
    await tell(db, "payment.succeeded", payment.id, 1)
    await in_tx(db, lambda tx: deliveries.hold(tx, payment.id, Stage.PAID, "look"))
    await in_tx(db, lambda tx: deliveries.release_hold(tx, payment.id, Stage.PAID))
    assert (await state(db, payment.id))["reason"] is None
    for _ in range(2):
        await in_tx(db, lambda tx: captures.settle_captured(tx, payment.id))
    assert (await state(db, payment.id))["reason"] == "AMOUNT_MISMATCH"


async def test_only_the_sandbox_is_confirmed_by_hand_and_once(db: Database) -> None:
    payment = await in_tx(db, a_payment)
    for _ in range(2):
        await in_tx(db, lambda tx: operations.confirm_payment(tx, payment.id, PROVIDERS))
        assert (await state(db, payment.id))["status"] == "succeeded"
    assert await said(db, payment.id) == ["PURCHASE_CONFIRMED"]
    (stored,) = await rows(db, "select outcome from webhook_events")
    assert stored["outcome"] == "applied"
    other = await in_tx(db, a_payment)
    with pytest.raises(operations.PaymentNotConfirmable):
        await in_tx(db, lambda tx: operations.confirm_payment(tx, other.id, {}))


async def test_a_late_success_takes_the_coins_again_or_books_the_shortfall(db: Database) -> None:
    async def buy(tx: Tx) -> Any:
        student_id = await a_student(tx)
        await coins.grant_coins(tx, student_id, 10, "welcome")
        return await a_payment(tx, student_id, coins=10)

    payment = await in_tx(db, buy)
    await tell(db, "payment.failed", payment.id)
    spent = await in_tx(db, lambda tx: a_payment(tx, payment.student_id, coins=7))
    await tell(db, "payment.succeeded", payment.id, 359_000)
    entries = await rows(
        db, "select kind, coins from coin_entries where payment_id = %(id)s order by created_at, kind", id=payment.id
    )
    assert [(entry["kind"], entry["coins"]) for entry in entries] == [
        ("reserved", 10),
        ("released", 10),
        ("captured", 3),
        ("shortfall", 7),
    ]
    assert (await state(db, payment.id))["payer"]
    await tell(db, "payment.succeeded", spent.id, 359_300)
    assert await in_tx(db, lambda tx: coins.count_available(tx, payment.student_id)) == 0
    await tell(db, "payment.refunded", payment.id, 359_000, refundId="r1")
    assert await in_tx(db, lambda tx: coins.count_available(tx, payment.student_id)) == 3


async def test_an_unknown_payment_is_not_captured(db: Database) -> None:
    with pytest.raises(NotFound):
        await in_tx(db, lambda tx: operations.capture(tx, new_id(), 1, "INR"))
