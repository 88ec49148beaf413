"""The catalogue for everybody, and its upkeep for admins."""

from __future__ import annotations

from typing import Annotated, Literal
from uuid import UUID

from fastapi import APIRouter
from pydantic import Field

from caravan.catalog.courses import (
    Course,
    CourseNotFound,
    Tier,
    find_course,
    list_courses,
    update_course,
)
from caravan.db import Tx
from caravan.web import audit
from caravan.web.auth import Actor
from caravan.web.deps import Db, Trace
from caravan.web.policies import allow, public
from caravan.web.schemas import In, Name, Note, Out

SOURCE = "admin-service"
AMOUNT_CENTS_MAX = 100_000_000_00

router = APIRouter(prefix="/api/v1", tags=["catalog"])


class TierOut(Out):
    sessions: int
    amount_cents: int
    currency: str
    group_size: int


class CourseOut(Out):
    """`tiers` are the prices for one student, `groupTiers` those for a private group."""

    id: UUID
    title: str
    category: str
    session_minutes: int
    weekdays: list[int]
    learning_modes: list[str]
    group_sizes: list[int]
    retired: bool
    tiers: list[TierOut]
    group_tiers: list[TierOut]


class CoursesOut(Out):
    items: list[CourseOut]


class TierIn(In):
    sessions: Annotated[int, Field(ge=1, le=400)]
    amount_cents: Annotated[int, Field(ge=0, le=AMOUNT_CENTS_MAX)]
    currency: Annotated[str, Field(pattern="^[A-Z]{3}$")] = "INR"
    group_size: Annotated[int, Field(ge=1, le=50)] = 1


class CourseChanges(In):
    """`tiers` replaces them all."""

    title: Name | None = None
    tiers: Annotated[list[TierIn], Field(max_length=200)] | None = None
    retired: bool | None = None
    weekdays: Annotated[list[Literal[1, 2, 3, 4, 5, 6, 7]], Field(min_length=1, max_length=7)] | None = None
    note: Note | None = None


def _show(course: Course) -> CourseOut:
    tiers = [
        TierOut(
            sessions=tier.sessions,
            amount_cents=tier.amount_cents,
            currency=tier.currency,
            group_size=tier.group_size,
        )
        for tier in course.tiers
    ]
    return CourseOut(
        id=course.id,
        title=course.title,
        category=course.category,
        session_minutes=course.session_minutes,
        weekdays=list(course.weekdays),
        learning_modes=list(course.learning_modes),
        group_sizes=list(course.group_sizes),
        retired=course.retired_at is not None,
        tiers=[tier for tier in tiers if tier.group_size == 1],
        group_tiers=[tier for tier in tiers if tier.group_size > 1],
    )


@router.get("/courses", dependencies=[public("courses:read")])
async def read_courses(db: Db) -> CoursesOut:
    """What can be bought now."""
    async with db.transaction(SOURCE, read_only=True) as tx:
        return CoursesOut(items=[_show(course) for course in await list_courses(tx)])


@router.get("/courses/{course_id}", dependencies=[public("courses:read")])
async def read_course(course_id: UUID, db: Db) -> CourseOut:
    """One course; a retired one says so."""
    async with db.transaction(SOURCE, read_only=True) as tx:
        return _show(await _get(tx, course_id))


@router.patch("/admin/courses/{course_id}")
async def change_course(
    course_id: UUID, changes: CourseChanges, actor: Annotated[Actor, allow("courses:update")], db: Db, trace: Trace
) -> CourseOut:
    """Change title, tiers, weekdays, or retire it; what was sold stays as it was sold."""
    note = audit.require_note(changes.note)

    async def work(tx: Tx) -> CourseOut:
        tx.trace = trace
        changed = await update_course(
            tx,
            course_id,
            title=changes.title,
            weekdays=changes.weekdays,
            retired=changes.retired,
            tiers=_tiers(changes.tiers),
        )
        if changed:
            await audit.record(
                tx,
                actor,
                action="courses:update",
                subject_type="course",
                subject_id=course_id,
                note=note,
                before={name: before for name, (before, _) in changed.items()},
                after={name: after for name, (_, after) in changed.items()},
            )
        return _show(await _get(tx, course_id))

    return await db.transact(work, SOURCE)


def _tiers(given: list[TierIn] | None) -> list[Tier] | None:
    if given is None:
        return None
    return [Tier(tier.sessions, tier.amount_cents, tier.currency, tier.group_size) for tier in given]


async def _get(tx: Tx, course_id: UUID) -> Course:
    course = await find_course(tx, course_id)
    if course is None:
        raise CourseNotFound
    return course
