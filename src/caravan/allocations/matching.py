"""Pure: who gets whom, within one batch. The database lists each need's best candidates; this hands them out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from uuid import UUID

import msgspec

from caravan.bookings import Series


class Candidate(msgspec.Struct, frozen=True):
    """A trainer who passes every filter. `load`: sessions booked around that time; distance only where it matters."""

    trainer_id: UUID
    load: int
    distance_km: float | None


@dataclass(slots=True)
class Need:
    """Sessions of one purchase that need a trainer: all of `series`, or none."""

    purchase_id: UUID
    student_id: UUID
    series: Series
    current_trainer: UUID | None
    """Who teaches the rest of this purchase already: goes before everybody else for a make-up."""
    candidates: list[Candidate] = field(default_factory=list[Candidate])
    """The best first, as the database saw them; those that were lost since are taken out."""


@dataclass(frozen=True, slots=True)
class Pick:
    need: Need
    candidate: Candidate


def assign(needs: Iterable[Need], given: Sequence[Pick]) -> list[Pick]:
    """A candidate for each need that has one left: in the order of `needs`, the one that was least loaded at its turn.

    `given` are the picks that are booked already: like those of this call they take time and add load. Nobody, trainer
    or student, is picked for two overlapping times. What is left out here needs to ask the database again.
    """
    diary = _Diary(given)
    picks: list[Pick] = []
    for need in needs:
        if not diary.is_free(need.student_id, need.series):
            continue
        for candidate in sorted(need.candidates, key=lambda c: rank(need, c, diary.load(c.trainer_id, need.series))):
            if diary.is_free(candidate.trainer_id, need.series):
                pick = Pick(need, candidate)
                diary.add(pick)
                picks.append(pick)
                break
    return picks


def rank(need: Need, candidate: Candidate, given: int = 0) -> tuple[bool, int, float, UUID]:
    """What candidates are sorted by, the best first; `given`: sessions beside those that the database knows of."""
    load = candidate.load + given
    return (candidate.trainer_id != need.current_trainer, load, candidate.distance_km or 0.0, candidate.trainer_id)


class _Diary:
    """Time that this batch has given away, by person."""

    def __init__(self, picks: Iterable[Pick]) -> None:
        self._taken: defaultdict[UUID, list[Series]] = defaultdict(list)
        for pick in picks:
            self.add(pick)

    def add(self, pick: Pick) -> None:
        self._taken[pick.need.student_id].append(pick.need.series)
        self._taken[pick.candidate.trainer_id].append(pick.need.series)

    def is_free(self, person: UUID, series: Series) -> bool:
        return not any(overlap(series, taken) for taken in self._taken.get(person, ()))

    def load(self, person: UUID, series: Series) -> int:
        """As the database counts it: all sessions of packages that touch the period."""
        return sum(len(t.starts) for t in self._taken.get(person, ()) if _spans_touch(series, t))


def overlap(one: Series, other: Series) -> bool:
    """Whether any two of their slots overlap; ends are exclusive, as in the database's ranges."""
    if not _spans_touch(one, other):
        return False
    my_length, their_length = timedelta(minutes=one.minutes), timedelta(minutes=other.minutes)
    mine, theirs = 0, 0
    while mine < len(one.starts) and theirs < len(other.starts):
        my_start, their_start = one.starts[mine], other.starts[theirs]
        if my_start + my_length <= their_start:
            mine += 1
        elif their_start + their_length <= my_start:
            theirs += 1
        else:
            return True
    return False


def _spans_touch(one: Series, other: Series) -> bool:
    return one.starts[0] < _last_end(other) and other.starts[0] < _last_end(one)


def _last_end(series: Series) -> datetime:
    return series.starts[-1] + timedelta(minutes=series.minutes)
