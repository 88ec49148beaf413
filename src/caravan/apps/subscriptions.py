"""The wiring: which group hears what, and what it does then. Read it aloud."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from typing import Any

from caravan.allocations import handlers as allocations
from caravan.allocations.operations import NOTICE
from caravan.carts import handlers as carts
from caravan.db import Tx
from caravan.eventlog.subscription import Handler, Subscription
from caravan.events import (
    ALL,
    BookingReleased,
    CourseUpdated,
    PurchaseConfirmed,
    PurchaseCreated,
    PurchaseRefunded,
    SessionChanged,
    StudentUpdated,
    TrainerAllocated,
    TrainerUpdated,
)
from caravan.purchases import handlers as purchases
from caravan.sessions import handlers as sessions
from caravan.student_views import handlers as student_views
from caravan.student_views.cache import ViewCache


def in_turn(*handlers: Handler) -> Handler:
    """Several handlers of one group for one event, in one transaction."""

    async def handle(tx: Tx, events: Sequence[Any]) -> None:
        for handler in handlers:
            await handler(tx, events)

    return handle


RESOURCES = (StudentUpdated, TrainerUpdated, CourseUpdated, BookingReleased)


def subscribe(notice: timedelta = NOTICE, views: ViewCache | None = None) -> tuple[Subscription, ...]:
    """All of it. `notice`: how long before its first session a purchase must be booked at the latest. `views`: where
    home and learning are cached, if they are."""
    return (
        Subscription(
            group="purchase-creation-workers",
            service="purchase-worker",
            label="PurchaseWorker",
            handlers={
                PurchaseConfirmed: in_turn(purchases.create_purchases, carts.empty_carts),
                PurchaseRefunded: purchases.apply_refunds,
                StudentUpdated: purchases.resume_payments,
                CourseUpdated: purchases.resume_payments,
            },
        ),
        Subscription(
            group="trainer-allocation-workers",
            service="allocation-worker",
            label="AllocationWorker",
            handlers={
                PurchaseCreated: partial(allocations.allocate_trainers, notice=notice),
                PurchaseRefunded: partial(allocations.undo_refunded, notice=notice),
                SessionChanged: partial(allocations.settle_changed, notice=notice),
                **dict.fromkeys(RESOURCES, partial(allocations.resume_waiting, notice=notice)),
            },
        ),
        Subscription(
            group="session-scheduling-workers",
            service="session-worker",
            label="SessionWorker",
            handlers={
                TrainerAllocated: sessions.schedule_sessions,
                BookingReleased: sessions.schedule_sessions,
                PurchaseRefunded: sessions.schedule_sessions,
            },
        ),
        Subscription(
            group="cache-invalidation-workers",
            service="cache-worker",
            label="CacheWorker",
            # What a family sees, but for the payment itself, which is not waited for.
            handlers=dict.fromkeys(
                (event for event in ALL if event is not PurchaseConfirmed and event not in RESOURCES),
                partial(student_views.invalidate_views, cache=views),
            ),
            notes_only=views is None,
        ),
    )


SUBSCRIPTIONS = subscribe()
BY_GROUP = {subscription.group: subscription for subscription in SUBSCRIPTIONS}
