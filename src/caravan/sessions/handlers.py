"""What sessions hear."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from caravan import deliveries
from caravan.db import Tx
from caravan.events import BookingReleased, Event, PurchaseRefunded, TrainerAllocated
from caravan.sessions.operations import sync_sessions


async def schedule_sessions(tx: Tx, events: Sequence[Event]) -> None:
    purchases: list[UUID] = []
    refunded: list[UUID] = []
    for event in events:
        if isinstance(event, PurchaseRefunded):
            refunded.append(event.payment_id)
        elif isinstance(event, TrainerAllocated | BookingReleased) and event.purchase_id:
            purchases.append(event.purchase_id)
    if refunded:
        purchases += (await deliveries.find_purchases(tx, refunded)).values()
    if purchases:
        await sync_sessions(tx, list(dict.fromkeys(purchases)))
