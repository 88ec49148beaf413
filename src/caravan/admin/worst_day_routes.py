"""HTTP of the worst day: pauses, later starts, many repairs at once, unclaimed money."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Annotated, Literal
from uuid import UUID

from fastapi import APIRouter
from pydantic import Field, model_validator

from caravan import pauses
from caravan.admin import worst_day
from caravan.admin.deps import MANY_MAX, SOURCE, Notice, Subscriptions, Write
from caravan.admin.routes import Mender, Reader, now_of
from caravan.admin.schemas import DATE_NAMES, DiagnosisOut, NoteIn
from caravan.db import Tx
from caravan.deliveries import Stage
from caravan.fulfilment.bulk import Chosen, Done
from caravan.pauses import Pause, Scope
from caravan.payments.webhooks import Unclaimed, list_unclaimed
from caravan.web.auth import Actor
from caravan.web.deps import Db, SettingsDep
from caravan.web.policies import allow
from caravan.web.schemas import CalendarDate, Out

router = APIRouter(prefix="/api/v1/admin", tags=["admin"])

Pauser = Annotated[Actor, allow("admin:pause")]
Repairer = Annotated[Actor, allow("admin:bulk")]
Cashier = Annotated[Actor, allow("admin:money")]
CityName = Annotated[str, Field(min_length=1, max_length=100)]


class PauseIn(NoteIn):
    """What is stopped, or goes on: a stage, of everybody, of a course, of a city, or of a course in a city."""

    stage: Literal[Stage.PAID, Stage.PURCHASED, Stage.ALLOCATED]
    course_id: UUID | None = None
    city: CityName | None = None

    @property
    def scope(self) -> Scope:
        return Scope(self.stage, self.course_id, self.city)


class ConfirmStartIn(NoteIn):
    """Without a date: the next day that is possible."""

    start_date: CalendarDate | None = Field(default=None, validation_alias=DATE_NAMES)


class RepairsIn(NoteIn):
    """`all`, or what waits with a `reason`."""

    all: bool = False
    reason: Annotated[str, Field(pattern="^[A-Z_]{1,60}$")] | None = None
    course_id: UUID | None = None
    city: CityName | None = None
    limit: Annotated[int, Field(strict=True, ge=1, le=MANY_MAX)] = 10
    dry_run: bool = False

    @model_validator(mode="after")
    def _says_whom(self) -> RepairsIn:
        if self.all is (self.reason is not None):
            raise ValueError("needs one of all and reason")
        return self


class UnclaimedIn(NoteIn):
    provider: Annotated[str, Field(max_length=100)]
    event_id: Annotated[str, Field(max_length=300)]


class PauseOut(Out):
    """`waiting`: payments that it keeps now. `underWay`: transactions that had begun before and were not over yet."""

    stage: str
    course_id: UUID | None
    course_title: str | None
    city: str | None
    note: str
    paused_by: str
    paused_at: datetime
    waiting: int
    sentence: str
    under_way: int = 0

    @classmethod
    def of(cls, pause: Pause, under_way: int = 0) -> PauseOut:
        return cls.model_validate(pause).model_copy(update={"under_way": under_way})


class PausesOut(Out):
    items: list[PauseOut]


class RepairLineOut(Out):
    payment_id: UUID
    outcome: str
    said: str
    stage_before: str | None
    stage: str | None
    reason: str | None
    code: str | None


class RepairsOut(Out):
    chosen: int
    moved: int
    stopped: str | None
    dry_run: bool
    items: list[RepairLineOut]

    @classmethod
    def of(cls, done: Done, *, dry_run: bool) -> RepairsOut:
        lines = [RepairLineOut.model_validate(line) for line in done.lines]
        return cls(chosen=done.chosen, moved=done.moved, stopped=done.stopped, dry_run=dry_run, items=lines)


class UnclaimedOut(Out):
    provider: str
    event_id: str
    payment_id: UUID
    amount_cents: int
    currency: str
    received_at: datetime


class UnclaimedListOut(Out):
    items: list[UnclaimedOut]


# ------------------------------------------------------------------ the API


@router.get("/pauses")
async def get_pauses(_actor: Reader, db: Db) -> PausesOut:
    """Stages that stand still, with who stopped them, when and why."""
    async with db.transaction(SOURCE, read_only=True) as tx:
        return PausesOut(items=[PauseOut.of(each) for each in await pauses.list_pauses(tx)])


@router.post("/pauses")
async def post_pause(body: PauseIn, actor: Pauser, db: Db, write: Write) -> PauseOut:
    """Stop a stage. After the answer nothing of its scope happens: `underWay` is 0 unless a worker hangs."""

    async def work(tx: Tx) -> Pause:
        return await worst_day.pause(tx, actor, body.scope, body.note)

    return PauseOut.of(*await pauses.take_hold(db, write(work)))


@router.post("/pauses/resume")
async def post_resume(body: PauseIn, actor: Pauser, write: Write) -> PauseOut:
    """Let it go on; what waits for it does so by itself, the nearest start first."""

    async def work(tx: Tx) -> Pause:
        return await worst_day.resume(tx, actor, body.scope, body.note)

    return PauseOut.of(await write(work))


@router.post("/payments/{payment_id}/confirm-start")
async def post_confirm_start(
    payment_id: UUID, actor: Mender, write: Write, notice: Notice, body: ConfirmStartIn | None = None
) -> DiagnosisOut:
    """Agree to a later start (START_PASSED): this one, or the next that is possible."""
    note, start_date = (body.note, body.start_date) if body else (None, None)

    async def work(tx: Tx) -> DiagnosisOut:
        await worst_day.confirm_start(tx, actor, payment_id, note, start_date=start_date, notice=notice)
        return await now_of(tx, payment_id)

    return await write(work)


@router.post("/repairs")
async def post_repairs(
    body: RepairsIn, actor: Repairer, db: Db, notice: Notice, subscriptions: Subscriptions
) -> RepairsOut:
    """Repair what is stuck: one first, then the rest, until something unexpected."""
    chosen = Chosen(body.reason, body.course_id, body.city, body.limit)
    done = await worst_day.repair_many(
        db, actor, chosen, body.note, source=SOURCE, subscriptions=subscriptions, notice=notice, dry_run=body.dry_run
    )
    return RepairsOut.of(done, dry_run=body.dry_run)


@router.get("/unclaimed")
async def get_unclaimed(_actor: Reader, db: Db, settings: SettingsDep) -> UnclaimedListOut:
    async with db.transaction(SOURCE, read_only=True) as tx:
        found = await list_unclaimed(tx, timedelta(minutes=settings.unclaimed_minutes))
    return UnclaimedListOut(items=[UnclaimedOut.model_validate(item) for item in found])


@router.post("/unclaimed/dealt-with")
async def post_unclaimed(body: UnclaimedIn, actor: Cashier, write: Write) -> UnclaimedOut:
    """A person has settled it outside: it is listed no more, and buys nothing if its payment appears."""

    async def work(tx: Tx) -> Unclaimed:
        return await worst_day.deal_with_unclaimed(tx, actor, body.provider, body.event_id, body.note)

    return UnclaimedOut.model_validate(await write(work))
