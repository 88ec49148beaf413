"""Pure rules of money: which status follows which, what a checkout freezes, what captured money waits for."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from enum import StrEnum
from typing import Any, Final
from uuid import UUID

from caravan.calendar import Pattern
from caravan.deliveries import Reason
from caravan.settings import Settings

SANDBOX: Final = "sandbox"
NOBODY: Final = "none"  # the provider of a total of zero: nobody is asked for money
COINS: Final = "coins"  # where a refund went that was paid out in coins


class Status(StrEnum):
    CREATED = "created"
    PENDING = "pending"
    FAILED = "failed"
    SUCCEEDED = "succeeded"
    PARTIALLY_REFUNDED = "partially_refunded"
    REFUNDED = "refunded"


# News arrives in any order; a payment only ever moves up. `failed` is below `succeeded`, so that a late success
# counts and a late failure does not.
_RANK: Final = {status: rank for rank, status in enumerate(Status)}


def advances(present: Status, to: Status) -> bool:
    """True where news of `to` changes a payment that is `present`."""
    return _RANK[to] > _RANK[present]


@dataclass(frozen=True, slots=True)
class Rules:
    """The house's figures for selling, from the settings."""

    notice: timedelta
    start_horizon_days: int
    checkout_lifetime: timedelta
    coin_value_cents: int

    @staticmethod
    def of(settings: Settings) -> Rules:
        return Rules(
            notice=timedelta(hours=settings.notice_hours),
            start_horizon_days=settings.start_horizon_days,
            checkout_lifetime=timedelta(minutes=settings.checkout_minutes),
            coin_value_cents=settings.coin_value_cents,
        )


@dataclass(frozen=True, slots=True)
class Order:
    """What somebody wants to buy, as asked. `raw` is the request, kept as it came."""

    student_id: UUID
    course_id: UUID
    session_count: int
    learning_mode: str
    group_size: int
    time_slot: str
    start_date: date
    raw: dict[str, Any]
    coins: int = 0
    cart_item_id: UUID | None = None
    expected_amount_cents: int | None = None
    again: bool = False


@dataclass(frozen=True, slots=True)
class Offer:
    """What the catalogue says of an order: a course, the student's zone, and the price of the tier (None: no such)."""

    title: str
    session_minutes: int
    weekdays: list[int]
    learning_modes: list[str]
    group_sizes: list[int]
    retired_at: datetime | None
    timezone: str
    amount_cents: int | None
    currency: str | None


@dataclass(frozen=True, slots=True)
class Checkout:
    """A row of checkouts: the intent to buy one course, its terms frozen. None: imported money, terms unknown."""

    id: UUID
    account_id: UUID | None
    student_id: UUID
    course_id: UUID | None
    sessions: int | None
    price_cents: int
    currency: str
    session_minutes: int | None
    weekdays: list[int] | None
    learning_mode: str | None
    group_size: int
    timezone: str | None
    slot_start: time | None
    start_date: date | None
    cart_item_id: UUID | None
    expires_at: datetime
    paid_by: UUID | None

    @property
    def pattern(self) -> Pattern:
        """When the sessions are held; only of terms that are known."""
        assert self.slot_start
        assert self.session_minutes
        assert self.weekdays
        assert self.timezone
        return Pattern(self.slot_start, self.session_minutes, tuple(self.weekdays), self.timezone)


@dataclass(frozen=True, slots=True)
class Payment:
    """A row of payments. `amount_cents` and `currency` were asked for, the captured ones came."""

    id: UUID
    checkout_id: UUID
    student_id: UUID
    provider: str
    status: Status
    amount_cents: int
    currency: str
    coins: int
    captured_cents: int | None
    captured_currency: str | None
    captured_at: datetime | None
    refunded_cents: int
    accepted_at: datetime | None
    created_at: datetime

    def __post_init__(self) -> None:
        object.__setattr__(self, "status", Status(self.status))

    @property
    def remaining_cents(self) -> int:
        """What came and has not gone back."""
        return (self.captured_cents or 0) - self.refunded_cents

    @property
    def as_asked(self) -> bool:
        """What came is what was asked for, or an operator said that it will do."""
        came = (self.captured_cents, self.captured_currency)
        return self.accepted_at is not None or came == (self.amount_cents, self.currency)


def obstacle(payment: Payment, paid_by: UUID | None) -> Reason | None:
    """Why captured money can't be delivered as it is, given who paid its checkout; None: nothing is in the way."""
    if paid_by not in (None, payment.id):
        return Reason.PAID_TWICE
    return None if payment.as_asked else Reason.AMOUNT_MISMATCH
