"""The one safe step: it does what the worker would have done, says so, and moves no money that an operator holds."""

from __future__ import annotations

from datetime import timedelta

import pytest

from caravan.apps.subscriptions import BY_GROUP, SUBSCRIPTIONS
from caravan.db import Database
from caravan.eventlog.dead_letters import DeadLetterUnreadable
from caravan.eventlog.drain import drain
from caravan.fulfilment.bulk import Done
from caravan.fulfilment.diagnose import diagnose
from caravan.fulfilment.invariants import check
from caravan.fulfilment.repair import OperatorMustDecide, PaymentNotFound, Repaired, repair, replay
from caravan.ids import new_id
from tests.fulfilment import world
from tests.fulfilment.test_diagnose import some_sessions_gone
from tests.fulfilment.world import Road


async def repaired(db: Database, road: Road) -> Repaired:
    async with db.transaction("admin-service") as tx:
        return await repair(tx, road.payment_id, by="ops@example.com", note="by hand", subscriptions=BY_GROUP)


async def a_free_trainer(db: Database, road: Road) -> None:
    """The road's trainer teaches its course, online, at any time."""
    async with db.transaction() as tx:
        await tx.execute(
            "insert into trainer_courses (trainer_id, course_id) values (%(trainer_id)s, %(course_id)s)", road.__dict__
        )
        await tx.execute(
            """insert into trainer_time (trainer_id, open, computed_at)
               values (%(trainer_id)s, tstzmultirange(tstzrange(now(), now() + interval '1 year')), now())
               on conflict (trainer_id) do update set open = excluded.open""",
            road.__dict__,
        )


async def violations(db: Database) -> list[str]:
    async with db.transaction(read_only=True) as tx:
        return [str(violation) for violation in await check(tx, world.BY_HAND, leeway=timedelta(0))]


async def test_each_press_does_one_step_until_it_is_delivered(db: Database) -> None:
    road = await world.a_payment(db)
    await a_free_trainer(db, road)
    first = await repaired(db, road)
    assert (first.stage_before, first.stage, first.reason_before) == ("paid", "purchased", "EVENT_MISSING")
    assert first.did.startswith("Created purchase")
    second = await repaired(db, road)
    assert (second.stage_before, second.stage) == ("purchased", "allocated")
    assert str(road.trainer_id) in second.did
    third = await repaired(db, road)
    assert (third.stage_before, third.stage) == ("allocated", "scheduled")
    assert "3 scheduled" in third.did
    fourth = await repaired(db, road)
    assert (fourth.step, fourth.stage) == (None, "scheduled")
    assert fourth.did == "Delivered: nothing to do."
    assert await violations(db) == []
    await drain(db, SUBSCRIPTIONS)
    assert await violations(db) == []


async def test_a_dry_run_names_nothing_that_will_not_exist(db: Database) -> None:
    road = await world.a_payment(db)
    await a_free_trainer(db, road)
    said: list[str] = []
    for _step in range(3):
        async with db.transaction("admin-service") as tx:
            await tx.execute("savepoint before")
            would = await repair(tx, road.payment_id, by="ops", note=None, subscriptions=BY_GROUP, dry_run=True)
            await tx.execute("rollback to savepoint before")
            tx.outgoing.clear()
        said.append(would.did)
        before = await repaired(db, road)
        assert (would.step, would.stage) == (before.step, before.stage)
        assert would.purchase_id in (None, before.purchase_id)
    assert said == [
        "Would create the purchase.",
        f"Would allocate a trainer: now it would be Ravi ({road.trainer_id}).",
        "Would create the missing sessions: 3 would be scheduled.",
    ]


async def test_after_one_press_the_workers_go_on(db: Database) -> None:
    road = await world.a_payment(db)
    await a_free_trainer(db, road)
    await repaired(db, road)
    await drain(db, SUBSCRIPTIONS)
    assert (await repaired(db, road)).stage == "scheduled"


async def test_what_has_to_wait_says_so(db: Database) -> None:
    road = await world.a_payment(db)
    await repaired(db, road)
    looked = await repaired(db, road)
    assert (looked.stage, looked.reason) == ("purchased", "NO_TRAINER_AVAILABLE")
    assert looked.did == "Looked again: it still waits, because no trainer is free for all of its sessions."
    assert looked.still_waits


@pytest.mark.parametrize("reason", ["OPERATOR_HOLD", "AMOUNT_MISMATCH", "PAID_TWICE"])
async def test_an_operators_decision_is_not_repaired(db: Database, reason: str) -> None:
    road = await world.a_payment(db, reason=reason)
    with pytest.raises(OperatorMustDecide) as refused:
        await repaired(db, road)
    assert refused.value.problem_code == reason


async def test_sessions_that_vanished_after_delivery_come_back(db: Database) -> None:
    road = await world.a_payment(db)
    await world.purchased(db, road)
    await world.allocated(db, road)
    await world.scheduled(db, road)
    async with db.transaction() as tx:
        await tx.execute("delete from tutoring_sessions")
    done = await repaired(db, road)
    assert (done.stage_before, done.reason_before, done.stage) == ("allocated", "SESSIONS_MISSING", "scheduled")
    assert await violations(db) == []


async def test_what_cannot_be_read_is_not_replayed_but_done_from_the_tables(db: Database) -> None:
    road = await world.a_payment(db)
    event_id = await world.said(db, road, "PURCHASE_CONFIRMED")
    letter_id = await world.parked(db, road, "PURCHASE_CONFIRMED", event_id, code="MALFORMED")
    async with db.transaction(read_only=True) as tx:
        (finding,) = await diagnose(tx, payment_id=road.payment_id)
    assert finding.reason == "IN_DEAD_LETTERS"
    assert finding.action is not None
    assert (finding.action.name, finding.action.label) == ("repair", "Create the purchase")
    assert "discarded by hand" in (finding.action.hint or "")
    async with db.transaction("admin-service") as tx:
        with pytest.raises(DeadLetterUnreadable) as refused:
            await replay(tx, letter_id, BY_GROUP, by="ops@example.com", note="by hand")
    for words in ("discard it", f"caravan diagnose --payment {road.payment_id}", "caravan repair --payment"):
        assert words in refused.value.detail
    done = await repaired(db, road)
    assert (done.step, done.stage) == ("create_purchase", "purchased")


async def test_delivered_but_registered_is_taken_off(db: Database) -> None:
    road = await world.a_payment(db)
    await world.purchased(db, road)
    await world.allocated(db, road)
    await world.scheduled(db, road, close=False)
    done = await repaired(db, road)
    assert (done.reason_before, done.reason) == ("NOT_REGISTERED", None)
    assert await violations(db) == []


async def test_no_such_payment(db: Database) -> None:
    async with db.transaction() as tx:
        with pytest.raises(PaymentNotFound):
            await repair(tx, new_id(), by="ops", note=None, subscriptions=BY_GROUP)


async def test_some_sessions_that_vanished_come_back(db: Database) -> None:
    road = await some_sessions_gone(db)
    done = await repaired(db, road)
    assert (done.step, done.did) == ("make_up", "Booked the owed sessions: 3 scheduled.")
    assert await violations(db) == []


def test_a_bulk_repair_that_found_nothing_does_not_say_that_all_is_delivered() -> None:
    """What has just moved on is given seconds; a step further may lie ahead of it, with no worker to take it."""
    assert "has just moved on" in Done(chosen=0).sentence
    assert "look again" in Done(chosen=0).sentence
