"""Why isn't it delivered? For each payment: its stage, the reason, the facts that made us say so, the one button.

A business reason is stored (deliveries); a technical one is computed here from the facts, when someone asks, never
stored and never shown to a student. `explain` is pure: the same facts, the same words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta, tzinfo
from enum import StrEnum
from typing import cast
from uuid import UUID
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from caravan.db import Tx
from caravan.deliveries import Reason, Stage
from caravan.fulfilment.facts import Facts, choose_payments, gather_facts
from caravan.fulfilment.gaps import HOP_OF_STAGE, Hop, Step
from caravan.web.formats import counted, money

# An event that waits this long with a live worker is behind; a worker's lease is as long, so a dead one shows as soon.
WAITING_SECONDS = 6.0
# A provider normally tells within seconds; a buyer may take minutes to pay.
WEBHOOK_LEEWAY = timedelta(minutes=2)
RECENT_PAYMENTS_MAX = 20


class Technical(StrEnum):
    """Why something that should have happened has not; computed, see the module."""

    WEBHOOK_NOT_RECEIVED = "WEBHOOK_NOT_RECEIVED"
    WEBHOOK_NOT_APPLIED = "WEBHOOK_NOT_APPLIED"
    NOT_REGISTERED = "NOT_REGISTERED"
    EVENT_MISSING = "EVENT_MISSING"
    EVENT_NOT_RELAYED = "EVENT_NOT_RELAYED"
    NO_WORKER = "NO_WORKER"
    WORKER_BEHIND = "WORKER_BEHIND"
    HANDLER_FAILING = "HANDLER_FAILING"
    IN_DEAD_LETTERS = "IN_DEAD_LETTERS"
    MARKED_PROCESSED_BUT_MISSING = "MARKED_PROCESSED_BUT_MISSING"
    SESSIONS_MISSING = "SESSIONS_MISSING"
    VIEW_STALE = "VIEW_STALE"  # see stale_views


@dataclass(frozen=True, slots=True)
class Action:
    """The one thing to do. `name` is stable; `method` and `path` are the API's, `needs` its body's fields.

    `hint`: what else helps, and who can do it, where the button alone may not.
    """

    name: str
    label: str
    method: str
    path: str
    needs: tuple[str, ...] = ("note",)
    dead_letter_id: UUID | None = None
    hint: str | None = None


@dataclass(frozen=True, slots=True)
class Finding:
    """One payment's answer. `stage` is the payment's status where no money was captured."""

    payment_id: UUID
    purchase_id: UUID | None
    student_id: UUID
    course_id: UUID | None
    stage: str
    reason: str | None
    technical: bool
    evidence: tuple[str, ...]
    action: Action | None
    step: Step | None


async def diagnose(
    tx: Tx,
    *,
    student_id: UUID | None = None,
    course_id: UUID | None = None,
    payment_id: UUID | None = None,
    purchase_id: UUID | None = None,
    limit: int = RECENT_PAYMENTS_MAX,
) -> list[Finding]:
    """Explain the payments that the ids choose, the newest first; without ids the most recent ones."""
    chosen = await choose_payments(
        tx, student_id=student_id, course_id=course_id, payment_id=payment_id, purchase_id=purchase_id, limit=limit
    )
    return [explain(facts, tx.now) for facts in await gather_facts(tx, chosen)]


def explain(facts: Facts, now: datetime, *, local: bool = False) -> Finding:
    """What is true of one payment at `now`, in stage, reason, sentences and the one action.

    The sentences' times are UTC's, or the student's (`local`), and say so.
    """
    facts = facts if local else replace(facts, timezone=None)
    checklist = _checklist(facts)
    if facts.captured_at is None or facts.stage is None:
        reason, said, step = _explain_uncaptured(facts, now)
    elif facts.reason is not None and facts.undelivered:
        reason, said, step = facts.reason, _waiting(facts), _STEP_OF_STAGE.get(Stage(facts.stage))
    else:
        reason, said, step = _explain_stage(facts)
    return Finding(
        payment_id=facts.payment_id,
        purchase_id=facts.purchase_id,
        student_id=facts.student_id,
        course_id=facts.course_id,
        stage=facts.stage or facts.status,
        reason=reason,
        technical=reason in Technical.__members__,
        evidence=(*checklist, *said),
        action=_action(facts, reason, step),
        step=step,
    )


_STEP_OF_STAGE = {
    Stage.PAID: Step.CREATE_PURCHASE,
    Stage.PURCHASED: Step.ALLOCATE_TRAINER,
    Stage.ALLOCATED: Step.SCHEDULE_SESSIONS,
    Stage.SCHEDULED: Step.MAKE_UP,
}

Explanation = tuple[str | None, list[str], Step | None]


def _explain_uncaptured(facts: Facts, now: datetime) -> Explanation:
    if facts.webhooks_unapplied:
        return (
            Technical.WEBHOOK_NOT_APPLIED,
            [f"Without effect yet: {counted(facts.webhooks_unapplied, 'stored webhook')} of this payment."],
            Step.APPLY_WEBHOOK,
        )
    if facts.status in ("created", "pending") and now - facts.created_at >= WEBHOOK_LEEWAY:
        return (
            Technical.WEBHOOK_NOT_RECEIVED,
            [
                f"Asked for at {_time(facts, facts.created_at)} and {facts.provider} has not said since"
                f" whether it was paid. {_LOOK_UP[facts.status]}"
            ],
            None,
        )
    return None, ["No money was captured: there is nothing to deliver."], None


_LOOK_UP = {
    "created": "Unpaid, unless the family says otherwise: then look it up at the provider, and if it was paid, have the"
    " webhook sent again.",
    "pending": "Look it up at the provider: if it was paid, have the webhook sent again.",
}


def is_unpaid(finding: Finding) -> bool:
    """Only asked for, and nobody has said that it was tried: no trouble by itself."""
    return finding.stage == "created" and finding.reason in (None, Technical.WEBHOOK_NOT_RECEIVED)


def _waiting(facts: Facts) -> list[str]:
    said = [f"Waiting with {facts.reason} since {_time(facts, facts.reason_since)}."]
    if facts.detail:
        said.append("Detail: " + _detail(facts.detail) + ".")
    return said


# What a search counted (allocations/search), in the order in which it looks.
_COUNTED = {
    "teaches": "{} teach the course",
    "active": "{} active",
    "offersMode": "{} offering the mode",
    "open": "{} open then",
    "free": "{} free",
    "withinRadius": "{} near enough",
}


def _detail(detail: Mapping[str, object]) -> str:
    """What is stored beside a reason, in words: plain text for JSON."""
    said = [f"{_name(name)} {_plain(detail[name])}" for name in sorted(detail) if name != "counts"]
    if isinstance(counts := detail.get("counts"), dict):
        said.append(_counted(cast(dict[str, object], counts)))
    return ", ".join(said)


def _counted(counts: Mapping[str, object]) -> str:
    """Of everybody, or of the few of a shortlist."""
    whom = "of the trainers" if "teaches" in counts else "of the few trainers that were looked at"
    return f"{whom}, " + ", ".join(words.format(counts[name]) for name, words in _COUNTED.items() if name in counts)


def _name(key: str) -> str:
    """`purchaseId` is `purchase id`."""
    return "".join(f" {letter.lower()}" if letter.isupper() else letter for letter in key)


def _explain_stage(facts: Facts) -> Explanation:
    stage = Stage(facts.stage or "")
    if not facts.undelivered:
        if facts.registered:
            return (
                Technical.NOT_REGISTERED,
                ["Nothing is owed, yet it is still listed as undelivered money."],
                Step.CLOSE,
            )
        return None, [_DONE[stage]], None
    if not facts.registered:
        said = "It is not delivered, yet it is missing from the register of undelivered money, so nobody watches it."
        reason, more, _step = _explain_hop(facts, HOP_OF_STAGE[Stage(facts.hop_stage or stage)])
        return reason or Technical.NOT_REGISTERED, [said, *more], Step.REGISTER
    return _explain_hop(facts, HOP_OF_STAGE[Stage(facts.hop_stage or stage)])


_DONE = {
    Stage.PURCHASED: "All of its sessions were refunded: nothing to do.",
    Stage.ALLOCATED: "All of its sessions were refunded: nothing to do.",
    Stage.REFUNDED: "The money was given back: nothing to do.",
    Stage.COMPLETED: "Every session was held: nothing to do.",
    Stage.SCHEDULED: "Delivered: nothing to do.",
}


def _explain_hop(facts: Facts, hop: Hop) -> Explanation:
    """What became of the event that should have taken it out of its stage."""
    step = _STEP_OF_STAGE[Stage(facts.stage or hop.stage)]
    if facts.event_pending:
        return None, [f"{facts.event_type} is being said: {facts.consumer_group} goes on from here."], step
    if facts.dead_letter_id is not None:
        what = "gave the event up" if facts.dead_letter_parked else "gave up the event, since discarded by hand,"
        said = (
            f"{facts.consumer_group} {what} at {_time(facts, facts.dead_letter_at)}"
            f" after {counted(facts.dead_letter_attempts or 0, 'attempt')}:"
            f" {facts.dead_letter_code}, {facts.dead_letter_error} (dead letter {facts.dead_letter_id})."
        )
        return Technical.IN_DEAD_LETTERS, [said], step
    if facts.processed_event_id is not None:
        said = (
            f"{facts.consumer_group} marked {facts.event_type} {facts.processed_event_id} processed at"
            f" {_time(facts, facts.processed_at)}, but {hop.missing} {_is(hop)} missing."
        )
        return _effect_missing(hop), [said], step
    if facts.event_id is None:
        said = f"No {facts.event_type} event was ever said about this payment, and {hop.missing} {_is(hop)} missing."
        missing = _effect_missing(hop)
        return Technical.EVENT_MISSING if missing is Technical.MARKED_PROCESSED_BUT_MISSING else missing, [said], step
    return _explain_waiting_event(facts, hop, step)


def _explain_waiting_event(facts: Facts, hop: Hop, step: Step) -> Explanation:
    age = facts.event_age_seconds or 0.0
    since = f"since {_time(facts, facts.event_at)} ({age:.0f} s)"
    said = [f"{facts.event_type} {facts.event_id} waits for {facts.consumer_group} {since}."]
    if facts.relayed is False and (not facts.relays_alive or age > WAITING_SECONDS):
        said.append("It is in the outbox and not in Kafka yet.")
        said.append(
            f"{counted(facts.relays_alive, 'outbox-relay')} alive"
            + (f", in trouble: {facts.relay_error}." if facts.relay_error else ", but the event has not had its turn.")
            if facts.relays_alive
            else "No outbox-relay is alive. Start one: caravan serve outbox-relay"
        )
        return Technical.EVENT_NOT_RELAYED, said, step
    if not facts.workers_alive:
        seen = (
            f"the last one was seen at {_time(facts, facts.worker_seen_at)}"
            if facts.worker_seen_at
            else "none was started, or it was stopped"
        )
        said.append(f"No {hop.service} is alive ({seen}). Start one: caravan serve {hop.service}")
        return Technical.NO_WORKER, said, step
    if facts.failing_event_id is not None and facts.failing_event_id == facts.event_id:
        said.append(
            f"{facts.failing_worker} fails on it since {_time(facts, facts.failing_since)}: {facts.failing_error}"
        )
        return Technical.HANDLER_FAILING, said, step
    if age > WAITING_SECONDS:
        said.append(f"{counted(facts.workers_alive, hop.service)} alive, but the event has not had its turn.")
        if facts.failing_error:
            said.append(
                f"{facts.failing_worker} is in trouble since {_time(facts, facts.failing_since)}: {facts.failing_error}"
            )
        return Technical.WORKER_BEHIND, said, step
    said.append("On its way.")
    return None, said, None


def _effect_missing(hop: Hop) -> Technical:
    if hop.stage in (Stage.ALLOCATED, Stage.SCHEDULED):
        return Technical.SESSIONS_MISSING
    return Technical.MARKED_PROCESSED_BUT_MISSING


def _is(hop: Hop) -> str:
    return "are" if hop.missing.endswith("sessions") else "is"


# ------------------------------------------------------------------ the checklist, in the order of the road


def _checklist(facts: Facts) -> list[str]:
    """Payment, purchase, events, allocation, sessions: what an operator would look up, in that order."""
    lines = [_payment_line(facts)]
    if facts.stage is None:
        return lines
    lines.append(
        f"Purchase {facts.purchase_id} was created at {_time(facts, facts.purchased_at)}."
        if facts.purchase_id
        else "There is no purchase."
    )
    if facts.event_id is not None and facts.processed_event_id is None:
        lines.append(f"{facts.event_type} is in the log and not processed by {facts.consumer_group}.")
    if facts.purchase_id:
        lines.append(_allocation_line(facts))
        lines.append(
            f"Sessions of {facts.total}: {facts.scheduled} scheduled, {facts.completed} completed,"
            f" {facts.student_absent} missed by the student, {_refunded(facts)} refunded, {facts.owed} owed."
        )
    return lines


def _refunded(facts: Facts) -> int:
    """Of a purchase that ended with its refund, all that was not held: no refund names those."""
    if facts.stage != Stage.REFUNDED:
        return facts.refunded or 0
    held = (facts.scheduled or 0) + (facts.completed or 0) + (facts.student_absent or 0)
    return (facts.total or 0) - held - (facts.owed or 0)


def _payment_line(facts: Facts) -> str:
    asked = money(facts.amount_cents, facts.currency)
    if facts.captured_at is None:
        return f"Payment of {asked} by {facts.provider} is {facts.status}, created at {_time(facts, facts.created_at)}."
    captured = money(facts.captured_cents or 0, facts.currency)
    line = f"Payment of {asked} by {facts.provider} is {facts.status}: {captured} captured"
    line += f" at {_time(facts, facts.captured_at)}"
    if facts.refunded_cents:
        line += f", {money(facts.refunded_cents, facts.currency)} given back"
    return line + "."


def _allocation_line(facts: Facts) -> str:
    if facts.allocation_id is None:
        return "There is no allocation."
    if facts.trainer_id is None:
        return f"Allocation {facts.allocation_id} is {facts.allocation_status}: no trainer yet."
    trainer = f"{facts.trainer_name} ({facts.trainer_id})"
    line = f"Allocation {facts.allocation_id} is {facts.allocation_status}, trainer {trainer}"
    return line + (", but no booking holds the trainer's time." if facts.booking_live is False else ".")


# ------------------------------------------------------------------ the one button


def _action(facts: Facts, reason: str | None, step: Step | None) -> Action | None:
    if reason is None:
        return None
    payment = f"/api/v1/admin/payments/{facts.payment_id}"
    if facts.replayable and reason == Technical.IN_DEAD_LETTERS:
        path = f"/api/v1/admin/dead-letters/{facts.dead_letter_id}/replay"
        return Action("replay", "Replay the event", "POST", path, dead_letter_id=facts.dead_letter_id)
    hint = _HINTS.get(reason)
    match reason:
        case Reason.OPERATOR_HOLD:
            return Action("release", "Release the hold", "POST", f"{payment}/release")
        case Reason.STAGE_PAUSED:
            path, needs = "/api/v1/admin/pauses/resume", ("stage", "note")
            return Action("resume", "Resume the stage", "POST", path, needs, hint=hint)
        case Reason.START_PASSED if facts.purchase_id is not None:
            label = f"Begin on {(facts.detail or {}).get('next', 'the next possible day')}"
            return Action("confirm-start", label, "POST", f"{payment}/confirm-start", ("startDate", "note"), hint=hint)
        case Reason.AMOUNT_MISMATCH:
            return Action("accept", "Accept the amount and deliver", "POST", f"{payment}/accept", hint=hint)
        case Reason.PAID_TWICE:
            return Action("refund", "Refund the second payment", "POST", f"{payment}/refund")
        case Reason.STUDENT_NOT_FOUND | Reason.COURSE_NOT_FOUND:
            return Action("refund", "Refund the payment", "POST", f"{payment}/refund", hint=hint)
        case Reason.STUDENT_LOCATION_MISSING:
            path, needs = f"/api/v1/students/{facts.student_id}", ("latitude", "longitude", "note")
            where = f"The family enters it at /checkout/{facts.payment_id}, or an admin for them; then it goes on."
            return Action("enter-location", "Enter where home is", "PATCH", path, needs, hint=where)
        case Reason.TIER_UNKNOWN:
            return Action("mend_payment", "Set the number of sessions", "PATCH", payment, ("sessionCount", "note"))
        case Reason.INVALID_SCHEDULE if facts.purchase_id is None:
            return Action("mend_payment", "Set slot and start", "PATCH", payment, ("timeSlot", "startDate", "note"))
        case _ if reason in _SLOT_HELPS and facts.stage == Stage.PURCHASED:
            path = f"/api/v1/admin/purchases/{facts.purchase_id}"
            needs = ("timeSlot", "startDate", "note")
            return Action("mend_purchase", "Choose another slot", "PATCH", path, needs, hint=hint)
        case _:
            return None if step is None else Action("repair", _LABELS[step], "POST", f"{payment}/repair", hint=hint)


# Another slot may be chosen while there is no trainer. Looking again for the same one is what the workers do already,
# whenever a trainer, a booking or the student changes.
_SLOT_HELPS = frozenset({Reason.STUDENT_CONFLICT, Reason.INVALID_SCHEDULE, Reason.NO_TRAINER_AVAILABLE})

_TRAINER_HINT = "Or let a trainer open time or teach this course: then it goes on by itself."
_HINTS: dict[str, str] = {
    Technical.IN_DEAD_LETTERS: "This does the same work from the tables; a dead letter left over is discarded by hand.",
    Technical.EVENT_NOT_RELAYED: 'The workers can do without Kafka: `caravan failover postgres-log --note "..."`.',
    Reason.AMOUNT_MISMATCH: "Or refund it.",
    Reason.STAGE_PAUSED: "Who paused it, when and why stands under Pauses (/admin/pauses, `caravan pauses`).",
    Reason.START_PASSED: "Agree with the family on it, or on another date.",
    Reason.STUDENT_NOT_FOUND: "If the student is entered under this id, it goes on by itself.",
    Reason.COURSE_NOT_FOUND: "If the course is entered under this id, it goes on by itself.",
    Reason.STUDENT_CONFLICT: "Agree with the family on it. If the other sessions go away, it goes on by itself.",
    Reason.NO_TRAINER_AVAILABLE: f"Agree with the family on it. {_TRAINER_HINT}",
    Reason.TRAINER_CONFLICT: f"This takes another trainer if one is free. {_TRAINER_HINT}",
    Reason.TRAINER_LEFT: f"This takes another trainer if one is free. {_TRAINER_HINT}",
}

_LABELS = {
    Step.APPLY_WEBHOOK: "Apply the stored webhook",
    Step.REGISTER: "Register it and go on",
    Step.CREATE_PURCHASE: "Create the purchase",
    Step.ALLOCATE_TRAINER: "Look for a trainer",
    Step.SCHEDULE_SESSIONS: "Create the missing sessions",
    Step.MAKE_UP: "Book the owed sessions",
    Step.CLOSE: "Take it off the register",
}


def _time(facts: Facts, at: datetime | None) -> str:
    return "an unknown time" if at is None else at.astimezone(_zone(facts)).strftime("%Y-%m-%d %H:%M:%S %Z")


def _zone(facts: Facts) -> tzinfo:
    try:
        return ZoneInfo(facts.timezone or "UTC")
    except (ZoneInfoNotFoundError, ValueError):  # of imported money
        return UTC


def _plain(value: object) -> str:
    """A detail's value in words: plain text for JSON."""
    if isinstance(value, dict):
        inner = cast(dict[str, object], value)
        return "(" + ", ".join(f"{_name(name)} {_plain(inner[name])}" for name in sorted(inner)) + ")"
    if isinstance(value, list):
        return " ".join(_plain(item) for item in cast(list[object], value))
    return str(value)
