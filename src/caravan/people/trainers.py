"""Trainers: what they teach, where, when. Every operation here says TRAINER_UPDATED with what it changed.

trainer_time.open is the answer to "may this trainer be booked then?": rules minus absences, computed at each change
and rolled forward daily (`roll_time`), because it ends where our knowledge ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from psycopg import errors as pg

from caravan import calendar
from caravan.db import Tx
from caravan.errors import Conflict, Invalid, NotFound
from caravan.eventlog import outbox
from caravan.events import TrainerUpdated
from caravan.ids import new_id
from caravan.people.availability import Rule, open_ranges
from caravan.people.students import ZONE, IncompletePlace, check_zone

ROLL_AFTER = timedelta(hours=24)


@dataclass(frozen=True, slots=True)
class Absence:
    id: UUID
    starts_at: datetime
    ends_at: datetime
    note: str | None


@dataclass(frozen=True, slots=True)
class Trainer:
    """Coordinates in degrees, both or none; `radius_km` is how far they travel."""

    id: UUID
    account_id: UUID | None
    name: str
    active: bool
    timezone: str
    latitude: float | None
    longitude: float | None
    radius_km: float
    modes: list[str]
    course_ids: list[UUID]


class TrainerNotFound(NotFound):
    """There is no such trainer."""


class UnknownCourse(Invalid):
    """One of these courses does not exist."""

    code = "UNKNOWN_COURSE"


class AccountHasTrainer(Conflict):
    """This account is another trainer's already."""

    code = "ACCOUNT_HAS_TRAINER"


class InvalidAbsence(Invalid):
    """An absence ends after it begins."""

    code = "INVALID_ABSENCE"


# Trainers with what they teach: those given, or a page of all by id.
LIST_TRAINERS = """
select t.id, t.account_id, t.name, t.active, t.timezone, t.latitude, t.longitude, t.radius_km, t.modes,
       array(select c.course_id from trainer_courses c where c.trainer_id = t.id order by c.course_id) as course_ids
from trainers t
where (%(trainer_ids)b::uuid[] is null or t.id = any(%(trainer_ids)b::uuid[]))
  and (%(after)s::uuid is null or t.id > %(after)s)
order by t.id limit %(limit)s
"""


async def list_trainers(tx: Tx, *, after: UUID | None = None, limit: int = 100) -> list[Trainer]:
    """A page, by id; the next begins `after` the last one's."""
    return await tx.all(LIST_TRAINERS, {"trainer_ids": None, "after": after, "limit": limit}, into=Trainer)


async def get_trainer(tx: Tx, trainer_id: UUID) -> Trainer:
    """Raises TrainerNotFound."""
    trainer = await tx.find(LIST_TRAINERS, {"trainer_ids": [trainer_id], "after": None, "limit": 1}, into=Trainer)
    if trainer is None:
        raise TrainerNotFound
    return trainer


LIST_RULES = """
select weekday, from_time, until_time, valid_from, valid_until from trainer_availability
where trainer_id = %(trainer_id)s order by weekday, from_time, valid_from
"""
LIST_ABSENCES = """
select id, lower(during) as starts_at, upper(during) as ends_at, note from trainer_absences
where trainer_id = %(trainer_id)s and upper(during) > %(now)s order by during
"""


async def list_rules(tx: Tx, trainer_id: UUID) -> list[Rule]:
    return await tx.all(LIST_RULES, {"trainer_id": trainer_id}, into=Rule)


async def list_absences(tx: Tx, trainer_id: UUID) -> list[Absence]:
    """Those that are not over."""
    return await tx.all(LIST_ABSENCES, {"trainer_id": trainer_id, "now": tx.now}, into=Absence)


INSERT_TRAINER = """
insert into trainers (id, account_id, name, timezone, latitude, longitude, radius_km, modes, created_at, updated_at)
values (%(id)s, %(account_id)s, %(name)s, %(timezone)s, %(latitude)s, %(longitude)s, %(radius_km)s, %(modes)s::text[],
        %(now)s, %(now)s)
"""


async def create_trainer(
    tx: Tx,
    *,
    name: str,
    course_ids: Sequence[UUID] = (),
    rules: Sequence[Rule] = (),
    modes: Sequence[str] = ("online",),
    latitude: float | None = None,
    longitude: float | None = None,
    radius_km: float = 10,
    timezone: str = ZONE,
    account_id: UUID | None = None,
    trainer_id: UUID | None = None,
) -> UUID:
    """A new trainer; without rules never available. Raises UnknownZone, IncompletePlace, UnknownCourse,
    AccountHasTrainer."""
    check_zone(timezone)
    if (latitude is None) != (longitude is None):
        raise IncompletePlace
    trainer_id = trainer_id or new_id()
    try:
        async with tx.savepoint():
            await tx.execute(
                INSERT_TRAINER,
                {
                    "id": trainer_id,
                    "account_id": account_id,
                    "name": name,
                    "timezone": timezone,
                    "latitude": latitude,
                    "longitude": longitude,
                    "radius_km": radius_km,
                    "modes": list(modes),
                    "now": tx.now,
                },
            )
    except pg.UniqueViolation as error:
        if error.diag.constraint_name != "trainers_account_id_key":
            raise
        raise AccountHasTrainer from None
    await _replace_courses(tx, trainer_id, course_ids)
    await _replace_rules(tx, trainer_id, rules)
    await recompute_time(tx, [trainer_id])
    _say(tx, trainer_id, "trainer")
    return trainer_id


# --- changes: each locks the trainer first, so that two of them follow one another ---

LOCK_TRAINERS = """
select id, timezone from trainers where id = any(%(trainer_ids)b::uuid[]) order by id for update
"""
TOUCH_TRAINER = "update trainers set updated_at = %(now)s where id = %(trainer_id)s"


async def lock_trainer(tx: Tx, trainer_id: UUID) -> Trainer:
    """The trainer, locked until the transaction ends. Raises TrainerNotFound."""
    await tx.execute(LOCK_TRAINERS, {"trainer_ids": [trainer_id]})
    return await get_trainer(tx, trainer_id)


def _say(tx: Tx, trainer_id: UUID, *changed: str) -> None:
    outbox.append(tx, [TrainerUpdated(trainer_id=trainer_id, changed=changed)])


RENAME_TRAINER = "update trainers set name = %(name)s, updated_at = %(now)s where id = %(trainer_id)s"


async def set_name(tx: Tx, trainer_id: UUID, name: str) -> bool:
    """False where it was so already. Raises TrainerNotFound, as all of these."""
    if (await lock_trainer(tx, trainer_id)).name == name:
        return False
    await tx.execute(RENAME_TRAINER, {"trainer_id": trainer_id, "name": name, "now": tx.now})
    _say(tx, trainer_id, "name")
    return True


ACTIVATE_TRAINER = "update trainers set active = %(active)s, updated_at = %(now)s where id = %(trainer_id)s"


async def set_active(tx: Tx, trainer_id: UUID, active: bool) -> bool:
    """An inactive trainer gets nothing new, and loses what is to come (whoever hears it sees to that)."""
    if (await lock_trainer(tx, trainer_id)).active == active:
        return False
    await tx.execute(ACTIVATE_TRAINER, {"trainer_id": trainer_id, "active": active, "now": tx.now})
    _say(tx, trainer_id, "active")
    return True


PLACE_TRAINER = """
update trainers set latitude = %(latitude)s, longitude = %(longitude)s, radius_km = %(radius_km)s, updated_at = %(now)s
where id = %(trainer_id)s
"""


async def set_place(
    tx: Tx, trainer_id: UUID, latitude: float | None, longitude: float | None, radius_km: float
) -> bool:
    """Where they set out from and how far they go. Raises IncompletePlace."""
    if (latitude is None) != (longitude is None):
        raise IncompletePlace
    old = await lock_trainer(tx, trainer_id)
    if (old.latitude, old.longitude, old.radius_km) == (latitude, longitude, radius_km):
        return False
    await tx.execute(
        PLACE_TRAINER,
        {
            "trainer_id": trainer_id,
            "latitude": latitude,
            "longitude": longitude,
            "radius_km": radius_km,
            "now": tx.now,
        },
    )
    _say(tx, trainer_id, "place")
    return True


SET_MODES = "update trainers set modes = %(modes)s::text[], updated_at = %(now)s where id = %(trainer_id)s"


async def set_skills(
    tx: Tx, trainer_id: UUID, *, course_ids: Sequence[UUID] | None = None, modes: Sequence[str] | None = None
) -> bool:
    """What they teach, and in which modes; None leaves it. Raises UnknownCourse."""
    old = await lock_trainer(tx, trainer_id)
    changed: list[str] = []
    if course_ids is not None and set(course_ids) != set(old.course_ids):
        await _replace_courses(tx, trainer_id, course_ids)
        changed.append("courses")
    if modes is not None and set(modes) != set(old.modes):
        await tx.execute(SET_MODES, {"trainer_id": trainer_id, "modes": sorted(set(modes)), "now": tx.now})
        changed.append("modes")
    if changed:
        _say(tx, trainer_id, *changed)
    return bool(changed)


DELETE_TRAINER_COURSES = "delete from trainer_courses where trainer_id = %(trainer_id)s"
INSERT_TRAINER_COURSES = """
insert into trainer_courses (trainer_id, course_id)
select distinct %(trainer_id)s::uuid, c from unnest(%(course_ids)b::uuid[]) c
"""


async def _replace_courses(tx: Tx, trainer_id: UUID, course_ids: Sequence[UUID]) -> None:
    await tx.execute(DELETE_TRAINER_COURSES, {"trainer_id": trainer_id})
    try:
        async with tx.savepoint():
            await tx.execute(INSERT_TRAINER_COURSES, {"trainer_id": trainer_id, "course_ids": list(course_ids)})
    except pg.ForeignKeyViolation:
        raise UnknownCourse from None


async def set_availability(tx: Tx, trainer_id: UUID, rules: Sequence[Rule]) -> bool:
    """Replace all rules; none means unavailable."""
    await lock_trainer(tx, trainer_id)
    if set(await list_rules(tx, trainer_id)) == set(rules):
        return False
    await _replace_rules(tx, trainer_id, rules)
    await recompute_time(tx, [trainer_id])
    await tx.execute(TOUCH_TRAINER, {"trainer_id": trainer_id, "now": tx.now})
    _say(tx, trainer_id, "availability")
    return True


DELETE_RULES = "delete from trainer_availability where trainer_id = %(trainer_id)s"
INSERT_RULES = """
insert into trainer_availability (id, trainer_id, weekday, from_time, until_time, valid_from, valid_until)
select id, %(trainer_id)s, weekday, from_time, until_time, valid_from, valid_until
from unnest(%(ids)b::uuid[], %(weekdays)b::smallint[], %(from_times)b::time[], %(until_times)b::time[],
            %(valid_from)b::date[], %(valid_until)b::date[])
  as r(id, weekday, from_time, until_time, valid_from, valid_until)
"""


async def _replace_rules(tx: Tx, trainer_id: UUID, rules: Sequence[Rule]) -> None:
    await tx.execute(DELETE_RULES, {"trainer_id": trainer_id})
    rules = list(dict.fromkeys(rules))
    await tx.execute(
        INSERT_RULES,
        {
            "trainer_id": trainer_id,
            "ids": [new_id() for _ in rules],
            "weekdays": [rule.weekday for rule in rules],
            "from_times": [rule.from_time for rule in rules],
            "until_times": [rule.until_time for rule in rules],
            "valid_from": [rule.valid_from for rule in rules],
            "valid_until": [rule.valid_until for rule in rules],
        },
    )


INSERT_ABSENCE = """
insert into trainer_absences (id, trainer_id, during, note, created_at)
values (%(id)s, %(trainer_id)s, tstzrange(%(starts_at)s, %(ends_at)s), %(note)s, %(now)s)
"""


async def set_absence(tx: Tx, trainer_id: UUID, starts_at: datetime, ends_at: datetime, note: str | None) -> UUID:
    """The trainer is away then (from, until; aware). Raises InvalidAbsence."""
    if starts_at >= ends_at:
        raise InvalidAbsence
    await lock_trainer(tx, trainer_id)
    absence_id = new_id()
    await tx.execute(
        INSERT_ABSENCE,
        {
            "id": absence_id,
            "trainer_id": trainer_id,
            "starts_at": starts_at,
            "ends_at": ends_at,
            "note": note,
            "now": tx.now,
        },
    )
    await recompute_time(tx, [trainer_id])
    _say(tx, trainer_id, "absences")
    return absence_id


# --- time: what the rules come to ---

LIST_RULES_OF_TRAINERS = """
select trainer_id, weekday, from_time, until_time, valid_from, valid_until from trainer_availability
where trainer_id = any(%(trainer_ids)b::uuid[])
"""

# Rules as instants, less the absences, as one value per trainer.
UPSERT_TRAINER_TIME = """
with opened as (
  select trainer_id, range_agg(tstzrange(begins, ends)) as open
  from unnest(%(owners)b::uuid[], %(begins)b::timestamptz[], %(ends)b::timestamptz[]) as o(trainer_id, begins, ends)
  group by trainer_id
), away as (
  select trainer_id, range_agg(during) as closed from trainer_absences
  where trainer_id = any(%(trainer_ids)b::uuid[]) group by trainer_id
)
insert into trainer_time (trainer_id, open, computed_at)
select id, coalesce(opened.open, '{}') - coalesce(away.closed, '{}'), %(now)s
from unnest(%(trainer_ids)b::uuid[]) id
left join opened on opened.trainer_id = id
left join away on away.trainer_id = id
on conflict (trainer_id) do update set open = excluded.open, computed_at = excluded.computed_at
"""


async def recompute_time(tx: Tx, trainer_ids: Sequence[UUID]) -> None:
    """Make trainer_time what the rules and absences say as of `tx.now`; unknown ids are left out."""
    zones = {
        row["id"]: calendar.zone(row["timezone"])
        for row in await tx.all(LOCK_TRAINERS, {"trainer_ids": list(trainer_ids)})
    }
    rules: dict[UUID, list[Rule]] = {}
    for owner, *fields in await tx.tuples(LIST_RULES_OF_TRAINERS, {"trainer_ids": list(zones)}):
        rules.setdefault(owner, []).append(Rule(*fields))
    opened: list[tuple[UUID, datetime, datetime]] = [
        (owner, begins, ends)
        for owner, of_owner in rules.items()
        for begins, ends in open_ranges(of_owner, zones[owner], tx.now)
    ]
    values: dict[str, Any] = {
        "trainer_ids": list(zones),
        "owners": [owner for owner, _, _ in opened],
        "begins": [begins for _, begins, _ in opened],
        "ends": [ends for _, _, ends in opened],
        "now": tx.now,
    }
    await tx.execute(UPSERT_TRAINER_TIME, values)


# Trainers whose time was computed long ago, or never; another reconciler's are left to it.
LIST_STALE_TIMES = """
select t.id from trainers t left join trainer_time m on m.trainer_id = t.id
where m.trainer_id is null or m.computed_at < %(before)s
order by t.id limit %(limit)s for update of t skip locked
"""


async def roll_time(tx: Tx, limit: int = 200) -> int:
    """Move the horizon of those computed more than 24 hours ago; how many. For the reconciler, until it says 0."""
    stale = await tx.values(LIST_STALE_TIMES, {"before": tx.now - ROLL_AFTER, "limit": limit})
    if stale:
        await recompute_time(tx, stale)
    return len(stale)
