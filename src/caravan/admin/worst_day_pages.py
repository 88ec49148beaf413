"""The console of the worst day: pauses, many repairs at once, unclaimed money. As admin/pages."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import RedirectResponse, Response

from caravan import pauses
from caravan.admin import worst_day
from caravan.admin.deps import SOURCE, Notice, Subscriptions, Write
from caravan.admin.forms import EVERY, read_chosen_scope, read_course, read_limit, read_scope
from caravan.admin.pages import Reader, Text, read_banners, show
from caravan.deliveries import Reason
from caravan.errors import DomainError
from caravan.fulfilment.bulk import Chosen, Done
from caravan.fulfilment.diagnose import Technical
from caravan.pauses import PAUSABLE
from caravan.web.auth import Actor
from caravan.web.deps import Db
from caravan.web.pages import page_actor

router = APIRouter(prefix="/admin", include_in_schema=False, dependencies=[Depends(read_banners)])

Pauser = Annotated[Actor, page_actor("admin:pause")]
Repairer = Annotated[Actor, page_actor("admin:bulk")]
Cashier = Annotated[Actor, page_actor("admin:money")]

LIST_COURSES = "select id, title from courses order by title, id"
LIST_CITIES = "select name from cities order by name"


async def _pauses(
    request: Request, actor: Actor, db: Db, *, under_way: int = 0, problem: DomainError | None = None
) -> Response:
    async with db.transaction(SOURCE, read_only=True) as tx:
        named = {"courses": await tx.all(LIST_COURSES), "cities": await tx.values(LIST_CITIES)}
    named |= {"stages": PAUSABLE, "under_way": under_way, "every": EVERY}
    return show(request, actor, "pauses.html", problem=problem, **named)


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
        scope = read_chosen_scope(stage, course_id, city)
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
        scope = read_scope(stage, course_id, city)
        await write(lambda tx: worst_day.resume(tx, actor, scope, note))
    except DomainError as problem:
        return await _pauses(request, actor, db, problem=problem)
    return RedirectResponse("/admin/pauses", status_code=303)


REASONS = (*Technical, *Reason)


async def _repairs(
    request: Request,
    actor: Actor,
    db: Db,
    given: dict[str, Any],
    *,
    done: Done | None = None,
    problem: DomainError | None = None,
) -> Response:
    async with db.transaction(SOURCE, read_only=True) as tx:
        named = {"courses": await tx.all(LIST_COURSES), "cities": await tx.values(LIST_CITIES)}
    named |= {"reasons": REASONS, "done": done, "given": given}
    return show(request, actor, "repairs.html", problem=problem, **named)


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
        chosen = Chosen(reason.strip() or None, read_course(course_id), city.strip() or None, read_limit(limit))
        done = await worst_day.repair_many(
            db, actor, chosen, note, source=SOURCE, subscriptions=subscriptions, notice=notice, dry_run=bool(dry_run)
        )
    except DomainError as problem:
        return await _repairs(request, actor, db, given, problem=problem)
    return await _repairs(request, actor, db, given, done=done)


@router.post("/unclaimed/dealt-with")
async def press_unclaimed(
    actor: Cashier, write: Write, provider: Text = "", event_id: Text = "", note: Text = ""
) -> Response:
    await write(lambda tx: worst_day.deal_with_unclaimed(tx, actor, provider, event_id, note))
    return RedirectResponse("/admin#unclaimed", status_code=303)
