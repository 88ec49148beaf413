"""Stages that operators have stopped for a while, for everybody or for a course or a city.

Owns: pauses. Whoever would take a purchase out of a stage asks `paused_by` (in SQL) in the statement that reads the
purchase's state, after it has locked its row; so workers, reconciler, repair and buttons obey alike. A lock of a row
gives a transaction its number: who began before a pause is seen by `wait_for_begun`, who begins later sees the pause.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final
from uuid import UUID

from caravan import deliveries
from caravan.db import Database, Tx
from caravan.deliveries import Block, Reason, Stage
from caravan.errors import Conflict, Invalid, NotFound
from caravan.ids import new_id

PAUSABLE: Final[Mapping[Stage, str]] = {
    Stage.PAID: "no purchases are created",
    Stage.PURCHASED: "no trainers are allocated",
    Stage.ALLOCATED: "no sessions are scheduled",
}
"""The stages at which payments can be kept, and what does not happen meanwhile."""

BEGUN_SECONDS_MAX = 30.0  # longer than a transaction may stand idle, or a statement may take
LOOK_SECONDS = 0.05


class NotPausable(Invalid):
    """What can be paused is paid (creating purchases), purchased (allocating trainers), allocated (scheduling)."""

    code = "STAGE_NOT_PAUSABLE"


class AlreadyPaused(Conflict):
    """This is paused already: `caravan pauses`, or Pauses in the console, shows since when and by whom."""

    code = "ALREADY_PAUSED"


class NotPaused(Conflict):
    """This is not paused, or not for that course or city: `caravan pauses`, or Pauses in the console, shows what is."""

    code = "NOT_PAUSED"


class NoSuchCourse(NotFound):
    """There is no such course."""

    code = "COURSE_NOT_FOUND"


class NoSuchPause(NotFound):
    """There is no such pause: it has ended."""

    code = "PAUSE_NOT_FOUND"


class CityUnknown(Invalid):
    """No such city is in the table cities."""

    code = "CITY_UNKNOWN"


@dataclass(frozen=True, slots=True)
class Scope:
    """What is paused: a stage, of everybody, of a course's purchases, of the students in a city, or both."""

    stage: Stage
    course_id: UUID | None = None
    city: str | None = None


@dataclass(frozen=True, slots=True)
class Pause:
    """A stage that stands still. `waiting`: payments that it keeps now."""

    id: UUID
    stage: str
    course_id: UUID | None
    course_title: str | None
    city: str | None
    note: str
    paused_by: str
    paused_at: datetime
    waiting: int

    @property
    def scope(self) -> Scope:
        return Scope(Stage(self.stage), self.course_id, self.city)

    @property
    def sentence(self) -> str:
        """`purchased is paused for Robotics in Delhi: no trainers are allocated.`"""
        return f"{self.stage} is paused{self.where}: {PAUSABLE[Stage(self.stage)]}."

    @property
    def where(self) -> str:
        """` for Robotics in Delhi`; empty: everywhere."""
        course = f" for {self.course_title or 'a course'}" if self.course_id else ""
        return course + (f" in {self.city}" if self.city else "")


# A city's name as people type it; its place as it is now.
FIND_CITY = """
select name, latitude, longitude, radius_km from cities where lower(name) = lower(%(name)s)
"""
LIST_CITIES = "select name from cities order by name"
COURSE_EXISTS = "select exists (select from courses where id = %(course_id)s)"

INSERT_PAUSE = """
insert into pauses (id, stage, course_id, city, latitude, longitude, radius_km, note, paused_by, paused_at)
values (%(id)s, %(stage)s, %(course_id)s, %(city)s, %(latitude)s, %(longitude)s, %(radius_km)s, %(note)s, %(by)s,
  %(now)s)
on conflict do nothing
"""


async def pause(tx: Tx, scope: Scope, *, note: str, by: str) -> Pause:
    """Stop a stage from this transaction's commit on; `wait_for_begun` next. Payments go on coming in and wait.

    Raises NotPausable, NoSuchCourse, CityUnknown, AlreadyPaused.
    """
    if scope.stage not in PAUSABLE:
        raise NotPausable
    if scope.course_id and not await tx.value(COURSE_EXISTS, {"course_id": scope.course_id}):
        raise NoSuchCourse
    city = await _find_city(tx, scope.city) if scope.city is not None else {}
    pause_id = new_id()
    named = {"city": city.get("name"), "latitude": None, "longitude": None, "radius_km": None} | city
    named |= {"id": pause_id, "stage": str(scope.stage), "course_id": scope.course_id, "note": note, "by": by}
    if not await tx.execute(INSERT_PAUSE, named | {"now": tx.now}):
        raise AlreadyPaused
    return await get_pause(tx, pause_id)


async def _find_city(tx: Tx, name: str) -> dict[str, object]:
    found = await tx.find(FIND_CITY, {"name": name.strip()})
    if found is None:
        known = ", ".join(await tx.values(LIST_CITIES))
        raise CityUnknown(f"No such city is in the table cities, which has: {known}.")
    return {**found, "city": found["name"]}


FIND_PAUSE = """
select id from pauses where stage = %(stage)s and course_id is not distinct from %(course_id)s
  and lower(city) is not distinct from lower(%(city)s::text)
"""
DELETE_PAUSE = "delete from pauses where id = %(id)s"


async def find_pause(tx: Tx, scope: Scope) -> UUID | None:
    """The pause of exactly this scope."""
    city = scope.city.strip() if scope.city else None
    return await tx.value(FIND_PAUSE, {"stage": str(scope.stage), "course_id": scope.course_id, "city": city})


async def resume(tx: Tx, pause_id: UUID) -> Pause:
    """End a pause; what it was. The reconciler lets go on what waits for it. Raises NoSuchPause."""
    ended = await get_pause(tx, pause_id)
    if not await tx.execute(DELETE_PAUSE, {"id": pause_id}):
        raise NoSuchPause
    return ended


# What stands still, the longest first, each with how many payments wait for it.
LIST_PAUSES = """
select p.id, p.stage, p.course_id, c.title as course_title, p.city, p.note, p.paused_by, p.paused_at,
  (select count(*) from undelivered u where u.reason = 'STAGE_PAUSED' and u.detail ->> 'pauseId' = p.id::text)::int
    as waiting
from pauses p left join courses c on c.id = p.course_id
where %(id)s::uuid is null or p.id = %(id)s
order by p.paused_at, p.id
"""


async def list_pauses(tx: Tx) -> list[Pause]:
    return await tx.all(LIST_PAUSES, {"id": None}, into=Pause)


async def get_pause(tx: Tx, pause_id: UUID) -> Pause:
    """Raises NoSuchPause."""
    found = await tx.find(LIST_PAUSES, {"id": pause_id}, into=Pause)
    if found is None:
        raise NoSuchPause
    return found


@dataclass(frozen=True, slots=True)
class Kept:
    """A payment that a pause keeps, at the stage where it is."""

    payment_id: UUID
    at: Stage
    pause_id: UUID


async def keep(tx: Tx, stage: Stage, kept: Sequence[Kept]) -> None:
    """Let payments wait for the end of a pause of `stage`, in the open; each goes on by itself after it."""
    if kept:
        known = {each.id: each for each in await list_pauses(tx)}
        await deliveries.block(tx, [_block(each, stage, known.get(each.pause_id)) for each in kept])


def _block(kept: Kept, stage: Stage, pause: Pause | None) -> Block:
    detail: dict[str, object] = {"pauseId": str(kept.pause_id), "stage": str(stage)}
    if pause is not None:  # else it has ended since we looked; the reconciler is about to come
        detail |= {"note": pause.note, "by": pause.paused_by}
    return Block(kept.payment_id, kept.at, Reason.STAGE_PAUSED, detail)


# Payments that waited for pauses and are kept by none any more, nearest start first: `purchased` has no trainer yet.
LIST_RESUMED = """
select u.payment_id, u.detail ->> 'stage' as stage
from undelivered u
join payments p on p.id = u.payment_id
join checkouts c on c.id = p.checkout_id
left join student_course_purchases pu on pu.payment_id = u.payment_id
where u.reason = 'STAGE_PAUSED'
  and paused_by(u.detail ->> 'stage', coalesce(pu.course_id, c.course_id, u.course_id), u.student_id) is null
order by coalesce(pu.start_date, c.start_date), coalesce(pu.slot_start, c.slot_start), u.since, u.payment_id
limit %(limit)s
"""


async def list_resumed(tx: Tx, limit: int) -> list[tuple[UUID, Stage]]:
    """Whom nothing keeps any more, with the stage at which each waits; the nearest start first."""
    rows = await tx.tuples(LIST_RESUMED, {"limit": limit})
    return [(payment_id, Stage(stage)) for payment_id, stage in rows]


async def take_hold(db: Database, pausing: Awaitable[Pause]) -> tuple[Pause, int]:
    """Pause, and `wait_for_begun`: the pause, and how many transactions were not over in time.

    Who asks again, because the first answer was lost, hears AlreadyPaused no sooner than it is true.
    """
    try:
        paused = await pausing
    except AlreadyPaused:
        await wait_for_begun(db)
        raise
    return paused, await wait_for_begun(db)


# Transactions that have a number, so have locked or written something, and are not over.
LIST_BEGUN = """
select l.transactionid::text as xid from pg_locks l join pg_stat_activity a on a.pid = l.pid
where l.locktype = 'transactionid' and l.mode = 'ExclusiveLock' and l.granted
  and a.datname = current_database() and l.pid <> pg_backend_pid()
"""


async def wait_for_begun(db: Database, *, seconds: float = BEGUN_SECONDS_MAX) -> int:
    """Wait for the work that was under way when a pause was committed: after that, nothing of its scope happens.

    How many transactions were not over in time: 0, unless a worker hangs; those are cut off by the database.
    """
    begun: set[str] | None = None
    clock = asyncio.get_running_loop().time
    until = clock() + seconds
    while True:
        alive = {row["xid"] for row in await db.all(LIST_BEGUN)}
        begun = alive if begun is None else begun & alive
        if not begun or clock() >= until:
            return len(begun)
        await asyncio.sleep(LOOK_SECONDS)
