"""Who gets whom within one batch, and what a purchase's time should be: pure rules."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest

from caravan.allocations.matching import Candidate, Need, Pick, assign, overlap
from caravan.bookings import Series

START = datetime(2026, 1, 9, 0, 30, tzinfo=UTC)
A, B, C = (UUID(int=n) for n in (1, 2, 3))


def daily(*, days: int = 0, minutes: int = 0, count: int = 10, length: int = 60) -> Series:
    first = START + timedelta(days=days, minutes=minutes)
    return Series(tuple(first + timedelta(days=n) for n in range(count)), length)


def need(number: int, series: Series, *candidates: Candidate, current: UUID | None = None, student: int = 0) -> Need:
    return Need(UUID(int=100 + number), UUID(int=200 + (student or number)), series, current, list(candidates))


def chosen(picks: list[Pick]) -> dict[int, UUID]:
    return {pick.need.purchase_id.int - 100: pick.candidate.trainer_id for pick in picks}


@pytest.mark.parametrize(
    ("other", "overlaps"),
    [
        (daily(), True),
        (daily(minutes=60), False),
        (daily(minutes=59), True),
        (daily(minutes=-60), False),
        (daily(minutes=-30, length=31), True),
        (daily(days=9, minutes=30), True),
        (daily(days=10), False),
        (daily(days=9, minutes=60), False),
        (daily(days=4, minutes=-90, count=1, length=300), True),
        (daily(minutes=720, count=9), False),
    ],
)
def test_overlap_is_exact_whatever_the_lengths(other: Series, overlaps: bool) -> None:
    assert overlap(daily(), other) is overlap(other, daily()) is overlaps


def test_the_least_loaded_then_the_nearest_then_the_lowest_id() -> None:
    loaded, near, far = Candidate(A, 11, 0.1), Candidate(C, 10, 1.0), Candidate(B, 10, 2.0)
    assert chosen(assign([need(1, daily(), loaded, far, near)], [])) == {1: C}
    assert chosen(assign([need(1, daily(), Candidate(B, 1, None), Candidate(A, 1, None))], [])) == {1: A}


def test_a_make_up_stays_with_its_trainer() -> None:
    assert chosen(assign([need(1, daily(), Candidate(A, 0, None), Candidate(B, 99, None), current=B)], [])) == {1: B}


def test_overlapping_needs_of_a_batch_get_different_trainers_in_their_order() -> None:
    both = (Candidate(A, 0, None), Candidate(B, 5, None))
    needs = [need(1, daily(), *both), need(2, daily(minutes=30), *both), need(3, daily(days=5), *both)]
    assert chosen(assign(needs, [])) == {1: A, 2: B}


def test_what_a_batch_gave_a_trainer_counts_as_load() -> None:
    both = (Candidate(A, 0, None), Candidate(B, 5, None))
    needs = [need(1, daily(), *both), need(2, daily(minutes=60), *both), need(3, daily(days=100), *both)]
    assert chosen(assign(needs, [])) == {1: A, 2: B, 3: A}


def test_what_is_booked_already_takes_time_and_a_student_has_one_place_at_a_time() -> None:
    first = need(1, daily(), Candidate(A, 0, None))
    given = assign([first], [])
    assert assign([need(2, daily(), Candidate(A, 0, None))], given) == []
    assert assign([need(2, daily(), Candidate(B, 0, None), student=1)], given) == []
    assert assign([need(2, daily())], []) == []
