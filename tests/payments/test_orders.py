"""Whatever order a payment's news comes in, it ends in the same state."""

from __future__ import annotations

from itertools import permutations
from typing import Any

from caravan.db import Database, Tx
from caravan.ids import new_id
from caravan.payments import coins
from tests.builders import a_course, a_payment, a_student
from tests.payments.helpers import in_tx, rows, said, state, tell

# Steps by name: created, failed, succeeded, succeeded again (redelivered), a part back, the rest back.
LIFE = ("create", "fail", "succeed", "part", "rest")


async def live(db: Database, order: tuple[str, ...]) -> dict[str, Any]:
    """What a payment has come to when everything is heard, in this order."""
    payment_id = new_id()

    async def prepare(tx: Tx) -> Any:
        student_id = await a_student(tx)
        await coins.grant_coins(tx, student_id, 10, "welcome")
        return student_id, await a_course(tx)

    student_id, course_id = await in_tx(db, prepare)
    for step in order:
        if step == "create":
            await in_tx(db, lambda tx: a_payment(tx, student_id, course_id, payment_id=payment_id, coins=10))
        elif step == "fail":
            await tell(db, "payment.failed", payment_id, 359_000)
        elif step == "succeed":
            await tell(db, "payment.succeeded", payment_id, 359_000)
        elif step == "part":
            await tell(db, "payment.refunded", payment_id, 59_000, refundId=f"a_{payment_id}")
        else:
            await tell(db, "payment.refunded", payment_id, 300_000, refundId=f"b_{payment_id}")
    waiting = await rows(
        db, "select 1 from webhook_events where payment_id = %(id)s and applied_at is null", id=payment_id
    )
    return await state(db, payment_id) | {
        "said": await said(db, payment_id),
        "coins": await in_tx(db, lambda tx: coins.count_available(tx, student_id)),
        "waiting": len(waiting),
    }


async def test_every_order_of_a_refunded_life_ends_the_same(db: Database) -> None:
    for order in permutations(LIFE):
        assert await live(db, order) == {
            "status": "refunded",
            "captured_cents": 359_000,
            "refunded_cents": 359_000,
            "reason": None,
            "undelivered": False,
            "payer": True,
            "said": ["PURCHASE_CONFIRMED", "PURCHASE_REFUNDED", "PURCHASE_REFUNDED"],
            "coins": 10,
            "waiting": 0,
        }, order


async def test_every_order_of_a_delivered_life_ends_the_same(db: Database) -> None:
    for order in permutations(("create", "fail", "succeed", "part", "succeed")):
        assert await live(db, order) == {
            "status": "partially_refunded",
            "captured_cents": 359_000,
            "refunded_cents": 59_000,
            "reason": None,
            "undelivered": True,
            "payer": True,
            "said": ["PURCHASE_CONFIRMED", "PURCHASE_REFUNDED"],
            "coins": 0,
            "waiting": 0,
        }, order
