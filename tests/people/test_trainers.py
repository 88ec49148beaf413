"""Trainers' operations: what is open after them, and what they say."""

from __future__ import annotations

from datetime import date, datetime, time, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest

from caravan.catalog import Tier
from caravan.catalog.courses import create_course
from caravan.db import Database, Tx
from caravan.people import trainers
from caravan.people.availability import HORIZON_DAYS, Rule
from caravan.people.students import IncompletePlace, UnknownZone

ALL_DAY = [Rule(weekday, time(6), time(22), date(2020, 1, 1), date(2099, 1, 1)) for weekday in range(1, 8)]


async def is_open(tx: Tx, trainer_id: UUID, when: datetime, minutes: int = 60) -> bool:
    return await tx.value(
        "select open @> tstzrange(%(a)s, %(b)s) from trainer_time where trainer_id = %(id)s",
        {"id": trainer_id, "a": when, "b": when + timedelta(minutes=minutes)},
    )


async def said(db: Database) -> list[list[str]]:
    async with db.transaction() as tx:
        rows: list[dict[str, Any]] = await tx.values(
            "select data from outbox where type = 'TRAINER_UPDATED' order by id"
        )
    return [row["changed"] for row in rows]


def noon(tx: Tx, days: int) -> datetime:
    """06:30 UTC, which is 12:00 in Kolkata, so many days from now."""
    return tx.now.replace(hour=6, minute=30, second=0, microsecond=0) + timedelta(days=days)


async def test_a_new_trainer_is_unavailable_until_told(db: Database) -> None:
    async with db.transaction() as tx:
        trainer = await trainers.create_trainer(tx, name="Ravi")
        assert not await is_open(tx, trainer, noon(tx, 3))
        assert await trainers.set_availability(tx, trainer, ALL_DAY)
        assert await is_open(tx, trainer, noon(tx, 3))
        assert not await is_open(tx, trainer, noon(tx, 3) + timedelta(hours=9, minutes=30))  # 21:30 to 22:30
        assert await is_open(tx, trainer, noon(tx, HORIZON_DAYS - 1))
        assert not await is_open(tx, trainer, noon(tx, HORIZON_DAYS + 2))
        assert not await trainers.set_availability(tx, trainer, list(reversed(ALL_DAY)))
        assert await trainers.set_availability(tx, trainer, [])
        assert not await is_open(tx, trainer, noon(tx, 3))
    assert await said(db) == [["trainer"], ["availability"], ["availability"]]


async def test_absences_are_taken_out(db: Database) -> None:
    async with db.transaction() as tx:
        trainer = await trainers.create_trainer(tx, name="Ravi", rules=ALL_DAY)
        await trainers.set_absence(tx, trainer, noon(tx, 3), noon(tx, 3) + timedelta(hours=1), "dentist")
        assert not await is_open(tx, trainer, noon(tx, 3))
        assert not await is_open(tx, trainer, noon(tx, 3) + timedelta(minutes=59), minutes=2)
        assert await is_open(tx, trainer, noon(tx, 3) + timedelta(hours=1))
        assert await is_open(tx, trainer, noon(tx, 4))
        assert [away.note for away in await trainers.list_absences(tx, trainer)] == ["dentist"]
        with pytest.raises(trainers.InvalidAbsence):
            await trainers.set_absence(tx, trainer, noon(tx, 3), noon(tx, 3), None)
        await trainers.set_availability(tx, trainer, ALL_DAY[:-1])
        assert not await is_open(tx, trainer, noon(tx, 3)), "new rules don't forget absences"
    assert await said(db) == [["trainer"], ["absences"], ["availability"]]


async def test_skills_place_and_leaving(db: Database) -> None:
    async with db.transaction() as tx:
        robotics = await create_course(tx, title="Robotics", category="STEM", session_minutes=60, tiers=[Tier(30, 1)])
        trainer = await trainers.create_trainer(tx, name="Ravi")
        assert await trainers.set_skills(tx, trainer, course_ids=[robotics, robotics], modes=["home", "online"])
        assert not await trainers.set_skills(tx, trainer, course_ids=[robotics], modes=["online", "home"])
        assert await trainers.set_place(tx, trainer, 28.6, 77.2, 5)
        assert not await trainers.set_place(tx, trainer, 28.6, 77.2, 5)
        assert await trainers.set_active(tx, trainer, False)
        kept = await trainers.get_trainer(tx, trainer)
        assert (kept.course_ids, set(kept.modes)) == ([robotics], {"home", "online"})
        assert (kept.latitude, kept.longitude, kept.radius_km, kept.active) == (28.6, 77.2, 5, False)
        with pytest.raises(trainers.UnknownCourse):
            await trainers.set_skills(tx, trainer, course_ids=[robotics, uuid4()])
        with pytest.raises(IncompletePlace):
            await trainers.set_place(tx, trainer, 28.6, None, 5)
        with pytest.raises(trainers.TrainerNotFound):
            await trainers.set_active(tx, uuid4(), False)
        with pytest.raises(UnknownZone):
            await trainers.create_trainer(tx, name="Ravi", timezone="../etc/passwd")
    assert await said(db) == [["trainer"], ["courses", "modes"], ["place"], ["active"]]


async def test_events_and_audit_hold_no_coordinates(db: Database) -> None:
    async with db.transaction() as tx:
        trainer = await trainers.create_trainer(tx, name="Ravi", latitude=28.6139, longitude=77.2090)
        await trainers.set_place(tx, trainer, 12.9716, 77.5946, 3)
    async with db.transaction() as tx:
        for text in await tx.values("select data::text from outbox"):
            assert "28.61" not in text
            assert "77." not in text


async def test_the_horizon_rolls_daily(db: Database) -> None:
    async with db.transaction() as tx:
        # 05:30 in Kolkata: 25 hours later it is the next day there, whatever the hour this test runs at
        tx.now = tx.now.replace(hour=0, minute=0, second=0, microsecond=0)
        ids = [await trainers.create_trainer(tx, name=f"T{n}", rules=ALL_DAY) for n in range(3)]
        assert await trainers.roll_time(tx) == 0
        beyond = noon(tx, HORIZON_DAYS + 1)
        tomorrow = tx.now + timedelta(hours=25)
    async with db.transaction() as tx:
        tx.now = tomorrow
        assert not await is_open(tx, ids[0], beyond)
        assert await trainers.roll_time(tx, limit=2) == 2
        assert await trainers.roll_time(tx, limit=2) == 1
        assert await trainers.roll_time(tx, limit=2) == 0
        assert await is_open(tx, ids[0], beyond)
    async with db.transaction() as tx:
        await tx.execute("delete from trainer_time")  # written by hand or restored: found again
        assert await trainers.roll_time(tx) == 3
