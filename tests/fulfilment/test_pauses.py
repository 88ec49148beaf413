"""A paused stage stands still for everybody, nothing is lost by it, and what waited goes on by itself."""

from __future__ import annotations

import asyncio
from datetime import date, timedelta
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import pytest

from caravan import pauses
from caravan.admin import money, placing, worst_day
from caravan.allocations.operations import AllocationRefused, settle_allocations
from caravan.apps.subscriptions import BY_GROUP
from caravan.db import Database
from caravan.deliveries import Stage
from caravan.fulfilment.reconciler import Reconciler
from caravan.pauses import AlreadyPaused, CityUnknown, NoSuchCourse, NotPaused, Scope
from caravan.people.trainers import set_absence, set_active
from caravan.student_views.wording import sentence
from caravan.web.audit import NoteRequired
from caravan.web.auth import Actor
from tests import builders
from tests.shop import PROVIDERS, SETTINGS, Shop, open_shop

ACTOR = Actor.system("ops@example.com")
NOTICE = timedelta(hours=12)
STAGES = list(pauses.PAUSABLE)


@pytest.fixture
async def shop(db: Database) -> Shop:
    return await open_shop(db, trainers=3)


async def pause(shop: Shop, stage: Stage, **scope: Any) -> None:
    async def work(tx: Any) -> None:
        await worst_day.pause(tx, ACTOR, Scope(stage, **scope), "the trainers' list is wrong")

    await shop.db.transact(work)
    assert await pauses.wait_for_begun(shop.db) == 0


async def resume(shop: Shop, stage: Stage, **scope: Any) -> None:
    async def work(tx: Any) -> None:
        await worst_day.resume(tx, ACTOR, Scope(stage, **scope), "mended")

    await shop.db.transact(work)


async def turn(shop: Shop) -> int:
    """What the reconciler does for what waited, at its next turn."""
    return (await Reconciler(shop.db, SETTINGS).run_once())["resumed"]


async def stage_of(shop: Shop, payment: UUID) -> tuple[str, str | None]:
    finding = await shop.why(payment)
    return finding.stage, finding.reason


async def repair(shop: Shop, payment: UUID) -> Any:
    async with shop.db.transaction() as tx:
        return await money.repair(tx, ACTOR, payment, "by hand", subscriptions=BY_GROUP, notice=NOTICE)


@pytest.mark.parametrize("stage", STAGES)
async def test_a_paused_stage_keeps_what_is_paid_for_and_lets_it_go_by_itself(shop: Shop, stage: Stage) -> None:
    await pause(shop, stage)
    payment = await shop.bought()  # checkout and payment are open
    await shop.work()
    assert await stage_of(shop, payment) == (stage, "STAGE_PAUSED")
    finding = await shop.why(payment)
    assert "the trainers' list is wrong" in " ".join(finding.evidence)
    assert finding.action is not None
    assert finding.action.name == "resume"
    async with shop.db.transaction(read_only=True) as tx:
        [standing] = await pauses.list_pauses(tx)
    assert (standing.waiting, standing.paused_by) == (1, "ops@example.com")

    # Neither repair nor the reconciler moves it, and nothing was given up.
    assert (await repair(shop, payment)).still_waits
    assert await turn(shop) == 0
    await shop.work()
    assert await stage_of(shop, payment) == (stage, "STAGE_PAUSED")
    assert await shop.rows("select 1 from dead_letters") == []
    assert await shop.violations() == []

    await resume(shop, stage)
    assert await turn(shop) == 1
    await shop.work()
    assert await stage_of(shop, payment) == ("scheduled", None)
    assert await shop.violations() == []
    assert await turn(shop) == 0
    said = await shop.feed()
    assert said.count("PURCHASE_BLOCKED") == said.count("PURCHASE_UNBLOCKED") + (stage is Stage.ALLOCATED)


async def test_a_family_reads_a_kind_sentence(shop: Shop) -> None:
    await pause(shop, Stage.PURCHASED)
    payment = await shop.bought()
    await shop.work()
    item = await shop.sees(payment)
    said = sentence(item, item["paid_at"])
    assert "goes on by itself" in said
    assert "trainers' list" not in said


async def test_a_paused_event_is_marked_only_with_its_effect_or_its_reason(shop: Shop) -> None:
    """The worker heard of it while it was paused: the reason is the effect, in the mark's own transaction."""
    await pause(shop, Stage.PAID)
    payment = await shop.bought()
    await shop.work("purchase-worker")
    [row] = await shop.rows(
        "select u.reason, (select count(*) from processed_events) as marks from undelivered u"
        " where payment_id = %(id)s",
        id=payment,
    )
    assert (row["reason"], row["marks"]) == ("STAGE_PAUSED", 1)


async def test_every_button_obeys(shop: Shop) -> None:
    await pause(shop, Stage.PURCHASED)
    payment = await shop.bought()
    await shop.work()
    purchase = (await shop.why(payment)).purchase_id
    async with shop.db.transaction() as tx:
        assigned = await placing.auto_assign(tx, ACTOR, purchase_id=purchase, notice=NOTICE)
        assert isinstance(assigned.refusal, AllocationRefused)
        assert assigned.refusal.problem_code == "STAGE_PAUSED"
    assert await shop.rows("select 1 from bookings") == []


async def test_a_scope_stops_nobody_else(shop: Shop) -> None:
    async with shop.db.transaction() as tx:
        other = await builders.a_course(tx, "Chess", tiers={30: 360000})
        await builders.a_trainer(tx, other)
        far = await builders.a_student(tx, "Vikram", location=(12.97, 77.59))
    await pause(shop, Stage.PURCHASED, course_id=other)
    await pause(shop, Stage.PURCHASED, city="delhi")
    here, there = await shop.bought(), await shop.bought(student=far, slot="8:00 AM")
    chess = Shop(shop.db, far, other, [])
    taught = await chess.bought(slot="5:00 PM")
    await shop.work()
    assert await stage_of(shop, here) == ("purchased", "STAGE_PAUSED")  # lives in Delhi
    assert await stage_of(shop, there) == ("scheduled", None)
    assert await stage_of(shop, taught) == ("purchased", "STAGE_PAUSED")  # the course
    await resume(shop, Stage.PURCHASED, city="Delhi")
    assert await turn(shop) == 1
    await shop.work()
    assert await stage_of(shop, here) == ("scheduled", None)
    assert await stage_of(shop, taught) == ("purchased", "STAGE_PAUSED")
    await resume(shop, Stage.PURCHASED, course_id=other)
    assert await turn(shop) == 1
    await shop.work()
    assert await stage_of(shop, taught) == ("scheduled", None)


async def test_one_pause_of_a_scope_and_its_own_end(shop: Shop) -> None:
    await pause(shop, Stage.PAID)
    with pytest.raises(AlreadyPaused):
        await pause(shop, Stage.PAID)
    with pytest.raises(NotPaused):
        await resume(shop, Stage.PAID, course_id=shop.course)
    with pytest.raises(CityUnknown, match="Gurugram"):
        await pause(shop, Stage.PAID, city="Atlantis")
    with pytest.raises(NoSuchCourse):
        await pause(shop, Stage.PAID, course_id=shop.student)
    with pytest.raises(NoteRequired):
        async with shop.db.transaction() as tx:
            await worst_day.pause(tx, ACTOR, Scope(Stage.PURCHASED), "  ")
    await resume(shop, Stage.PAID)
    told = await shop.rows("select action, actor, note, subject_id from audit_log order by at, id")
    assert [(row["action"], row["note"]) for row in told] == [
        ("pause", "the trainers' list is wrong"),
        ("resume", "mended"),
    ]


async def test_after_the_pause_nothing_of_its_scope_is_committed(shop: Shop) -> None:
    """An operation under way when the pause is committed: `wait_for_begun` waits for it."""
    payment = await shop.bought()
    await shop.work("purchase-worker")
    purchase = (await shop.why(payment)).purchase_id
    assert purchase is not None
    async with shop.db.transaction() as tx:
        await settle_allocations(tx, [purchase], notice=NOTICE)  # has looked, and is not committed
        await shop.db.transact(lambda other: worst_day.pause(other, ACTOR, Scope(Stage.PURCHASED), "stop"))
        waiting = asyncio.create_task(pauses.wait_for_begun(shop.db))
        done, _ = await asyncio.wait({waiting}, timeout=0.3)
        assert not done
        assert await pauses.wait_for_begun(shop.db, seconds=0.0) == 1  # who doesn't wait is told
    assert await waiting == 0
    assert len(await shop.rows("select 1 from bookings")) == 1


async def test_who_begins_after_the_pause_sees_it_however_long_it_waited_for_a_lock(shop: Shop) -> None:
    payment = await shop.bought()
    await shop.work("purchase-worker")
    purchase = (await shop.why(payment)).purchase_id
    assert purchase is not None

    async def settle() -> Any:
        async with shop.db.transaction() as tx:
            return (await settle_allocations(tx, [purchase], notice=NOTICE))[purchase].reason

    async with shop.db.transaction() as tx:
        await tx.execute("select id from payments where id = %(id)s for update", {"id": payment})
        settling = asyncio.create_task(settle())  # waits for the payment's lock
        await builders.somebody_waiting_for_a_lock(shop.db)
        await shop.db.transact(lambda other: worst_day.pause(other, ACTOR, Scope(Stage.PURCHASED), "stop"))
    assert str(await settling) == "STAGE_PAUSED"
    assert await pauses.wait_for_begun(shop.db) == 0
    assert await shop.rows("select 1 from bookings") == []


async def test_the_nearest_start_goes_first(db: Database) -> None:
    shop = await open_shop(db, trainers=1)
    await pause(shop, Stage.PURCHASED)
    paid: dict[int, UUID] = {}
    for days in (9, 5, 7):  # all want the only trainer at the same time
        async with db.transaction() as tx:
            student = await builders.a_student(tx, f"Student {days}")
            start = (tx.now + timedelta(days=days)).date()
        paid[days] = await shop.bought(student=student, start=start)
        await shop.work()
    await resume(shop, Stage.PURCHASED)
    assert await turn(shop) == 3
    await shop.work()
    assert [(await stage_of(shop, paid[days]))[0] for days in (5, 7, 9)] == ["scheduled", "purchased", "purchased"]


async def test_a_refund_ends_what_is_paused(shop: Shop) -> None:
    await pause(shop, Stage.ALLOCATED)
    payment = await shop.bought()
    await shop.work()
    async with shop.db.transaction() as tx:
        await money.refund(tx, ACTOR, payment, "by the family's wish", providers=PROVIDERS)
    await shop.work()
    assert (await stage_of(shop, payment))[0] == "refunded"
    assert await shop.rows("select 1 from bookings where live") == []
    assert await shop.rows("select 1 from undelivered") == []
    assert await shop.violations() == []
    await resume(shop, Stage.ALLOCATED)
    assert await turn(shop) == 0


# ------------------------------------------------------------------ a start that has passed


async def kept_past_its_start(shop: Shop) -> UUID:
    await pause(shop, Stage.PURCHASED)
    payment = await shop.bought()
    await shop.work()
    await shop.run(
        "update student_course_purchases set start_date = current_date - 2, created_at = created_at - interval '5 days'"
    )
    await shop.run("update payments set captured_at = captured_at - interval '5 days'")
    await resume(shop, Stage.PURCHASED)
    assert await turn(shop) == 1
    await shop.work()
    return payment


async def test_a_start_that_passed_meanwhile_is_asked_for_not_moved(shop: Shop) -> None:
    payment = await kept_past_its_start(shop)
    assert await stage_of(shop, payment) == ("purchased", "START_PASSED")
    finding = await shop.why(payment)
    assert finding.action is not None
    assert finding.action.name == "confirm-start"
    assert (await repair(shop, payment)).still_waits  # looking again moves nothing
    assert await shop.rows("select 1 from bookings") == []
    async with shop.db.transaction() as tx:
        await worst_day.confirm_start(tx, ACTOR, payment, "agreed on the telephone", notice=NOTICE)
    await shop.work()
    assert await stage_of(shop, payment) == ("scheduled", None)
    assert await shop.violations() == []


async def test_another_start_may_be_agreed(shop: Shop) -> None:
    payment = await kept_past_its_start(shop)
    chosen = date.today() + timedelta(days=10)
    async with shop.db.transaction() as tx:
        await worst_day.confirm_start(tx, ACTOR, payment, "agreed", start_date=chosen, notice=NOTICE)
    await shop.work()
    [row] = await shop.rows("select min(starts_at) as first from tutoring_sessions")
    assert abs((row["first"].date() - chosen).days) <= 1
    async with shop.db.transaction() as tx:
        with pytest.raises(worst_day.NoStartToConfirm):
            await worst_day.confirm_start(tx, ACTOR, payment, "again", notice=NOTICE)


async def test_workers_that_were_off_for_days_ask_too(shop: Shop) -> None:
    payment = await shop.bought()
    await shop.work("purchase-worker")
    await shop.run("update student_course_purchases set start_date = current_date - 2")
    await shop.run("update payments set captured_at = captured_at - interval '9 days'")
    await shop.work()
    assert await stage_of(shop, payment) == ("purchased", "START_PASSED")


async def kept_past_its_first_session(shop: Shop, days: int = 5) -> tuple[UUID, list[Any]]:
    """Trainer and time were booked; a pause of `allocated` lasted until the first of 10 sessions were over."""
    await pause(shop, Stage.ALLOCATED)
    payment = await shop.bought(sessions=10)
    await shop.work()
    assert await stage_of(shop, payment) == ("allocated", "STAGE_PAUSED")
    await shop.run(SHIFT_BOOKING, days=days)
    assert await shop.violations() == []
    booked = await shop.rows(BOOKED)
    await resume(shop, Stage.ALLOCATED)
    assert await turn(shop) == 1
    await shop.work()
    return payment, [row["slot"] for row in booked]


SHIFT_BOOKING = """
update bookings b set created_at = b.created_at - make_interval(days => %(days)s),
  starts = array(select s - make_interval(days => %(days)s) from unnest(b.starts) s order by s),
  during = (select range_agg(tstzrange(s - make_interval(days => %(days)s),
                                       s - make_interval(days => %(days)s) + make_interval(mins => b.minutes)))
            from unnest(b.starts) s)
"""
BOOKED = "select slot from bookings, unnest(starts) slot where live order by slot"
NUMBERED = "select seq, starts_at from tutoring_sessions order by seq"


async def test_booked_sessions_that_a_pause_outlasted_are_not_moved_to_the_end_in_silence(shop: Shop) -> None:
    payment, booked = await kept_past_its_first_session(shop)
    assert await stage_of(shop, payment) == ("allocated", "START_PASSED")
    assert await shop.rows(NUMBERED) == []
    assert [row["slot"] for row in await shop.rows(BOOKED)] == booked  # the time stays theirs meanwhile
    assert (await repair(shop, payment)).still_waits
    assert await turn(shop) == 0
    await shop.work()
    finding = await shop.why(payment)
    assert (finding.stage, finding.reason) == ("allocated", "START_PASSED")
    assert finding.action is not None
    assert finding.action.name == "confirm-start"
    assert await shop.violations() == []

    async with shop.db.transaction() as tx:
        now = tx.now
        await worst_day.confirm_start(tx, ACTOR, payment, "agreed on the telephone", notice=NOTICE)
    await shop.work()
    assert await stage_of(shop, payment) == ("scheduled", None)
    starts = [row["starts_at"] for row in await shop.rows(NUMBERED)]
    to_come = [slot for slot in booked if slot > now]
    assert 0 < len(to_come) < 10
    assert (len(starts), starts[: len(to_come)]) == (10, to_come)
    assert await shop.violations() == []


async def test_what_is_booked_goes_on_though_nobody_has_time_for_what_was_missed(shop: Shop) -> None:
    payment, booked = await kept_past_its_first_session(shop)
    async with shop.db.transaction() as tx:
        now = tx.now
        for trainer in shop.trainers:
            await set_absence(tx, trainer, booked[-1] + timedelta(hours=2), now + timedelta(days=380), None)
    async with shop.db.transaction() as tx:
        await worst_day.confirm_start(tx, ACTOR, payment, "agreed", notice=NOTICE)
    await shop.work()
    assert await stage_of(shop, payment) == ("scheduled", "NO_TRAINER_AVAILABLE")
    assert [row["starts_at"] for row in await shop.rows(NUMBERED)] == [slot for slot in booked if slot > now]
    assert await shop.violations() == []


async def test_of_booked_sessions_another_start_may_be_agreed_too(shop: Shop) -> None:
    payment, _ = await kept_past_its_first_session(shop)
    chosen = date.today() + timedelta(days=20)
    async with shop.db.transaction() as tx:
        await worst_day.confirm_start(tx, ACTOR, payment, "agreed", start_date=chosen, notice=NOTICE)
    await shop.work()
    assert await stage_of(shop, payment) == ("scheduled", None)
    starts = [row["starts_at"] for row in await shop.rows(NUMBERED)]
    assert (len(starts), abs((starts[0].date() - chosen).days) <= 1) == (10, True)
    assert len(await shop.rows(BOOKED)) == 10
    assert await shop.violations() == []


async def test_where_all_booked_sessions_are_over_the_next_possible_day_is_asked_for(shop: Shop) -> None:
    payment, _ = await kept_past_its_first_session(shop, days=60)
    assert await stage_of(shop, payment) == ("allocated", "START_PASSED")
    async with shop.db.transaction() as tx:
        await worst_day.confirm_start(tx, ACTOR, payment, "agreed", notice=NOTICE)
    await shop.work()
    assert await stage_of(shop, payment) == ("scheduled", None)
    assert len(await shop.rows(NUMBERED)) == 10
    assert await shop.violations() == []


async def test_the_question_stays_where_the_trainer_leaves_meanwhile(shop: Shop) -> None:
    payment, booked = await kept_past_its_first_session(shop)
    [trainer] = await shop.rows("select trainer_id as id from bookings")
    async with shop.db.transaction() as tx:
        await set_active(tx, trainer["id"], False)
    await shop.work()
    assert await stage_of(shop, payment) == ("purchased", "START_PASSED")
    assert await shop.rows(NUMBERED) == []
    assert await shop.violations() == []
    async with shop.db.transaction() as tx:
        now = tx.now
        await worst_day.confirm_start(tx, ACTOR, payment, "agreed", notice=NOTICE)
    await shop.work()
    assert await stage_of(shop, payment) == ("scheduled", None)
    assert len(await shop.rows(NUMBERED)) == 10
    assert await shop.rows("select 1 from bookings where live and trainer_id = %(id)s", id=trainer["id"]) == []
    assert min(row["slot"] for row in await shop.rows(BOOKED)) > max(now, booked[0])
    assert await shop.violations() == []


async def test_who_is_given_back_what_was_missed_goes_on_as_it_is_booked(shop: Shop) -> None:
    payment, booked = await kept_past_its_first_session(shop)
    async with shop.db.transaction() as tx:
        to_come = [slot for slot in booked if slot > tx.now]
        missed = len(booked) - len(to_come)
        cents = 1000 * missed
        await money.refund(tx, ACTOR, payment, "missed", amount_cents=cents, sessions=missed, providers=PROVIDERS)
    await shop.work()
    assert await stage_of(shop, payment) == ("scheduled", None)
    assert [row["starts_at"] for row in await shop.rows(NUMBERED)] == to_come
    assert await shop.violations() == []


async def test_the_day_that_is_proposed_is_one_to_come(shop: Shop) -> None:
    payment, booked = await kept_past_its_first_session(shop)
    await shop.run("update undelivered set detail = jsonb_build_object('next', current_date - 1)")  # days ago
    await Reconciler(shop.db, SETTINGS).run_once()
    finding = await shop.why(payment)
    assert finding.action is not None
    async with shop.db.transaction(read_only=True) as tx:
        to_come = next(slot for slot in booked if slot > tx.now)
    assert finding.action.label == f"Begin on {to_come.astimezone(ZoneInfo('Asia/Kolkata')).date()}"


async def test_a_session_worker_that_was_off_past_the_start_asks_too(shop: Shop) -> None:
    payment = await shop.bought(sessions=10)
    await shop.work("purchase-worker", "allocation-worker")
    await shop.run(SHIFT_BOOKING, days=5)
    await shop.work()
    assert await stage_of(shop, payment) == ("allocated", "START_PASSED")
    assert await shop.rows(NUMBERED) == []


async def test_who_asks_for_a_pause_again_hears_of_it_when_it_holds(shop: Shop) -> None:
    await pause(shop, Stage.PURCHASED)
    async with shop.db.transaction() as tx:
        await tx.execute("create temporary table under_way (id int) on commit drop")  # a transaction with a number

        async def again(other: Any) -> pauses.Pause:
            return await worst_day.pause(other, ACTOR, Scope(Stage.PURCHASED), "again")

        asking = asyncio.create_task(pauses.take_hold(shop.db, shop.db.transact(again)))
        done, _ = await asyncio.wait({asking}, timeout=0.3)
        assert not done
    with pytest.raises(AlreadyPaused):
        await asking
