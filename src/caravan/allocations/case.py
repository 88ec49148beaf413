"""One purchase on its way through a pass of `settle_allocations`, and when its sessions are to be held. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Literal
from uuid import UUID

from caravan import calendar
from caravan.allocations.matching import Need, Pick
from caravan.allocations.plan import Plan, State
from caravan.allocations.search import Search
from caravan.bookings import Missed, Series
from caravan.calendar import InvalidSchedule
from caravan.deliveries import Reason
from caravan.web.formats import counted

APART = timedelta(hours=12)
"""No two sessions of a purchase begin sooner after one another, as the calendar has it."""

LONG_AGO = datetime(2000, 1, 1, tzinfo=UTC)

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
    reason: Reason
    detail: dict[str, object]


@dataclass(slots=True)
class Case:
    """One purchase on its way through a pass: what it is, what it should be, and what came of it."""

    state: State
    plan: Plan
    outcome: Settled
    missed: Missed | None = None
    make_up: bool = False
    """The purchase keeps its allocation and trainer; what is wanted comes beside it, as a single booking."""
    need: Need | None = None
    search: Search | None = None
    pick: Pick | None = None
    booking_id: UUID | None = None
    refusal: Refusal | None = None

    @property
    def open(self) -> bool:
        return self.refusal is None and self.booking_id is None


def say_when(case: Case, now: datetime, notice: timedelta, holidays: Collection[date]) -> None:
    """Say when the wanted sessions are to be held, or why that can't be said."""
    state = case.state
    if state.learning_mode == "home" and not state.located:
        case.refusal = Refusal(Reason.STUDENT_LOCATION_MISSING, {})
        return
    if case.missed and case.missed.next:
        case.refusal = Refusal(Reason.START_PASSED, case.missed.detail)
        return
    try:
        starts = _next_starts(state, case.plan, now + notice, holidays)
    except InvalidSchedule as error:
        case.refusal = Refusal(Reason.INVALID_SCHEDULE, {"problem": error.detail})
        return
    if _late_for(case, now, notice, holidays):
        proposed = calendar.local_date(starts[0], state.timezone)
        case.refusal = Refusal(Reason.START_PASSED, {"start": str(state.start_date), "next": str(proposed)})
        return
    current = state.trainer_id if case.make_up else None
    case.need = Need(state.purchase_id, state.student_id, Series(tuple(starts), state.minutes), current)


def _late_for(case: Case, now: datetime, notice: timedelta, holidays: Collection[date]) -> bool:
    """Whether the start that was chosen has passed because we were late: a pause, a hold, workers that were off.

    Who waits for something else (a trainer, a place) rolls on by the day, and so does money that came too late.
    """
    state = case.state
    if case.missed:
        return True
    if state.numbered or case.plan.kept or case.plan.left:
        return False
    kept = state.reason in (Reason.STAGE_PAUSED, Reason.START_PASSED)
    if state.waits and not kept:
        return False
    (chosen,) = calendar.session_starts(state.pattern, state.start_date, 1, not_before=LONG_AGO, holidays=holidays)
    return chosen < now + notice and (kept or chosen >= state.captured_at + notice)


def _next_starts(state: State, plan: Plan, not_before: datetime, holidays: Collection[date]) -> list[datetime]:
    """The next slots of the pattern that are not beside one that is kept: a make-up of a series comes at its end."""
    # As within a series: a kept slot is in the way of two at most.
    count = min(calendar.MAX_SESSIONS, plan.wanted + 2 * len(plan.kept))
    starts = calendar.session_starts(state.pattern, state.start_date, count, not_before=not_before, holidays=holidays)
    if not plan.kept:
        return starts
    free = [start for start in starts if all(abs(start - kept) >= APART for kept in plan.kept)]
    if len(free) < plan.wanted:
        more = counted(plan.wanted, "more session")
        raise InvalidSchedule(f"{more} can't be placed beside the {len(plan.kept)} that are booked.")
    return free[: plan.wanted]
