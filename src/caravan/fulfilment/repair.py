"""Do the one safe next step for a payment that is stuck, through the operation that its worker would have run.

There is no second implementation here: a step is a call of a context's own operation, which looks at the tables and
does what is missing. The reconciler runs the same steps over many payments, an operator's button over one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from uuid import UUID

from caravan import deliveries
from caravan.allocations.operations import NOTICE, settle_allocations
from caravan.db import Tx
from caravan.deliveries import Reason, Stage
from caravan.errors import Conflict, NotFound, is_transient
from caravan.eventlog import dead_letters
from caravan.eventlog.consumer import describe
from caravan.eventlog.subscription import Subscription
from caravan.fulfilment.diagnose import Finding, Technical, explain
from caravan.fulfilment.facts import Facts, gather_facts
from caravan.fulfilment.gaps import Step
from caravan.fulfilment.wording import still_waits
from caravan.payments.captures import settle_captured
from caravan.payments.webhooks import apply_waiting
from caravan.purchases.operations import apply_refunds, create_purchases
from caravan.sessions.operations import sync_sessions

# Money that only an operator may decide about.
OPERATORS_DECISION = frozenset({Reason.OPERATOR_HOLD, Reason.AMOUNT_MISMATCH, Reason.PAID_TWICE})


class PaymentNotFound(NotFound):
    """There is no such payment."""

    code = "PAYMENT_NOT_FOUND"


class OperatorMustDecide(Conflict):
    """No repair moves this payment: an operator has to accept it, refund it or release it. The code says which."""

    def __init__(self, reason: str) -> None:
        super().__init__(_DECISIONS[Reason(reason)])
        self.reason = reason

    @property
    def problem_code(self) -> str:
        return self.reason


_DECISIONS = {
    Reason.OPERATOR_HOLD: "An operator put it on hold: release it first.",
    Reason.AMOUNT_MISMATCH: "Another amount came than was asked for: accept it or refund it.",
    Reason.PAID_TWICE: "The checkout was paid twice: refund this payment.",
}


class ReplayFailed(Conflict):
    """The handler failed again: the dead letter stays parked."""

    code = "REPLAY_FAILED"


@dataclass(frozen=True, slots=True)
class Repaired:
    """What a repair did, in words, and where the payment was and is. `step` is None where nothing was to be done."""

    payment_id: UUID
    purchase_id: UUID | None
    step: str | None
    did: str
    stage_before: str
    stage: str
    reason_before: str | None
    reason: str | None

    @property
    def still_waits(self) -> bool:
        """Nothing was moved, because a business reason stands in the way."""
        return self.stage == self.stage_before and self.reason in Reason.__members__


# Repairs and refunds of one payment wait for each other.
LOCK_PAYMENT = "select id from payments where id = %(payment_id)s for update"


async def repair(
    tx: Tx,
    payment_id: UUID,
    *,
    by: str,
    note: str | None,
    subscriptions: Mapping[str, Subscription],
    notice: timedelta = NOTICE,
    dry_run: bool = False,
) -> Repaired:
    """Do the next step for this payment, if there is one, and tell what it was.

    With `dry_run` the caller takes it all back: it is told as what would be done, and no id is named that won't exist.
    Raises PaymentNotFound; OperatorMustDecide with the reason as code; ReplayFailed.
    """
    facts, before = await _look(tx, payment_id, lock=True)
    if before.reason in OPERATORS_DECISION:
        raise OperatorMustDecide(str(before.reason))
    step: str | None = before.step
    if step is None:
        did = before.evidence[-1]
    elif before.reason == Technical.IN_DEAD_LETTERS and facts.replayable and facts.dead_letter_id:
        step = "replay"
        await replay(tx, facts.dead_letter_id, subscriptions, by=by, note=note)
        did = f"{'Would replay' if dry_run else 'Replayed'} the parked {facts.event_type} (dead letter"
        did += f" {facts.dead_letter_id})."
    else:
        await run_step(tx, Step(step), [payment_id], notice=notice)
        did = ""
    facts, after = await _look(tx, payment_id)
    return Repaired(
        payment_id=payment_id,
        purchase_id=before.purchase_id if dry_run else after.purchase_id,
        step=step,
        did=did or _tell(Step(step or ""), before, after, facts, dry_run=dry_run),
        stage_before=before.stage,
        stage=after.stage,
        reason_before=before.reason,
        reason=after.reason,
    )


async def replay(
    tx: Tx, dead_letter_id: UUID, subscriptions: Mapping[str, Subscription], *, by: str, note: str | None
) -> dead_letters.DeadLetter:
    """Run a parked event again; if its handler fails, it stays parked. Raises ReplayFailed."""
    try:
        async with tx.savepoint():
            return await dead_letters.replay(tx, dead_letter_id, subscriptions, by=by, note=note)
    except (Conflict, NotFound):
        raise
    except Exception as error:
        if is_transient(error):
            raise
        raise ReplayFailed(f"The handler failed again: {describe(error)}.") from error


async def _look(tx: Tx, payment_id: UUID, *, lock: bool = False) -> tuple[Facts, Finding]:
    if lock and await tx.value(LOCK_PAYMENT, {"payment_id": payment_id}) is None:
        raise PaymentNotFound
    (facts,) = await gather_facts(tx, [payment_id])
    return facts, explain(facts, tx.now)


async def run_step(tx: Tx, step: Step, payment_ids: Sequence[UUID], *, notice: timedelta = NOTICE) -> None:
    """One step for many payments. May run again at any time: held, finished and refunded ones stay as they are."""
    ids = sorted(payment_ids)
    if not ids:
        return
    match step:
        case Step.APPLY_WEBHOOK:
            for payment_id in ids:
                await apply_waiting(tx, payment_id)
        case Step.REGISTER:
            await deliveries.open_deliveries(tx, ids)
            await _go_on(tx, ids, notice)
        case Step.CREATE_PURCHASE:
            await _create_purchases(tx, ids)
        case Step.ALLOCATE_TRAINER:
            await _settle(tx, ids, notice)
        case Step.SCHEDULE_SESSIONS | Step.MAKE_UP:
            # What went by while no worker numbered it is owed still: it is booked anew first.
            await sync_sessions(tx, await _settle(tx, ids, notice))
        case Step.CLOSE:
            await _close(tx, ids, notice)


# Captured money of which nobody has decided whether it pays its checkout.
UNSETTLED = """
select p.id from payments p join checkouts c on c.id = p.checkout_id
where p.id = any(%(payment_ids)b::uuid[]) and c.paid_by is null order by p.id
"""


async def _create_purchases(tx: Tx, payment_ids: Sequence[UUID]) -> None:
    for payment_id in await tx.values(UNSETTLED, {"payment_ids": list(payment_ids)}):
        await settle_captured(tx, payment_id)
    await create_purchases(tx, payment_ids)


async def _settle(tx: Tx, payment_ids: Sequence[UUID], notice: timedelta) -> list[UUID]:
    """The payments' purchases, after their allocations are settled."""
    purchases = sorted((await deliveries.find_purchases(tx, payment_ids)).values())
    await settle_allocations(tx, purchases, notice=notice)
    return purchases


async def _go_on(tx: Tx, payment_ids: Sequence[UUID], notice: timedelta) -> None:
    """Whatever comes next for payments of any stage."""
    await _create_purchases(tx, payment_ids)
    await sync_sessions(tx, await _settle(tx, payment_ids, notice))


# Those of some payments that really owe nothing any more, and where they are.
NOTHING_OWED = """
select payment_id, stage from fulfilments
where payment_id = any(%(payment_ids)b::uuid[]) and owed = 0 and stage <> 'paid'
"""


async def _close(tx: Tx, payment_ids: Sequence[UUID], notice: timedelta) -> None:
    """Finish what a refund or the last session left undone, then take delivered money off the register."""
    await apply_refunds(tx, payment_ids)
    await sync_sessions(tx, await _settle(tx, payment_ids, notice))
    done = await tx.tuples(NOTHING_OWED, {"payment_ids": list(payment_ids)})
    for payment_id, stage in done:
        await deliveries.release_hold(tx, payment_id, Stage(stage))  # a hold ends with what it held
    await deliveries.close_deliveries(tx, [payment_id for payment_id, _ in done])


def _tell(step: Step, before: Finding, after: Finding, facts: Facts, *, dry_run: bool) -> str:
    """What changed, in one sentence; with `dry_run` what would change."""
    if facts.reason and after.stage == before.stage:
        return still_waits(facts.reason)
    match step:
        case Step.APPLY_WEBHOOK:
            did = f"Applied the stored webhook: the payment is {facts.status}."
            would = f"Would apply the stored webhook: the payment would be {facts.status}."
        case Step.CREATE_PURCHASE if facts.purchase_id:
            did = f"Created purchase {facts.purchase_id}."
            would = "Would create the purchase."
        case Step.ALLOCATE_TRAINER if facts.trainer_id:
            did = f"Allocated trainer {facts.trainer_name} ({facts.trainer_id}, allocation {facts.allocation_id})."
            would = f"Would allocate a trainer: now it would be {facts.trainer_name} ({facts.trainer_id})."
        case Step.SCHEDULE_SESSIONS if facts.scheduled:
            did = f"Created the missing sessions: {facts.scheduled} scheduled."
            would = f"Would create the missing sessions: {facts.scheduled} would be scheduled."
        case Step.MAKE_UP if not facts.owed:
            did = f"Booked the owed sessions: {facts.scheduled} scheduled."
            would = f"Would book the owed sessions: {facts.scheduled} would be scheduled."
        case Step.REGISTER:
            did = f"Registered it as undelivered money and went on: it is {after.stage} now."
            would = f"Would register it as undelivered money and go on: it would be {after.stage}."
        case Step.CLOSE:
            did = "Took it off the register: nothing is owed."
            would = "Would take it off the register: nothing is owed."
        case _:
            did = f"Ran {step} again: it is {after.stage} now."
            would = f"Would run {step} again: it would be {after.stage}."
    return would if dry_run else did
