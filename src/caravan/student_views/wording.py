"""The road of a purchase in a family's words. Pure: no technical reason, no code, nothing that sounds like an error."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final, Literal

from caravan.calendar import local_date
from caravan.db.tx import Row
from caravan.deliveries import Reason, Stage
from caravan.web.formats import counted, day, money

# When a payment that nothing holds up deserves a word of comfort.
LONG: Final = timedelta(seconds=30)

State = Literal["done", "now", "waiting", "todo"]

STAGES: Final[dict[Stage, str]] = {
    Stage.PAID: "Adding the course",
    Stage.PURCHASED: "Looking for a trainer",
    Stage.ALLOCATED: "Booking the sessions",
    Stage.SCHEDULED: "Booked",
    Stage.COMPLETED: "Completed",
    Stage.REFUNDED: "Refunded",
}

_MENDING: Final = "A detail of this order needs mending. Our team is on it; you needn't do anything or pay again."
REASONS: Final[dict[Reason, str]] = {
    Reason.AMOUNT_MISMATCH: "The amount that reached us is not the one we asked for. Our team is looking into it.",
    Reason.PAID_TWICE: "This order was paid already. Our team is looking into this second payment.",
    Reason.STUDENT_NOT_FOUND: _MENDING,
    Reason.COURSE_NOT_FOUND: _MENDING,
    Reason.TIER_UNKNOWN: _MENDING,
    Reason.INVALID_SCHEDULE: _MENDING,
    Reason.STUDENT_LOCATION_MISSING: "For sessions at home we need to know where home is. Then we go on.",
    Reason.STUDENT_CONFLICT: "Some of these times clash with other sessions. We go on when they are free.",
    Reason.NO_TRAINER_AVAILABLE: (
        "No trainer is free for all these sessions yet. We keep looking, and book the first one who is."
    ),
    Reason.TRAINER_CONFLICT: "The trainer's time was taken in the meantime. We are looking for another trainer.",
    Reason.TRAINER_LEFT: "The trainer can't go on with this course. We are looking for another one.",
    Reason.OPERATOR_HOLD: "Our team has paused this order and will be in touch.",
    Reason.STAGE_PAUSED: (
        "Our team is mending something, so this step rests for a while. It goes on by itself; your payment is safe."
    ),
    Reason.START_PASSED: "The day on which this was to begin has passed. We will agree on a new start with you.",
}
COMFORT: Final = "This takes longer than usual. Your payment is safe, and you needn't do anything or pay again."

_ROAD: Final = (Stage.PAID, Stage.PURCHASED, Stage.ALLOCATED, Stage.SCHEDULED)


@dataclass(frozen=True, slots=True)
class Step:
    title: str
    state: State


def steps(item: Row | None, sessions: int) -> list[Step]:
    """Paid → Course added → Trainer found → N sessions booked, as far as it is. `item`: None while it isn't paid."""
    titles = ("Paid", "Course added", "Trainer found", f"{counted(sessions, 'session')} booked")
    if item is None:
        return [Step(title, "now" if number == 0 else "todo") for number, title in enumerate(titles)]
    stage, reason = item["stage"], item["reason"]
    reached = len(_ROAD) if stage == Stage.COMPLETED else _ROAD.index(Stage(stage)) + 1 if stage in _ROAD else 0
    if reached == len(_ROAD) and item["owed"]:
        booked = item["total"] - item["refunded"] - item["owed"]
        reached, titles = 3, (*titles[:3], f"{booked} of {counted(sessions, 'session')} booked")
    states: list[State] = ["done" if number < reached else "todo" for number in range(len(titles))]
    if reached < len(titles):
        states[reached] = "waiting" if reason else "now"
    return [Step(title, state) for title, state in zip(titles, states, strict=True)]


def sentence(item: Row, now: datetime) -> str:
    """Where a paid course is, and what it waits for, in one or two sentences."""
    stage = Stage(item["stage"])
    if stage is Stage.REFUNDED:
        return f"The money for this course was given back{_given_back(item)}."
    if stage is Stage.COMPLETED:
        return "All sessions of this course are over. Well done!"
    if item["reason"]:
        return REASONS.get(item["reason"], _MENDING)  # a later release may know more reasons, while it rolls out
    if stage is Stage.SCHEDULED and not item["owed"]:
        who = f" with {item['trainer_name']}" if item["trainer_name"] else ""
        booked = item["scheduled"]
        return f"All set: {counted(booked, 'session')} {'is' if booked == 1 else 'are'} booked{who}."
    going = f"{STAGES[stage]}…" if stage is not Stage.SCHEDULED else "Booking the sessions that are missing…"
    return f"{going} {COMFORT}" if now - item["paid_at"] > LONG else going


def _given_back(item: Row) -> str:
    """How much in all, and when the last of it. Nothing where coins had paid it all."""
    if not item["refunded_cents"] or item["refunded_at"] is None:
        return ""
    on = day(local_date(item["refunded_at"], item["timezone"]))
    return f": all {money(item['refunded_cents'], item['currency'])}, on {on}"


def tone(item: Row) -> State:
    """How an item's badge looks; the text beside it says the same."""
    if item["reason"]:
        return "waiting"
    over = item["stage"] in (Stage.COMPLETED, Stage.REFUNDED)
    return "done" if over or (item["stage"] == Stage.SCHEDULED and not item["owed"]) else "now"


def badge(item: Row) -> str:
    return "Waiting" if item["reason"] else STAGES[Stage(item["stage"])]
