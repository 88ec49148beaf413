"""The console of the worst day: pauses, many repairs at once, unclaimed money. As admin/pages."""

from __future__ import annotations

from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Depends, Request
from fastapi.responses import RedirectResponse, Response

from caravan import pauses
from caravan.admin import worst_day
from caravan.admin.pages import Reader, Text, read_banners, show
from caravan.admin.routes import SOURCE, Notice, Subscriptions, Write
from caravan.admin.worst_day_routes import MANY_MAX
from caravan.deliveries import Reason, Stage
from caravan.errors import DomainError, Invalid
from caravan.fulfilment.bulk import Chosen, Done
from caravan.fulfilment.diagnose import Technical
from caravan.ids import parse_uuid
from caravan.pauses import PAUSABLE, Scope
from caravan.web.auth import Actor
from caravan.web.deps import Db
from caravan.web.pages import page_actor

router = APIRouter(prefix="/admin", include_in_schema=False, dependencies=[Depends(read_banners)])

Pauser = Annotated[Actor, page_actor("admin:pause")]
Repairer = Annotated[Actor, page_actor("admin:bulk")]
Cashier = Annotated[Actor, page_actor("admin:money")]


class CourseUnreadable(Invalid):
    """A course is named by its id."""

    code = "COURSE_UNREADABLE"


class StageUnreadable(Invalid):
    """Choose a stage: paid, purchased or allocated."""

    code = "STAGE_NOT_PAUSABLE"


class LimitUnreadable(Invalid):
    """How many at most is a number from 1 to 100."""

    code = "LIMIT_UNREADABLE"


def _read_course(text: str) -> UUID | None:
    course = parse_uuid(text.strip()) if text.strip() else None
    if text.strip() and course is None:
        raise CourseUnreadable
    return course


def _read_scope(stage: str, course_id: str, city: str) -> Scope:
    if stage not in PAUSABLE:
        raise StageUnreadable
    return Scope(Stage(stage), _read_course(course_id), city.strip() or None)


def _read_limit(text: str) -> int:
    text = text.strip() or "10"
    if not (text.isascii() and text.isdecimal() and len(text) <= 3 and 1 <= int(text) <= MANY_MAX):
        raise LimitUnreadable
    return int(text)


LIST_COURSES = "select id, title from courses order by title, id"
LIST_CITIES = "select name from cities order by name"


async def _pauses(
    request: Request, actor: Actor, db: Db, *, under_way: int = 0, problem: DomainError | None = None
) -> Response:
    async with db.transaction(SOURCE, read_only=True) as tx:
        return show(
            request,
            actor,
            "pauses.html",
            status_code=problem.status if problem else 200,
            stages=PAUSABLE,
            courses=await tx.all(LIST_COURSES),
            cities=await tx.values(LIST_CITIES),
            under_way=under_way,
            problem=problem.detail if problem else "",
        )


@router.get("/pauses")
async def pauses_page(request: Request, actor: Reader, db: Db) -> Response:
    """What stands still, and the buttons for it."""
    return await _pauses(request, actor, db)


@router.post("/pauses")
async def press_pause(
    request: Request,
    actor: Pauser,
    db: Db,
    write: Write,
    stage: Text = "",
    course_id: Text = "",
    city: Text = "",
    note: Text = "",
) -> Response:
    try:
        scope = _read_scope(stage, course_id, city)
        _, under_way = await pauses.take_hold(db, write(lambda tx: worst_day.pause(tx, actor, scope, note)))
    except DomainError as problem:
        return await _pauses(request, actor, db, problem=problem)
    if under_way:
        request.state.pauses = None
        return await _pauses(request, actor, db, under_way=under_way)
    return RedirectResponse("/admin/pauses", status_code=303)


@router.post("/pauses/resume")
async def press_resume(
    request: Request,
    actor: Pauser,
    db: Db,
    write: Write,
    stage: Text = "",
    course_id: Text = "",
    city: Text = "",
    note: Text = "",
) -> Response:
    try:
        scope = _read_scope(stage, course_id, city)
        await write(lambda tx: worst_day.resume(tx, actor, scope, note))
    except DomainError as problem:
        return await _pauses(request, actor, db, problem=problem)
    return RedirectResponse("/admin/pauses", status_code=303)


REASONS = (*Technical, *Reason)


async def _repairs(
    request: Request, actor: Actor, db: Db, given: dict[str, Any], *, done: Done | None = None, problem: str = ""
) -> Response:
    async with db.transaction(SOURCE, read_only=True) as tx:
        named = {"courses": await tx.all(LIST_COURSES), "cities": await tx.values(LIST_CITIES)}
    status = 422 if problem else 200
    return show(
        request,
        actor,
        "repairs.html",
        status_code=status,
        reasons=REASONS,
        done=done,
        given=given,
        problem=problem,
        **named,
    )


@router.get("/repairs")
async def repairs_page(request: Request, actor: Reader, db: Db) -> Response:
    """Repair many at once."""
    blank = {"reason": "", "course_id": "", "city": "", "limit": "10", "dry_run": True}
    return await _repairs(request, actor, db, blank)


@router.post("/repairs")
async def press_repairs(
    request: Request,
    actor: Repairer,
    db: Db,
    notice: Notice,
    subscriptions: Subscriptions,
    reason: Text = "",
    course_id: Text = "",
    city: Text = "",
    limit: Text = "",
    dry_run: Text = "",
    note: Text = "",
) -> Response:
    """The page again, with what was done in a table. Pressed twice it finds less to do."""
    given = {"reason": reason, "course_id": course_id, "city": city, "limit": limit, "dry_run": bool(dry_run)}
    try:
        chosen = Chosen(reason.strip() or None, _read_course(course_id), city.strip() or None, _read_limit(limit))
        done = await worst_day.repair_many(
            db, actor, chosen, note, source=SOURCE, subscriptions=subscriptions, notice=notice, dry_run=bool(dry_run)
        )
    except DomainError as problem:
        return await _repairs(request, actor, db, given, problem=problem.detail)
    return await _repairs(request, actor, db, given, done=done)


@router.post("/unclaimed/dealt-with")
async def press_unclaimed(
    actor: Cashier, write: Write, provider: Text = "", event_id: Text = "", note: Text = ""
) -> Response:
    await write(lambda tx: worst_day.deal_with_unclaimed(tx, actor, provider, event_id, note))
    return RedirectResponse("/admin#unclaimed", status_code=303)
