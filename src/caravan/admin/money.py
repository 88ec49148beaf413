"""The buttons of a payment: repair, give back, accept, hold, release, mend.

Each button (here, in `placing`, `event_log` and `worst_day`) runs the operation that a worker would run and leaves one
audit row with before and after. All take `tx` and the actor; the command line uses them too. `note` is checked there:
no door can forget it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date, timedelta
from uuid import UUID

from caravan import deliveries
from caravan.admin.audited import audited
from caravan.db import Tx
from caravan.deliveries import Reason, Stage
from caravan.errors import Conflict
from caravan.eventlog.subscription import Subscription
from caravan.fulfilment import repair as repairs
from caravan.fulfilment.repair import Repaired
from caravan.payments import captures, refunds
from caravan.payments.providers import Provider
from caravan.payments.refunds import Refund
from caravan.people.students import update_student
from caravan.purchases import operations as purchases
from caravan.web.audit import require_note
from caravan.web.auth import Actor


class NothingToHold(Conflict):
    """Only money that is not delivered yet can be put on hold."""

    code = "NOTHING_TO_HOLD"


class AlreadyHeld(Conflict):
    """It is on hold already."""

    code = "ALREADY_HELD"


class NotHeld(Conflict):
    """It is not on hold."""

    code = "NOT_HELD"


async def repair(
    tx: Tx,
    actor: Actor,
    payment_id: UUID,
    note: str | None,
    *,
    subscriptions: Mapping[str, Subscription],
    notice: timedelta,
    dry_run: bool = False,
) -> Repaired:
    """The one safe next step; `dry_run` tells it as one that the caller takes back. Raises what fulfilment.repair
    does."""
    note = require_note(note)
    async with audited(tx, actor, "repair", payment_id, note) as change:
        done = await repairs.repair(
            tx, payment_id, by=actor.name, note=note, subscriptions=subscriptions, notice=notice, dry_run=dry_run
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
