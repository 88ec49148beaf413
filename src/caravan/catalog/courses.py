"""Courses, tiers, holidays: reading and changing them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from uuid import UUID

from psycopg import errors as pg

from caravan.calendar import EVERY_DAY
from caravan.db import Tx
from caravan.errors import Invalid, NotFound
from caravan.eventlog import outbox
from caravan.events import CourseUpdated
from caravan.ids import new_id


@dataclass(frozen=True, slots=True)
class Tier:
    """What `sessions` lessons cost a private group of `group_size`, in the currency's minor unit."""

    sessions: int
    amount_cents: int
    currency: str = "INR"
    group_size: int = 1


@dataclass(frozen=True, slots=True)
class Course:
    """`weekdays`: ISO, Monday 1. `tiers`: by group size, then sessions."""

    id: UUID
    title: str
    category: str
    session_minutes: int
    weekdays: tuple[int, ...]
    learning_modes: tuple[str, ...]
    group_sizes: tuple[int, ...]
    retired_at: datetime | None
    tiers: tuple[Tier, ...]


class CourseNotFound(NotFound):
    """There is no such course."""


class InvalidTiers(Invalid):
    """Two prices for the same thing, or a group size that the course doesn't have."""

    code = "INVALID_TIERS"


# Courses with their tiers, all or some.
LIST_COURSES = """
select c.id, c.title, c.category, c.session_minutes, c.weekdays, c.learning_modes, c.group_sizes, c.retired_at,
       t.sessions, t.amount_cents, t.currency, t.group_size
from courses c left join course_tiers t on t.course_id = c.id
where (%(course_ids)b::uuid[] is null or c.id = any(%(course_ids)b::uuid[])) and (%(retired)s or c.retired_at is null)
order by c.category, c.title, c.id, t.group_size, t.sessions
"""


async def list_courses(tx: Tx, course_ids: Sequence[UUID] | None = None, *, with_retired: bool = False) -> list[Course]:
    """By category and title: what can be bought now, or (`with_retired`) what ever could; of `course_ids`, if given."""
    rows = await tx.all(
        LIST_COURSES,
        {"course_ids": list(course_ids) if course_ids is not None else None, "retired": with_retired},
    )
    tiers: dict[UUID, list[Tier]] = {}
    for row in rows:
        of_course = tiers.setdefault(row["id"], [])
        if row["sessions"] is not None:
            of_course.append(Tier(row["sessions"], row["amount_cents"], row["currency"], row["group_size"]))
    by_id = {row["id"]: row for row in rows}
    return [
        Course(
            id=course_id,
            title=row["title"],
            category=row["category"],
            session_minutes=row["session_minutes"],
            weekdays=tuple(row["weekdays"]),
            learning_modes=tuple(row["learning_modes"]),
            group_sizes=tuple(row["group_sizes"]),
            retired_at=row["retired_at"],
            tiers=tuple(tiers[course_id]),
        )
        for course_id, row in by_id.items()
    ]


async def find_course(tx: Tx, course_id: UUID) -> Course | None:
    """A course, retired ones too: whoever bought it still has it."""
    courses = await list_courses(tx, [course_id], with_retired=True)
    return courses[0] if courses else None


FIND_PRICE = """
select t.sessions, t.amount_cents, t.currency, t.group_size from course_tiers t join courses c on c.id = t.course_id
where t.course_id = %(course_id)s and t.sessions = %(sessions)s and t.group_size = %(group_size)s
  and c.retired_at is null
"""


async def price_of(tx: Tx, course_id: UUID, sessions: int, group_size: int = 1) -> Tier | None:
    """What so many sessions cost now; None where that isn't sold (any more)."""
    return await tx.find(
        FIND_PRICE, {"course_id": course_id, "sessions": sessions, "group_size": group_size}, into=Tier
    )


LIST_HOLIDAYS = "select on_date from holidays"


async def list_holidays(tx: Tx) -> frozenset[date]:
    return frozenset(await tx.values(LIST_HOLIDAYS))


INSERT_HOLIDAY = """
insert into holidays (on_date, name) values (%(on_date)s, %(name)s) on conflict (on_date) do nothing
"""


async def add_holiday(tx: Tx, on_date: date, name: str) -> None:
    """Lessons that are booked from now on skip this date."""
    await tx.execute(INSERT_HOLIDAY, {"on_date": on_date, "name": name})


INSERT_COURSE = """
insert into courses (id, title, category, session_minutes, weekdays, learning_modes, group_sizes,
                     created_at, updated_at)
values (%(id)s, %(title)s, %(category)s, %(session_minutes)s, %(weekdays)b::smallint[], %(learning_modes)s::text[],
        %(group_sizes)b::smallint[], %(now)s, %(now)s)
"""


async def create_course(
    tx: Tx,
    *,
    title: str,
    category: str,
    session_minutes: int,
    tiers: Sequence[Tier],
    weekdays: Sequence[int] = EVERY_DAY,
    learning_modes: Sequence[str] = ("online", "home"),
    group_sizes: Sequence[int] = (1,),
    course_id: UUID | None = None,
) -> UUID:
    """A new course, said as COURSE_UPDATED: money may wait for it. Raises InvalidTiers."""
    course_id = course_id or new_id()
    await tx.execute(
        INSERT_COURSE,
        {
            "id": course_id,
            "title": title,
            "category": category,
            "session_minutes": session_minutes,
            "weekdays": list(weekdays),
            "learning_modes": list(learning_modes),
            "group_sizes": list(group_sizes),
            "now": tx.now,
        },
    )
    await _replace_tiers(tx, course_id, tiers, group_sizes)
    outbox.append(tx, [CourseUpdated(course_id=course_id, changed=("course",))])
    return course_id


LOCK_COURSE = "select id from courses where id = %(course_id)s for update"
UPDATE_COURSE = """
update courses set title = %(title)s, weekdays = %(weekdays)b::smallint[], retired_at = %(retired_at)s,
  updated_at = %(now)s
where id = %(course_id)s
"""


async def update_course(
    tx: Tx,
    course_id: UUID,
    *,
    title: str | None = None,
    weekdays: Sequence[int] | None = None,
    retired: bool | None = None,
    tiers: Sequence[Tier] | None = None,
) -> Mapping[str, tuple[object, object]]:
    """Change what is not None; field to (before, after) of what really changed. What was sold stays as it was sold.

    Raises CourseNotFound, InvalidTiers.
    """
    await tx.execute(LOCK_COURSE, {"course_id": course_id})
    old = await find_course(tx, course_id)
    if old is None:
        raise CourseNotFound
    changed: dict[str, tuple[object, object]] = {}
    if title is not None and title != old.title:
        changed["title"] = (old.title, title)
    if weekdays is not None and set(weekdays) != set(old.weekdays):
        changed["weekdays"] = (old.weekdays, tuple(sorted(set(weekdays))))
    if retired is not None and retired != (old.retired_at is not None):
        changed["retired"] = (not retired, retired)
    if tiers is not None and set(tiers) != set(old.tiers):
        changed["tiers"] = (old.tiers, tuple(tiers))
        await _replace_tiers(tx, course_id, tiers, old.group_sizes)
    if not changed:
        return {}
    retired_at = old.retired_at if "retired" not in changed else (tx.now if retired else None)
    await tx.execute(
        UPDATE_COURSE,
        {
            "course_id": course_id,
            "title": title if "title" in changed else old.title,
            "weekdays": sorted(set(weekdays or old.weekdays)),
            "retired_at": retired_at,
            "now": tx.now,
        },
    )
    outbox.append(tx, [CourseUpdated(course_id=course_id, changed=tuple(changed))])
    return changed


DELETE_TIERS = "delete from course_tiers where course_id = %(course_id)s"
INSERT_TIERS = """
insert into course_tiers (course_id, sessions, group_size, amount_cents, currency)
select %(course_id)s, t.* from unnest(%(sessions)b::smallint[], %(group_sizes)b::smallint[], %(amounts)b::bigint[],
                                      %(currencies)b::text[]) t
"""


async def _replace_tiers(tx: Tx, course_id: UUID, tiers: Sequence[Tier], group_sizes: Sequence[int]) -> None:
    if not {tier.group_size for tier in tiers} <= set(group_sizes):
        raise InvalidTiers
    await tx.execute(DELETE_TIERS, {"course_id": course_id})
    try:
        async with tx.savepoint():
            await tx.execute(
                INSERT_TIERS,
                {
                    "course_id": course_id,
                    "sessions": [tier.sessions for tier in tiers],
                    "group_sizes": [tier.group_size for tier in tiers],
                    "amounts": [tier.amount_cents for tier in tiers],
                    "currencies": [tier.currency for tier in tiers],
                },
            )
    except pg.UniqueViolation:
        raise InvalidTiers from None
