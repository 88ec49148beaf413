"""Undelivered money: entered once, waits with a reason, announced once per change, held by an operator."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

import pytest

from caravan import deliveries
from caravan.db import Database
from caravan.deliveries import Block, Reason, Stage
from caravan.ids import new_id


@pytest.fixture
async def payment(db: Database) -> UUID:
    payment_id, checkout_id, student_id = new_id(), new_id(), new_id()
    async with db.transaction() as tx:
        await tx.execute(
            "insert into checkouts (id, student_id, course_id, price_cents, currency, raw, expires_at)"
            " values (%(c)s, %(s)s, gen_random_uuid(), 360000, 'INR', '{}', now())",
            {"c": checkout_id, "s": student_id},
        )
        await tx.execute(
            "insert into payments (id, checkout_id, student_id, provider, status, amount_cents, currency,"
            " captured_cents, captured_at, metadata)"
            " values (%(p)s, %(c)s, %(s)s, 'sandbox', 'succeeded', 360000, 'INR', 360000, now(), '{}')",
            {"p": payment_id, "c": checkout_id, "s": student_id},
        )
        await deliveries.open_deliveries(tx, [payment_id])
    return payment_id


async def test_money_is_told_in_the_currency_that_came(db: Database, payment: UUID) -> None:
    async with db.transaction() as tx:
        await deliveries.close_deliveries(tx, [payment])
        await tx.execute("update payments set captured_currency = 'USD'")
        await deliveries.open_deliveries(tx, [payment])
        assert await tx.value("select currency from undelivered") == "USD"


async def said(db: Database) -> list[tuple[str, str]]:
    async with db.transaction() as tx:
        return await tx.tuples("select type, data ->> 'reason' from outbox order by id")


async def test_a_reason_is_announced_once_per_change(db: Database, payment: UUID) -> None:
    for reason in (Reason.NO_TRAINER_AVAILABLE, Reason.NO_TRAINER_AVAILABLE, Reason.STUDENT_CONFLICT):
        async with db.transaction() as tx:
            await deliveries.block(tx, [Block(payment, Stage.PURCHASED, reason, {"n": 1})])
    for _ in range(2):
        async with db.transaction() as tx:
            await deliveries.unblock(tx, [payment], Stage.PURCHASED)
    assert await said(db) == [
        ("PURCHASE_BLOCKED", "NO_TRAINER_AVAILABLE"),
        ("PURCHASE_BLOCKED", "STUDENT_CONFLICT"),
        ("PURCHASE_UNBLOCKED", "STUDENT_CONFLICT"),
    ]


async def test_the_time_of_a_reason_is_that_of_its_first_announcement(db: Database, payment: UUID) -> None:
    times: list[datetime] = []
    for n in (1, 2):
        async with db.transaction() as tx:
            await deliveries.block(tx, [Block(payment, Stage.PURCHASED, Reason.NO_TRAINER_AVAILABLE, {"n": n})])
        async with db.transaction() as tx:
            row = await tx.one("select detail, reason_since from undelivered")
            assert row["detail"] == {"n": n}
            times.append(row["reason_since"])
    assert times[0] == times[1]


async def test_a_hold_wins_over_every_reason_until_it_is_released(db: Database, payment: UUID) -> None:
    async with db.transaction() as tx:
        assert await deliveries.hold(tx, payment, Stage.PURCHASED, "the family asked")
    async with db.transaction() as tx:
        assert not await deliveries.hold(tx, payment, Stage.PURCHASED, "again")
        await deliveries.block(tx, [Block(payment, Stage.PURCHASED, Reason.NO_TRAINER_AVAILABLE)])
        await deliveries.unblock(tx, [payment], Stage.PURCHASED)
        assert await tx.value("select reason from undelivered") == "OPERATOR_HOLD"
        assert await deliveries.list_waiting(tx, [Reason.OPERATOR_HOLD]) == []  # nobody resumes it
    async with db.transaction() as tx:
        assert await deliveries.release_hold(tx, payment, Stage.PURCHASED)
    assert await said(db) == [("PURCHASE_BLOCKED", "OPERATOR_HOLD"), ("PURCHASE_UNBLOCKED", "OPERATOR_HOLD")]


async def test_delivered_money_is_left_alone(db: Database, payment: UUID) -> None:
    async with db.transaction() as tx:
        await deliveries.close_deliveries(tx, [payment])
        await deliveries.block(tx, [Block(payment, Stage.PURCHASED, Reason.NO_TRAINER_AVAILABLE)])
        assert not await deliveries.hold(tx, payment, Stage.SCHEDULED, "too late")
    assert await said(db) == []
