"""JSON of the operator's API at the edge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from datetime import datetime
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import AliasChoices, Field, model_validator

from caravan.admin.detail import Allocation, Counts, Detail, Moment, Session, Terms
from caravan.admin.overview import Funnel, Overview, Undelivered
from caravan.admin.purchases import Listed
from caravan.eventlog.dead_letters import DeadLetter
from caravan.eventlog.standing import Standing
from caravan.payments.webhooks import Unclaimed
from caravan.web.schemas import CalendarDate, In, Note, Out

SessionCount = Annotated[int, Field(strict=True, ge=1, le=400)]
TimeSlot = Annotated[str, Field(max_length=100)]
SLOT_NAMES = AliasChoices("timeSlot", "preferredTimeSlot", "time_slot")
UNCLAIMED_ITEMS_MAX = 100
DATE_NAMES = AliasChoices("startDate", "date", "preferredDate", "start_date")


# ------------------------------------------------------------------ what is asked


class NoteIn(In):
    note: Note | None = None


class AutoAssignIn(NoteIn):
    """`{purchaseId}`, or `{studentId, courseId}`."""

    purchase_id: UUID | None = None
    student_id: UUID | None = None
    course_id: UUID | None = None
    time_slot: TimeSlot | None = Field(None, validation_alias=SLOT_NAMES)
    start_date: CalendarDate | None = Field(None, validation_alias=DATE_NAMES)

    @model_validator(mode="after")
    def _names_a_purchase(self) -> AutoAssignIn:
        if self.purchase_id is None and (self.student_id is None or self.course_id is None):
            raise ValueError("needs purchaseId, or studentId and courseId")
        return self


class ApproveIn(NoteIn):
    trainer_id: UUID | None = None


class RefundIn(NoteIn):
    """All of it without `amountCents`. `sessions`: how many a part takes away, or which. `asCoins`: for PAID_TWICE."""

    amount_cents: Annotated[int, Field(strict=True, ge=0, le=10**12)] | None = None
    sessions: (
        Annotated[int, Field(strict=True, ge=0, le=400)]
        | Annotated[list[Annotated[int, Field(strict=True, ge=1, le=400)]], Field(max_length=400)]
        | None
    ) = None
    as_coins: Annotated[bool, Field(strict=True)] = False

    @model_validator(mode="after")
    def _is_one_kind(self) -> RefundIn:
        if self.as_coins and (self.amount_cents is not None or self.sessions is not None):
            raise ValueError("asCoins gives all of it back: leave out amountCents and sessions")
        return self


class MendPurchaseIn(NoteIn):
    time_slot: TimeSlot | None = Field(None, validation_alias=SLOT_NAMES)
    start_date: CalendarDate | None = Field(None, validation_alias=DATE_NAMES)

    @model_validator(mode="after")
    def _says_something(self) -> MendPurchaseIn:
        if self.time_slot is None and self.start_date is None:
            raise ValueError("needs timeSlot or startDate")
        return self


class MendPaymentIn(NoteIn):
    session_count: SessionCount | None = None
    time_slot: TimeSlot | None = Field(None, validation_alias=SLOT_NAMES)
    start_date: CalendarDate | None = Field(None, validation_alias=DATE_NAMES)

    @model_validator(mode="after")
    def _says_something(self) -> MendPaymentIn:
        if self.session_count is None and self.time_slot is None and self.start_date is None:
            raise ValueError("needs sessionCount, timeSlot or startDate")
        return self


class MarkSessionIn(NoteIn):
    status: Literal["completed", "student_absent", "trainer_absent"]


# ------------------------------------------------------------------ what is answered


def _shown(*things: Any) -> dict[str, Any]:
    """The fields of some dataclasses, as one: an answer takes those that it names."""
    return {each.name: getattr(thing, each.name) for thing in things for each in fields(thing)}


class ActionOut(Out):
    name: str
    label: str
    method: str
    path: str
    needs: tuple[str, ...]
    dead_letter_id: UUID | None
    hint: str | None


class DiagnosisOut(Out):
    payment_id: UUID
    purchase_id: UUID | None
    student_id: UUID
    course_id: UUID | None
    stage: str
    reason: str | None
    technical: bool
    evidence: tuple[str, ...]
    action: ActionOut | None


class DiagnosesOut(Out):
    items: list[DiagnosisOut]


class LineOut(Out):
    payment_id: UUID
    purchase_id: UUID | None
    student_id: UUID
    student_name: str | None
    course_id: UUID | None
    title: str | None
    stage: str
    reason: str | None
    amount_cents: int
    currency: str
    created_at: datetime
    captured_at: datetime | None
    waiting_since: datetime | None
    action: ActionOut | None

    @classmethod
    def of(cls, line: Listed) -> LineOut:
        return cls.model_validate(_shown(line, line.finding))


class PurchasesOut(Out):
    items: list[LineOut]
    next_cursor: str | None


class PurchaseOut(LineOut):
    """One purchase with its timeline, the oldest first; every line says who."""

    evidence: tuple[str, ...]
    terms: Terms
    session_counts: Counts | None
    allocations: list[Allocation]
    sessions: list[Session]
    refunded_cents: int
    timeline: list[Moment]

    @classmethod
    def of_detail(cls, detail: Detail) -> PurchaseOut:
        seen = _shown(detail, detail.line, detail.line.finding)
        return cls.model_validate(seen | {"session_counts": detail.counts})


class RepairedOut(Out):
    payment_id: UUID
    purchase_id: UUID | None
    step: str | None
    did: str
    stage_before: str
    stage: str
    reason_before: str | None
    reason: str | None


class RefundOut(Out):
    id: UUID
    payment_id: UUID
    amount_cents: int
    sessions: int
    session_seqs: list[int]
    full: bool


class AssignedOut(Out):
    allocation_id: UUID | None
    purchase_id: UUID
    trainer_id: UUID | None
    status: str | None


class SyncedOut(Out):
    created: int
    cancelled: int
    owed: int


class AllocationOut(Out):
    id: UUID
    purchase_id: UUID
    payment_id: UUID
    student_id: UUID
    student_name: str | None
    course_id: UUID
    title: str | None
    trainer_id: UUID | None
    status: str
    reason: str | None
    created_at: datetime
    updated_at: datetime


class AllocationsOut(Out):
    items: list[AllocationOut]
    next_cursor: str | None


class DeadLetterOut(Out):
    """`event` is the CloudEvent as it was."""

    id: UUID
    consumer_group: str
    event_id: UUID
    event_type: str
    correlation_id: str | None
    event: dict[str, Any]
    code: str
    error: str
    attempts: int
    status: str
    created_at: datetime
    resolved_at: datetime | None
    resolved_by: str | None
    note: str | None

    @classmethod
    def of(cls, letter: DeadLetter) -> DeadLetterOut:
        return cls.model_validate(_shown(letter) | {"event": letter.envelope})


class DeadLettersOut(Out):
    items: list[DeadLetterOut]
    next_cursor: str | None


class WorkerOut(Out):
    name: str
    service: str
    consumer_group: str | None
    host: str
    pid: int
    build: str
    started_at: datetime
    heartbeat_at: datetime
    heartbeat_age_seconds: float
    progress_age_seconds: float
    alive: bool
    events_done: int
    failing_event_id: UUID | None
    failing_since: datetime | None
    last_error: str | None
    state: str
    sentence: str


class MissingOut(Out):
    """A service that should have a worker and has none that ever told of itself, or whose last one went in order."""

    service: str
    state: str
    sentence: str


class WorkersOut(Out):
    items: list[WorkerOut]
    missing: list[MissingOut]

    @classmethod
    def of(cls, standings: Sequence[Standing]) -> WorkersOut:
        there = [_shown(each, each.worker) for each in standings if each.worker is not None]
        return cls.model_validate({"items": there, "missing": [each for each in standings if each.worker is None]})


class LagOut(Out):
    group: str
    service: str
    messages: int
    seconds: float
    workers_alive: int
    state: str
    sentence: str


class LagsOut(Out):
    items: list[LagOut]
    failed_over_since: datetime | None = None  # the workers do without the Kafka that is there


class UnclaimedOut(Out):
    """`items` are the oldest ones."""

    count: int
    amount_cents: int
    items: list[Unclaimed]


class OverviewOut(Out):
    undelivered: Undelivered
    unclaimed: UnclaimedOut
    funnel: dict[str, Funnel]

    @classmethod
    def of(cls, seen: Overview) -> OverviewOut:
        money = seen.unclaimed
        cents = sum(each.amount_cents for each in money)
        return cls(
            undelivered=seen.undelivered,
            unclaimed=UnclaimedOut(count=len(money), amount_cents=cents, items=money[:UNCLAIMED_ITEMS_MAX]),
            funnel={"lastDay": seen.last_day, "lastWeek": seen.last_week},
        )


class AlertOut(Out):
    """`endedAt` null: it is so now."""

    id: UUID
    name: str
    subject: str
    severity: str
    said: str
    facts: dict[str, Any]
    began_at: datetime
    ended_at: datetime | None


class AlertsOut(Out):
    """What is so now, critical first, then what was, the latest first."""

    items: list[AlertOut]
