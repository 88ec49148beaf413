"""The same things, 32 at once."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from itertools import count
from typing import Any

from caravan.db import Database, Tx
from caravan.errors import DomainError
from caravan.payments import coins, operations
from caravan.payments.refunds import refund_payment
from caravan.payments.webhooks import receive_webhook
from tests.builders import PROVIDERS, RULES, SANDBOX, a_course, a_paid_checkout, a_payment, a_student
from tests.payments.helpers import body_of, in_tx, rows, said, state

AT_ONCE = 32


async def at_once(db: Database, work: Callable[[Tx], Awaitable[Any]], times: int = AT_ONCE) -> Counter[str]:
    """How each of them ended: `done`, or the code of its refusal."""

    async def one() -> str:
        try:
            await in_tx(db, work)
        except DomainError as refusal:
            return refusal.code
        return "done"

    return Counter(await asyncio.gather(*(one() for _ in range(times))))


async def student_and_course(tx: Tx) -> Any:
    return await a_student(tx), await a_course(tx)


async def test_one_of_many_equal_checkouts_opens(db: Database) -> None:
    student_id, course_id = await in_tx(db, student_and_course)
    ended = await at_once(db, lambda tx: a_payment(tx, student_id, course_id))
    assert ended == {"done": 1, "CHECKOUT_OPEN": 31}
    assert len(await rows(db, "select 1 from checkouts")) == 1


async def test_coins_are_spent_once(db: Database) -> None:
    student_id, course_id = await in_tx(db, student_and_course)
    await in_tx(db, lambda tx: coins.grant_coins(tx, student_id, 35, "welcome"))
    minutes = count(6 * 60)  # each another slot, so that only the coins make them wait for one another

    async def buy(tx: Tx) -> None:
        at = next(minutes)
        await a_payment(tx, student_id, course_id, time_slot=f"{at // 60:02d}:{at % 60:02d}", coins=10)

    ended = await at_once(db, buy)
    assert ended == {"done": 3, "COINS_INSUFFICIENT": 29}
    assert await in_tx(db, lambda tx: coins.count_available(tx, student_id)) == 5


async def test_one_webhook_many_times_at_once_has_one_effect(db: Database) -> None:
    payment = await in_tx(db, a_payment)
    body = body_of("payment.succeeded", payment.id)

    async def work(tx: Tx) -> bool:
        return await receive_webhook(tx, SANDBOX, SANDBOX.sign("msg_1", tx.now, body), body)

    assert (await at_once(db, work)) == {"done": AT_ONCE}
    assert await said(db, payment.id) == ["PURCHASE_CONFIRMED"]
    assert len(await rows(db, "select 1 from webhook_events")) == 1


async def test_many_attempts_paid_at_once_buy_once(db: Database) -> None:
    first = await in_tx(db, a_payment)
    attempts = [first.id]
    for _ in range(7):
        made = await in_tx(
            db, lambda tx: operations.retry_payment(tx, first.checkout_id, RULES, PROVIDERS, account_id=None)
        )
        attempts.append(made.payment.id)
    confirmed = [in_tx(db, lambda tx, id_=id_: operations.confirm_payment(tx, id_, PROVIDERS)) for id_ in attempts]
    await asyncio.gather(*confirmed)
    states = [await state(db, id_) for id_ in attempts]
    assert [one["reason"] for one in states].count("PAID_TWICE") == 7
    assert sum(one["status"] == "succeeded" for one in states) == 8
    confirmed_events = await rows(db, "select 1 from outbox where type = 'PURCHASE_CONFIRMED'")
    assert len(confirmed_events) == 1


async def test_refunds_at_once_never_give_back_more_than_came(db: Database) -> None:
    payment = await in_tx(db, a_paid_checkout)

    async def work(tx: Tx) -> None:
        await refund_payment(tx, payment.id, amount_cents=100_000, sessions=0, note="again", source="admin")

    assert await at_once(db, work, 8) == {"done": 3, "REFUND_TOO_LARGE": 5}
    assert (await state(db, payment.id))["refunded_cents"] == 300_000


async def test_one_refund_many_times_at_once_is_one(db: Database) -> None:
    payment = await in_tx(db, a_paid_checkout)

    async def work(tx: Tx) -> None:
        await refund_payment(
            tx, payment.id, amount_cents=100_000, sessions=0, note="", source="admin", provider_refund_id="r1"
        )

    assert await at_once(db, work, 8) == {"done": 8}
    assert (await state(db, payment.id))["refunded_cents"] == 100_000
