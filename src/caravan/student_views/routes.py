"""`home`, `learning` and `sessions` of a student."""

from __future__ import annotations

from datetime import datetime
from functools import partial
from typing import Annotated, Any, Final
from uuid import UUID

import msgspec
from fastapi import APIRouter, Depends, Query, Response
from pydantic.alias_generators import to_camel
from starlette.requests import HTTPConnection

from caravan.db import Database, Tx
from caravan.db.tx import Row
from caravan.deliveries import Reason, Stage
from caravan.student_views import queries
from caravan.student_views.cache import Made, Shown, ViewCache
from caravan.student_views.cursor import Cursor
from caravan.web.auth import Actor
from caravan.web.deps import Db
from caravan.web.policies import allow
from caravan.web.schemas import Out

SOURCE: Final = "student-service"
LIMIT_MAX: Final = 200

router = APIRouter(prefix="/api/v1/students/{student_id}", tags=["student views"])
Reader = Annotated[Actor, allow("views:read")]


class TrainerOut(Out):
    id: UUID
    name: str


class SessionCounts(Out):
    """total = scheduled + completed + student_absent + refunded + owed; `cancelled` ones were replaced or are owed."""

    total: int
    scheduled: int
    completed: int
    student_absent: int
    cancelled: int
    refunded: int
    owed: int


class NextSession(Out):
    id: UUID
    seq: int
    starts_at: datetime
    ends_at: datetime


class Item(Out):
    """A paid course. `reason`: why it waits, in the family's terms (business reasons only)."""

    payment_id: UUID
    purchase_id: UUID | None
    course_id: UUID | None
    title: str
    stage: Stage
    reason: Reason | None
    trainer: TrainerOut | None
    sessions: SessionCounts
    next_session: NextSession | None
    paid_at: datetime
    amount_cents: int
    currency: str
    timezone: str


class ViewOut(Out):
    version: int
    items: list[Item]


class SessionOut(Out):
    id: UUID
    purchase_id: UUID
    seq: int
    course_id: UUID
    trainer_id: UUID
    starts_at: datetime
    ends_at: datetime
    status: str


class SessionPage(Out):
    items: list[SessionOut]
    next_cursor: str | None


def _names(of: type[Out], *but: str) -> tuple[tuple[str, str], ...]:
    """The fields of an answer: how they are written, how their columns are called."""
    return tuple((to_camel(name), name) for name in of.model_fields if name not in but)


# What of an item stands in the row as it is answered.
PLAIN: Final = _names(Item, "trainer", "sessions", "next_session")
COUNTS: Final = _names(SessionCounts)
NEXT: Final = _names(NextSession)

STAGES: Final = {Shown.HOME: queries.HOME, Shown.LEARNING: queries.LEARNING}


def get_cache(connection: HTTPConnection) -> ViewCache | None:
    """None without a Redis: then every answer is made from PostgreSQL."""
    return getattr(connection.app.state, "views", None)


Cache = Annotated[ViewCache | None, Depends(get_cache)]


@router.get("/home", response_model=ViewOut)
async def get_home(student_id: UUID, actor: Reader, db: Db, cache: Cache) -> Response:
    """What goes on or waits: every captured payment that is neither completed nor refunded, newest first."""
    return await _view(db, cache, actor, student_id, Shown.HOME)


@router.get("/learning", response_model=ViewOut)
async def get_learning(student_id: UUID, actor: Reader, db: Db, cache: Cache) -> Response:
    """Every course that was ever paid for, with its progress; completed and refunded ones too."""
    return await _view(db, cache, actor, student_id, Shown.LEARNING)


@router.get("/sessions")
async def list_sessions(
    student_id: UUID,
    actor: Reader,
    db: Db,
    limit: Annotated[int, Query(ge=1, le=LIMIT_MAX)] = 50,
    cursor: Annotated[str | None, Query(max_length=200)] = None,
) -> SessionPage:
    """All sessions by time, in pages; `nextCursor` of one page is the `cursor` of the next."""
    actor.require_student(student_id)
    after = Cursor.decode(cursor) if cursor is not None else None
    async with db.transaction(SOURCE, read_only=True) as tx:
        rows, following = await queries.list_sessions(tx, student_id, after, limit)
    items = [SessionOut.model_validate(row) for row in rows]
    return SessionPage(items=items, next_cursor=following.encode() if following else None)


async def _view(db: Database, cache: ViewCache | None, actor: Actor, student_id: UUID, shown: Shown) -> Response:
    actor.require_student(student_id)
    make = partial(make_view, student_id=student_id, shown=shown)
    if cache is not None:
        body = await cache.read(db, student_id, shown, make)
    else:
        body = (await make(db)).body
    return Response(body, media_type="application/json")


async def make_view(db: Tx | Database, student_id: UUID, shown: Shown) -> Made:
    """The answer, from PostgreSQL. Raises NotFound."""
    view = await queries.get_view(db, student_id, STAGES[shown])
    return Made(
        head=view.head,
        now=view.now,
        until=min((row["next_ends_at"] for row in view.items if row["next_ends_at"]), default=None),
        body=msgspec.json.encode({"version": view.head.version, "items": [_item(row) for row in view.items]}),
    )


def _item(row: Row) -> dict[str, Any]:
    """An `Item` as it is answered; what comes from our own tables is not judged once more."""
    item = {shown: row[name] for shown, name in PLAIN}
    item["trainer"] = {"id": row["trainer_id"], "name": row["trainer_name"]} if row["trainer_id"] else None
    item["sessions"] = {shown: row[name] for shown, name in COUNTS}
    item["nextSession"] = {shown: row[f"next_{name}"] for shown, name in NEXT} if row["next_id"] else None
    return item
