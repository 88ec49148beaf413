"""Pure: what a purchase's time should be, and so what to give back and how much to book."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date, datetime, time
from uuid import UUID

import msgspec

from caravan.calendar import Pattern
from caravan.deliveries import Stage


class State(msgspec.Struct, frozen=True):
    """A purchase as the tables have it, once it is locked.

    `refunded`: sessions taken away by refunds; `refunded_seqs`: which, where they were numbered. `done`: completed, or
    missed by the student. `numbered`: all sessions ever.
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
    pause_id: UUID | None
    captured_at: datetime
    allocation_id: UUID | None
    allocation_status: str | None
    trainer_id: UUID | None
    trainer_active: bool | None
    allocation_booked: bool
    booked: bool
    numbered: int
    done: int

    @property
    def pattern(self) -> Pattern:
        return Pattern(self.slot_start, self.minutes, tuple(self.weekdays), self.timezone)

    @property
    def waits(self) -> bool:
        """Whether it has been looked for a trainer before, in vain."""
        return self.allocation_status == "waiting" or self.reason is not None

    @property
    def stage(self) -> Stage:
        if self.numbered:
            return Stage.SCHEDULED
        return Stage.ALLOCATED if self.allocation_status == "approved" else Stage.PURCHASED


@dataclass(frozen=True, slots=True)
class Slot:
    """Booked time whose outcome is open: it is to come, or it has begun and nobody has said how it went.

    `seq`: the number of its session, if it has one yet.
    """

    purchase_id: UUID
    booking_id: UUID
    trainer_active: bool
    starts_at: datetime
    begun: bool
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
    """Time of trainers who left goes back first, then what refunds took away; what is missing then is wanted."""
    to_come = [slot for slot in slots if not slot.begun]
    if not state.active:
        return Plan(over=True, left=False, give_back=to_come, wanted=0, kept=[])
    give_back = [slot for slot in to_come if not slot.trainer_active]
    kept = [slot for slot in slots if slot not in give_back]
    left = bool(give_back)
    owed = state.tier - state.refunded - state.done
    surplus = len(kept) - owed
    if surplus > 0:
        # The named sessions first, then from the end; one that has begun only where nothing else is left to take.
        named = set(state.refunded_seqs)
        kept.sort(key=lambda slot: (slot.seq not in named, slot.begun, -slot.starts_at.timestamp()))
        give_back += kept[:surplus]
        kept = kept[surplus:]
    return Plan(
        over=owed <= 0,
        left=left and surplus < 0,
        give_back=give_back,
        wanted=max(0, -surplus),
        kept=[slot.starts_at for slot in kept],
    )
