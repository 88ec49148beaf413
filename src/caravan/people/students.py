"""Students and whose they are. The only code that reads or writes a family's coordinates outside matching."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from caravan import calendar
from caravan.db import Tx
from caravan.errors import Invalid, NotFound
from caravan.eventlog import outbox
from caravan.events import StudentUpdated
from caravan.ids import new_id

ZONE = "Asia/Kolkata"
FIELDS = ("name", "latitude", "longitude", "timezone")


@dataclass(frozen=True, slots=True)
class Student:
    """Coordinates in degrees; both or none."""

    id: UUID
    name: str
    latitude: float | None
    longitude: float | None
    timezone: str
    created_at: datetime
    updated_at: datetime


class StudentNotFound(NotFound):
    """There is no such student."""


class IncompletePlace(Invalid):
    """A place needs both latitude and longitude."""

    code = "INCOMPLETE_PLACE"


class UnknownZone(Invalid):
    """This is not a time zone we know: use an IANA name such as Asia/Kolkata."""

    code = "UNKNOWN_ZONE"


def check_zone(name: str) -> None:
    """Raises UnknownZone."""
    try:
        calendar.zone(name)
    except calendar.InvalidSchedule:
        raise UnknownZone from None


FIND_STUDENT = """
select id, name, latitude, longitude, timezone, created_at, updated_at from students where id = %(student_id)s
"""


async def get_student(tx: Tx, student_id: UUID) -> Student:
    """Raises StudentNotFound."""
    student = await tx.find(FIND_STUDENT, {"student_id": student_id}, into=Student)
    if student is None:
        raise StudentNotFound
    return student


INSERT_STUDENT = """
insert into students (id, name, latitude, longitude, timezone, created_at, updated_at)
values (%(id)s, %(name)s, %(latitude)s, %(longitude)s, %(timezone)s, %(now)s, %(now)s)
"""


async def create_student(
    tx: Tx,
    *,
    name: str,
    latitude: float | None = None,
    longitude: float | None = None,
    timezone: str = ZONE,
    account_id: UUID | None = None,
    student_id: UUID | None = None,
) -> UUID:
    """A new student, of an account if given; said as STUDENT_UPDATED, because money may wait for a missing one.

    Raises UnknownZone, IncompletePlace.
    """
    check_zone(timezone)
    if (latitude is None) != (longitude is None):
        raise IncompletePlace
    student_id = student_id or new_id()
    await tx.execute(
        INSERT_STUDENT,
        {
            "id": student_id,
            "name": name,
            "latitude": latitude,
            "longitude": longitude,
            "timezone": timezone,
            "now": tx.now,
        },
    )
    if account_id is not None:
        await link_student(tx, account_id, student_id)
    outbox.append(tx, [StudentUpdated(student_id=student_id, changed=("student",))])
    return student_id


INSERT_ACCOUNT_STUDENT = """
insert into account_students (account_id, student_id, created_at) values (%(account_id)s, %(student_id)s, %(now)s)
on conflict do nothing
"""


async def link_student(tx: Tx, account_id: UUID, student_id: UUID) -> None:
    """The account may act for the student; a second time changes nothing."""
    await tx.execute(INSERT_ACCOUNT_STUDENT, {"account_id": account_id, "student_id": student_id, "now": tx.now})


LOCK_STUDENT = "select id from students where id = %(student_id)s for update"
UPDATE_STUDENT = """
update students set name = %(name)s, latitude = %(latitude)s, longitude = %(longitude)s, timezone = %(timezone)s,
  updated_at = %(now)s
where id = %(student_id)s
"""


async def update_student(tx: Tx, student_id: UUID, changes: Mapping[str, Any]) -> tuple[str, ...]:
    """Change some of FIELDS (None takes a coordinate away); the names of those that really changed, which are said.

    Raises StudentNotFound, UnknownZone, IncompletePlace.
    """
    await tx.execute(LOCK_STUDENT, {"student_id": student_id})
    old = await get_student(tx, student_id)
    new = {field: changes.get(field, getattr(old, field)) for field in FIELDS}
    changed = tuple(field for field in FIELDS if new[field] != getattr(old, field))
    if (new["latitude"] is None) != (new["longitude"] is None):
        raise IncompletePlace
    if "timezone" in changed:
        check_zone(new["timezone"])
    if changed:
        await tx.execute(UPDATE_STUDENT, new | {"student_id": student_id, "now": tx.now})
        outbox.append(tx, [StudentUpdated(student_id=student_id, changed=changed)])
    return changed
