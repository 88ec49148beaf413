"""Settle what purchases are owed in trainers' time: find, book, trim, release. Each may run again at any time.

The worker, the reconciler, an operator's button and the command line all call `settle_allocations`. It looks at the
tables' present state under the purchases' locks, and does whatever is missing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date, timedelta
from uuid import UUID

import structlog

from caravan import bookings, calendar, deliveries, pauses
from caravan.allocations import store
from caravan.allocations.booking import book
from caravan.allocations.case import Case, Settled, say_when
from caravan.allocations.matching import rank
from caravan.allocations.plan import Plan, Slot, State, make_plan
from caravan.allocations.search import CANDIDATES_SHOWN
from caravan.allocations.store import Decided
from caravan.catalog import list_holidays
from caravan.db import Tx
from caravan.deliveries import Block, Reason, Stage
from caravan.errors import Conflict, NotFound
from caravan.eventlog import outbox
from caravan.events import TrainerAllocated
from caravan.pauses import Kept

log: structlog.stdlib.BoundLogger = structlog.get_logger()

NOTICE = timedelta(hours=12)
"""No session begins sooner than this from now, unless the installation says otherwise."""


class NoSuchAllocation(NotFound):
    """There is no such allocation."""

    code = "ALLOCATION_NOT_FOUND"


class AllocationNotWaiting(Conflict):
    """The allocation is not waiting for a trainer, so it stays as it is."""

    code = "ALLOCATION_NOT_WAITING"


class AllocationRefused(Conflict):
    """The allocation has to wait on; the code says why."""

    def __init__(self, reason: Reason, detail: Mapping[str, object] | None = None) -> None:
        super().__init__(f"No trainer was booked: {reason}.", extra=detail)
        self.reason = reason

    @property
    def problem_code(self) -> str:
        return str(self.reason)


async def settle_allocations(
    tx: Tx, purchase_ids: Sequence[UUID], *, notice: timedelta = NOTICE, only: UUID | None = None
) -> dict[UUID, Settled]:
    """Give each purchase exactly the trainer's time that it is owed; what happened, by purchase.

    Ended purchases give their time back, refunded sessions and the time of trainers who left too. What is missing is
    booked in full with one trainer, or not at all; then the purchase waits with a reason. The nearest start is served
    first. Where operators have paused this, time is given back and none is taken. `only` allows one trainer (an
    operator's choice).
    """
    await bookings.lock_purchases(tx, purchase_ids)
    states = await store.list_states(tx, purchase_ids)
    slots = await _slots(tx, [state for state in states if state.booked and not state.held])
    cases: list[Case] = []
    settled: dict[UUID, Settled] = {}
    for state in states:
        outcome = Settled("held" if state.held else "unchanged", state.allocation_id, state.trainer_id)
        settled[state.purchase_id] = outcome
        if not state.held:
            cases.append(Case(state, make_plan(state, slots.get(state.purchase_id, [])), outcome))
    await _give_back(tx, cases)
    await _keep_paused(tx, [case for case in cases if case.plan.wanted and case.state.pause_id])
    await _book_wanted(tx, [case for case in cases if case.plan.wanted and not case.state.pause_id], notice, only)
    await _unblock(tx, [c.state for c in cases if (c.state.reason or c.plan.left) and c.outcome.reason is None])
    return settled


async def _slots(tx: Tx, states: Sequence[State]) -> dict[UUID, list[Slot]]:
    found: dict[UUID, list[Slot]] = {}
    if states:
        for slot in await store.list_slots(tx, [state.purchase_id for state in states]):
            found.setdefault(slot.purchase_id, []).append(slot)
    return found


async def _give_back(tx: Tx, cases: Sequence[Case]) -> None:
    """Release time, end the allocations that have nothing to come, and say openly that a trainer left."""
    await bookings.release_slots(
        tx, [(slot.booking_id, slot.starts_at) for case in cases for slot in case.plan.give_back]
    )
    statuses: dict[UUID, str] = {}
    for case in cases:
        state, plan, outcome = case.state, case.plan, case.outcome
        if plan.give_back:
            outcome.action = "trimmed"
        if state.allocation_id is None:
            continue
        status = _next_status(state, plan)
        case.make_up = status == "approved"
        if status is None or status == state.allocation_status:
            continue
        statuses[state.allocation_id] = status
        if status == "cancelled":
            outcome.allocation_id = outcome.trainer_id = None
        if plan.over or not state.active:
            outcome.action = "completed" if status == "completed" else "ended"
    await store.mark_allocations(tx, statuses)
    await store.hand_over(
        tx,
        [
            case.state.purchase_id
            for case in cases
            if case.state.allocation_status == "waiting" and not case.plan.wanted and not case.plan.over
        ],
    )
    left = [case.state for case in cases if case.plan.left and not case.state.pause_id]
    await deliveries.open_deliveries(
        tx, [case.state.payment_id for case in cases if case.plan.wanted and not case.state.registered]
    )
    await deliveries.block(tx, [Block(state.payment_id, state.stage, Reason.TRAINER_LEFT) for state in left])


def _next_status(state: State, plan: Plan) -> str | None:
    """What the allocation's status has to be, before anything is booked."""
    if not state.active:
        # Work that was done stays done, also when the money goes back later.
        return "completed" if state.allocation_status == "completed" else "cancelled"
    if plan.over:
        return "completed" if state.done else "cancelled"
    if state.allocation_status == "completed":
        # More is owed after all. Its trainer goes on, unless they left or nothing of theirs is booked any more.
        return "approved" if state.trainer_active and state.allocation_booked else "cancelled"
    if plan.left and state.trainer_active is False:
        return "cancelled"
    return state.allocation_status


async def _keep_paused(tx: Tx, cases: Sequence[Case]) -> None:
    """Operators have stopped the taking of time: it waits, and nothing is decided about it."""
    kept: list[Kept] = []
    for case in cases:
        state, outcome = case.state, case.outcome
        assert state.pause_id
        outcome.action, outcome.reason = "waiting", Reason.STAGE_PAUSED
        kept.append(Kept(state.payment_id, state.stage, state.pause_id))
    await pauses.keep(tx, Stage.PURCHASED, kept)


async def _book_wanted(tx: Tx, cases: Sequence[Case], notice: timedelta, only: UUID | None) -> None:
    """Find a trainer for all that is wanted of each, or let it wait; an allocation row and a reason tell which."""
    if not cases:
        return
    holidays = await list_holidays(tx)
    # What is booked and was never numbered: a make-up of it, or another's time, would move the start in silence.
    missed = await bookings.list_missed(
        tx, [case.state.purchase_id for case in cases if case.state.booked and not case.state.numbered]
    )
    for case in cases:
        case.missed = missed.get(case.state.purchase_id)
        say_when(case, tx.now, notice, holidays)
    await book(tx, cases, only)
    decided = [case for case in cases if not (case.refusal and case.refusal.reason is Reason.START_PASSED)]
    changed = await store.upsert_allocations(tx, [_decide(tx, case) for case in decided])
    blocks: list[Block] = []
    for case in cases:
        state, outcome = case.state, case.outcome
        outcome.allocation_id = changed.get(state.purchase_id) or outcome.allocation_id
        if case.refusal:
            outcome.action, outcome.reason, outcome.detail = "waiting", case.refusal.reason, case.refusal.detail
            blocks.append(Block(state.payment_id, state.stage, case.refusal.reason, case.refusal.detail))
        elif case.pick:
            outcome.action = "allocated"
            outcome.trainer_id = outcome.trainer_id if case.make_up else case.pick.candidate.trainer_id
    await deliveries.block(tx, blocks)
    _announce(tx, [case for case in cases if case.booking_id])


def _decide(tx: Tx, case: Case) -> Decided:
    """The allocation as it is to be, with why: who was looked at and the best of them."""
    state, need = case.state, case.need
    trainer_id = case.pick.candidate.trainer_id if case.pick else None
    decision: dict[str, object] = {"asOf": tx.now, "chosen": trainer_id}
    if case.search and need:
        decision["counts" if case.search.everybody else "shortlist"] = case.search.counts
        best = sorted(case.search.candidates, key=lambda candidate: rank(need, candidate))
        decision["candidates"] = [
            {
                "trainerId": candidate.trainer_id,
                "load": candidate.load,
                "distanceKm": None if candidate.distance_km is None else round(candidate.distance_km, 1),
            }
            for candidate in best[:CANDIDATES_SHOWN]
        ]
    if need:
        decision["firstStartsAt"] = need.series.starts[0]
    if case.refusal:
        decision["reason"] = case.refusal.reason
    return Decided(
        state=state,
        trainer_id=trainer_id,
        booking_id=case.booking_id,
        metadata={
            "sessionCount": case.plan.wanted,
            "schedule": {"timeSlot": calendar.format_slot(state.slot_start), "date": state.start_date},
        },
        decision=decision,
    )


def _announce(tx: Tx, cases: Sequence[Case]) -> None:
    events: list[TrainerAllocated] = []
    for case in cases:
        assert case.pick
        assert case.booking_id
        assert case.outcome.allocation_id
        events.append(
            TrainerAllocated(
                payment_id=case.state.payment_id,
                student_id=case.state.student_id,
                course_id=case.state.course_id,
                purchase_id=case.state.purchase_id,
                allocation_id=case.outcome.allocation_id,
                booking_id=case.booking_id,
                trainer_id=case.pick.candidate.trainer_id,
                session_count=case.plan.wanted,
            )
        )
    outbox.append(tx, events)
    if events:
        log.info("Allocation verified in database", count=len(events))


async def _unblock(tx: Tx, states: Sequence[State]) -> None:
    """What waited goes on; each is announced at the stage at which it waited."""
    for stage in Stage:
        await deliveries.unblock(tx, [state.payment_id for state in states if state.stage == stage], stage)


async def give_up_missed(tx: Tx, purchase_id: UUID, *, everything: bool) -> date | None:
    """Give back the booked time of a purchase whose start was missed, and say on which day the rest of it begins.

    With `everything`, or where nothing is left, its trainer too: None, and another start can be chosen, as where
    nothing was booked. The caller settles the allocation next.
    """
    await bookings.lock_purchases(tx, [purchase_id])
    missed = (await bookings.list_missed(tx, [purchase_id])).get(purchase_id)
    if missed is None:
        return None
    if missed.next and not everything:
        await bookings.release_booked(tx, purchase_id, until=tx.now)
        return missed.next
    (state,) = await store.list_states(tx, [purchase_id])
    await bookings.release_booked(tx, purchase_id)
    if state.allocation_id:
        await store.mark_allocations(tx, {state.allocation_id: "cancelled"})
    return None


async def next_start(tx: Tx, purchase_id: UUID, *, notice: timedelta = NOTICE) -> date:
    """The date (in its zone) on which a purchase could begin now, if nobody chooses another. Raises InvalidSchedule."""
    (state,) = await store.list_states(tx, [purchase_id])
    holidays = await list_holidays(tx)
    (begins,) = calendar.session_starts(
        state.pattern, state.start_date, 1, not_before=tx.now + notice, holidays=holidays
    )
    return calendar.local_date(begins, state.timezone)


async def approve(
    tx: Tx, allocation_id: UUID, trainer_id: UUID | None = None, *, notice: timedelta = NOTICE
) -> Settled:
    """Give a waiting allocation a trainer now: this one, or the best. The same filters hold for everybody.

    Raises AllocationRefused with the reason (the caller's transaction must not go on), NoSuchAllocation,
    AllocationNotWaiting; asking again for what is so already changes nothing.
    """
    found = await store.find_allocation(tx, allocation_id)
    if found is None:
        raise NoSuchAllocation
    await bookings.lock_purchases(tx, [found.purchase_id])
    found = await store.find_allocation(tx, allocation_id)
    if found is None:
        raise NoSuchAllocation
    if found.status == "approved" and trainer_id in (None, found.trainer_id):
        return Settled("unchanged", found.id, found.trainer_id)
    if found.status != "waiting":
        raise AllocationNotWaiting
    outcome = (await settle_allocations(tx, [found.purchase_id], notice=notice, only=trainer_id))[found.purchase_id]
    if outcome.action == "held":
        raise AllocationRefused(Reason.OPERATOR_HOLD)
    if outcome.reason:
        raise AllocationRefused(outcome.reason, outcome.detail)
    return outcome
