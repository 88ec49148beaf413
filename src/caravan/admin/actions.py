"""The buttons: each runs the operation that a worker would run, and leaves one audit row with before and after.

Everything takes `tx` and the actor; the command line uses these too. `note` is checked here: no door can forget it.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any
from uuid import UUID

import structlog

from caravan import calendar, deliveries
from caravan.admin.purchases import PurchaseNotFound
from caravan.allocations import operations as allocations
from caravan.allocations.operations import AllocationRefused, NoSuchAllocation, Settled
from caravan.db import Tx
from caravan.deliveries import Reason, Stage
from caravan.errors import Conflict
from caravan.eventlog import carrier as carriers
from caravan.eventlog import dead_letters
from caravan.eventlog.carrier import Carrier
from caravan.eventlog.subscription import Subscription
from caravan.fulfilment import repair as repairs
from caravan.fulfilment.diagnose import Finding, explain
from caravan.fulfilment.facts import Facts, gather_facts
from caravan.fulfilment.repair import LOCK_PAYMENT, PaymentNotFound, Repaired
from caravan.payments import captures, refunds
from caravan.payments.providers import Provider
from caravan.payments.refunds import Refund
from caravan.people.students import update_student
from caravan.purchases import operations as purchases
from caravan.sessions import operations as sessions
from caravan.sessions.operations import Outcome
from caravan.web import audit
from caravan.web.audit import require_note
from caravan.web.auth import Actor

log: structlog.stdlib.BoundLogger = structlog.get_logger()


class NothingToHold(Conflict):
    """Only money that is not delivered yet can be put on hold."""

    code = "NOTHING_TO_HOLD"


class AlreadyHeld(Conflict):
    """It is on hold already."""

    code = "ALREADY_HELD"


class NotHeld(Conflict):
    """It is not on hold."""

    code = "NOT_HELD"


class PurchaseEnded(Conflict):
    """The purchase was refunded: it needs no trainer."""

    code = "PURCHASE_ENDED"


class AllocationHasNoTrainer(Conflict):
    """The allocation has no trainer yet, so there are no sessions to make."""

    code = "ALLOCATION_NOT_APPROVED"


# ------------------------------------------------------------------ before, after, who, why


async def _look(tx: Tx, payment_id: UUID) -> tuple[Facts, Finding]:
    """The payment as it is, locked until the end. Raises PaymentNotFound."""
    if await tx.value(LOCK_PAYMENT, {"payment_id": payment_id}) is None:
        raise PaymentNotFound
    (facts,) = await gather_facts(tx, [payment_id])
    return facts, explain(facts, tx.now)


def _snapshot(facts: Facts, finding: Finding) -> dict[str, Any]:
    """What an audit row says of a payment."""
    return {
        "status": facts.status,
        "stage": finding.stage,
        "reason": finding.reason,
        "refundedCents": facts.refunded_cents,
        "purchaseId": facts.purchase_id,
        "allocationId": facts.allocation_id,
        "allocationStatus": facts.allocation_status,
        "trainerId": facts.trainer_id,
        "scheduled": facts.scheduled,
        "owed": facts.owed,
    }


@dataclass(slots=True)
class _Change:
    """What was so before; `did` is told in the audit row, where there is more to tell than the difference."""

    facts: Facts
    finding: Finding
    did: str | None = None


@asynccontextmanager
async def audited(
    tx: Tx,
    actor: Actor,
    action: str,
    payment_id: UUID,
    note: str | None,
    *,
    subject: tuple[str, UUID] | None = None,
    asked: Mapping[str, Any] | None = None,
    only_changes: bool = False,
) -> AsyncGenerator[_Change]:
    """One audit row around a change: what was so before, what is so after, and what was asked for."""
    facts, finding = await _look(tx, payment_id)
    change = _Change(facts, finding)
    yield change
    before, after = _snapshot(facts, finding), _snapshot(*await _look(tx, payment_id))
    if only_changes and before == after:
        return
    kind, subject_id = subject or ("payment", payment_id)
    after |= {"asked": asked} if asked else {}
    after |= {"did": change.did} if change.did else {}
    await audit.record(
        tx, actor, action=action, subject_type=kind, subject_id=subject_id, note=note, before=before, after=after
    )


# ------------------------------------------------------------------ money


async def repair(
    tx: Tx,
    actor: Actor,
    payment_id: UUID,
    note: str | None,
    *,
    subscriptions: Mapping[str, Subscription],
    notice: timedelta,
) -> Repaired:
    """The one safe next step. Raises what fulfilment.repair does."""
    note = require_note(note)
    async with audited(tx, actor, "repair", payment_id, note) as change:
        done = await repairs.repair(
            tx, payment_id, by=actor.name, note=note, subscriptions=subscriptions, notice=notice
        )
        change.did = done.did
    return done


async def refund(
    tx: Tx,
    actor: Actor,
    payment_id: UUID,
    note: str | None,
    *,
    providers: Mapping[str, Provider],
    amount_cents: int | None = None,
    sessions: Sequence[int] | int | None = None,
    as_coins: int | None = None,
    refund_id: UUID | None = None,
) -> Refund:
    """Money goes back: all, or a part with the sessions that it takes away; `as_coins` is a coin's worth in cents,
    for money that came twice. `refund_id`: made once per request, see payments. Raises what payments.refunds does."""
    note = require_note(note)
    asked = {"amountCents": amount_cents, "sessions": sessions, "asCoins": as_coins is not None}
    async with audited(tx, actor, "refund", payment_id, note, asked=asked):
        if as_coins is not None:
            return await refunds.refund_as_coins(tx, payment_id, coin_value_cents=as_coins, note=note)
        return await refunds.refund_by_operator(
            tx, providers, payment_id, amount_cents=amount_cents, sessions=sessions, note=note, refund_id=refund_id
        )


async def accept(tx: Tx, actor: Actor, payment_id: UUID, note: str | None) -> None:
    """Another amount than asked for will do. Raises NothingToAccept."""
    note = require_note(note)
    async with audited(tx, actor, "accept", payment_id, note):
        await captures.accept_amount(tx, payment_id)


async def hold(tx: Tx, actor: Actor, payment_id: UUID, note: str | None) -> None:
    """Stop everything that would move this payment. Raises NothingToHold, AlreadyHeld."""
    note = require_note(note)
    async with audited(tx, actor, "hold", payment_id, note) as change:
        if change.facts.held:
            raise AlreadyHeld
        # The register may not have heard yet of a refund that left nothing to hold.
        stage = change.facts.stage if change.facts.undelivered else None
        if stage is None or not await deliveries.hold(tx, payment_id, Stage(stage), note):
            raise NothingToHold


async def release(tx: Tx, actor: Actor, payment_id: UUID, note: str | None, *, notice: timedelta) -> None:
    """Let it go on, with the next step at once: what it waited for before is found again. Raises NotHeld."""
    note = require_note(note)
    async with audited(tx, actor, "release", payment_id, note) as change:
        stage = change.facts.stage
        if stage is None or not await deliveries.release_hold(tx, payment_id, Stage(stage)):
            raise NotHeld
        if change.finding.step is not None:
            await repairs.run_step(tx, change.finding.step, [payment_id], notice=notice)


async def mend_payment(
    tx: Tx,
    actor: Actor,
    payment_id: UUID,
    note: str | None,
    *,
    session_count: int | None,
    time_slot: str | None,
    start_date: date | None,
) -> None:
    """Say what an imported payment didn't, and go on with it. Raises TermsKnown, InvalidSlot."""
    note = require_note(note)
    asked = {"sessionCount": session_count, "timeSlot": time_slot, "startDate": start_date}
    async with audited(tx, actor, "mend payment", payment_id, note, asked=asked):
        await purchases.mend_terms(tx, payment_id, sessions=session_count, time_slot=time_slot, start_date=start_date)


async def enter_location(
    tx: Tx, actor: Actor, payment_id: UUID, note: str | None, *, latitude: float, longitude: float, notice: timedelta
) -> None:
    """Where the student's home is, as the family said; what waits for it goes on at once. Coordinates have one home:
    the audit row tells that they were entered, never which. Raises StudentNotFound."""
    note = require_note(note)
    async with audited(tx, actor, "enter location", payment_id, note) as change:
        await update_student(tx, change.facts.student_id, {"latitude": latitude, "longitude": longitude})
        if change.finding.reason == Reason.STUDENT_LOCATION_MISSING and change.finding.step is not None:
            await repairs.run_step(tx, change.finding.step, [payment_id], notice=notice)
        change.did = "Entered where home is."


# ------------------------------------------------------------------ purchases, trainers, sessions

PAYMENT_OF_PURCHASE = "select payment_id from student_course_purchases where id = %(purchase_id)s"


async def _payment_of(tx: Tx, purchase_id: UUID) -> UUID:
    payment_id = await tx.value(PAYMENT_OF_PURCHASE, {"purchase_id": purchase_id})
    if payment_id is None:
        raise PurchaseNotFound
    return payment_id


async def mend_purchase(
    tx: Tx,
    actor: Actor,
    purchase_id: UUID,
    note: str | None,
    *,
    time_slot: str | None,
    start_date: date | None,
    notice: timedelta,
) -> None:
    """Another slot or start for a purchase that waits, and look for a trainer at once."""
    note = require_note(note)
    payment_id = await _payment_of(tx, purchase_id)
    asked = {"timeSlot": time_slot, "startDate": start_date}
    async with audited(tx, actor, "mend purchase", payment_id, note, subject=("purchase", purchase_id), asked=asked):
        await purchases.choose_slot(tx, purchase_id, time_slot=time_slot, start_date=start_date, notice=notice)
        await allocations.settle_allocations(tx, [purchase_id], notice=notice)


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
    await _look(tx, payment_id)
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


def _assigned(purchase_id: UUID, settled: Settled) -> Assigned:
    reason = Reason.OPERATOR_HOLD if settled.action == "held" else settled.reason
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


# ------------------------------------------------------------------ dead letters


async def replay(
    tx: Tx, actor: Actor, dead_letter_id: UUID, note: str | None, *, subscriptions: Mapping[str, Subscription]
) -> dead_letters.DeadLetter:
    """Run a parked event once more. Raises ReplayFailed and what dead_letters does."""
    note = require_note(note)
    letter = await repairs.replay(tx, dead_letter_id, subscriptions, by=actor.name, note=note)
    return await _resolved(tx, actor, "replay", letter, note)


async def discard(tx: Tx, actor: Actor, dead_letter_id: UUID, note: str | None) -> dead_letters.DeadLetter:
    """Give a parked event up for good."""
    note = require_note(note)
    letter = await dead_letters.discard(tx, dead_letter_id, by=actor.name, note=note)
    return await _resolved(tx, actor, "discard", letter, note)


async def fail_over(tx: Tx, actor: Actor, carrier: Carrier, note: str | None) -> bool:
    """Have the workers take their events from `carrier`; False where they do already. Raises NoKafka."""
    note = require_note(note)
    before = (await carriers.get_carrier(tx)).carrier
    switched = await carriers.switch_carrier(tx, carrier)
    if switched:
        await audit.record(
            tx,
            actor,
            action="failover",
            subject_type="event log",
            subject_id="event-log",
            note=note,
            before={"carrier": before},
            after={"carrier": carrier},
        )
    return switched


async def _resolved(
    tx: Tx, actor: Actor, action: str, letter: dead_letters.DeadLetter, note: str
) -> dead_letters.DeadLetter:
    now = await dead_letters.get_dead_letter(tx, letter.id)
    await audit.record(
        tx,
        actor,
        action=action,
        subject_type="dead letter",
        subject_id=letter.id,
        note=note,
        before={"status": letter.status, "eventId": letter.event_id, "group": letter.consumer_group},
        after={"status": now.status},
    )
    return now
