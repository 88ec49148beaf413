"""From captured money to a purchase, and what refunds take from it. Each may run again at any time: it does what is
missing. The worker, the reconciler, an operator's button and the command line all call these."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date, time, timedelta
from typing import Literal
from uuid import UUID

import structlog

from caravan import calendar, deliveries, pauses
from caravan.calendar import InvalidSlot, Pattern
from caravan.catalog import list_holidays
from caravan.db import Tx
from caravan.deliveries import Block, Reason, Stage
from caravan.errors import Conflict, NotFound
from caravan.eventlog import outbox
from caravan.events import CourseAccessGranted, Event, PurchaseCreated
from caravan.pauses import Kept
from caravan.purchases import store
from caravan.purchases.terms import Paid, Terms, Wait, known_mode, known_slot, known_start, known_tier, read_terms

log: structlog.stdlib.BoundLogger = structlog.get_logger()

Skip = Literal["exists", "held", "refunded", "not captured", "not the payer"]


class NoSuchPayment(NotFound):
    """There is no such payment."""

    code = "PAYMENT_NOT_FOUND"


class NoSuchPurchase(NotFound):
    """There is no such purchase."""

    code = "PURCHASE_NOT_FOUND"


class TermsKnown(Conflict):
    """What was sold is known already, and stays as it was sold."""

    code = "TERMS_KNOWN"


class PurchaseNotWaiting(Conflict):
    """The purchase has a trainer, or is refunded: its time can't be chosen anew here."""

    code = "PURCHASE_NOT_WAITING"


@dataclass(slots=True)
class Created:
    """What happened, by payment. A payment that does not exist is in none."""

    created: dict[UUID, UUID] = field(default_factory=dict[UUID, UUID])
    """The new purchase."""
    waiting: dict[UUID, Reason] = field(default_factory=dict[UUID, Reason])
    skipped: dict[UUID, Skip] = field(default_factory=dict[UUID, Skip])


async def create_purchases(tx: Tx, payment_ids: Sequence[UUID]) -> Created:
    """Make the purchases that captured payments are still owed; store the reason where one can't be."""
    done = Created()
    await store.lock_payments(tx, payment_ids)
    payments = await store.list_paid(tx, payment_ids)
    holidays = await list_holidays(tx)
    sold: list[tuple[Paid, Terms]] = []
    blocks: list[Block] = []
    kept: list[Kept] = []
    for paid in payments:
        skip = _skip(paid)
        verdict = skip or _stop(paid)
        if verdict is None and paid.pause_id:
            done.waiting[paid.payment_id] = Reason.STAGE_PAUSED
            kept.append(Kept(paid.payment_id, Stage.PAID, paid.pause_id))
            continue
        verdict = verdict or read_terms(paid, tx.now, holidays)
        if isinstance(verdict, Terms):
            sold.append((paid, verdict))
        elif isinstance(verdict, Wait):
            done.waiting[paid.payment_id] = verdict.reason
            if paid.reason == verdict.reason and verdict.detail is None:
                continue  # payments stored it, and knows more about it
            blocks.append(Block(paid.payment_id, Stage.PAID, verdict.reason, verdict.detail))
        else:
            done.skipped[paid.payment_id] = verdict
    done.created = await store.insert_purchases(tx, sold)
    done.skipped.update({paid.payment_id: "exists" for paid, _ in sold if paid.payment_id not in done.created})
    new = [(paid, terms) for paid, terms in sold if paid.payment_id in done.created]
    # Only money that came around the usual way can be missing in the register.
    await deliveries.open_deliveries(
        tx, [p.payment_id for p in payments if not p.registered and p.payment_id not in done.skipped]
    )
    await deliveries.name_courses(tx, [paid.payment_id for paid, _ in new if not paid.course_sold])
    await deliveries.block(tx, blocks)
    await pauses.keep(tx, Stage.PAID, kept)
    await deliveries.unblock(tx, [paid.payment_id for paid, _ in new if paid.reason], Stage.PAID)
    _announce(tx, [(paid, terms, done.created[paid.payment_id]) for paid, terms in new])
    return done


def _skip(paid: Paid) -> Skip | None:
    if paid.purchase_id is not None:
        return "exists"
    if not paid.captured:
        return "not captured"
    if paid.status == "refunded":
        return "refunded"
    if paid.held:
        return "held"
    if paid.paid_by is None and not paid.mismatch:
        return "not the payer"
    return None


def _stop(paid: Paid) -> Wait | None:
    """Money that an operator has to look at first."""
    if paid.paid_by not in (None, paid.payment_id):
        return Wait(Reason.PAID_TWICE, {"paidBy": str(paid.paid_by)})
    if paid.mismatch:
        return Wait(Reason.AMOUNT_MISMATCH)
    return None


def _announce(tx: Tx, created: Sequence[tuple[Paid, Terms, UUID]]) -> None:
    if not created:
        return
    events: list[Event] = []
    for paid, terms, purchase_id in created:
        names = {
            "payment_id": paid.payment_id,
            "student_id": paid.student_id,
            "course_id": terms.course_id,
            "purchase_id": purchase_id,
        }
        events += [PurchaseCreated(**names, session_count=terms.tier), CourseAccessGranted(**names)]
    outbox.append(tx, events)
    log.info("Purchase created successfully", count=len(created))
    log.info("PURCHASE_CREATED event emitted", count=len(created))


async def apply_refunds(tx: Tx, payment_ids: Sequence[UUID]) -> set[UUID]:
    """Let purchases say what was refunded: full ends them, partial takes sessions off. The purchases that changed."""
    await store.lock_payments(tx, payment_ids)
    return await store.mark_refunded(tx, payment_ids)


async def mend_terms(
    tx: Tx,
    payment_id: UUID,
    *,
    sessions: int | None = None,
    time_slot: str | None = None,
    start_date: date | None = None,
    learning_mode: str | None = None,
) -> Created:
    """Say what is not known of an imported payment (TIER_UNKNOWN, INVALID_SCHEDULE), and go on with it.

    Raises TermsKnown for a term that the checkout or the metadata knows: those were sold. InvalidSlot as in a checkout.
    """
    await store.lock_payments(tx, [payment_id])
    payments = await store.list_paid(tx, [payment_id])
    if not payments:
        raise NoSuchPayment
    paid = payments[0]
    if paid.purchase_id is not None:
        raise TermsKnown
    _refuse_known(paid, sessions=sessions, time_slot=time_slot, start_date=start_date, learning_mode=learning_mode)
    slot = calendar.parse_slot(time_slot) if time_slot is not None else None
    if slot is not None and paid.session_minutes is not None:
        calendar.check_slot_length(slot, paid.session_minutes)
    await store.fill_checkout(
        tx,
        payment_id,
        sessions=sessions,
        slot_start=slot.start if slot else None,
        start_date=start_date,
        learning_mode=learning_mode,
    )
    return await create_purchases(tx, [payment_id])


def _refuse_known(
    paid: Paid, *, sessions: int | None, time_slot: str | None, start_date: date | None, learning_mode: str | None
) -> None:
    try:
        slot_start = known_slot(paid)
    except InvalidSlot:
        slot_start = None
    for name, new, known in (
        ("number of sessions", sessions, known_tier(paid)),
        ("time slot", time_slot, slot_start),
        ("start date", start_date, known_start(paid)),
        ("learning mode", learning_mode, known_mode(paid)),
    ):
        if new is not None and known is not None:
            raise TermsKnown(f"The {name} is known ({known}), and stays as it was sold.")


async def choose_slot(
    tx: Tx,
    purchase_id: UUID,
    *,
    time_slot: str | None = None,
    start_date: date | None = None,
    notice: timedelta,
) -> None:
    """Another slot or start for a purchase without a trainer; what was asked first stays with its checkout.

    The caller settles the allocation next. Raises PurchaseNotWaiting, InvalidSlot, and for the date as a checkout does.
    """
    payment_id = await store.find_payment(tx, purchase_id)
    if payment_id is None:
        raise NoSuchPurchase
    await store.lock_payments(tx, [payment_id])
    waiting = await store.lock_purchase(tx, purchase_id)
    if waiting is None:
        raise NoSuchPurchase
    if waiting.has_trainer or not waiting.is_active:
        raise PurchaseNotWaiting
    slot_start: time = waiting.slot_start
    if time_slot is not None:
        slot = calendar.parse_slot(time_slot)
        calendar.check_slot_length(slot, waiting.session_minutes)
        slot_start = slot.start
    if start_date is not None:
        calendar.check_requested_start(
            start_date,
            Pattern(slot_start, waiting.session_minutes, tuple(waiting.weekdays), waiting.timezone),
            tx.now,
            notice=notice,
            holidays=await list_holidays(tx),
        )
    await store.move_purchase(
        tx, purchase_id, slot_start, start_date or waiting.start_date, calendar.format_slot(slot_start)
    )
