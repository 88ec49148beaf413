"""A few trainers first, all of them where those don't do: both apply the same filters, and neither leaves anybody out
who could be served."""

from __future__ import annotations

import random
from collections.abc import Sequence
from datetime import UTC, date, datetime, time, timedelta
from typing import Any
from uuid import UUID

import pytest

from caravan.allocations import booking, search
from caravan.allocations.matching import Need
from caravan.allocations.operations import settle_allocations
from caravan.allocations.search import Asked, Reach, Search, search_trainers, shortlist_trainers
from caravan.bookings import Series
from caravan.db import Database, Tx
from caravan.deliveries import Reason
from caravan.ids import new_id
from caravan.people import trainers
from caravan.people.availability import Rule
from tests.builders import DELHI, a_course, a_purchase, a_student, a_trainer

ALL = Reach(1000, 1000)
NOON = time(12)


def daily(tx: Tx, days: int, hour: int, count: int = 10, minutes: int = 60, minute: int = 0) -> Series:
    first = tx.now.replace(hour=0, minute=0, second=0, microsecond=0) + timedelta(days=days, hours=hour, minutes=minute)
    return Series(tuple(first + timedelta(days=n) for n in range(count)), minutes)


async def a_market(tx: Tx, dice: random.Random, trainers_count: int = 40) -> UUID:
    """A course whose trainers differ in everything that is looked at; some have bookings, some are away for a while."""
    course = await a_course(tx)
    for number in range(trainers_count):
        opens = dice.choice([0, 6, 9, 13])
        rules = [
            Rule(weekday, time(opens), time((opens + 9) % 24, 30), date(2026, 1, 1), date(2099, 1, 1))
            for weekday in dice.choice([(1, 2, 3, 4, 5, 6, 7), (1, 3, 5), (6, 7)])
        ]
        one = await trainers.create_trainer(
            tx,
            name=f"T{number}",
            course_ids=[course],
            rules=rules,
            modes=dice.choice([("online",), ("online", "home"), ("home",)]),
            latitude=None if number % 9 == 0 else DELHI[0] + dice.uniform(-0.1, 0.1),
            longitude=None if number % 9 == 0 else DELHI[1] + dice.uniform(-0.1, 0.1),
            radius_km=dice.uniform(2, 15),
            timezone=dice.choice(["Asia/Kolkata", "Europe/Berlin", "America/New_York", "UTC"]),
        )
        if number % 7 == 0:
            await trainers.set_active(tx, one, False)
        if number % 4 == 0:
            away = tx.now + timedelta(days=dice.randrange(40), hours=dice.randrange(24))
            await trainers.set_absence(tx, one, away, away + timedelta(hours=dice.choice([2, 70])), None)
    booked: list[UUID] = []
    for _ in range(40):
        terms: dict[str, Any] = {"slot": time(dice.randrange(8, 20)), "starts_in_days": dice.randrange(2, 20)}
        booked.append(await a_purchase(tx, await a_student(tx), course, sessions=30, **terms))
    await settle_allocations(tx, booked)
    return course


async def some_needs(tx: Tx, dice: random.Random, course: UUID, count: int = 30) -> list[Asked]:
    return [
        Asked(
            Need(
                new_id(),
                await a_student(tx, location=(DELHI[0] + dice.uniform(-0.1, 0.1), DELHI[1] + dice.uniform(-0.1, 0.1))),
                daily(
                    tx,
                    dice.choice([dice.randrange(2, 30), dice.randrange(380)]),
                    dice.randrange(24),
                    dice.choice([1, 10, 40]),
                    dice.choice([30, 60, 90]),
                    dice.choice([0, 30, 45]),
                ),
                None,
            ),
            course,
            dice.choice(["online", "home", "center"]),
        )
        for _ in range(count)
    ]


def who(found: Sequence[Search]) -> list[set[tuple[UUID, int, float | None]]]:
    return [{(c.trainer_id, c.load, c.distance_km) for c in answer.candidates} for answer in found]


@pytest.mark.parametrize("seed", range(4))
async def test_a_shortlist_of_all_is_what_the_search_finds(db: Database, seed: int) -> None:
    dice = random.Random(seed)
    async with db.transaction() as tx:
        course = await a_market(tx, dice)
        needs = await some_needs(tx, dice, course)
        short, full = await shortlist_trainers(tx, needs, ALL), await search_trainers(tx, needs)
        assert who(short) == who(full)
        assert any(answer.candidates for answer in full)
        assert not all(answer.candidates for answer in full)
        for answer, everybody in zip(short, full, strict=True):
            assert answer.counts["free"] == everybody.counts["withinRadius"]
        assert any(answer.counts["free"] < answer.counts["open"] for answer in short)
        # A shorter one is a part of it, and the same whenever it is asked for.
        few = await shortlist_trainers(tx, needs, search.REACHES[0])
        assert all(some <= all_ for some, all_ in zip(who(few), who(full), strict=True))
        assert who(await shortlist_trainers(tx, needs, search.REACHES[0])) == who(few)


@pytest.mark.parametrize("seed", range(4))
async def test_the_week_tells_what_the_open_hours_tell(db: Database, seed: int) -> None:
    """What is kept small beside `open` gives the answer that `open` itself gives, for each trainer and series."""
    dice = random.Random(seed)
    async with db.transaction() as tx:
        course = await a_market(tx, dice)
        needs = await some_needs(tx, dice, course, 60)
        for asked in needs:
            series = asked.need.series
            exact = await tx.values(
                "select trainer_id from trainer_time where open @> (select range_agg(tstzrange(s, s + %(length)s))"
                " from unnest(%(starts)s::timestamptz[]) s)",
                {"starts": list(series.starts), "length": timedelta(minutes=series.minutes)},
            )
            quick = await tx.values(
                f"select h.trainer_id from trainer_time h, (select during, range_merge(during) as span, week from"
                f" (select range_agg(tstzrange(s, s + %(length)s)) as during"
                f" from unnest(%(starts)s::timestamptz[]) s) d,"
                f" (select range_agg(int4range(m, m + %(minutes)s)) as week from unnest(%(week)s::int[]) m) w) r"
                f" where {search.IS_OPEN}",
                {
                    "starts": list(series.starts),
                    "length": timedelta(minutes=series.minutes),
                    "minutes": series.minutes,
                    "week": sorted(search.minutes_of_week(series.starts)),
                },
            )
            assert set(quick) == set(exact)


def test_a_start_between_two_minutes_touches_both() -> None:
    assert search.minutes_of_week([datetime(1970, 1, 8, 0, 1, tzinfo=UTC)]) == {1}
    assert search.minutes_of_week([datetime(1970, 1, 7, 23, 59, 30, tzinfo=UTC)]) == {10_079, 0}


@pytest.mark.parametrize("mode", ["online", "home"])
async def test_whose_few_are_all_busy_is_served_by_the_one_who_is_left(
    db: Database, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(booking, "REACHES", (Reach(2, 4), Reach(4, 8)))
    async with db.transaction() as tx:
        course = await a_course(tx)
        everybody = {await a_trainer(tx, course) for _ in range(14)}
        purchases = [await a_purchase(tx, await a_student(tx), course) for _ in range(13)]
        settled = await settle_allocations(tx, purchases)
        assert len({outcome.trainer_id for outcome in settled.values()}) == 13
        [left] = everybody - {outcome.trainer_id for outcome in settled.values()}
        last = await a_purchase(tx, await a_student(tx), course, mode=mode)
        assert (await settle_allocations(tx, [last]))[last].trainer_id == left


async def test_the_nearest_come_first_for_lessons_at_home(db: Database) -> None:
    async with db.transaction() as tx:
        course = await a_course(tx)
        far = [await a_trainer(tx, course, location=(DELHI[0] + 0.05, DELHI[1] + n / 500)) for n in range(30)]
        near = [await a_trainer(tx, course, location=(DELHI[0], DELHI[1] + n / 500)) for n in range(1, 5)]
        purchase = await a_purchase(tx, await a_student(tx), course, mode="home")
        assert (await settle_allocations(tx, [purchase]))[purchase].trainer_id == near[0]
        decision = await tx.value("select decision from trainer_allocations")
        assert {c["trainerId"] for c in decision["candidates"]} == {str(trainer) for trainer in near}
        # Who moves is found where they are now; who has no place, nowhere.
        await trainers.set_place(tx, far[7], *DELHI, 10)
        await trainers.set_place(tx, near[0], None, None, 10)
        other = await a_purchase(tx, await a_student(tx), course, mode="home", slot=NOON)
        assert (await settle_allocations(tx, [other]))[other].trainer_id == far[7]


async def test_a_make_up_is_its_trainers_wherever_the_shortlist_begins(db: Database) -> None:
    async with db.transaction() as tx:
        course = await a_course(tx)
        taught = [await a_trainer(tx, course) for _ in range(40)]
        student = await a_student(tx)
        for current in taught[::8]:
            need = Need(new_id(), student, daily(tx, 5, 6), current)
            [found] = await shortlist_trainers(tx, [Asked(need, course, "online")], search.REACHES[0])
            assert found.counts == {"open": 4, "free": 4}
            assert current in {c.trainer_id for c in found.candidates}
            assert len({c.trainer_id for c in found.candidates}) == 4


async def test_a_batch_is_decided_the_same_again(db: Database) -> None:
    class Undo(Exception):
        pass

    async with db.transaction() as tx:
        course = await a_market(tx, random.Random(7))
        purchases = [
            await a_purchase(tx, await a_student(tx), course, slot=time(6 + n % 9), mode=("online", "home")[n % 2])
            for n in range(40)
        ]
    picked: list[dict[UUID, UUID | None]] = []
    for _ in range(3):
        try:
            async with db.transaction() as tx:
                settled = await settle_allocations(tx, purchases)
                picked.append({purchase: outcome.trainer_id for purchase, outcome in settled.items()})
                raise Undo
        except Undo:
            pass
    assert picked[0] == picked[1] == picked[2]
    assert set(picked[0].values()) - {None}


async def test_a_taken_student_costs_a_few_attempts_and_is_told(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    inserted: list[int] = []
    insert = booking.bookings.insert_bookings

    async def counted(tx: Tx, wishes: Sequence[Any]) -> set[UUID]:
        inserted.append(len(wishes))
        return await insert(tx, wishes)

    async with db.transaction() as tx:
        course = await a_course(tx)
        for _ in range(100):
            await a_trainer(tx, course)
        student = await a_student(tx)
        first = await a_purchase(tx, student, course)
        await settle_allocations(tx, [first])
        second = await a_purchase(tx, student, course, slot=time(6, 30))
        monkeypatch.setattr(booking.bookings, "insert_bookings", counted)
        outcome = (await settle_allocations(tx, [second]))[second]
        assert (outcome.reason, outcome.detail) == (Reason.STUDENT_CONFLICT, {"purchaseId": str(first)})
        assert len(inserted) <= search.REACHES[0].most
