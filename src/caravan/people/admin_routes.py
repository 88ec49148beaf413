"""Trainers and accounts, for the office. Every change needs a note and leaves an audit row."""

from __future__ import annotations

from datetime import UTC, date, datetime, time
from typing import Annotated, Any, Literal
from uuid import UUID

from fastapi import APIRouter, Query
from pydantic import AwareDatetime, Field, field_validator, model_validator

from caravan.db import Tx
from caravan.people import trainers
from caravan.people.availability import Rule
from caravan.people.trainers import Trainer
from caravan.web import audit, auth
from caravan.web.auth import Actor, Role
from caravan.web.deps import Db, Trace
from caravan.web.policies import allow
from caravan.web.schemas import In, Name, Note, Out

SOURCE = "admin-service"
PAGE = 100

router = APIRouter(prefix="/api/v1/admin", tags=["admin"])

Mode = Literal["online", "home", "center"]


class RuleShape(In):
    """Wall-clock times in the trainer's zone; `untilTime` 00:00 is the end of the day; both dates are included."""

    weekday: Annotated[int, Field(ge=1, le=7)]
    from_time: time
    until_time: time
    valid_from: date
    valid_until: date

    @field_validator("from_time", "until_time")
    @classmethod
    def _is_wall_clock(cls, value: time) -> time:
        if value.tzinfo is not None:
            raise ValueError("is wall-clock time: leave the zone out")
        return value.replace(microsecond=0)

    @model_validator(mode="after")
    def _is_forward(self) -> RuleShape:
        if self.from_time >= self.until_time != time(0):
            raise ValueError("fromTime must come before untilTime; 00:00 is the end of the day")
        if self.valid_from > self.valid_until:
            raise ValueError("validFrom must not come after validUntil")
        return self


class AbsenceOut(Out):
    id: UUID
    starts_at: datetime
    ends_at: datetime
    note: str | None


class TrainerOut(Out):
    """The place is for admins; `hasPlace` for everybody in the office."""

    id: UUID
    account_id: UUID | None
    name: str
    active: bool
    timezone: str
    modes: list[str]
    course_ids: list[UUID]
    radius_km: float
    has_place: bool


class TrainersOut(Out):
    items: list[TrainerOut]
    next_cursor: UUID | None


class TrainerDetail(TrainerOut):
    latitude: float | None
    longitude: float | None
    availability: list[RuleShape]
    absences: list[AbsenceOut]


class TrainerChanges(In):
    """What is left out stays; `availability` and `courseIds` replace what was there; null takes a coordinate away."""

    name: Name | None = None
    active: bool | None = None
    course_ids: Annotated[list[UUID], Field(max_length=500)] | None = None
    modes: Annotated[list[Mode], Field(min_length=1, max_length=3)] | None = None
    radius_km: Annotated[float, Field(ge=0, le=1000)] | None = None
    latitude: Annotated[float, Field(ge=-90, le=90)] | None = None
    longitude: Annotated[float, Field(ge=-180, le=180)] | None = None
    availability: Annotated[list[RuleShape], Field(max_length=200)] | None = None
    note: Note | None = None


Moment = Annotated[AwareDatetime, Field(ge=datetime(2000, 1, 1, tzinfo=UTC), le=datetime(2200, 1, 1, tzinfo=UTC))]


class AbsenceIn(In):
    starts_at: Moment
    ends_at: Moment
    note: Note | None = None


class Disable(In):
    note: Note | None = None


class Disabled(Out):
    id: UUID
    disabled: bool


@router.get("/trainers")
async def read_trainers(
    actor: Annotated[Actor, allow("trainers:list")],
    db: Db,
    cursor: UUID | None = None,
    limit: Annotated[int, Query(ge=1, le=PAGE)] = PAGE,
) -> TrainersOut:
    async with db.transaction(SOURCE, read_only=True) as tx:
        page = await trainers.list_trainers(tx, after=cursor, limit=limit)
    return TrainersOut(
        items=[TrainerOut.model_validate(_fields(trainer)) for trainer in page],
        next_cursor=page[-1].id if len(page) == limit else None,
    )


@router.get("/trainers/{trainer_id}")
async def read_trainer(trainer_id: UUID, actor: Annotated[Actor, allow("trainers:read")], db: Db) -> TrainerDetail:
    async with db.transaction(SOURCE, read_only=True) as tx:
        return await _show(tx, trainer_id, actor)


@router.patch("/trainers/{trainer_id}")
async def change_trainer(
    trainer_id: UUID, changes: TrainerChanges, actor: Annotated[Actor, allow("trainers:update")], db: Db, trace: Trace
) -> TrainerDetail:
    note = audit.require_note(changes.note)

    async def work(tx: Tx) -> TrainerDetail:
        tx.trace = trace
        old = await trainers.lock_trainer(tx, trainer_id)
        if await _apply(tx, old, changes):
            new = await trainers.get_trainer(tx, trainer_id)
            await audit.record(
                tx,
                actor,
                action="trainers:update",
                subject_type="trainer",
                subject_id=trainer_id,
                note=note,
                before=_audited(old),
                after=_audited(new) | {"given": sorted(changes.model_fields_set - {"note"})},
            )
        return await _show(tx, trainer_id, actor)

    return await db.transact(work, SOURCE)


async def _apply(tx: Tx, old: Trainer, changes: TrainerChanges) -> bool:
    """Do what was asked; True where it changed anything."""
    given = changes.model_fields_set
    did: list[bool] = []
    if changes.name is not None:
        did.append(await trainers.set_name(tx, old.id, changes.name))
    if changes.course_ids is not None or changes.modes is not None:
        did.append(await trainers.set_skills(tx, old.id, course_ids=changes.course_ids, modes=changes.modes))
    if given & {"latitude", "longitude", "radius_km"}:
        latitude = changes.latitude if "latitude" in given else old.latitude
        longitude = changes.longitude if "longitude" in given else old.longitude
        radius_km = old.radius_km if changes.radius_km is None else changes.radius_km
        did.append(await trainers.set_place(tx, old.id, latitude, longitude, radius_km))
    if changes.availability is not None:
        rules = [Rule(**rule.model_dump()) for rule in changes.availability]
        did.append(await trainers.set_availability(tx, old.id, rules))
    if changes.active is not None:
        did.append(await trainers.set_active(tx, old.id, changes.active))
    return any(did)


@router.post("/trainers/{trainer_id}/absences", status_code=201)
async def add_absence(
    trainer_id: UUID, absence: AbsenceIn, actor: Annotated[Actor, allow("trainers:update")], db: Db, trace: Trace
) -> AbsenceOut:
    note = audit.require_note(absence.note)

    async def work(tx: Tx) -> AbsenceOut:
        tx.trace = trace
        absence_id = await trainers.set_absence(tx, trainer_id, absence.starts_at, absence.ends_at, note)
        shown = AbsenceOut(id=absence_id, starts_at=absence.starts_at, ends_at=absence.ends_at, note=note)
        await audit.record(
            tx,
            actor,
            action="trainers:absence",
            subject_type="trainer",
            subject_id=trainer_id,
            note=note,
            after=shown.model_dump(),
        )
        return shown

    return await db.transact(work, SOURCE)


@router.post("/accounts/{account_id}/disable")
async def disable(
    account_id: UUID, given: Disable, actor: Annotated[Actor, allow("accounts:disable")], db: Db
) -> Disabled:
    """Shut an account out: at once for requests, within seconds for sockets. Again changes nothing."""
    note = audit.require_note(given.note)

    async def work(tx: Tx) -> Disabled:
        if await auth.disable_account(tx, account_id):
            await audit.record(
                tx,
                actor,
                action="accounts:disable",
                subject_type="account",
                subject_id=account_id,
                note=note,
                before={"disabled": False},
                after={"disabled": True},
            )
        return Disabled(id=account_id, disabled=True)

    return await db.transact(work, SOURCE)


async def _show(tx: Tx, trainer_id: UUID, actor: Actor) -> TrainerDetail:
    trainer = await trainers.get_trainer(tx, trainer_id)
    sees_place = actor.role is Role.ADMIN
    return TrainerDetail.model_validate(
        _fields(trainer)
        | {
            "latitude": trainer.latitude if sees_place else None,
            "longitude": trainer.longitude if sees_place else None,
            "availability": [
                RuleShape(
                    weekday=rule.weekday,
                    from_time=rule.from_time,
                    until_time=rule.until_time,
                    valid_from=rule.valid_from,
                    valid_until=rule.valid_until,
                )
                for rule in await trainers.list_rules(tx, trainer_id)
            ],
            "absences": [
                AbsenceOut(id=away.id, starts_at=away.starts_at, ends_at=away.ends_at, note=away.note)
                for away in await trainers.list_absences(tx, trainer_id)
            ],
        }
    )


def _fields(trainer: Trainer) -> dict[str, Any]:
    return _audited(trainer) | {
        "id": trainer.id,
        "account_id": trainer.account_id,
        "timezone": trainer.timezone,
        "has_place": trainer.latitude is not None,
    }


def _audited(trainer: Trainer) -> dict[str, Any]:
    """What an audit row may keep of a trainer: no coordinates."""
    return {
        "name": trainer.name,
        "active": trainer.active,
        "modes": trainer.modes,
        "course_ids": trainer.course_ids,
        "radius_km": trainer.radius_km,
    }
