"""The buttons of a purchase: another slot, a trainer, its sessions. As admin/money."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any
from uuid import UUID

import structlog

from caravan import calendar
from caravan.admin.audited import audited, look
from caravan.admin.detail import PurchaseNotFound
from caravan.allocations import operations as allocations
from caravan.allocations.case import Settled
from caravan.allocations.operations import AllocationRefused, NoSuchAllocation
from caravan.db import Tx
from caravan.deliveries import Reason
from caravan.errors import Conflict, Invalid
from caravan.fulfilment.wording import still_waits
from caravan.purchases import operations as purchases
from caravan.sessions import operations as sessions
from caravan.sessions.operations import Outcome
from caravan.web.audit import require_note
from caravan.web.auth import Actor
from caravan.web.formats import day

log: structlog.stdlib.BoundLogger = structlog.get_logger()


class PurchaseEnded(Conflict):
    """The purchase was refunded: it needs no trainer."""

    code = "PURCHASE_ENDED"


class AllocationHasNoTrainer(Conflict):
    """The allocation has no trainer yet, so there are no sessions to make."""

    code = "ALLOCATION_NOT_APPROVED"


class SlotOrStartMissing(Invalid):
    """Choose another slot, another start, or both: nothing was changed."""

    code = "SLOT_OR_START_REQUIRED"


PAYMENT_OF_PURCHASE = "select payment_id from student_course_purchases where id = %(purchase_id)s"


async def _payment_of(tx: Tx, purchase_id: UUID) -> UUID:
    payment_id = await tx.value(PAYMENT_OF_PURCHASE, {"purchase_id": purchase_id})
    if payment_id is None:
        raise PurchaseNotFound
    return payment_id


@dataclass(frozen=True, slots=True)
class Mended:
    """What came of another slot: it has a trainer now, or `still_waits`."""

    said: str
    still_waits: bool


async def mend_purchase(
    tx: Tx,
    actor: Actor,
    purchase_id: UUID,
    note: str | None,
    *,
    time_slot: str | None,
    start_date: date | None,
    notice: timedelta,
) -> Mended:
    """Another slot or start for a purchase that waits, and look for a trainer at once."""
    note = require_note(note)
    if time_slot is None and start_date is None:
        raise SlotOrStartMissing
    payment_id = await _payment_of(tx, purchase_id)
    asked = {"timeSlot": time_slot, "startDate": start_date}
    async with audited(
        tx, actor, "mend purchase", payment_id, note, subject=("purchase", purchase_id), asked=asked
    ) as change:
        before = await tx.one(GET_PURCHASE_STATE, {"purchase_id": purchase_id})
        await purchases.choose_slot(tx, purchase_id, time_slot=time_slot, start_date=start_date, notice=notice)
        settled = (await allocations.settle_allocations(tx, [purchase_id], notice=notice))[purchase_id]
        chosen = _say_choice(before, await tx.one(GET_PURCHASE_STATE, {"purchase_id": purchase_id}))
        change.did = f"{chosen} {await _say_outcome(tx, settled)}"
    return Mended(change.did, still_waits=_reason(settled) is not None)


def _say_choice(before: dict[str, Any], after: dict[str, Any]) -> str:
    """`Slot 11:00 PM → 6:00 AM, start Wed 9 Dec 2026 as before.`"""
    slots = [calendar.format_slot(state["slot_start"]) for state in (before, after)]
    starts = [day(state["start_date"]) for state in (before, after)]
    return f"Slot {_say_change(*slots)}, start {_say_change(*starts)}."


def _say_change(before: str, after: str) -> str:
    return f"{before} as before" if before == after else f"{before} → {after}"


FIND_TRAINER_NAME = "select name from trainers where id = %(trainer_id)s"

# What the student has at the times that clash.
FIND_CLASH = """
select coalesce(c.title, 'another course') as title, pu.slot_start
from student_course_purchases pu left join courses c on c.id = pu.course_id where pu.id::text = %(purchase_id)s
"""


async def _say_outcome(tx: Tx, settled: Settled) -> str:
    reason = _reason(settled)
    if reason is not None:
        return f"{still_waits(reason)}{await _say_clash(tx, settled)}"
    if settled.trainer_id is None:
        return "Nothing of it is left to be booked."
    name = await tx.value(FIND_TRAINER_NAME, {"trainer_id": settled.trainer_id})
    return f"{name or 'A trainer'} is booked."


async def _say_clash(tx: Tx, settled: Settled) -> str:
    named = (settled.detail or {}).get("purchaseId") if settled.reason is Reason.STUDENT_CONFLICT else None
    clash = await tx.find(FIND_CLASH, {"purchase_id": named}) if named else None
    return f" They are of {clash['title']}, {calendar.format_slot(clash['slot_start'])}." if clash else ""


@dataclass(frozen=True, slots=True)
class Assigned:
    """The answer of auto-assign; with a `refusal` there is no trainer, and the purchase waits with that reason."""

    purchase_id: UUID
    allocation_id: UUID | None
    trainer_id: UUID | None
    status: str | None
    refusal: AllocationRefused | None = None


# The purchase that a student and a course name: one that needs a trainer before one that has one, then the newest.
CHOOSE_PURCHASE = """
select pu.id from student_course_purchases pu
left join trainer_allocations a on a.purchase_id = pu.id and a.status in ('approved', 'completed')
where pu.student_id = %(student_id)s and pu.course_id = %(course_id)s and pu.is_active
order by a.id is not null, pu.created_at desc, pu.id desc limit 1
"""

GET_PURCHASE_STATE = """
select pu.is_active, pu.slot_start, pu.start_date, pu.payment_id, a.id as allocation_id, a.trainer_id, a.status
from student_course_purchases pu
left join trainer_allocations a on a.purchase_id = pu.id and a.status <> 'cancelled'
where pu.id = %(purchase_id)s
"""


async def auto_assign(
    tx: Tx,
    actor: Actor,
    *,
    purchase_id: UUID | None = None,
    student_id: UUID | None = None,
    course_id: UUID | None = None,
    time_slot: str | None = None,
    start_date: date | None = None,
    note: str | None = None,
    notice: timedelta,
) -> Assigned:
    """Find a trainer for a purchase, as the allocation worker would; again changes nothing.

    A slot or date other than the purchase's is chosen first. Where there is no trainer the answer holds the refusal,
    and the reason is stored: commit, then raise it. Raises PurchaseNotFound, PurchaseEnded, what choose_slot does.
    """
    log.info("auto-assign", purchase_id=str(purchase_id), student_id=str(student_id), course_id=str(course_id))
    if purchase_id is None:
        purchase_id = await tx.value(CHOOSE_PURCHASE, {"student_id": student_id, "course_id": course_id})
    if purchase_id is None:
        raise PurchaseNotFound("This student has no purchase of this course.")
    payment_id = await _payment_of(tx, purchase_id)
    await look(tx, payment_id)
    state = await tx.one(GET_PURCHASE_STATE, {"purchase_id": purchase_id})
    if not state["is_active"]:
        raise PurchaseEnded
    if state["status"] in ("approved", "completed"):
        return Assigned(purchase_id, state["allocation_id"], state["trainer_id"], state["status"])
    async with audited(
        tx, actor, "auto-assign", payment_id, note, subject=("purchase", purchase_id), only_changes=True
    ):
        await _choose_other_slot(tx, purchase_id, state, time_slot, start_date, notice)
        settled = (await allocations.settle_allocations(tx, [purchase_id], notice=notice))[purchase_id]
    return _assigned(purchase_id, settled)


async def _choose_other_slot(
    tx: Tx, purchase_id: UUID, state: dict[str, Any], time_slot: str | None, start_date: date | None, notice: timedelta
) -> None:
    """Runbooks repeat the slot that was bought: only another one is a choice."""
    other_slot = time_slot if time_slot and calendar.parse_slot(time_slot).start != state["slot_start"] else None
    other_date = start_date if start_date != state["start_date"] else None
    if other_slot or other_date:
        await purchases.choose_slot(tx, purchase_id, time_slot=other_slot, start_date=other_date, notice=notice)


def _reason(settled: Settled) -> Reason | None:
    """Why it waits, if it does."""
    return Reason.OPERATOR_HOLD if settled.action == "held" else settled.reason


def _assigned(purchase_id: UUID, settled: Settled) -> Assigned:
    reason = _reason(settled)
    if reason is not None:
        return Assigned(purchase_id, settled.allocation_id, None, "waiting", AllocationRefused(reason))
    return Assigned(purchase_id, settled.allocation_id, settled.trainer_id, "approved")


FIND_ALLOCATION = """
select a.purchase_id, a.status, pu.payment_id
from trainer_allocations a join student_course_purchases pu on pu.id = a.purchase_id where a.id = %(allocation_id)s
"""


async def _allocation(tx: Tx, allocation_id: UUID) -> dict[str, Any]:
    found = await tx.find(FIND_ALLOCATION, {"allocation_id": allocation_id})
    if found is None:
        raise NoSuchAllocation
    return found


async def approve(
    tx: Tx, actor: Actor, allocation_id: UUID, trainer_id: UUID | None, note: str | None, *, notice: timedelta
) -> Assigned:
    """Give a waiting allocation this trainer, or the best. Raises AllocationRefused, AllocationNotWaiting."""
    found = await _allocation(tx, allocation_id)
    subject = ("allocation", allocation_id)
    asked = {"trainerId": trainer_id}
    async with audited(
        tx, actor, "approve", found["payment_id"], note, subject=subject, asked=asked, only_changes=True
    ):
        settled = await allocations.approve(tx, allocation_id, trainer_id, notice=notice)
    return _assigned(found["purchase_id"], settled)


async def create_sessions(tx: Tx, actor: Actor, allocation_id: UUID, note: str | None) -> dict[str, int]:
    """Make the sessions that an allocation's bookings say and that are missing: `{created, cancelled, owed}`."""
    found = await _allocation(tx, allocation_id)
    if found["status"] not in ("approved", "completed"):
        raise AllocationHasNoTrainer
    purchase_id = found["purchase_id"]
    subject = ("allocation", allocation_id)
    async with audited(tx, actor, "create sessions", found["payment_id"], note, subject=subject, only_changes=True):
        synced = await sessions.sync_sessions(tx, [purchase_id])
    if purchase_id in synced.held:
        raise AllocationRefused(Reason.OPERATOR_HOLD)
    return {
        "created": synced.scheduled.get(purchase_id, 0),
        "cancelled": len(synced.cancelled.get(purchase_id, [])),
        "owed": synced.owed.get(purchase_id, 0),
    }


async def mark_session(
    tx: Tx, actor: Actor, purchase_id: UUID, seq: int, status: Outcome, note: str | None, *, notice: timedelta
) -> None:
    """Note how a session went; a trainer's absence is made up at once where there is time."""
    note = require_note(note)
    payment_id = await _payment_of(tx, purchase_id)
    asked = {"seq": seq, "status": status}
    async with audited(tx, actor, "mark session", payment_id, note, subject=("purchase", purchase_id), asked=asked):
        await sessions.mark_session(tx, purchase_id, seq, status)
        await allocations.settle_allocations(tx, [purchase_id], notice=notice)
