"""Given, When, Then: a paid course is delivered, or waits with the right reason and goes on by itself."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest

from caravan.db import Database
from caravan.eventlog import outbox
from caravan.events import TrainerUpdated
from caravan.payments.refunds import refund_payment
from tests import builders
from tests.shop import Shop, open_shop

DELIVERED = [
    "PURCHASE_CONFIRMED",
    "PURCHASE_CREATED",
    "COURSE_ACCESS_GRANTED",
    "TRAINER_ALLOCATED",
    "SESSIONS_SCHEDULED",
]


@pytest.fixture
async def shop(db: Database) -> Shop:
    return await open_shop(db)


@pytest.mark.parametrize("sessions", [10, 20, 30])
async def test_a_paid_course_is_delivered_with_all_its_sessions(shop: Shop, sessions: int) -> None:
    payment = await shop.bought(sessions=sessions)
    assert (await shop.sees(payment))["stage"] == "paid"  # from the first second

    await shop.work()

    seen = await shop.sees(payment)
    assert (seen["stage"], seen["scheduled"], seen["owed"]) == ("scheduled", sessions, 0)
    assert seen["trainer_name"] == "Ravi"
    assert await shop.feed() == DELIVERED
    assert await shop.rows("select * from undelivered") == []
    assert await shop.violations() == []


async def test_every_event_names_its_payment_its_cause_and_its_trace(shop: Shop) -> None:
    payment = await shop.bought()
    await shop.work()
    events = await shop.rows("select event_id, type, correlation_id, causation_id, source from outbox order by id")
    assert {e["correlation_id"] for e in events} == {str(payment)}
    by_type = {e["type"]: e for e in events}
    assert by_type["PURCHASE_CREATED"]["causation_id"] == by_type["PURCHASE_CONFIRMED"]["event_id"]
    assert by_type["TRAINER_ALLOCATED"]["causation_id"] == by_type["PURCHASE_CREATED"]["event_id"]
    assert by_type["SESSIONS_SCHEDULED"]["causation_id"] == by_type["TRAINER_ALLOCATED"]["event_id"]
    assert [by_type[t]["source"] for t in ("PURCHASE_CONFIRMED", "PURCHASE_CREATED", "TRAINER_ALLOCATED")] == [
        "payment-service",
        "purchase-worker",
        "allocation-worker",
    ]


async def test_many_families_at_once_and_nobody_is_booked_twice(db: Database) -> None:
    shop = await open_shop(db, trainers=3)
    async with db.transaction() as tx:
        students = [await builders.a_student(tx) for _ in range(5)]
    payments = await asyncio.gather(*(shop.bought(student=student) for student in students))

    await shop.work()

    stages = [(await shop.sees(p, s))["stage"] for p, s in zip(payments, students, strict=True)]
    assert sorted(stages) == ["purchased"] * 2 + ["scheduled"] * 3
    waiting = [p for p, stage in zip(payments, stages, strict=True) if stage == "purchased"]
    assert {(await shop.why(p)).reason for p in waiting} == {"NO_TRAINER_AVAILABLE"}
    assert await shop.violations() == []


async def test_no_trainer_then_one_says_when_they_work_and_it_goes_on_by_itself(db: Database) -> None:
    shop = await open_shop(db, trainers=0)
    payment = await shop.bought()
    await shop.work()
    assert (await shop.why(payment)).reason == "NO_TRAINER_AVAILABLE"

    async with db.transaction("admin-service") as tx:
        trainer = await builders.a_trainer(tx, shop.course, open_days=None)
    await shop.work()
    assert (await shop.why(payment)).reason == "NO_TRAINER_AVAILABLE"  # unset availability means unavailable
    async with db.transaction("admin-service") as tx:
        await builders.open_time(tx, trainer, tx.now, tx.now + timedelta(days=200))
        outbox.append(tx, [TrainerUpdated(trainer_id=trainer, changed=("availability",))])
    await shop.work()

    assert (await shop.sees(payment))["stage"] == "scheduled"
    assert await shop.feed() == [
        *DELIVERED[:3],
        "PURCHASE_BLOCKED",
        "TRAINER_ALLOCATED",
        "PURCHASE_UNBLOCKED",
        "SESSIONS_SCHEDULED",
    ]


async def test_a_refund_ends_the_course_and_the_next_family_gets_the_trainer(db: Database) -> None:
    shop = await open_shop(db, trainers=1)
    first = await shop.bought()
    await shop.work()
    async with db.transaction() as tx:
        other = await builders.a_student(tx)
    second = await shop.bought(student=other)
    await shop.work()
    assert (await shop.why(second)).reason == "NO_TRAINER_AVAILABLE"

    async with db.transaction("admin-service") as tx:
        await refund_payment(tx, first, amount_cents=None, note="moved away", source="admin")
    await shop.work()

    assert (await shop.sees(first))["stage"] == "refunded"
    assert (await shop.sees(second, other))["stage"] == "scheduled"
    assert await shop.violations() == []


@pytest.mark.parametrize("worked", ["", "purchase-worker", "purchase-worker allocation-worker", "all"])
async def test_a_partial_refund_at_any_stage_takes_its_sessions_away(shop: Shop, worked: str) -> None:
    payment = await shop.bought(sessions=30)
    for service in worked.split():
        await shop.work(*([] if service == "all" else [service]))

    async with shop.db.transaction("admin-service") as tx:
        await refund_payment(tx, payment, amount_cents=120000, sessions=10, note="ten fewer", source="admin")
    await shop.work()

    seen = await shop.sees(payment)
    assert (seen["stage"], seen["scheduled"], seen["refunded"], seen["owed"]) == ("scheduled", 20, 10, 0)
    assert await shop.violations() == []


async def test_the_same_webhook_many_times_at_once_makes_one_course(shop: Shop) -> None:
    payment = await shop.buy()
    await asyncio.gather(*(shop.webhook(payment) for _ in range(8)))
    await shop.work()
    await shop.webhook(payment)
    await shop.work()
    assert len(await shop.rows("select * from student_course_purchases")) == 1
    assert await shop.feed() == DELIVERED
