"""Registering, and a student's own data."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Request, Response
from pydantic import Field, field_validator

from caravan.db import Tx
from caravan.people.students import ZONE, Student, create_student, get_student, update_student
from caravan.web import audit, auth
from caravan.web.auth import Actor, Role
from caravan.web.credentials import set_cookie
from caravan.web.deps import Db, Trace
from caravan.web.login import SignedIn, describe
from caravan.web.policies import allow, public
from caravan.web.schemas import In, Name, Note, Out

SOURCE = "student-service"

router = APIRouter(prefix="/api/v1")


class Registration(In):
    """`name`: the account's; `studentName`: the child's, where it is another."""

    email: Annotated[str, Field(max_length=320)]
    password: Annotated[str, Field(max_length=1024)]
    name: Name | None = None
    student_name: Name | None = None
    phone: Annotated[str, Field(pattern=r"^\+?[0-9 ()-]{5,30}$")] | None = None
    timezone: Annotated[str, Field(max_length=64)] = ZONE

    model_config = In.model_config | {"str_strip_whitespace": False}


class StudentOut(Out):
    """Coordinates are for the family and for admins; to others `hasLocation` says all they need."""

    id: UUID
    name: str
    timezone: str
    has_location: bool
    latitude: float | None
    longitude: float | None
    created_at: datetime
    updated_at: datetime


class StudentChanges(In):
    """What is left out stays; null takes a coordinate away."""

    name: Name | None = None
    latitude: Annotated[float, Field(ge=-90, le=90)] | None = None
    longitude: Annotated[float, Field(ge=-180, le=180)] | None = None
    timezone: Annotated[str, Field(max_length=64)] | None = None
    note: Note | None = None

    @field_validator("name", "timezone")
    @classmethod
    def _is_given(cls, value: str | None) -> str:
        if value is None:
            raise ValueError("can be left out, but not taken away")
        return value


@router.post("/auth/register", dependencies=[public("auth:register")], status_code=201, tags=["auth"])
async def register(given: Registration, request: Request, response: Response, db: Db, trace: Trace) -> SignedIn:
    """An account and its first student, signed in."""
    email = auth.normalise_email(given.email)
    password_hash = await auth.hash_password(given.password)
    name = given.name or email.partition("@")[0]

    async def work(tx: Tx) -> tuple[str, Actor]:
        tx.trace = trace
        account_id = await auth.create_account(
            tx, email=email, name=name, role=Role.STUDENT, password_hash=password_hash, phone=given.phone
        )
        await create_student(tx, name=given.student_name or name, timezone=given.timezone, account_id=account_id)
        token = await auth.issue_token(tx, account_id)
        actor = await auth.find_actor(tx, token)
        assert actor is not None
        return token, actor

    token, actor = await db.transact(work, SOURCE)
    set_cookie(response, request, token)
    return SignedIn(token=token, user=describe(actor))


@router.get("/students/{student_id}", tags=["students"])
async def read_student(student_id: UUID, actor: Annotated[Actor, allow("students:read")], db: Db) -> StudentOut:
    actor.require_student(student_id)
    async with db.transaction(SOURCE, read_only=True) as tx:
        return _show(await get_student(tx, student_id), actor)


@router.patch("/students/{student_id}", tags=["students"])
async def change_student(
    student_id: UUID, changes: StudentChanges, actor: Annotated[Actor, allow("students:update")], db: Db, trace: Trace
) -> StudentOut:
    """Change name, zone or place. An admin must say why, in `note`."""
    actor.require_student(student_id)
    by_admin = actor.role is Role.ADMIN
    note = audit.require_note(changes.note) if by_admin else None
    wanted: dict[str, Any] = changes.model_dump(exclude_unset=True, exclude={"note"})

    async def work(tx: Tx) -> StudentOut:
        tx.trace = trace
        changed = await update_student(tx, student_id, wanted)
        if by_admin and changed:
            # Names only: coordinates have one home.
            await audit.record(
                tx,
                actor,
                action="students:update",
                subject_type="student",
                subject_id=student_id,
                note=note,
                after={"changed": changed},
            )
        return _show(await get_student(tx, student_id), actor)

    return await db.transact(work, SOURCE)


def _show(student: Student, actor: Actor) -> StudentOut:
    sees_place = student.id in actor.student_ids or actor.role is Role.ADMIN
    return StudentOut(
        id=student.id,
        name=student.name,
        timezone=student.timezone,
        has_location=student.latitude is not None,
        latitude=student.latitude if sees_place else None,
        longitude=student.longitude if sees_place else None,
        created_at=student.created_at,
        updated_at=student.updated_at,
    )
