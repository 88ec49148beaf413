"""HTTP of payments: buy, look, confirm in the sandbox, and what providers tell us."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Depends, Header, Request
from fastapi.responses import JSONResponse

from caravan.db import Tx
from caravan.errors import DomainError, NotFound
from caravan.payments import store
from caravan.payments.model import Rules, Status, advances
from caravan.payments.operations import (
    Created,
    confirm_locked,
    create_payment,
    get_payment_view,
    lock_payment,
    retry_payment,
)
from caravan.payments.providers import Provider, get_provider, list_providers
from caravan.payments.schemas import CreatedOut, PaymentIn, PaymentOut, ReceivedOut
from caravan.payments.webhooks import receive_webhook
from caravan.web import audit
from caravan.web.auth import Actor
from caravan.web.deps import Db, SettingsDep, Trace
from caravan.web.idempotency import once
from caravan.web.policies import allow, public

SOURCE = "payment-service"
WEBHOOK_BYTES_MAX = 256 * 1024
NO_CHECKOUT = "There is no such checkout."
NO_PAYMENT = "There is no such payment."

router = APIRouter(prefix="/api/v1", tags=["payments"])


class BodyTooLarge(DomainError):
    """A webhook has 256 kB at most."""

    code = "BODY_TOO_LARGE"
    status = 413


def find_providers(settings: SettingsDep) -> dict[str, Provider]:
    return list_providers(settings)


Providers = Annotated[dict[str, Provider], Depends(find_providers)]
IdempotencyKey = Annotated[str | None, Header(alias="Idempotency-Key")]


@router.post("/payments", status_code=201, response_model=CreatedOut)
async def post_payment(
    body: PaymentIn,
    request: Request,
    actor: Annotated[Actor, allow("payments:create")],
    db: Db,
    settings: SettingsDep,
    providers: Providers,
    trace: Trace,
    idempotency_key: IdempotencyKey = None,
) -> JSONResponse:
    """Buy a course, or try again to pay a checkout. With an Idempotency-Key the same request has one answer."""
    raw, document = await request.body(), await request.json()

    async def work(tx: Tx) -> tuple[int, dict[str, Any]]:
        tx.trace = trace

        async def create() -> tuple[int, dict[str, Any]]:
            created = await _create(tx, actor, body, document, Rules.of(settings), providers)
            await _keep(tx, actor, "payments:create", created.payment.id)
            answer = CreatedOut.of(created.payment, created.checkout)
            return 201, answer.model_dump(mode="json", by_alias=True)

        if idempotency_key is None:
            return await create()
        return await once(tx, actor, idempotency_key, "POST /api/v1/payments", raw, create)

    status, answer = await db.transact(work, source=SOURCE)
    return JSONResponse(answer, status_code=status)


async def _create(
    tx: Tx, actor: Actor, body: PaymentIn, document: dict[str, Any], rules: Rules, providers: Mapping[str, Provider]
) -> Created:
    if body.checkout_id is None:
        order = body.order(document)
        actor.require_student(order.student_id)
        return await create_payment(tx, order, rules, providers, account_id=actor.account_id)
    student_id = await store.find_checkout_student(tx, body.checkout_id)
    if student_id is None:
        raise NotFound(NO_CHECKOUT)
    actor.require_student(student_id, NO_CHECKOUT)
    return await retry_payment(
        tx, body.checkout_id, rules, providers, account_id=actor.account_id, coins_wanted=body.coins
    )


async def _keep(tx: Tx, actor: Actor, action: str, payment_id: UUID) -> None:
    await audit.record_for_family(tx, actor, action=action, subject_type="payment", subject_id=payment_id)


@router.get("/payments/{payment_id}", response_model=PaymentOut)
async def get_payment(payment_id: UUID, actor: Annotated[Actor, allow("payments:read")], db: Db) -> PaymentOut:
    async with db.transaction(SOURCE, read_only=True) as tx:
        return await _see(tx, actor, payment_id)


async def _see(tx: Tx, actor: Actor, payment_id: UUID) -> PaymentOut:
    seen = await get_payment_view(tx, payment_id)
    actor.require_student(seen["student_id"], NO_PAYMENT)
    return PaymentOut.model_validate(seen)


@router.post("/payments/{payment_id}/confirm", response_model=PaymentOut)
async def post_confirm(
    payment_id: UUID, actor: Annotated[Actor, allow("payments:confirm")], db: Db, providers: Providers, trace: Trace
) -> PaymentOut:
    """Pay in the sandbox. A payment that is paid already is answered as it is."""

    async def work(tx: Tx) -> PaymentOut:
        tx.trace = trace
        payment = await lock_payment(tx, payment_id)
        actor.require_student(payment.student_id, NO_PAYMENT)
        if advances(payment.status, Status.SUCCEEDED):
            await _keep(tx, actor, "payments:confirm", payment_id)
        await confirm_locked(tx, payment, providers)
        return await _see(tx, actor, payment_id)

    return await db.transact(work, source=SOURCE, few=True)


@router.post("/webhooks/{provider}", response_model=ReceivedOut, dependencies=[public("webhooks:receive")])
async def post_webhook(provider: str, request: Request, db: Db, providers: Providers, trace: Trace) -> ReceivedOut:
    """What a payment provider tells us: the raw body, signed. 200 once it is stored; the same event again is fine."""
    sender = get_provider(providers, provider)
    body = await _read_body(request)
    headers = dict(request.headers)

    async def work(tx: Tx) -> bool:
        tx.trace = trace
        return await receive_webhook(tx, sender, headers, body)

    return ReceivedOut(new=await db.transact(work, source=SOURCE, few=True))


async def _read_body(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > WEBHOOK_BYTES_MAX:
            raise BodyTooLarge
    return bytes(body)
