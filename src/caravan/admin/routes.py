"""HTTP of the operator's side, `/api/v1/admin`. Support and admins read; web/policies says who may change what."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated, Any, Literal
from uuid import UUID

from fastapi import APIRouter, Header, Path, Query, Request

from caravan.admin import event_log, money, placing, purchases
from caravan.admin.deps import SOURCE, Notice, Subscriptions, Write
from caravan.admin.detail import get_detail
from caravan.admin.overview import get_overview
from caravan.admin.schemas import (
    AlertOut,
    AlertsOut,
    AllocationOut,
    AllocationsOut,
    ApproveIn,
    AssignedOut,
    AutoAssignIn,
    DeadLetterOut,
    DeadLettersOut,
    DiagnosesOut,
    DiagnosisOut,
    LagOut,
    LagsOut,
    LineOut,
    MarkSessionIn,
    MendPaymentIn,
    MendPurchaseIn,
    NoteIn,
    OverviewOut,
    PurchaseOut,
    PurchasesOut,
    RefundIn,
    RefundOut,
    RepairedOut,
    SyncedOut,
    WorkersOut,
)
from caravan.db import Tx
from caravan.deliveries import Stage
from caravan.eventlog.carrier import get_carrier
from caravan.eventlog.dead_letters import list_dead_letters
from caravan.eventlog.lag import list_lag
from caravan.eventlog.standing import stand
from caravan.eventlog.workers import list_workers
from caravan.fulfilment import alerts
from caravan.fulfilment.diagnose import diagnose
from caravan.fulfilment.stale_views import name_stale_views
from caravan.ids import new_id
from caravan.payments.providers import list_providers
from caravan.student_views.routes import Cache
from caravan.web.auth import Actor
from caravan.web.deps import Db, SettingsDep
from caravan.web.idempotency import once
from caravan.web.policies import allow
from caravan.web.schemas import QueryText

LIMIT_MAX = 200

router = APIRouter(prefix="/api/v1/admin", tags=["admin"])

Reader = Annotated[Actor, allow("admin:read")]
Repairer = Annotated[Actor, allow("admin:repair")]
Mender = Annotated[Actor, allow("admin:mend")]
Cashier = Annotated[Actor, allow("admin:money")]
Discarder = Annotated[Actor, allow("admin:discard")]
Limit = Annotated[int, Query(ge=1, le=LIMIT_MAX)]
Seq = Annotated[int, Path(ge=1, le=400)]
Cursor = Annotated[str | None, Query(max_length=200)]
# A request without a body is refused for its missing note, as one with an empty note.
OptionalNote = NoteIn | None


def _note(body: OptionalNote) -> str | None:
    return body.note if body else None


# ------------------------------------------------------------------ looking


@router.get("/overview")
async def get_admin_overview(_actor: Reader, db: Db, settings: SettingsDep) -> OverviewOut:
    """Undelivered and unclaimed money, and how far the payments of the last day and week have come."""
    async with db.transaction(SOURCE, read_only=True) as tx:
        return OverviewOut.of(await get_overview(tx, unclaimed_after=timedelta(minutes=settings.unclaimed_minutes)))


@router.get("/diagnose")
async def get_diagnosis(
    _actor: Reader,
    db: Db,
    cache: Cache,
    student_id: Annotated[UUID | None, Query(alias="studentId")] = None,
    course_id: Annotated[UUID | None, Query(alias="courseId")] = None,
    payment_id: Annotated[UUID | None, Query(alias="paymentId")] = None,
    purchase_id: Annotated[UUID | None, Query(alias="purchaseId")] = None,
    limit: Limit = 20,
) -> DiagnosesOut:
    """Stage, reason, evidence and the one action of some payments; without an id, of the most recent ones."""
    async with db.transaction(SOURCE, read_only=True) as tx:
        found = await diagnose(
            tx, student_id=student_id, course_id=course_id, payment_id=payment_id, purchase_id=purchase_id, limit=limit
        )
        found = await name_stale_views(tx, cache, found) if cache else found
    return DiagnosesOut(items=[DiagnosisOut.model_validate(finding) for finding in found])


@router.get("/purchases")
async def get_purchases(
    _actor: Reader,
    db: Db,
    stage: Stage | None = None,
    reason: Annotated[str | None, Query(pattern="^[A-Z_]{1,60}$")] = None,
    q: QueryText | None = None,
    cursor: Cursor = None,
    limit: Limit = 50,
) -> PurchasesOut:
    """Payments by stage, reason (business or technical) and search: an id of anything, e-mail, phone, a name."""
    async with db.transaction(SOURCE, read_only=True) as tx:
        page = await purchases.list_purchases(tx, stage=stage, reason=reason, q=q, cursor=cursor, limit=limit)
    return PurchasesOut(items=[LineOut.of(line) for line in page.items], next_cursor=page.next_cursor)


@router.get("/purchases/{purchase_id}")
async def get_purchase(purchase_id: UUID, _actor: Reader, db: Db) -> PurchaseOut:
    """One purchase with its timeline; a payment's id does as well."""
    async with db.transaction(SOURCE, read_only=True) as tx:
        return PurchaseOut.of_detail(await get_detail(tx, purchase_id))


@router.get("/allocations")
async def get_allocations(
    _actor: Reader,
    db: Db,
    status: Literal["waiting", "approved", "cancelled", "completed"] | None = None,
    cursor: Cursor = None,
    limit: Limit = 50,
) -> AllocationsOut:
    async with db.transaction(SOURCE, read_only=True) as tx:
        rows, following = await purchases.list_allocations(tx, status=status, cursor=cursor, limit=limit)
    return AllocationsOut(items=[AllocationOut.model_validate(row) for row in rows], next_cursor=following)


@router.get("/dead-letters")
async def get_dead_letters(
    _actor: Reader,
    db: Db,
    status: Literal["parked", "replayed", "discarded", "all"] = "parked",
    before: Annotated[UUID | None, Query(alias="cursor")] = None,
    limit: Limit = 50,
) -> DeadLettersOut:
    """Events that were given up, the newest first. The cursor is the last one's id."""
    async with db.transaction(SOURCE, read_only=True) as tx:
        letters = await list_dead_letters(tx, status=None if status == "all" else status, before=before, limit=limit)
    return DeadLettersOut(
        items=[DeadLetterOut.of(letter) for letter in letters],
        next_cursor=str(letters[-1].id) if len(letters) == limit else None,
    )


@router.get("/workers")
async def get_workers(_actor: Reader, db: Db) -> WorkersOut:
    """Who works, each with its state in a word and a sentence; and the services that have nobody."""
    async with db.transaction(SOURCE, read_only=True) as tx:
        return WorkersOut.of(stand(await list_workers(tx), await list_lag(tx)))


@router.get("/lag")
async def get_lag(_actor: Reader, db: Db) -> LagsOut:
    async with db.transaction(SOURCE, read_only=True) as tx:
        since = (await get_carrier(tx)).failed_over_since
        return LagsOut(items=[LagOut.model_validate(lag) for lag in await list_lag(tx)], failed_over_since=since)


@router.get("/alerts")
async def get_alerts(_actor: Reader, db: Db, state: Literal["open", "all"] = "open") -> AlertsOut:
    """What somebody should know of the platform itself; `all`: with what has ended."""
    async with db.transaction(SOURCE, read_only=True) as tx:
        found = await alerts.list_open(tx) + (await alerts.list_ended(tx) if state == "all" else [])
    return AlertsOut(items=[AlertOut.model_validate(alert) for alert in found])


# ------------------------------------------------------------------ payments


@router.post("/payments/{payment_id}/repair")
async def post_repair(
    payment_id: UUID,
    actor: Repairer,
    write: Write,
    subscriptions: Subscriptions,
    notice: Notice,
    body: OptionalNote = None,
) -> RepairedOut:
    """The one safe next step, through the worker's own code; says what it did."""

    async def work(tx: Tx) -> Any:
        return await money.repair(tx, actor, payment_id, _note(body), subscriptions=subscriptions, notice=notice)

    return RepairedOut.model_validate(await write(work))


@router.post("/payments/{payment_id}/refund")
async def post_refund(
    payment_id: UUID,
    request: Request,
    actor: Cashier,
    write: Write,
    settings: SettingsDep,
    body: RefundIn | None = None,
    idempotency_key: Annotated[str | None, Header(alias="Idempotency-Key")] = None,
) -> RefundOut:
    """All of it, or a part with the sessions that it takes away; `asCoins` for money that came twice.

    With an Idempotency-Key the same request gives money back once, however often it is sent.
    """
    given = body or RefundIn()
    raw = await request.body()
    refund_id = new_id()  # once: the transaction may run again

    async def refund(tx: Tx) -> RefundOut:
        done = await money.refund(
            tx,
            actor,
            payment_id,
            given.note,
            providers=list_providers(settings),
            amount_cents=given.amount_cents,
            sessions=given.sessions,
            as_coins=settings.coin_value_cents if given.as_coins else None,
            refund_id=refund_id,
        )
        return RefundOut.model_validate(done)

    async def work(tx: Tx) -> RefundOut:
        if idempotency_key is None:
            return await refund(tx)

        async def answer() -> tuple[int, dict[str, Any]]:
            return 200, (await refund(tx)).model_dump(mode="json", by_alias=True)

        route = f"POST /api/v1/admin/payments/{payment_id}/refund"
        _status, kept = await once(tx, actor, idempotency_key, route, raw, answer)
        return RefundOut.model_validate(kept)

    return await write(work)


@router.post("/payments/{payment_id}/accept")
async def post_accept(payment_id: UUID, actor: Cashier, write: Write, body: OptionalNote = None) -> DiagnosisOut:
    """Another amount than asked for will do (AMOUNT_MISMATCH)."""

    async def work(tx: Tx) -> DiagnosisOut:
        await money.accept(tx, actor, payment_id, _note(body))
        return await now_of(tx, payment_id)

    return await write(work)


@router.post("/payments/{payment_id}/hold")
async def post_hold(payment_id: UUID, actor: Mender, write: Write, body: OptionalNote = None) -> DiagnosisOut:
    async def work(tx: Tx) -> DiagnosisOut:
        await money.hold(tx, actor, payment_id, _note(body))
        return await now_of(tx, payment_id)

    return await write(work)


@router.post("/payments/{payment_id}/release")
async def post_release(
    payment_id: UUID, actor: Mender, write: Write, notice: Notice, body: OptionalNote = None
) -> DiagnosisOut:
    async def work(tx: Tx) -> DiagnosisOut:
        await money.release(tx, actor, payment_id, _note(body), notice=notice)
        return await now_of(tx, payment_id)

    return await write(work)


@router.patch("/payments/{payment_id}")
async def patch_payment(payment_id: UUID, body: MendPaymentIn, actor: Mender, write: Write) -> DiagnosisOut:
    """Say what an imported payment didn't (TIER_UNKNOWN, INVALID_SCHEDULE), and go on with it."""

    async def work(tx: Tx) -> DiagnosisOut:
        await money.mend_payment(
            tx,
            actor,
            payment_id,
            body.note,
            session_count=body.session_count,
            time_slot=body.time_slot,
            start_date=body.start_date,
        )
        return await now_of(tx, payment_id)

    return await write(work)


async def now_of(tx: Tx, payment_id: UUID | None = None, *, purchase_id: UUID | None = None) -> DiagnosisOut:
    (finding,) = await diagnose(tx, payment_id=payment_id, purchase_id=purchase_id)
    return DiagnosisOut.model_validate(finding)


# ------------------------------------------------------------------ purchases, trainers, sessions


@router.patch("/purchases/{purchase_id}")
async def patch_purchase(
    purchase_id: UUID, body: MendPurchaseIn, actor: Mender, write: Write, notice: Notice
) -> DiagnosisOut:
    """Another slot or start for a purchase that waits (STUDENT_CONFLICT, INVALID_SCHEDULE)."""

    async def work(tx: Tx) -> DiagnosisOut:
        await placing.mend_purchase(
            tx, actor, purchase_id, body.note, time_slot=body.time_slot, start_date=body.start_date, notice=notice
        )
        return await now_of(tx, purchase_id=purchase_id)

    return await write(work)


@router.post("/purchases/{purchase_id}/sessions/{seq}")
async def post_session(
    purchase_id: UUID, seq: Seq, body: MarkSessionIn, actor: Mender, write: Write, notice: Notice
) -> DiagnosisOut:
    """Note how a session went; a trainer's absence makes one owed."""

    async def work(tx: Tx) -> DiagnosisOut:
        await placing.mark_session(tx, actor, purchase_id, seq, body.status, body.note, notice=notice)
        return await now_of(tx, purchase_id=purchase_id)

    return await write(work)


@router.post("/allocations/auto-assign")
async def post_auto_assign(body: AutoAssignIn, actor: Repairer, write: Write, notice: Notice) -> AssignedOut:
    """Find a trainer as the worker would. Again changes nothing; where it has to wait, 409 with the reason as code."""

    async def work(tx: Tx) -> placing.Assigned:
        return await placing.auto_assign(
            tx,
            actor,
            purchase_id=body.purchase_id,
            student_id=body.student_id,
            course_id=body.course_id,
            time_slot=body.time_slot,
            start_date=body.start_date,
            note=body.note,
            notice=notice,
        )

    assigned = await write(work)
    if assigned.refusal is not None:
        raise assigned.refusal
    return AssignedOut.model_validate(assigned)


@router.post("/allocations/{allocation_id}/approve")
async def post_approve(
    allocation_id: UUID, actor: Repairer, write: Write, notice: Notice, body: ApproveIn | None = None
) -> AssignedOut:
    """Give a waiting allocation this trainer, or the best one; 409 with the reason leaves it as it is."""
    given = body or ApproveIn()

    async def work(tx: Tx) -> placing.Assigned:
        return await placing.approve(tx, actor, allocation_id, given.trainer_id, given.note, notice=notice)

    return AssignedOut.model_validate(await write(work))


@router.post("/allocations/{allocation_id}/sessions")
async def post_sessions(allocation_id: UUID, actor: Repairer, write: Write, body: NoteIn | None = None) -> SyncedOut:
    """Make the sessions that are missing."""

    async def work(tx: Tx) -> dict[str, int]:
        return await placing.create_sessions(tx, actor, allocation_id, _note(body))

    return SyncedOut(**await write(work))


# ------------------------------------------------------------------ dead letters


@router.post("/dead-letters/{dead_letter_id}/replay")
async def post_replay(
    dead_letter_id: UUID, actor: Repairer, write: Write, subscriptions: Subscriptions, body: OptionalNote = None
) -> DeadLetterOut:
    async def work(tx: Tx) -> DeadLetterOut:
        letter = await event_log.replay(tx, actor, dead_letter_id, _note(body), subscriptions=subscriptions)
        return DeadLetterOut.of(letter)

    return await write(work)


@router.post("/dead-letters/{dead_letter_id}/discard")
async def post_discard(
    dead_letter_id: UUID, actor: Discarder, write: Write, body: OptionalNote = None
) -> DeadLetterOut:
    async def work(tx: Tx) -> DeadLetterOut:
        return DeadLetterOut.of(await event_log.discard(tx, actor, dead_letter_id, _note(body)))

    return await write(work)
