"""Book what the cases of a pass need: candidates in SQL, `matching` decides, constraints have the last word."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from caravan import bookings
from caravan.allocations.case import Case, Refusal
from caravan.allocations.matching import Pick, assign
from caravan.allocations.search import REACHES, Asked, Reach, Search, search_trainers, shortlist_trainers
from caravan.bookings import Wish
from caravan.db import Tx
from caravan.deliveries import Reason
from caravan.ids import new_ids

SEARCHES_MAX = 12
"""How often one pass asks for everybody anew, where others took all that it was given."""


async def book(tx: Tx, cases: Sequence[Case], only: UUID | None) -> None:
    """Book what can be booked, and refuse the rest.

    Who has waited goes first, and is shown everybody: nobody who comes later takes the trainer that just became free.
    For the others a few trainers are looked at, more where those are not free, all where that does not do either.
    """
    everybody: list[Reach | None] = [None] * SEARCHES_MAX
    first = [case for case in cases if only or case.state.waits]
    others = [case for case in cases if not (only or case.state.waits)]
    await _book_group(tx, cases, first, everybody, only)
    await _book_group(tx, cases, others, [*REACHES, *everybody], only)


async def _book_group(
    tx: Tx, cases: Sequence[Case], group: Sequence[Case], reaches: Sequence[Reach | None], only: UUID | None
) -> None:
    """Book for a group of the cases. A lost race moves on to the next candidate; where all are lost, the search is
    asked again and knows better."""
    by_id = {case.state.purchase_id: case for case in group}
    for reach in reaches:
        # Students who are taken are found by losing, or before it gets dear to go on.
        if reach is not REACHES[0]:
            await _refuse_clashing(tx, [case for case in group if case.open and case.need])
        if not await _search(tx, [case for case in group if case.open], reach, only):
            return
        while picks := assign(
            [case.need for case in group if case.open and case.need],
            [case.pick for case in cases if case.booking_id and case.pick],
        ):
            await _insert(tx, [(by_id[pick.need.purchase_id], pick) for pick in picks])
    for case in group:
        if case.open and case.search:
            case.refusal = Refusal(Reason.NO_TRAINER_AVAILABLE, {"counts": case.search.counts})


async def _refuse_clashing(tx: Tx, cases: Sequence[Case]) -> None:
    """Students who have something else at that time wait, whoever could teach them."""
    if not cases:
        return
    clashes = await bookings.find_clashes(
        tx, [(case.state.student_id, case.need.series) for case in cases if case.need]
    )
    for place, purchase_id in clashes.items():
        detail: dict[str, object] = {"purchaseId": str(purchase_id) if purchase_id else None}
        cases[place].refusal = Refusal(Reason.STUDENT_CONFLICT, detail)


async def _search(tx: Tx, cases: Sequence[Case], reach: Reach | None, only: UUID | None) -> bool:
    """Ask for candidates as of now, of a few trainers or (no `reach`) of all; False if there is nobody to ask for."""
    asked = [Asked(case.need, case.state.course_id, case.state.learning_mode) for case in cases if case.need]
    if not asked:
        return False
    found = await (shortlist_trainers(tx, asked, reach) if reach else search_trainers(tx, asked, only=only))
    for case, search in zip(cases, found, strict=True):
        assert case.need
        case.search, case.need.candidates = search, list(search.candidates)
        if search.everybody and not search.candidates:
            case.refusal = _refuse(case, search, only)
    return True


def _refuse(case: Case, search: Search, only: UUID | None) -> Refusal:
    detail: dict[str, object] = {"counts": search.counts}
    if only and search.counts["open"] and not search.counts["free"]:
        return Refusal(Reason.TRAINER_CONFLICT, detail)
    left = case.plan.left or case.state.reason == Reason.TRAINER_LEFT
    return Refusal(Reason.TRAINER_LEFT if left else Reason.NO_TRAINER_AVAILABLE, detail)


async def _insert(tx: Tx, picked: Sequence[tuple[Case, Pick]]) -> None:
    """Make the bookings; a pick that lost its race is taken off its need's candidates."""
    wishes = [
        Wish(
            id=booking_id,
            kind="single" if case.make_up else "package",
            purchase_id=case.state.purchase_id,
            trainer_id=pick.candidate.trainer_id,
            student_id=case.state.student_id,
            series=pick.need.series,
        )
        for booking_id, (case, pick) in zip(new_ids(len(picked)), picked, strict=True)
    ]
    won = await bookings.insert_bookings(tx, wishes)
    for (case, pick), wish in zip(picked, wishes, strict=True):
        if wish.id in won:
            case.pick, case.booking_id = pick, wish.id
        else:
            pick.need.candidates.remove(pick.candidate)
