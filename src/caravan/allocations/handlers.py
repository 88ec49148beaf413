"""What allocations hear. `notice`: how long before its first session a purchase must be booked at the latest."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from uuid import UUID

from caravan import deliveries
from caravan.allocations import store
from caravan.allocations.operations import NOTICE, settle_allocations
from caravan.db import Tx
from caravan.deliveries import Reason
from caravan.events import (
    BookingReleased,
    CourseUpdated,
    Event,
    PurchaseCreated,
    PurchaseRefunded,
    SessionChanged,
    StudentUpdated,
    TrainerUpdated,
)

RESUMED_MAX = 300
"""Purchases that one batch of news takes up again; the reconciler comes for the rest."""

FOR_A_TRAINER = (
    Reason.NO_TRAINER_AVAILABLE,
    Reason.TRAINER_CONFLICT,
    Reason.TRAINER_LEFT,
)


async def allocate_trainers(tx: Tx, events: Sequence[Event], *, notice: timedelta = NOTICE) -> None:
    purchases = [event.purchase_id for event in events if isinstance(event, PurchaseCreated) and event.purchase_id]
    if purchases:
        await settle_allocations(tx, purchases, notice=notice)


async def undo_refunded(tx: Tx, events: Sequence[Event], *, notice: timedelta = NOTICE) -> None:
    payments = [event.payment_id for event in events if isinstance(event, PurchaseRefunded)]
    purchases = await deliveries.find_purchases(tx, payments)
    if purchases:
        await settle_allocations(tx, list(purchases.values()), notice=notice)


async def settle_changed(tx: Tx, events: Sequence[Event], *, notice: timedelta = NOTICE) -> None:
    """Sessions went some way or other: book a make-up for what is owed again, complete what is over."""
    purchases = [event.purchase_id for event in events if isinstance(event, SessionChanged) and event.purchase_id]
    if purchases:
        await settle_allocations(tx, list(dict.fromkeys(purchases)), notice=notice)


async def resume_waiting(tx: Tx, events: Sequence[Event], *, notice: timedelta = NOTICE) -> None:
    """Something that purchases may wait for has changed: those that it can help, the longest waiting first."""
    purchases = list(dict.fromkeys([*await _deserted(tx, events), *await _helped(tx, events)]))
    if purchases:
        await settle_allocations(tx, purchases[:RESUMED_MAX], notice=notice)


async def _deserted(tx: Tx, events: Sequence[Event]) -> list[UUID]:
    """Booked purchases whose trainer may just have left."""
    trainers = [event.trainer_id for event in events if isinstance(event, TrainerUpdated)]
    return await store.list_deserted(tx, trainers, RESUMED_MAX) if trainers else []


async def _helped(tx: Tx, events: Sequence[Event]) -> list[UUID]:
    students = [
        event.student_id
        for event in events
        if isinstance(event, BookingReleased)
        or (isinstance(event, StudentUpdated) and {"latitude", "longitude", "timezone"} & set(event.changed))
    ]
    trainers = [event.trainer_id for event in events if isinstance(event, TrainerUpdated | BookingReleased)]
    courses = [event.course_id for event in events if isinstance(event, CourseUpdated)]
    payments: list[UUID] = []
    if students:
        # A place also decides who is near enough.
        payments += await deliveries.list_waiting(
            tx,
            (Reason.STUDENT_LOCATION_MISSING, Reason.STUDENT_CONFLICT, *FOR_A_TRAINER),
            student_ids=students,
            limit=RESUMED_MAX,
        )
    if trainers:
        taught = await store.list_courses_taught(tx, trainers)
        payments += await deliveries.list_waiting(tx, FOR_A_TRAINER, course_ids=taught, limit=RESUMED_MAX)
    if courses:
        reasons = (Reason.STUDENT_LOCATION_MISSING, Reason.STUDENT_CONFLICT, Reason.INVALID_SCHEDULE, *FOR_A_TRAINER)
        payments += await deliveries.list_waiting(tx, reasons, course_ids=courses, limit=RESUMED_MAX)
    purchases = await deliveries.find_purchases(tx, payments)
    return [purchases[payment] for payment in dict.fromkeys(payments) if payment in purchases]
