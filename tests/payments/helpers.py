"""What the tests of payments look at."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar
from uuid import UUID

from caravan.db import Database, Tx
from caravan.ids import new_id
from caravan.payments.webhooks import receive_webhook
from tests.builders import SANDBOX

T = TypeVar("T")


async def in_tx(db: Database, work: Callable[[Tx], Awaitable[T]]) -> T:
    return await db.transact(work, source="payment-service")


def body_of(type_: str, payment_id: UUID | str, cents: int | None = 360_000, **data: Any) -> bytes:
    fields: dict[str, Any] = {"paymentId": str(payment_id), "amountCents": cents, "currency": "INR"} | data
    return json.dumps({"type": type_, "timestamp": "2026-01-09T00:00:00Z", "data": fields}).encode()


async def tell(db: Database, type_: str, payment_id: UUID, cents: int = 360_000, *, id_: str = "", **data: Any) -> bool:
    """A webhook of the sandbox, received."""

    async def work(tx: Tx) -> bool:
        body = body_of(type_, payment_id, cents, **data)
        return await receive_webhook(tx, SANDBOX, SANDBOX.sign(id_ or f"msg_{new_id()}", tx.now, body), body)

    return await in_tx(db, work)


async def rows(db: Database, query: Any, **params: Any) -> list[dict[str, Any]]:
    async with db.transaction() as tx:
        return await tx.all(query, params)


async def said(db: Database, payment_id: UUID) -> list[str]:
    """The types of the events about a payment, in order."""
    found = await rows(
        db, "select type from outbox where correlation_id = %(id)s::text order by id", id=str(payment_id)
    )
    return [row["type"] for row in found]


async def state(db: Database, payment_id: UUID) -> dict[str, Any]:
    """Where a payment is: status, money, why it waits, whether it pays its checkout."""
    (row,) = await rows(
        db,
        "select p.status, p.captured_cents, p.refunded_cents, u.reason, u.payment_id is not null as undelivered,"
        " c.paid_by = p.id as payer from payments p join checkouts c on c.id = p.checkout_id"
        " left join undelivered u on u.payment_id = p.id where p.id = %(id)s",
        id=payment_id,
    )
    return row


async def somebody_waits(tx: Tx) -> None:
    """Returns once another transaction waits for a lock; the server has nothing else to wait on."""
    async with asyncio.timeout(10):
        # A snapshot of the activity is kept for a transaction unless it is cleared.
        while not await tx.value(
            "select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'"
        ):
            await tx.execute("select pg_stat_clear_snapshot()")
            await asyncio.sleep(0.005)
