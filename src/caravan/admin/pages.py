"""The console: the operator's API as pages. A form does what the API's route of the same name does."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import date, timedelta
from typing import Annotated, Any, Final
from uuid import UUID

from fastapi import APIRouter, Depends, Form, Query, Request, Response
from fastapi.responses import RedirectResponse

from caravan.admin import event_log, money, placing, purchases, wording, worst_day
from caravan.admin.deps import SOURCE, Notice, Subscriptions, Write
from caravan.admin.detail import get_detail
from caravan.admin.forms import read_cents, read_count, read_date, read_degrees, read_sessions
from caravan.admin.overview import get_overview, sum_undelivered
from caravan.db import Tx
from caravan.deliveries import Stage
from caravan.errors import Conflict, DomainError, Invalid
from caravan.eventlog.carrier import get_carrier
from caravan.eventlog.dead_letters import list_dead_letters
from caravan.eventlog.lag import list_lag
from caravan.eventlog.standing import stand
from caravan.eventlog.workers import list_workers
from caravan.fulfilment import alerts
from caravan.fulfilment.repair import Repaired
from caravan.fulfilment.wording import reason_words, still_waits
from caravan.pauses import list_pauses
from caravan.payments.providers import list_providers
from caravan.web.auth import Actor
from caravan.web.credentials import find_token
from caravan.web.deps import Db, SettingsDep
from caravan.web.pages import environment, page_actor, render
from caravan.web.policies import POLICIES, judge
from caravan.web.schemas import QueryText, Storable

PAGE_LINES: Final = 50
UNCLAIMED_SHOWN: Final = 20
WAITS: Final = "waits"  # what a page is told of a repair that could move nothing
CHOSEN_WAITS: Final = "chosen_waits"  # of another slot at which it still waits


async def read_banners(request: Request, db: Db) -> None:
    """For the banners of every page. Who has no sign-in at all gets no page either."""
    request.state.alerts, request.state.watched, request.state.pauses = [], True, []
    if find_token(request):
        async with db.transaction(SOURCE, read_only=True) as tx:
            request.state.alerts = await alerts.list_open(tx)
            request.state.watched = await alerts.is_watched(tx)
            request.state.pauses = await list_pauses(tx)


router = APIRouter(prefix="/admin", include_in_schema=False, dependencies=[Depends(read_banners)])
Reader = Annotated[Actor, page_actor("admin:read")]
Presser = Annotated[Actor, page_actor("admin:repair")]
Text = Annotated[str, Form(max_length=2000), Storable]
Choice = Annotated[str, Query(pattern="^[A-Za-z_]{0,60}$")]
Place = Annotated[str, Query(max_length=200)]

environment.filters.update(reason=reason_words, here=wording.here)


class ChangedMeanwhile(Conflict):
    """The payment has changed since this page was made: look at it again."""

    code = "CHANGED_MEANWHILE"


class RefundUnclear(Invalid):
    """Say how much of it goes back, or choose all of it: one of the two. Nothing was refunded."""

    code = "REFUND_AMOUNT_REQUIRED"


def show(
    request: Request, actor: Actor, template: str, *, problem: DomainError | None = None, **context: Any
) -> Response:
    """A page of the console, with why something was refused; its templates ask `may(action)` before they show a
    button."""

    def may(action: str) -> bool:
        return actor.role in POLICIES[action]

    context |= {"may": may, "state": wording.state_sentence, "precise": wording.precise}
    context |= {"alerts": request.state.alerts, "watched": request.state.watched, "where": wording.where_to_look}
    context |= {"pauses": request.state.pauses, "problem": problem.detail if problem else ""}
    return render(request, actor, f"admin/{template}", status_code=problem.status if problem else 200, **context)


# ------------------------------------------------------------------ looking


@router.get("")
async def overview_page(request: Request, actor: Reader, db: Db, settings: SettingsDep) -> Response:
    async with db.transaction(SOURCE, read_only=True) as tx:
        seen = await get_overview(tx, unclaimed_after=timedelta(minutes=settings.unclaimed_minutes))
        lags = await list_lag(tx)
        letters = await list_dead_letters(tx, limit=100)
        return show(
            request,
            actor,
            "overview.html",
            seen=seen,
            lags=lags,
            parked=len(letters),
            unclaimed_shown=UNCLAIMED_SHOWN,
            now=tx.now,
        )


@router.get("/waiting")
async def waiting_page(request: Request, actor: Reader, db: Db, reason: Choice = "", cursor: Place = "") -> Response:
    """Undelivered money by reason, each with the one button that moves it."""
    async with db.transaction(SOURCE, read_only=True) as tx:
        undelivered = await sum_undelivered(tx)
        page = await purchases.list_undelivered(tx, reason=reason or None, cursor=cursor or None, limit=PAGE_LINES)
        return show(request, actor, "waiting.html", page=page, reason=reason, undelivered=undelivered, now=tx.now)


@router.get("/purchases")
async def purchases_page(
    request: Request, actor: Reader, db: Db, q: QueryText = "", stage: Choice = "", cursor: Place = ""
) -> Response:
    chosen = Stage(stage) if stage in {*Stage} else None
    async with db.transaction(SOURCE, read_only=True) as tx:
        page = await purchases.list_purchases(
            tx, stage=chosen, reason=None, q=q.strip() or None, cursor=cursor or None, limit=PAGE_LINES
        )
        return show(
            request, actor, "purchases.html", page=page, q=q, stage=chosen or "", stages=list(Stage), now=tx.now
        )


@router.get("/purchases/{some_id}")
async def purchase_page(request: Request, some_id: UUID, actor: Reader, db: Db, done: Choice = "") -> Response:
    return await _purchase(request, actor, db, some_id, done=done)


async def _purchase(
    request: Request, actor: Actor, db: Db, some_id: UUID, *, done: str = "", problem: DomainError | None = None
) -> Response:
    async with db.transaction(SOURCE, read_only=True) as tx:
        detail = await get_detail(tx, some_id, local=True)
        by_hand = [moment.said for moment in detail.timeline if moment.kind == "by hand"]
        said = by_hand[-1] if done and by_hand else ""
        return show(
            request,
            actor,
            "purchase.html",
            problem=problem,
            detail=detail,
            line=detail.line,
            finding=detail.line.finding,
            done=said if done not in (WAITS, CHOSEN_WAITS) else "",
            waits=_still(done, said, detail.line.finding.reason),
            now=tx.now,
        )


def _still(done: str, said: str, reason: str | None) -> str:
    """What a page says of a button after which it waits on."""
    if done == CHOSEN_WAITS:
        return said
    return still_waits(reason) if done == WAITS and reason else ""


@router.get("/dead-letters")
async def dead_letters_page(request: Request, actor: Reader, db: Db) -> Response:
    return await _dead_letters(request, actor, db)


async def _dead_letters(request: Request, actor: Actor, db: Db, problem: DomainError | None = None) -> Response:
    async with db.transaction(SOURCE, read_only=True) as tx:
        parked = await list_dead_letters(tx, limit=PAGE_LINES)
        resolved = [letter for letter in await list_dead_letters(tx, status=None) if letter.status != "parked"]
    return show(request, actor, "dead_letters.html", problem=problem, parked=parked, resolved=resolved)


@router.get("/workers")
async def workers_page(request: Request, actor: Reader, db: Db) -> Response:
    async with db.transaction(SOURCE, read_only=True) as tx:
        lags = await list_lag(tx)
        since = (await get_carrier(tx)).failed_over_since
        standings = stand(await list_workers(tx), lags)
        return show(request, actor, "workers.html", lags=lags, standings=standings, failed_over_since=since)


@router.get("/alerts")
async def alerts_page(request: Request, actor: Reader, db: Db) -> Response:
    """What is so now, and what was."""
    async with db.transaction(SOURCE, read_only=True) as tx:
        return show(request, actor, "alerts.html", ended=await alerts.list_ended(tx), now=tx.now)


# ------------------------------------------------------------------ pressing


@router.post("/payments/{payment_id}/{button}")
async def press(
    request: Request,
    payment_id: UUID,
    button: str,
    actor: Presser,
    db: Db,
    write: Write,
    settings: SettingsDep,
    subscriptions: Subscriptions,
    notice: Notice,
    note: Text = "",
    amount: Text = "",
    sessions: Text = "",
    all_of_it: Text = "",
    as_coins: Text = "",
    refunded_cents: Text = "",
    session_count: Text = "",
    time_slot: Text = "",
    start_date: Text = "",
    latitude: Text = "",
    longitude: Text = "",
) -> Response:
    """One of the buttons of a payment; the page again, with what was done or why not."""
    needed = BUTTONS.get(button)
    if needed is None:
        raise NoSuchButton
    judge(actor, needed)
    try:
        starts = read_date(start_date)
        cents, taken = read_cents(amount), read_sessions(sessions)
        count = read_count(session_count)
        if button == "refund":
            _refuse_unclear(cents, taken, all_of_it)

        async def work(tx: Tx) -> Any:
            match button:
                case "repair":
                    return await money.repair(tx, actor, payment_id, note, subscriptions=subscriptions, notice=notice)
                case "refund":
                    await _refuse_stale(tx, payment_id, refunded_cents)
                    return await money.refund(
                        tx,
                        actor,
                        payment_id,
                        note,
                        providers=list_providers(settings),
                        amount_cents=cents,
                        sessions=taken,
                        as_coins=settings.coin_value_cents if as_coins else None,
                    )
                case "accept":
                    return await money.accept(tx, actor, payment_id, note)
                case "hold":
                    return await money.hold(tx, actor, payment_id, note)
                case "release":
                    return await money.release(tx, actor, payment_id, note, notice=notice)
                case "confirm-start":
                    return await worst_day.confirm_start(tx, actor, payment_id, note, start_date=starts, notice=notice)
                case "mend_payment":
                    return await money.mend_payment(
                        tx,
                        actor,
                        payment_id,
                        note,
                        session_count=count,
                        time_slot=time_slot.strip() or None,
                        start_date=starts,
                    )
                case "enter-location":
                    north, east = read_degrees(latitude, 90), read_degrees(longitude, 180)
                    return await money.enter_location(
                        tx, actor, payment_id, note, latitude=north, longitude=east, notice=notice
                    )
                case _:
                    return await _mend_purchase(tx, actor, payment_id, note, time_slot, starts, notice)

        answer = await write(work)
    except DomainError as problem:
        if problem.status == 404:
            raise
        return await _purchase(request, actor, db, payment_id, problem=problem)
    return RedirectResponse(f"/admin/purchases/{payment_id}?done={_came_of(button, answer)}", status_code=303)


def _came_of(button: str, answer: Any) -> str:
    """What the page is told of a button that was pressed."""
    if isinstance(answer, Repaired) and answer.still_waits:
        return WAITS
    if isinstance(answer, placing.Mended) and answer.still_waits:
        return CHOSEN_WAITS
    return button.replace("-", "_")


class NoSuchButton(DomainError):
    """There is no such button."""

    code = "NOT_FOUND"
    status = 404


# What each button needs, as the API's routes do.
BUTTONS: Final = {
    "repair": "admin:repair",
    "refund": "admin:money",
    "accept": "admin:money",
    "hold": "admin:mend",
    "release": "admin:mend",
    "confirm-start": "admin:mend",
    "mend_payment": "admin:mend",
    "mend_purchase": "admin:mend",
    "enter-location": "students:update",
}

GET_REFUNDED = "select refunded_cents from payments where id = %(payment_id)s for update"


def _refuse_unclear(cents: int | None, sessions: list[int] | int | None, all_of_it: str) -> None:
    """An empty field must not end a purchase. Programs may leave the amount out: they mean it."""
    part = cents is not None
    if part == bool(all_of_it) or (sessions is not None and not part):
        raise RefundUnclear


async def _refuse_stale(tx: Tx, payment_id: UUID, refunded_cents: str) -> None:
    """A form sent twice must not give a part back twice."""
    if str(await tx.value(GET_REFUNDED, {"payment_id": payment_id})) != refunded_cents:
        raise ChangedMeanwhile


async def _mend_purchase(
    tx: Tx, actor: Actor, payment_id: UUID, note: str, time_slot: str, start_date: date | None, notice: timedelta
) -> placing.Mended:
    detail = await get_detail(tx, payment_id)
    return await placing.mend_purchase(
        tx,
        actor,
        detail.line.finding.purchase_id or payment_id,
        note,
        time_slot=time_slot.strip() or None,
        start_date=start_date,
        notice=notice,
    )


@router.post("/dead-letters/{dead_letter_id}/replay")
async def press_replay(
    request: Request,
    dead_letter_id: UUID,
    actor: Presser,
    db: Db,
    write: Write,
    subscriptions: Subscriptions,
    note: Text = "",
) -> Response:
    async def work(tx: Tx) -> Any:
        return await event_log.replay(tx, actor, dead_letter_id, note, subscriptions=subscriptions)

    return await _resolve(request, actor, db, write, work)


@router.post("/dead-letters/{dead_letter_id}/discard")
async def press_discard(
    request: Request,
    dead_letter_id: UUID,
    actor: Annotated[Actor, page_actor("admin:discard")],
    db: Db,
    write: Write,
    note: Text = "",
) -> Response:
    async def work(tx: Tx) -> Any:
        return await event_log.discard(tx, actor, dead_letter_id, note)

    return await _resolve(request, actor, db, write, work)


async def _resolve(
    request: Request, actor: Actor, db: Db, write: Write, work: Callable[[Tx], Awaitable[Any]]
) -> Response:
    try:
        await write(work)
    except DomainError as problem:
        return await _dead_letters(request, actor, db, problem)
    return RedirectResponse("/admin/dead-letters", status_code=303)
