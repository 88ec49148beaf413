"""Sessions are what the bookings say; refunds, absences and trainers who leave change that, in any order."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import time, timedelta
from itertools import permutations
from typing import Any
from uuid import UUID

import pytest

import caravan.allocations.handlers as allocations
import caravan.purchases.handlers as purchases
import caravan.sessions.handlers as sessions
from caravan import deliveries
from caravan.allocations.operations import give_up_missed, settle_allocations
from caravan.db import Database, Tx
from caravan.deliveries import Stage
from caravan.events import (
    BookingReleased,
    PurchaseRefunded,
    SessionChanged,
    SessionsScheduled,
    TrainerAllocated,
    TrainerUpdated,
)
from caravan.sessions.operations import (
    NoSuchSession,
    Outcome,
    SessionCancelled,
    SessionNotBegun,
    SessionsAllCounted,
    mark_session,
    sync_sessions,
)
from tests.builders import a_course, a_purchase, a_refund, a_student, a_trainer

Handler = Callable[[Tx, Sequence[Any]], Awaitable[None]]


@dataclass
class Sold:
    payment: UUID
    purchase: UUID
    course: UUID
    trainer: UUID


async def sold(tx: Tx, *, sessions: int = 10, **terms: Any) -> Sold:
    """A purchase with a trainer who can take it, not booked yet."""
    course = await a_course(tx)
    trainer = await a_trainer(tx, course)
    purchase = await a_purchase(tx, await a_student(tx), course, sessions=sessions, **terms)
    payment = await tx.value("select payment_id from student_course_purchases where id = %(id)s", {"id": purchase})
    return Sold(payment, purchase, course, trainer)


async def delivered(tx: Tx, **terms: Any) -> Sold:
    made = await sold(tx, **terms)
    await settle_allocations(tx, [made.purchase])
    await sync_sessions(tx, [made.purchase])
    assert not await undelivered(tx, made)
    tx.outgoing.clear()
    return made


async def go_round(tx: Tx, made: Sold) -> None:
    """What the workers do when one of their events is heard, whichever it was."""
    await settle_allocations(tx, [made.purchase])
    await sync_sessions(tx, [made.purchase])


async def undelivered(tx: Tx, made: Sold) -> bool:
    return await tx.value("select exists (select from undelivered where payment_id = %(id)s)", {"id": made.payment})


async def statuses(tx: Tx, made: Sold) -> list[str]:
    return await tx.values(
        "select status from tutoring_sessions where purchase_id = %(id)s order by seq", {"id": made.purchase}
    )


async def pass_by(tx: Tx, made: Sold, count: int) -> None:
    """Days went by: the first `count` sessions and slots lie in the past now. (Time itself can't be moved.)"""
    shift = await tx.value(
        "select make_interval(days => -ceil(extract(epoch from starts_at - %(now)s) / 86400)::int)"
        " from tutoring_sessions where purchase_id = %(id)s and seq = %(count)s",
        {"id": made.purchase, "count": count, "now": tx.now},
    )
    row = {"id": made.purchase, "shift": shift}
    await tx.execute(
        "update tutoring_sessions set starts_at = starts_at + %(shift)s, ends_at = ends_at + %(shift)s"
        " where purchase_id = %(id)s",
        row,
    )
    await tx.execute("update student_course_purchases set start_date = start_date + %(shift)s where id = %(id)s", row)
    await tx.execute(
        "update bookings set starts = (select array_agg(s + %(shift)s order by s) from unnest(starts) s),"
        " during = (select range_agg(tstzrange(s + %(shift)s, s + %(shift)s + make_interval(mins => minutes)))"
        " from unnest(starts) s) where purchase_id = %(id)s",
        row,
    )


async def adds_up(tx: Tx, made: Sold) -> dict[str, Any]:
    """The purchase's own sum, and that sessions and bookings say the same."""
    row = await tx.one("select * from fulfilments where payment_id = %(id)s", {"id": made.payment})
    if row["stage"] != "refunded":
        parts = ("completed", "student_absent", "scheduled", "refunded", "owed")
        assert row["total"] == sum(row[part] for part in parts)
    differ = await tx.value(
        """select count(*) from (
             select booking_id, starts_at from tutoring_sessions where purchase_id = %(id)s and status = 'scheduled'
               and starts_at > %(now)s
           ) s full join (
             select b.id as booking_id, slot as starts_at from bookings b, unnest(b.starts) slot
             where b.purchase_id = %(id)s and b.live and slot > %(now)s
           ) b using (booking_id, starts_at) where s is null or b is null""",
        {"id": made.purchase, "now": tx.now},
    )
    assert differ == 0
    return row


def heard(tx: Tx, kind: type[Any]) -> list[Any]:
    return [event for event in tx.outgoing if isinstance(event, kind)]


@pytest.mark.parametrize("tier", [10, 20, 30])
async def test_booked_time_becomes_numbered_sessions_once(db: Database, tier: int) -> None:
    async with db.transaction() as tx:
        made = await sold(tx, sessions=tier)
        await settle_allocations(tx, [made.purchase])
        await sessions.schedule_sessions(tx, heard(tx, TrainerAllocated))
        rows = await tx.all("select * from tutoring_sessions order by seq")
        assert [row["seq"] for row in rows] == list(range(1, tier + 1))
        assert {row["trainer_id"] for row in rows} == {made.trainer}
        assert {row["ends_at"] - row["starts_at"] for row in rows} == {timedelta(hours=1)}
        assert [row["starts_at"] for row in rows] == await tx.value("select starts from bookings")
        (said,) = heard(tx, SessionsScheduled)
        assert (said.session_count, said.first_starts_at, said.last_ends_at) == (
            tier,
            rows[0]["starts_at"],
            rows[-1]["ends_at"],
        )
        assert not await undelivered(tx, made)
        again = await sync_sessions(tx, [made.purchase])
        assert (again.scheduled, again.cancelled, again.owed) == ({}, {}, {made.purchase: 0})
        assert len(heard(tx, SessionsScheduled)) == 1
        assert (await adds_up(tx, made))["stage"] == "scheduled"


async def test_a_batch_is_numbered_each_for_itself(db: Database) -> None:
    async with db.transaction() as tx:
        several = [await sold(tx, sessions=n) for n in (10, 20, 30)]
        waiting = await sold(tx, sessions=10)
        await tx.execute("update trainers set active = false where id = %(id)s", {"id": waiting.trainer})
        ids = [made.purchase for made in [*several, waiting]]
        await settle_allocations(tx, ids)
        done = await sync_sessions(tx, ids)
        assert done.scheduled == {made.purchase: n for made, n in zip(several, (10, 20, 30), strict=True)}
        assert done.owed[waiting.purchase] == 10
        assert await undelivered(tx, waiting)
        for made in several:
            await adds_up(tx, made)


async def test_a_held_purchase_gets_no_sessions_until_it_is_let_go(db: Database) -> None:
    async with db.transaction() as tx:
        made = await sold(tx)
        await settle_allocations(tx, [made.purchase])
        await deliveries.hold(tx, made.payment, Stage.ALLOCATED, "wait")
        assert (await sync_sessions(tx, [made.purchase])).held == {made.purchase}
        assert await statuses(tx, made) == []
        await deliveries.release_hold(tx, made.payment, Stage.ALLOCATED)
        assert (await sync_sessions(tx, [made.purchase])).scheduled == {made.purchase: 10}


# --- refunds, at each stage, whoever hears of them first ---

UNDOING: tuple[Handler, ...] = (purchases.apply_refunds, allocations.undo_refunded, sessions.schedule_sessions)
ORDERS = list(permutations(range(3)))


async def hear_everywhere(tx: Tx, event: PurchaseRefunded, order: Sequence[int]) -> None:
    """Each group hears of the refund in its turn; then what those said themselves is heard."""
    for index in order:
        await UNDOING[index](tx, [event])
    for said in list(tx.outgoing):
        if isinstance(said, BookingReleased | TrainerAllocated):
            await sessions.schedule_sessions(tx, [said])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("stage", ["purchased", "allocated", "scheduled"])
async def test_a_full_refund_ends_it_at_any_stage(db: Database, stage: str, order: Sequence[int]) -> None:
    async with db.transaction() as tx:
        made = await sold(tx)
        if stage != "purchased":
            await settle_allocations(tx, [made.purchase])
        if stage == "scheduled":
            await sync_sessions(tx, [made.purchase])
        event = await a_refund(tx, made.payment)
        for _ in range(2):
            await hear_everywhere(tx, event, order)
        row = await adds_up(tx, made)
        assert (row["stage"], row["owed"], row["scheduled"]) == ("refunded", 0, 0)
        assert await statuses(tx, made) == ["cancelled"] * (10 if stage == "scheduled" else 0)
        assert await tx.values("select live from bookings") == ([] if stage == "purchased" else [False])
        assert await tx.values("select status from trainer_allocations") == (
            [] if stage == "purchased" else ["cancelled"]
        )
        assert await tx.value("select not is_active from student_course_purchases")
        assert not await undelivered(tx, made)
        # Late news of earlier steps brings nothing back.
        await go_round(tx, made)
        assert await tx.value("select count(*) from bookings where live") == 0


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("stage", ["purchased", "allocated", "scheduled"])
async def test_a_partial_refund_takes_the_last_sessions_at_any_stage(
    db: Database, stage: str, order: Sequence[int]
) -> None:
    async with db.transaction() as tx:
        made = await sold(tx)
        if stage != "purchased":
            await settle_allocations(tx, [made.purchase])
        if stage == "scheduled":
            await sync_sessions(tx, [made.purchase])
        event = await a_refund(tx, made.payment, sessions=3)
        assert await tx.value("select refunded from fulfilments") == 3  # from the moment when it is said
        for _ in range(2):
            await hear_everywhere(tx, event, order)
        row = await adds_up(tx, made)
        assert (row["stage"], row["scheduled"], row["refunded"], row["owed"]) == ("scheduled", 7, 3, 0)
        assert await statuses(tx, made) == ["scheduled"] * 7 + ["cancelled"] * (3 if stage == "scheduled" else 0)
        assert not await undelivered(tx, made)


async def test_a_partial_refund_takes_the_named_sessions(db: Database) -> None:
    async with db.transaction() as tx:
        made = await delivered(tx)
        event = await a_refund(tx, made.payment, seqs=[2, 5])
        await hear_everywhere(tx, event, (0, 1, 2))
        found = await statuses(tx, made)
        assert [n for n, status in enumerate(found, start=1) if status == "cancelled"] == [2, 5]
        (changed,) = heard(tx, SessionChanged)
        assert (changed.seqs, changed.status) == ((2, 5), "cancelled")
        await hear_everywhere(tx, await a_refund(tx, made.payment, sessions=1), (0, 1, 2))
        found = await statuses(tx, made)
        assert [n for n, status in enumerate(found, start=1) if status == "cancelled"] == [2, 5, 10]
        assert (await adds_up(tx, made))["refunded"] == 3


async def test_everything_refunded_in_parts_ends_the_allocation(db: Database) -> None:
    async with db.transaction() as tx:
        made = await delivered(tx)
        await hear_everywhere(tx, await a_refund(tx, made.payment, sessions=10), (1, 0, 2))
        assert await statuses(tx, made) == ["cancelled"] * 10
        assert await tx.values("select status from trainer_allocations") == ["cancelled"]
        assert not await undelivered(tx, made)


async def test_a_full_refund_keeps_what_was_held(db: Database) -> None:
    async with db.transaction() as tx:
        made = await delivered(tx)
        await pass_by(tx, made, 4)
        await mark_session(tx, made.purchase, 1, "completed")
        await hear_everywhere(tx, await a_refund(tx, made.payment), (1, 2, 0))
        assert await statuses(tx, made) == ["completed"] + ["scheduled"] * 3 + ["cancelled"] * 6
        assert await tx.tuples("select live, cardinality(starts) from bookings") == [(True, 4)]


async def test_a_refund_takes_begun_sessions_only_where_named_or_nothing_else_is_left(db: Database) -> None:
    async with db.transaction() as tx:
        made = await delivered(tx)
        await pass_by(tx, made, 8)
        await mark_session(tx, made.purchase, 1, "completed")
        await hear_everywhere(tx, await a_refund(tx, made.payment, seqs=[3]), (0, 1, 2))
        await hear_everywhere(tx, await a_refund(tx, made.payment, sessions=3), (0, 1, 2))
        found = await statuses(tx, made)
        assert [n for n, status in enumerate(found, start=1) if status == "cancelled"] == [3, 8, 9, 10]
        assert (await adds_up(tx, made))["scheduled"] == 5
        with pytest.raises(SessionCancelled):
            await mark_session(tx, made.purchase, 3, "completed")


async def test_a_refunded_absence_cannot_become_held_later(db: Database) -> None:
    async with db.transaction() as tx:
        made = await delivered(tx)
        await pass_by(tx, made, 10)
        for seq in range(1, 10):
            await mark_session(tx, made.purchase, seq, "completed")
        await mark_session(tx, made.purchase, 10, "trainer_absent")
        await hear_everywhere(tx, await a_refund(tx, made.payment, sessions=1), (0, 1, 2))
    with pytest.raises(SessionsAllCounted):
        async with db.transaction() as tx:
            await mark_session(tx, made.purchase, 10, "completed")


async def test_a_rest_that_is_refunded_while_it_waits_waits_no_longer(db: Database) -> None:
    async with db.transaction() as tx:
        made = await delivered(tx)
        await pass_by(tx, made, 4)
        await leave(tx, made)
        assert await tx.value("select status from trainer_allocations order by id desc limit 1") == "waiting"
        await hear_everywhere(tx, await a_refund(tx, made.payment, sessions=6), (0, 1, 2))
        row = await adds_up(tx, made)
        assert (row["scheduled"], row["owed"], row["trainer_id"]) == (4, 0, made.trainer)
        assert not await undelivered(tx, made)
        assert await tx.values("select status from trainer_allocations order by id") == ["cancelled", "approved"]


# --- absences and make-ups ---


async def test_what_is_owed_after_the_end_goes_to_a_trainer_who_is_there(db: Database) -> None:
    """All was refunded but a session that turns out not to have been held, and its trainer has left since."""
    async with db.transaction() as tx:
        made = await delivered(tx)
        await pass_by(tx, made, 1)
        await mark_session(tx, made.purchase, 1, "student_absent")
        await hear_everywhere(tx, await a_refund(tx, made.payment, sessions=9), (0, 1, 2))
        await leave(tx, made)
        other = await a_trainer(tx, made.course)
        await mark_session(tx, made.purchase, 1, "trainer_absent")
        await go_round(tx, made)
        assert await tx.tuples("select trainer_id, status from trainer_allocations order by id") == [
            (made.trainer, "cancelled"),
            (other, "approved"),
        ]
        assert (await adds_up(tx, made))["owed"] == 0


async def test_a_trainers_absence_is_made_up_after_the_last_session(db: Database) -> None:
    async with db.transaction() as tx:
        made = await delivered(tx)
        await a_trainer(tx, made.course)  # less loaded, but a make-up stays with its trainer
        await pass_by(tx, made, 3)
        await mark_session(tx, made.purchase, 1, "completed")
        await mark_session(tx, made.purchase, 2, "student_absent")
        assert not await undelivered(tx, made)
        tx.outgoing.clear()
        for _ in range(2):
            await mark_session(tx, made.purchase, 3, "trainer_absent")
        (changed,) = heard(tx, SessionChanged)
        assert (changed.seqs, changed.status) == ((3,), "trainer_absent")
        assert await undelivered(tx, made)
        row = await tx.one("select * from fulfilments")
        assert (row["owed"], row["scheduled"]) == (1, 7)
        for _ in range(2):
            await allocations.settle_changed(tx, [changed])
            await sessions.schedule_sessions(tx, heard(tx, TrainerAllocated))
        assert await statuses(tx, made) == ["completed", "student_absent", "trainer_absent"] + ["scheduled"] * 8
        assert await tx.values("select kind from bookings order by created_at, id") == ["package", "single"]
        times = await tx.values("select starts_at from tutoring_sessions order by seq")
        assert times[10] > times[9]
        assert set(await tx.values("select trainer_id from tutoring_sessions")) == {made.trainer}
        assert await tx.values("select status from trainer_allocations") == ["approved"]
        assert not await undelivered(tx, made)
        await adds_up(tx, made)


async def test_a_make_up_that_nobody_can_take_waits_openly(db: Database) -> None:
    async with db.transaction() as tx:
        made = await delivered(tx)
        await pass_by(tx, made, 1)
        await tx.execute("update trainer_time set open = tstzmultirange(tstzrange(%(now)s, %(now)s))", {"now": tx.now})
        await mark_session(tx, made.purchase, 1, "trainer_absent")
        outcome = (await settle_allocations(tx, [made.purchase]))[made.purchase]
        assert (outcome.action, outcome.trainer_id) == ("waiting", made.trainer)
        assert await tx.tuples("select reason from undelivered") == [("NO_TRAINER_AVAILABLE",)]
        assert await tx.values("select status from trainer_allocations") == ["approved"]
        other = await a_trainer(tx, made.course)
        await allocations.resume_waiting(tx, [TrainerUpdated(trainer_id=other, changed=("courses",))])
        await sync_sessions(tx, [made.purchase])
        assert await tx.value("select trainer_id from tutoring_sessions where seq = 11") == other
        assert await tx.value("select trainer_id from trainer_allocations") == made.trainer  # still theirs
        assert not await undelivered(tx, made)


async def test_a_word_taken_back_takes_the_make_up_back(db: Database) -> None:
    async with db.transaction() as tx:
        made = await delivered(tx)
        await pass_by(tx, made, 1)
        await mark_session(tx, made.purchase, 1, "trainer_absent")
        await go_round(tx, made)
        await mark_session(tx, made.purchase, 1, "completed")
        await go_round(tx, made)
        assert await statuses(tx, made) == ["completed"] + ["scheduled"] * 9 + ["cancelled"]
        await adds_up(tx, made)


async def test_the_last_session_completes_the_allocation(db: Database) -> None:
    async with db.transaction() as tx:
        made = await delivered(tx)
        await pass_by(tx, made, 10)
        outcomes: list[Outcome] = ["completed"] * 9
        outcomes.append("student_absent")
        for seq, status in enumerate(outcomes, start=1):
            await mark_session(tx, made.purchase, seq, status)
            await allocations.settle_changed(tx, heard(tx, SessionChanged))
        assert await tx.values("select status from trainer_allocations") == ["completed"]
        assert (await adds_up(tx, made))["stage"] == "completed"
        await go_round(tx, made)
        assert await tx.values("select status from trainer_allocations") == ["completed"]


async def test_what_cannot_have_been_is_refused(db: Database) -> None:
    async with db.transaction() as tx:
        made = await delivered(tx)
        await pass_by(tx, made, 1)
        await tx.execute("update tutoring_sessions set status = 'cancelled' where seq = 3")
        with pytest.raises(SessionNotBegun):
            await mark_session(tx, made.purchase, 2, "completed")
        with pytest.raises(SessionCancelled):
            await mark_session(tx, made.purchase, 3, "completed")
        with pytest.raises(NoSuchSession):
            await mark_session(tx, made.purchase, 99, "completed")


# --- a trainer leaves ---


async def leave(tx: Tx, made: Sold) -> None:
    await tx.execute("update trainers set active = false where id = %(id)s", {"id": made.trainer})
    await allocations.resume_waiting(tx, [TrainerUpdated(trainer_id=made.trainer, changed=("active",))])
    await sync_sessions(tx, [made.purchase])


async def test_a_trainer_leaves_and_another_takes_the_rest_in_the_same_pass(db: Database) -> None:
    async with db.transaction() as tx:
        made = await delivered(tx, sessions=20)
        await pass_by(tx, made, 5)
        for seq in range(1, 6):
            await mark_session(tx, made.purchase, seq, "completed")
        other = await a_trainer(tx, made.course)
        tx.outgoing.clear()
        await leave(tx, made)
        assert await tx.tuples(
            "select trainer_id, status, (metadata -> 'sessionCount')::int from trainer_allocations order by id"
        ) == [(made.trainer, "cancelled", 20), (other, "approved", 15)]
        assert await statuses(tx, made) == ["completed"] * 5 + ["cancelled"] * 15 + ["scheduled"] * 15
        assert await tx.values("select kind from bookings where live order by id") == ["package", "package"]
        names = [event.type for event in tx.outgoing if event.type.startswith("PURCHASE_")]
        assert names == ["PURCHASE_BLOCKED", "PURCHASE_UNBLOCKED"]
        blocked = next(event for event in tx.outgoing if event.type == "PURCHASE_BLOCKED")
        assert (blocked.reason, blocked.stage) == ("TRAINER_LEFT", "scheduled")
        assert not await undelivered(tx, made)
        assert (await adds_up(tx, made))["scheduled"] == 15
        said = len(tx.outgoing)
        await leave(tx, made)
        assert len(tx.outgoing) == said


async def test_a_trainer_leaves_and_the_rest_waits_until_another_comes(db: Database) -> None:
    async with db.transaction() as tx:
        made = await delivered(tx)
        await pass_by(tx, made, 2)
        await leave(tx, made)
        assert await tx.tuples("select reason from undelivered") == [("TRAINER_LEFT",)]
        assert await tx.values("select status from trainer_allocations order by id") == ["cancelled", "waiting"]
        assert await statuses(tx, made) == ["scheduled"] * 2 + ["cancelled"] * 8
        row = await adds_up(tx, made)
        assert row["owed"] == 8
        other = await a_trainer(tx, made.course)
        await allocations.resume_waiting(tx, [TrainerUpdated(trainer_id=other, changed=("courses",))])
        await sync_sessions(tx, [made.purchase])
        assert await statuses(tx, made) == ["scheduled"] * 2 + ["cancelled"] * 8 + ["scheduled"] * 8
        assert not await undelivered(tx, made)
        await adds_up(tx, made)


async def test_a_substitute_who_leaves_does_not_end_the_allocation(db: Database) -> None:
    async with db.transaction() as tx:
        made = await delivered(tx)
        await pass_by(tx, made, 1)
        await tx.execute("update trainers set modes = '{center}' where id = %(id)s", {"id": made.trainer})
        substitute = await a_trainer(tx, made.course)
        await mark_session(tx, made.purchase, 1, "trainer_absent")
        await go_round(tx, made)
        await tx.execute("update trainers set modes = '{online}' where id = %(id)s", {"id": made.trainer})
        await leave(tx, Sold(made.payment, made.purchase, made.course, substitute))
        assert await tx.tuples("select trainer_id, status from trainer_allocations") == [(made.trainer, "approved")]
        assert (await statuses(tx, made))[10:] == ["cancelled", "scheduled"]
        assert await tx.value("select trainer_id from tutoring_sessions where seq = 12") == made.trainer
        assert not await undelivered(tx, made)


async def test_the_rest_goes_around_a_substitutes_session_not_behind_it(db: Database) -> None:
    async with db.transaction() as tx:
        made = await delivered(tx)
        await pass_by(tx, made, 1)
        await tx.execute("update trainers set modes = '{center}' where id = %(id)s", {"id": made.trainer})
        substitute = await a_trainer(tx, made.course)
        await mark_session(tx, made.purchase, 1, "trainer_absent")
        await go_round(tx, made)
        before = await tx.values(
            "select starts_at from tutoring_sessions where status = 'scheduled' order by starts_at"
        )
        await leave(tx, made)
        rows = await tx.tuples(
            "select starts_at, trainer_id from tutoring_sessions where status = 'scheduled' order by 1"
        )
        # By the hour at which this runs, the next slot may be too soon for another trainer.
        too_soon = sum(start < tx.now + timedelta(hours=12) for start in before)
        assert len(rows) == 10
        assert {trainer for _, trainer in rows} == {substitute}
        assert rows[0][0] <= before[1]  # the pattern's next slot, not the first after the make-up
        assert rows[-1][0] == before[-1] + timedelta(days=too_soon)
        await adds_up(tx, made)


async def test_slots_that_began_unnumbered_stay_owed_and_ask_for_another_start(db: Database) -> None:
    """The session worker was away for days: nobody was told of the first slots, so nobody came."""
    async with db.transaction() as tx:
        made = await delivered(tx)
        await pass_by(tx, made, 2)
        await tx.execute("delete from tutoring_sessions")
        await deliveries.open_deliveries(tx, [made.payment])
        assert (await sync_sessions(tx, [made.purchase])).owed == {made.purchase: 10}
        await go_round(tx, made)
        assert await statuses(tx, made) == []
        assert await tx.values("select reason from undelivered") == ["START_PASSED"]
        await give_up_missed(tx, made.purchase, everything=False)  # somebody agreed
        await go_round(tx, made)
        assert await statuses(tx, made) == ["scheduled"] * 10
        assert not await undelivered(tx, made)
        await adds_up(tx, made)


async def test_a_students_neighbouring_slots_are_no_clash(db: Database) -> None:
    async with db.transaction() as tx:
        made = await delivered(tx, slot=time(6))
        second = await a_purchase(tx, await tx.value("select id from students"), made.course, slot=time(7))
        assert (await settle_allocations(tx, [second]))[second].action == "allocated"
