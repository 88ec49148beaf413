"""Settle what purchases are owed in trainers' time: find, book, trim, release. Each may run again at any time.

The worker, the reconciler, an operator's button and the command line all call `settle_allocations`. It looks at the
tables' present state under the purchases' locks, and does whatever is missing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from typing import Literal
from uuid import UUID

import structlog

from caravan import bookings, calendar, deliveries
from caravan.allocations import store
from caravan.allocations.matching import Need, Pick, assign
from caravan.allocations.plan import Plan, Slot, State, make_plan
from caravan.allocations.store import CANDIDATES_SHOWN, Decided, Search
from caravan.bookings import Series, Wish
from caravan.calendar import InvalidSchedule
from caravan.db import Tx
from caravan.deliveries import Block, Reason, Stage
from caravan.errors import Conflict, NotFound
from caravan.eventlog import outbox
from caravan.events import TrainerAllocated
from caravan.ids import new_id

log: structlog.stdlib.BoundLogger = structlog.get_logger()

NOTICE = timedelta(hours=12)
"""No session begins sooner than this from now, unless the installation says otherwise."""

APART = timedelta(hours=12)
"""No two sessions of a purchase begin sooner after one another, as the calendar has it."""

SEARCHES_MAX = 12
"""How often one pass asks for candidates anew, where others took all that it was given."""


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


Action = Literal["allocated", "waiting", "trimmed", "ended", "completed", "unchanged", "held"]


@dataclass(slots=True)
class Settled:
    """What became of one purchase. `allocation_id`, `trainer_id`: as they are now, None where there are none.

    `reason` and `detail`: why it waits, if it does.
    """

    action: Action
    allocation_id: UUID | None
    trainer_id: UUID | None
    reason: Reason | None = None
    detail: Mapping[str, object] | None = None


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a purchase must wait. `counts` as in Search; None where no trainers were looked for."""

    reason: Reason
    detail: dict[str, object]
    search: Search | None = None


@dataclass(slots=True)
class _Case:
    state: State
    plan: Plan
    outcome: Settled
    make_up: bool = False
    """The purchase keeps its allocation and trainer; what is wanted comes beside it, as a single booking."""


async def settle_allocations(
    tx: Tx, purchase_ids: Sequence[UUID], *, notice: timedelta = NOTICE, only: UUID | None = None
) -> dict[UUID, Settled]:
    """Give each purchase exactly the trainer's time that it is owed; what happened, by purchase.

    Ended purchases give their time back, refunded sessions and the time of trainers who left too. What is missing is
    booked in full with one trainer, or not at all; then the purchase waits with a reason. Purchases are served in the
    order of their waiting. `only` allows one trainer (an operator's choice).
    """
    await store.lock_purchases(tx, purchase_ids)
    states = await store.list_states(tx, purchase_ids)
    slots = await _slots(tx, [state for state in states if state.booked and not state.held])
    cases: list[_Case] = []
    settled: dict[UUID, Settled] = {}
    for state in states:
        outcome = Settled("held" if state.held else "unchanged", state.allocation_id, state.trainer_id)
        settled[state.purchase_id] = outcome
        if not state.held:
            cases.append(_Case(state, make_plan(state, slots.get(state.purchase_id, [])), outcome))
    await _give_back(tx, cases)
    await _book_wanted(tx, [case for case in cases if case.plan.wanted], notice, only)
    await _unblock(tx, [c.state for c in cases if (c.state.reason or c.plan.left) and c.outcome.reason is None])
    return settled


async def _slots(tx: Tx, states: Sequence[State]) -> dict[UUID, list[Slot]]:
    found: dict[UUID, list[Slot]] = {}
    if states:
        for slot in await store.list_slots(tx, [state.purchase_id for state in states]):
            found.setdefault(slot.purchase_id, []).append(slot)
    return found


async def _give_back(tx: Tx, cases: Sequence[_Case]) -> None:
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
    left = [case.state for case in cases if case.plan.left]
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
        return "approved"
    if plan.left and state.trainer_active is False:
        return "cancelled"
    return state.allocation_status


async def _book_wanted(tx: Tx, cases: Sequence[_Case], notice: timedelta, only: UUID | None) -> None:
    """Find a trainer for all that is wanted of each, or let it wait; an allocation row and a reason tell which."""
    if not cases:
        return
    refused: dict[UUID, Refusal] = {}
    needs = await _needs(tx, cases, notice, refused)
    booked, searches = await _book(tx, cases, needs, refused, only)
    decided = [_decide(tx, case, needs.get(case.state.purchase_id), booked, refused, searches) for case in cases]
    changed = await store.upsert_allocations(tx, decided)
    for case, decision in zip(cases, decided, strict=True):
        _conclude(case, decision, changed, refused)
    await deliveries.block(
        tx,
        [
            Block(case.state.payment_id, case.state.stage, case.outcome.reason, case.outcome.detail)
            for case in cases
            if case.outcome.reason
        ],
    )
    _announce(tx, [(case, decision) for case, decision in zip(cases, decided, strict=True) if decision.booking_id])


async def _needs(tx: Tx, cases: Sequence[_Case], notice: timedelta, refused: dict[UUID, Refusal]) -> dict[UUID, Need]:
    """When each case is to be held: the wanted number of its pattern's next slots."""
    holidays = await store.list_holidays(tx)
    needs: dict[UUID, Need] = {}
    for case in cases:
        state, plan = case.state, case.plan
        if state.learning_mode == "home" and not state.located:
            refused[state.purchase_id] = Refusal(Reason.STUDENT_LOCATION_MISSING, {})
            continue
        try:
            starts = _next_starts(state, plan, tx.now + notice, holidays)
        except InvalidSchedule as error:
            refused[state.purchase_id] = Refusal(Reason.INVALID_SCHEDULE, {"problem": error.detail})
            continue
        current = state.trainer_id if case.make_up else None
        series = Series(tuple(starts), state.minutes)
        needs[state.purchase_id] = Need(state.purchase_id, state.student_id, series, current)
    return needs


def _next_starts(state: State, plan: Plan, not_before: datetime, holidays: Collection[date]) -> list[datetime]:
    """The next slots of the pattern that are not beside one that is kept: a make-up of a series comes at its end."""
    # As within a series: a kept slot is in the way of two at most.
    count = min(calendar.MAX_SESSIONS, plan.wanted + 2 * len(plan.kept))
    starts = calendar.session_starts(state.pattern, state.start_date, count, not_before=not_before, holidays=holidays)
    free = [start for start in starts if all(abs(start - kept) >= APART for kept in plan.kept)]
    if len(free) < plan.wanted:
        raise InvalidSchedule(f"{plan.wanted} more sessions don't fit beside the {len(plan.kept)} that are booked.")
    return free[: plan.wanted]


async def _book(
    tx: Tx, cases: Sequence[_Case], needs: dict[UUID, Need], refused: dict[UUID, Refusal], only: UUID | None
) -> tuple[dict[UUID, tuple[Pick, UUID]], dict[UUID, Search]]:
    """Book what can be booked: pick and booking by purchase, and what the last search of each said.

    A lost race moves on to the next candidate; where all are lost, the search is asked again and knows better.
    """
    by_id = {case.state.purchase_id: case for case in cases}
    booked: dict[UUID, tuple[Pick, UUID]] = {}
    searches: dict[UUID, Search] = {}
    waiting = list(needs.values())
    for _ in range(SEARCHES_MAX):
        if not waiting:
            break
        asked = [(n, by_id[n.purchase_id].state.course_id, by_id[n.purchase_id].state.learning_mode) for n in waiting]
        for need, search in zip(waiting, await store.search_trainers(tx, asked, only=only), strict=True):
            searches[need.purchase_id] = search
            need.candidates = list(search.candidates)
            refusal = _refuse(by_id[need.purchase_id], search, only)
            if refusal:
                refused[need.purchase_id] = refusal
        waiting = [need for need in waiting if need.purchase_id not in refused]
        while picks := assign(waiting, [pick for pick, _ in booked.values()]):
            booked |= await _insert(tx, by_id, picks)
            waiting = [need for need in waiting if need.purchase_id not in booked]
    for need in waiting:
        search = searches[need.purchase_id]
        refused[need.purchase_id] = Refusal(Reason.NO_TRAINER_AVAILABLE, {"counts": search.counts}, search)
    return booked, searches


async def _insert(tx: Tx, by_id: dict[UUID, _Case], picks: Sequence[Pick]) -> dict[UUID, tuple[Pick, UUID]]:
    """Make the bookings; a pick that lost its race is taken off its need's candidates."""
    wishes = {
        pick.need.purchase_id: Wish(
            id=new_id(),
            kind="single" if by_id[pick.need.purchase_id].make_up else "package",
            purchase_id=pick.need.purchase_id,
            trainer_id=pick.candidate.trainer_id,
            student_id=pick.need.student_id,
            series=pick.need.series,
        )
        for pick in picks
    }
    won = await bookings.insert_bookings(tx, list(wishes.values()))
    for pick in picks:
        if wishes[pick.need.purchase_id].id not in won:
            pick.need.candidates.remove(pick.candidate)
    return {
        pick.need.purchase_id: (pick, wishes[pick.need.purchase_id].id)
        for pick in picks
        if wishes[pick.need.purchase_id].id in won
    }


def _refuse(case: _Case, search: Search, only: UUID | None) -> Refusal | None:
    if search.clashes:
        clash = str(search.clash) if search.clash else None
        return Refusal(Reason.STUDENT_CONFLICT, {"purchaseId": clash}, search)
    if search.candidates:
        return None
    counts = search.counts
    if only and counts["open"] and not counts["free"]:
        return Refusal(Reason.TRAINER_CONFLICT, {"counts": counts}, search)
    left = case.plan.left or case.state.reason == Reason.TRAINER_LEFT
    return Refusal(Reason.TRAINER_LEFT if left else Reason.NO_TRAINER_AVAILABLE, {"counts": counts}, search)


def _decide(
    tx: Tx,
    case: _Case,
    need: Need | None,
    booked: dict[UUID, tuple[Pick, UUID]],
    refused: dict[UUID, Refusal],
    searches: dict[UUID, Search],
) -> Decided:
    state = case.state
    search = searches.get(state.purchase_id)
    refusal = refused.get(state.purchase_id)
    pick, booking_id = booked.get(state.purchase_id, (None, None))
    decision: dict[str, object] = {"asOf": tx.now}
    if search:
        decision["counts"] = search.counts
        decision["candidates"] = [
            {
                "trainerId": c.trainer_id,
                "load": c.load,
                "distanceKm": None if c.distance_km is None else round(c.distance_km, 1),
            }
            for c in search.candidates[:CANDIDATES_SHOWN]
        ]
    decision["chosen"] = pick.candidate.trainer_id if pick else None
    if refusal:
        decision["reason"] = refusal.reason
    if need:
        decision["firstStartsAt"] = need.series.starts[0]
    return Decided(
        state=state,
        sessions=case.plan.wanted,
        trainer_id=pick.candidate.trainer_id if pick else None,
        booking_id=booking_id,
        metadata={
            "sessionCount": case.plan.wanted,
            "schedule": {"timeSlot": calendar.format_slot(state.slot_start), "date": state.start_date},
        },
        decision=decision,
    )


def _conclude(case: _Case, decision: Decided, changed: dict[UUID, UUID], refused: dict[UUID, Refusal]) -> None:
    outcome, purchase_id = case.outcome, case.state.purchase_id
    outcome.allocation_id = changed.get(purchase_id) or outcome.allocation_id
    if decision.trainer_id:
        outcome.action = "allocated"
        if not case.make_up:
            outcome.trainer_id = decision.trainer_id
    else:
        refusal = refused[purchase_id]
        outcome.action, outcome.reason, outcome.detail = "waiting", refusal.reason, refusal.detail


def _announce(tx: Tx, allocated: Sequence[tuple[_Case, Decided]]) -> None:
    if not allocated:
        return
    events: list[TrainerAllocated] = []
    for case, decision in allocated:
        assert case.outcome.allocation_id
        assert decision.booking_id
        assert decision.trainer_id
        events.append(
            TrainerAllocated(
                payment_id=case.state.payment_id,
                student_id=case.state.student_id,
                course_id=case.state.course_id,
                purchase_id=case.state.purchase_id,
                allocation_id=case.outcome.allocation_id,
                booking_id=decision.booking_id,
                trainer_id=decision.trainer_id,
                session_count=decision.sessions,
            )
        )
    outbox.append(tx, events)
    log.info("Allocation verified in database", count=len(allocated))


async def _unblock(tx: Tx, states: Sequence[State]) -> None:
    """What waited goes on; each is announced at the stage at which it waited."""
    for stage in Stage:
        await deliveries.unblock(tx, [state.payment_id for state in states if state.stage == stage], stage)


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
    await store.lock_purchases(tx, [found.purchase_id])
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
