"""The buttons of the worst day: stop a stage and let it go on, agree to a later start, repair many, settle unclaimed
money. As admin/money: everything takes the actor, checks the note and leaves its audit row."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date, timedelta
from typing import Any
from uuid import UUID

from caravan import pauses
from caravan.admin import money
from caravan.admin.audited import audited
from caravan.allocations import operations as allocations
from caravan.db import Database, Tx
from caravan.deliveries import Reason
from caravan.errors import Conflict
from caravan.eventlog.subscription import Subscription
from caravan.fulfilment import bulk
from caravan.fulfilment.bulk import Chosen, Done
from caravan.fulfilment.diagnose import diagnose
from caravan.fulfilment.repair import Repaired
from caravan.pauses import NotPaused, Pause, Scope
from caravan.payments.webhooks import Unclaimed, settle_unclaimed
from caravan.purchases import operations as purchases
from caravan.web import audit
from caravan.web.audit import require_note
from caravan.web.auth import Actor


class NoStartToConfirm(Conflict):
    """It does not wait for anybody to agree to a later start."""

    code = "NO_START_TO_CONFIRM"


class DryRun(Exception):
    """Undoes a transaction that was only tried."""


# ------------------------------------------------------------------ pause and resume


async def pause(tx: Tx, actor: Actor, scope: Scope, note: str | None) -> Pause:
    """Stop a stage; the edge calls it within `pauses.take_hold`. Raises what pauses.pause does."""
    note = require_note(note)
    paused = await pauses.pause(tx, scope, note=note, by=actor.name)
    await _record(tx, actor, "pause", paused, note, before=None, after=_scope(paused))
    return paused


async def resume(tx: Tx, actor: Actor, scope: Scope, note: str | None) -> Pause:
    """Let it go on: what waits for it does so by itself, the nearest start first. Raises NotPaused."""
    note = require_note(note)
    pause_id = await pauses.find_pause(tx, scope)
    if pause_id is None:
        raise NotPaused
    ended = await pauses.resume(tx, pause_id)
    before = _scope(ended) | {"note": ended.note, "by": ended.paused_by, "since": ended.paused_at}
    await _record(tx, actor, "resume", ended, note, before=before | {"waiting": ended.waiting}, after=None)
    return ended


def _scope(paused: Pause) -> dict[str, Any]:
    return {"stage": paused.stage, "courseId": paused.course_id, "city": paused.city}


async def _record(
    tx: Tx,
    actor: Actor,
    action: str,
    paused: Pause,
    note: str,
    *,
    before: dict[str, Any] | None,
    after: dict[str, Any] | None,
) -> None:
    await audit.record(
        tx, actor, action=action, subject_type="stage", subject_id=paused.stage, note=note, before=before, after=after
    )


# ------------------------------------------------------------------ a start that has passed


async def confirm_start(
    tx: Tx, actor: Actor, payment_id: UUID, note: str | None, *, start_date: date | None = None, notice: timedelta
) -> None:
    """Somebody agrees to a later start: this one, or the next that is booked or possible; it goes on at once.

    Raises NoStartToConfirm, and for the date as a checkout does.
    """
    note = require_note(note)
    asked = {"startDate": start_date}
    async with audited(tx, actor, "confirm start", payment_id, note, asked=asked) as change:
        facts = change.facts
        if facts.reason != Reason.START_PASSED or facts.purchase_id is None:
            raise NoStartToConfirm
        kept = await allocations.give_up_missed(tx, facts.purchase_id, everything=start_date is not None)
        if kept is not None:
            change.did = f"Agreed to begin on {kept} as it is booked; what was missed comes at the end."
        else:
            agreed = start_date or await allocations.next_start(tx, facts.purchase_id, notice=notice)
            await purchases.choose_slot(tx, facts.purchase_id, start_date=agreed, notice=notice)
            change.did = f"Agreed to begin on {agreed} or the next day of the course."
        await allocations.settle_allocations(tx, [facts.purchase_id], notice=notice)


# ------------------------------------------------------------------ many at once


async def repair_many(
    db: Database,
    actor: Actor,
    chosen: Chosen,
    note: str | None,
    *,
    source: str,
    subscriptions: Mapping[str, Subscription],
    notice: timedelta,
    dry_run: bool = False,
) -> Done:
    """One first, then the rest, until something unexpected; each leaves its audit row, and the whole one more.

    An edge of its own: each payment has its transaction.
    """
    note = require_note(note)

    async def repair_one(payment_id: UUID) -> Repaired:
        told: list[Repaired] = []

        async def work(tx: Tx) -> None:
            told[:] = [
                await money.repair(
                    tx, actor, payment_id, note, subscriptions=subscriptions, notice=notice, dry_run=dry_run
                )
            ]
            if dry_run:
                raise DryRun

        try:
            await db.transact(work, source)
        except DryRun:
            pass
        return told[0]

    async def look(payment_id: UUID) -> str:
        (finding,) = await db.transact(lambda tx: diagnose(tx, payment_id=payment_id), source)
        return finding.stage

    payment_ids = await db.transact(lambda tx: bulk.choose(tx, chosen), source)
    done = await bulk.repair_many(payment_ids, repair_one, None if dry_run else look)
    if done.lines and not dry_run:
        await db.transact(lambda tx: _record_many(tx, actor, chosen, note, done), source)
    return done


async def _record_many(tx: Tx, actor: Actor, chosen: Chosen, note: str, done: Done) -> None:
    after = {"chosen": done.chosen, "tried": len(done.lines), "moved": done.moved, "stopped": done.stopped}
    await audit.record(
        tx,
        actor,
        action="repair many",
        subject_type="payments",
        subject_id=chosen.reason or "all",
        note=note,
        before={"asked": chosen.words},
        after=after,
    )


# ------------------------------------------------------------------ unclaimed money


async def deal_with_unclaimed(tx: Tx, actor: Actor, provider: str, event_id: str, note: str | None) -> Unclaimed:
    """A person has found out whose money it is and settled it outside: it is listed no more. Raises NotUnclaimed."""
    note = require_note(note)
    settled = await settle_unclaimed(tx, provider, event_id)
    money = {"amountCents": settled.amount_cents, "currency": settled.currency, "paymentId": settled.payment_id}
    await audit.record(
        tx,
        actor,
        action="deal with unclaimed money",
        subject_type="webhook",
        subject_id=f"{provider}/{event_id}",
        note=note,
        before=money,
        after={"outcome": "dealt with"},
    )
    return settled
