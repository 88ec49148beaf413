"""Pure: what a purchase's time should be, and so what to give back and how much to book."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date, datetime, time
from uuid import UUID

from caravan.calendar import Pattern
from caravan.deliveries import Stage


@dataclass(frozen=True, slots=True)
class State:
    """A purchase as the tables have it, once it is locked.

    `refunded`: sessions taken away by refunds; `refunded_seqs`: which, where they were numbered. `done`: completed, or
    missed by the student. `begun`: scheduled, began, and nobody has said how it went. `numbered`: all sessions ever.
    """

    purchase_id: UUID
    payment_id: UUID
    student_id: UUID
    course_id: UUID
    tier: int
    refunded: int
    refunded_seqs: list[int]
    active: bool
    minutes: int
    weekdays: list[int]
    learning_mode: str
    timezone: str
    slot_start: time
    start_date: date
    located: bool
    registered: bool
    held: bool
    reason: str | None
    waiting_since: datetime | None
    allocation_id: UUID | None
    allocation_status: str | None
    trainer_id: UUID | None
    trainer_active: bool | None
    booked: bool
    numbered: int
    done: int
    begun: int

    @property
    def pattern(self) -> Pattern:
        return Pattern(self.slot_start, self.minutes, tuple(self.weekdays), self.timezone)

    @property
    def stage(self) -> Stage:
        if self.numbered:
            return Stage.SCHEDULED
        return Stage.ALLOCATED if self.allocation_status == "approved" else Stage.PURCHASED


@dataclass(frozen=True, slots=True)
class Slot:
    """Time to come that is booked for a purchase, and the number of its session if it has one yet."""

    purchase_id: UUID
    booking_id: UUID
    trainer_active: bool
    starts_at: datetime
    seq: int | None


@dataclass(frozen=True, slots=True)
class Plan:
    """`give_back`: slots to release. `wanted`: how many to book, beside those `kept`. `over`: nothing more is to come.

    `left`: a trainer who left leaves something to be booked anew.
    """

    over: bool
    left: bool
    give_back: list[Slot]
    wanted: int
    kept: list[datetime]


def make_plan(state: State, slots: list[Slot]) -> Plan:
    """`slots` in the order of time. Slots of trainers who left go back first, then what a refund took away."""
    if not state.active:
        return Plan(over=True, left=False, give_back=slots, wanted=0, kept=[])
    kept = [slot for slot in slots if slot.trainer_active]
    give_back = [slot for slot in slots if not slot.trainer_active]
    left = bool(give_back)
    owed = state.tier - state.refunded - state.done - state.begun
    surplus = len(kept) - owed
    if surplus > 0:
        # The named sessions first, then from the end.
        named = set(state.refunded_seqs)
        trimmed = sorted(kept, key=lambda slot: (slot.seq not in named, -slot.starts_at.timestamp()))[:surplus]
        give_back += trimmed
        kept = [slot for slot in kept if slot not in trimmed]
    return Plan(
        over=owed <= 0 and state.begun == 0,
        left=left and surplus < 0,
        give_back=give_back,
        wanted=max(0, -surplus),
        kept=[slot.starts_at for slot in kept],
    )
