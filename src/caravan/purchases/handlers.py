"""What purchases hear."""

from __future__ import annotations

from collections.abc import Sequence

import structlog

from caravan import deliveries
from caravan.db import Tx
from caravan.deliveries import Reason
from caravan.events import CourseUpdated, Event, PurchaseConfirmed, PurchaseRefunded, StudentUpdated
from caravan.purchases import operations

log: structlog.stdlib.BoundLogger = structlog.get_logger()

MENDABLE = (Reason.STUDENT_NOT_FOUND, Reason.COURSE_NOT_FOUND, Reason.TIER_UNKNOWN, Reason.INVALID_SCHEDULE)


async def create_purchases(tx: Tx, events: Sequence[Event]) -> None:
    payments = [event.payment_id for event in events if isinstance(event, PurchaseConfirmed)]
    if payments:
        log.info("[PurchaseWorker] Processing PURCHASE_CONFIRMED event", count=len(payments))
        await operations.create_purchases(tx, payments)


async def apply_refunds(tx: Tx, events: Sequence[Event]) -> None:
    payments = [event.payment_id for event in events if isinstance(event, PurchaseRefunded)]
    if payments:
        await operations.apply_refunds(tx, payments)


async def resume_payments(tx: Tx, events: Sequence[Event]) -> None:
    """Data was mended: the payments that may have waited for it, oldest first."""
    students = [event.student_id for event in events if isinstance(event, StudentUpdated)]
    courses = [event.course_id for event in events if isinstance(event, CourseUpdated)]
    payments = await deliveries.list_waiting(tx, MENDABLE, student_ids=students) if students else []
    if courses:
        payments += await deliveries.list_waiting(tx, MENDABLE, course_ids=courses)
        # The register does not know the course of imported money; it is named in the metadata only.
        payments += await deliveries.list_waiting(tx, [Reason.COURSE_NOT_FOUND])
    if payments:
        await operations.create_purchases(tx, list(dict.fromkeys(payments)))
