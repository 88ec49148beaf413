"""JSON of the operator's API at the edge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from datetime import date, datetime, time
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import AliasChoices, Field, model_validator

from caravan.admin import overview, purchases
from caravan.eventlog.dead_letters import DeadLetter
from caravan.eventlog.lag import GroupLag
from caravan.eventlog.standing import Standing
from caravan.fulfilment.alerts import Alert
from caravan.fulfilment.diagnose import Action, Finding
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


class ActionOut(Out):
    name: str
    label: str
    method: str
    path: str
    needs: tuple[str, ...]
    dead_letter_id: UUID | None
    hint: str | None


def action_out(action: Action | None) -> ActionOut | None:
    return None if action is None else ActionOut.model_validate(action, from_attributes=True)


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

    @staticmethod
    def of(finding: Finding) -> DiagnosisOut:
        return DiagnosisOut.model_validate(finding, from_attributes=True)


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

    @staticmethod
    def of(line: purchases.Listed) -> LineOut:
        return LineOut(**line_fields(line))


def line_fields(line: purchases.Listed) -> dict[str, Any]:
    finding = line.finding
    return {
        "payment_id": finding.payment_id,
        "purchase_id": finding.purchase_id,
        "student_id": finding.student_id,
        "student_name": line.student_name,
        "course_id": finding.course_id,
        "title": line.title,
        "stage": finding.stage,
        "reason": finding.reason,
        "amount_cents": line.amount_cents,
        "currency": line.currency,
        "created_at": line.created_at,
        "captured_at": line.captured_at,
        "waiting_since": line.waiting_since,
        "action": action_out(finding.action),
    }


class PurchasesOut(Out):
    items: list[LineOut]
    next_cursor: str | None


class TermsOut(Out):
    sessions: int | None
    session_minutes: int | None
    learning_mode: str | None
    group_size: int
    timezone: str | None
    slot_start: time | None
    start_date: date | None
    sold_slot_start: time | None
    sold_start_date: date | None
    price_cents: int
    currency: str


class CountsOut(Out):
    total: int
    scheduled: int
    completed: int
    student_absent: int
    cancelled: int
    refunded: int
    owed: int


class AllocationDetailOut(Out):
    id: UUID
    status: str
    trainer_id: UUID | None
    trainer_name: str | None
    decision: dict[str, Any] | None
    created_at: datetime


class SessionOut(Out):
    seq: int
    starts_at: datetime
    ends_at: datetime
    status: str
    trainer_id: UUID


class MomentOut(Out):
    at: datetime
    kind: str
    actor: str
    said: str
    subject: str


class PurchaseOut(LineOut):
    """One purchase with its timeline, the oldest first; every line says who."""

    evidence: tuple[str, ...]
    terms: TermsOut
    session_counts: CountsOut | None
    allocations: list[AllocationDetailOut]
    sessions: list[SessionOut]
    refunded_cents: int
    timeline: list[MomentOut]

    @staticmethod
    def of_detail(detail: purchases.Detail) -> PurchaseOut:
        return PurchaseOut(
            **line_fields(detail.line),
            evidence=detail.line.finding.evidence,
            terms=TermsOut.model_validate(detail.terms, from_attributes=True),
            session_counts=detail.counts and CountsOut.model_validate(detail.counts, from_attributes=True),
            allocations=[AllocationDetailOut.model_validate(a, from_attributes=True) for a in detail.allocations],
            sessions=[SessionOut.model_validate(s, from_attributes=True) for s in detail.sessions],
            refunded_cents=detail.refunded_cents,
            timeline=[MomentOut.model_validate(m, from_attributes=True) for m in detail.timeline],
        )


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

    @staticmethod
    def of(letter: DeadLetter) -> DeadLetterOut:
        names = [name for name in DeadLetterOut.model_fields if name != "event"]
        return DeadLetterOut(**{name: getattr(letter, name) for name in names}, event=letter.envelope)


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

    @staticmethod
    def of(standings: Sequence[Standing]) -> WorkersOut:
        return WorkersOut(
            items=[
                WorkerOut.model_validate({**asdict(each.worker), "state": each.state, "sentence": each.sentence})
                for each in standings
                if each.worker is not None
            ],
            missing=[
                MissingOut.model_validate(each, from_attributes=True) for each in standings if each.worker is None
            ],
        )


class LagOut(Out):
    group: str
    service: str
    messages: int
    seconds: float
    workers_alive: int
    state: str
    sentence: str

    @staticmethod
    def of(lag: GroupLag) -> LagOut:
        return LagOut.model_validate(lag, from_attributes=True)


class LagsOut(Out):
    items: list[LagOut]
    failed_over_since: datetime | None = None  # the workers do without the Kafka that is there


class UndeliveredOut(Out):
    """`byReason` counts payments; the keys are reasons as they are, and ON_ITS_WAY."""

    count: int
    amount_cents: int
    oldest_seconds: int
    by_reason: dict[str, int]
    amount_cents_by_currency: dict[str, int]


class UnclaimedItemOut(Out):
    provider: str
    event_id: str
    payment_id: UUID
    amount_cents: int
    currency: str
    received_at: datetime


class UnclaimedOut(Out):
    """`items` are the oldest ones."""

    count: int
    amount_cents: int
    items: list[UnclaimedItemOut]


class FunnelOut(Out):
    asked: int
    paid: int
    purchased: int
    allocated: int
    scheduled: int
    refunded: int


class OverviewOut(Out):
    undelivered: UndeliveredOut
    unclaimed: UnclaimedOut
    funnel: dict[str, FunnelOut]

    @staticmethod
    def of(seen: overview.Overview) -> OverviewOut:
        money = seen.unclaimed
        items = [UnclaimedItemOut.model_validate(item, from_attributes=True) for item in money[:UNCLAIMED_ITEMS_MAX]]
        return OverviewOut(
            undelivered=UndeliveredOut.model_validate(seen.undelivered, from_attributes=True),
            unclaimed=UnclaimedOut(
                count=len(money), amount_cents=sum(each.amount_cents for each in money), items=items
            ),
            funnel={
                "lastDay": FunnelOut.model_validate(seen.last_day, from_attributes=True),
                "lastWeek": FunnelOut.model_validate(seen.last_week, from_attributes=True),
            },
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

    @staticmethod
    def of(alert: Alert) -> AlertOut:
        return AlertOut.model_validate(alert, from_attributes=True)


class AlertsOut(Out):
    """What is so now, critical first, then what was, the latest first."""

    items: list[AlertOut]
