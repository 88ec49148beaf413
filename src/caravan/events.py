"""Every event there is: type, topic, fields, who may see it. The only thing that the contexts share.

Strict when spoken (a struct has exactly these fields), tolerant when heard (unknown fields are ignored). On the wire
the fields are camelCase inside a CloudEvent's `data`; `eventlog.codec` makes the envelope. Coordinates are in no event.
"""

from __future__ import annotations

from datetime import datetime
from typing import ClassVar
from uuid import UUID

import msgspec

from caravan.ids import uuid_text


class Event(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """Something that happened. Subclasses name their wire type and topic."""

    type: ClassVar[str]
    topic: ClassVar[str]
    version: ClassVar[int] = 1
    visible: ClassVar[bool] = False  # on the student's feed

    @property
    def subject(self) -> str:
        raise NotImplementedError

    @property
    def student(self) -> UUID | None:
        """Whose order this event keeps."""
        return None

    @property
    def correlation_id(self) -> str | None:
        return None


class PaymentEvent(Event, frozen=True, kw_only=True):
    """What concerns one captured payment; in order per student, correlated by the payment's id."""

    payment_id: UUID
    student_id: UUID
    course_id: UUID | None
    purchase_id: UUID | None = None

    @property
    def subject(self) -> str:
        return uuid_text(self.purchase_id or self.payment_id)

    @property
    def student(self) -> UUID | None:
        return self.student_id

    @property
    def correlation_id(self) -> str | None:
        return uuid_text(self.payment_id)


class PurchaseConfirmed(PaymentEvent, frozen=True, kw_only=True):
    type = "PURCHASE_CONFIRMED"
    topic = "purchase-confirmed"
    visible = True
    checkout_id: UUID


class PurchaseCreated(PaymentEvent, frozen=True, kw_only=True):
    type = "PURCHASE_CREATED"
    topic = "purchase-created"
    visible = True
    session_count: int


class CourseAccessGranted(PaymentEvent, frozen=True, kw_only=True):
    type = "COURSE_ACCESS_GRANTED"
    topic = "purchase-created"
    visible = True


class TrainerAllocated(PaymentEvent, frozen=True, kw_only=True):
    type = "TRAINER_ALLOCATED"
    topic = "trainer-allocated"
    visible = True
    allocation_id: UUID
    booking_id: UUID
    trainer_id: UUID
    session_count: int


class SessionsScheduled(PaymentEvent, frozen=True, kw_only=True):
    type = "SESSIONS_SCHEDULED"
    topic = "sessions-scheduled"
    visible = True
    allocation_id: UUID
    session_count: int
    first_starts_at: datetime
    last_ends_at: datetime


class SessionChanged(PaymentEvent, frozen=True, kw_only=True):
    """Sessions changed status, time or trainer; `seqs` are their numbers in the purchase."""

    type = "SESSION_CHANGED"
    topic = "sessions-scheduled"
    visible = True
    seqs: tuple[int, ...]
    status: str


class PurchaseBlocked(PaymentEvent, frozen=True, kw_only=True):
    type = "PURCHASE_BLOCKED"
    topic = "purchase-status"
    visible = True
    stage: str
    reason: str


class PurchaseUnblocked(PaymentEvent, frozen=True, kw_only=True):
    type = "PURCHASE_UNBLOCKED"
    topic = "purchase-status"
    visible = True
    stage: str
    reason: str


class PurchaseRefunded(PaymentEvent, frozen=True, kw_only=True):
    """Money went back; `full` ends the purchase, else `sessions` are taken away (`session_seqs` where numbered)."""

    type = "PURCHASE_REFUNDED"
    topic = "purchase-status"
    visible = True
    refund_id: UUID
    amount_cents: int
    currency: str
    full: bool
    sessions: int
    session_seqs: tuple[int, ...] = ()


class StudentUpdated(Event, frozen=True, kw_only=True):
    """`changed`: names of the fields, never their values."""

    type = "STUDENT_UPDATED"
    topic = "resources-changed"
    student_id: UUID
    changed: tuple[str, ...]

    @property
    def subject(self) -> str:
        return uuid_text(self.student_id)

    @property
    def student(self) -> UUID | None:
        return self.student_id


class TrainerUpdated(Event, frozen=True, kw_only=True):
    type = "TRAINER_UPDATED"
    topic = "resources-changed"
    trainer_id: UUID
    changed: tuple[str, ...]

    @property
    def subject(self) -> str:
        return uuid_text(self.trainer_id)


class CourseUpdated(Event, frozen=True, kw_only=True):
    type = "COURSE_UPDATED"
    topic = "resources-changed"
    course_id: UUID
    changed: tuple[str, ...]

    @property
    def subject(self) -> str:
        return uuid_text(self.course_id)


class BookingReleased(Event, frozen=True, kw_only=True):
    """Some or all of a booking's time is free again."""

    type = "BOOKING_RELEASED"
    topic = "resources-changed"
    booking_id: UUID
    trainer_id: UUID
    student_id: UUID
    purchase_id: UUID | None
    payment_id: UUID | None = None

    @property
    def subject(self) -> str:
        return uuid_text(self.booking_id)

    @property
    def student(self) -> UUID | None:
        return self.student_id

    @property
    def correlation_id(self) -> str | None:
        return uuid_text(self.payment_id) if self.payment_id else None


ALL: tuple[type[Event], ...] = (
    PurchaseConfirmed,
    PurchaseCreated,
    CourseAccessGranted,
    TrainerAllocated,
    SessionsScheduled,
    SessionChanged,
    PurchaseBlocked,
    PurchaseUnblocked,
    PurchaseRefunded,
    StudentUpdated,
    TrainerUpdated,
    CourseUpdated,
    BookingReleased,
)
BY_TYPE: dict[str, type[Event]] = {event.type: event for event in ALL}
TOPICS: tuple[str, ...] = tuple(dict.fromkeys(event.topic for event in ALL))
