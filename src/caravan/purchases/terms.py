"""Pure: what exactly was sold. The checkout's frozen terms, else what the payment's metadata says; never a guess."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import date, datetime, time
from typing import Any
from uuid import UUID

import msgspec

from caravan import calendar
from caravan.calendar import InvalidSchedule, InvalidSlot, Pattern
from caravan.deliveries import Reason

SESSIONS_MAX = 400
MODES = ("online", "home", "center")


class Paid(msgspec.Struct, frozen=True):
    """A payment, its checkout, and what they refer to, as the tables have it now. Terms are None where not known.

    `course_sold`: the checkout knows the course, not only the metadata.
    """

    payment_id: UUID
    status: str
    captured: bool
    mismatch: bool
    paid_by: UUID | None
    checkout_id: UUID
    student_id: UUID
    course_id: UUID | None
    course_sold: bool
    metadata: Mapping[str, Any]
    sessions: int | None
    session_minutes: int | None
    weekdays: list[int] | None
    learning_mode: str | None
    group_size: int
    timezone: str | None
    slot_start: time | None
    start_date: date | None
    purchase_id: UUID | None
    registered: bool
    reason: str | None
    held: bool
    pause_id: UUID | None
    student_known: bool
    course_known: bool
    course_modes: list[str] | None


@dataclass(frozen=True, slots=True)
class Terms:
    """What was sold. `metadata` is kept with the purchase: the terms in words, and where the tier came from."""

    course_id: UUID
    tier: int
    pattern: Pattern
    learning_mode: str
    start_date: date
    metadata: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Wait:
    """Why there can be no purchase yet."""

    reason: Reason
    detail: Mapping[str, object] | None = None


def read_terms(paid: Paid, now: datetime, holidays: Collection[date]) -> Terms | Wait:
    """The terms of a payment that nothing else stops, or what is missing."""
    if not paid.student_known:
        return Wait(Reason.STUDENT_NOT_FOUND, {"studentId": str(paid.student_id)})
    if paid.course_id is None or not paid.course_known:
        named = paid.course_id or paid.metadata.get("courseId")
        return Wait(Reason.COURSE_NOT_FOUND, {"courseId": str(named)[:36] if named else None})
    tier = known_tier(paid)
    if tier is None:
        return Wait(Reason.TIER_UNKNOWN)
    try:
        return _read_schedule(paid, paid.course_id, tier, now, holidays)
    except (InvalidSlot, InvalidSchedule) as error:
        return Wait(Reason.INVALID_SCHEDULE, {"problem": error.detail})


def _read_schedule(paid: Paid, course_id: UUID, tier: int, now: datetime, holidays: Collection[date]) -> Terms:
    slot_start, start_date, mode = known_slot(paid), known_start(paid), known_mode(paid)
    missing = [
        name
        for name, value in (("timeSlot", slot_start), ("startDate", start_date), ("learningMode", mode))
        if value is None
    ]
    if slot_start is None or start_date is None or mode is None:
        raise InvalidSchedule(f"Not known: {', '.join(missing)}.")
    pattern = Pattern(slot_start, paid.session_minutes or 0, tuple(paid.weekdays or ()), paid.timezone or "")
    calendar.check_series(pattern, start_date, tier, not_before=now, holidays=holidays)
    metadata = {
        "sessionCount": tier,
        "tierFrom": "checkout" if paid.sessions is not None else "payment.metadata",
        "timeSlot": calendar.format_slot(slot_start),
        "startDate": start_date.isoformat(),
    }
    return Terms(course_id, tier, pattern, mode, start_date, metadata)


def known_tier(paid: Paid) -> int | None:
    """How many sessions were paid for: a quantity has no default, and is not read out of other types."""
    if paid.sessions is not None:
        return paid.sessions
    count: object = paid.metadata.get("sessionCount")
    return count if type(count) is int and 1 <= count <= SESSIONS_MAX else None


def known_slot(paid: Paid) -> time | None:
    """The slot's start; None if nobody said one. Raises InvalidSlot for text that is none, or of another length."""
    text: object = paid.metadata.get("timeSlot", paid.metadata.get("preferredTimeSlot"))
    if paid.slot_start is not None or text is None:
        return paid.slot_start
    slot = calendar.parse_slot(str(text))
    calendar.check_slot_length(slot, paid.session_minutes or 0)
    return slot.start


def known_start(paid: Paid) -> date | None:
    """The requested date; None if nobody said one that is a date."""
    if paid.start_date is not None:
        return paid.start_date
    for name in ("startDate", "date", "preferredDate"):
        text: object = paid.metadata.get(name)
        if isinstance(text, str):
            try:
                return date.fromisoformat(text[:10])  # some clients send an instant; its date is what was chosen
            except ValueError:
                return None
    return None


def known_mode(paid: Paid) -> str | None:
    """The mode sold; where nobody said one, the only one that the course has."""
    said: object = paid.learning_mode or paid.metadata.get("learningMode")
    if said is None and paid.course_modes and len(paid.course_modes) == 1:
        return paid.course_modes[0]
    return said if isinstance(said, str) and said in MODES else None
