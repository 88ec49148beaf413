"""What providers tell us: stored as it came, once, then applied. Owns webhook_events.

Storing and applying share the transaction that answers 2xx, but applying may fail alone: what has no effect yet
(no such payment, a refund before its capture, a bug of ours) stays unapplied and is taken up again, by whatever makes
the payment, by its capture, or by the reconciler.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final
from uuid import UUID

import structlog

from caravan.db import Tx
from caravan.errors import Conflict, DomainError, is_transient
from caravan.payments import store
from caravan.payments.captures import capture_once, fail_once
from caravan.payments.model import Payment
from caravan.payments.providers import FAILED, KNOWN_TYPES, REFUNDED, SUCCEEDED, Provider, ProviderEvent
from caravan.payments.refunds import refund_payment

log: structlog.stdlib.BoundLogger = structlog.get_logger()

# Outcomes: what an event did. `refused: CODE` and `differs` are for an operator to look at.
APPLIED: Final = "applied"
ALREADY: Final = "already"  # it said what we knew
STALE: Final = "stale"  # a failure after the success
DIFFERS: Final = "differs"  # a second success with another amount; the first one counts
IGNORED: Final = "ignored"  # a type that we don't know
DEALT_WITH: Final = "dealt with"  # unclaimed money that a person has settled outside; audit_log says who and why

INSERT_WEBHOOK = """
insert into webhook_events (provider, event_id, type, payment_id, amount_cents, currency, refund_id, sent_at, body,
                            received_at, applied_at, outcome)
values (%(provider)s, %(event_id)s, %(type)s, %(payment_id)s, %(amount_cents)s, %(currency)s, %(refund_id)s,
        %(sent_at)s, %(body)b, %(now)s, case when %(outcome)s::text is not null then %(now)s::timestamptz end,
        %(outcome)s::text)
on conflict (provider, event_id) do nothing
"""


async def receive_webhook(tx: Tx, provider: Provider, headers: Mapping[str, str], body: bytes) -> bool:
    """Check, store and apply what a provider sent; answer 2xx after the commit. False: we have it already.

    Raises SignatureInvalid and WebhookMalformed; then nothing is stored.
    """
    event = provider.verify(headers, body, tx.now)
    if event.payment_id:
        await store.lock_payment_id(tx, event.payment_id)
    return await take_in(tx, event)


async def take_in(tx: Tx, event: ProviderEvent) -> bool:
    """Store and apply what a provider said, under lock_payment_id. False: we have it already."""
    values = {
        "provider": event.provider,
        "event_id": event.event_id,
        "type": event.type,
        "payment_id": event.payment_id,
        "amount_cents": event.amount_cents,
        "currency": event.currency,
        "refund_id": event.refund_id,
        "sent_at": event.sent_at,
        "body": event.body,
        "now": tx.now,
        "outcome": None if event.type in KNOWN_TYPES else IGNORED,
    }
    new = await tx.execute(INSERT_WEBHOOK, values) == 1
    if event.payment_id:
        await apply_waiting(tx, event.payment_id)
    return new


# What a payment's provider said that has had no effect yet: money in, then failures, then money back.
LIST_UNAPPLIED = """
select w.provider, w.event_id, w.type, w.sent_at, w.body, w.payment_id, w.amount_cents, w.currency, w.refund_id
from webhook_events w join payments p on p.id = w.payment_id and p.provider = w.provider
where w.payment_id = %(payment_id)s and w.applied_at is null
order by array_position(array['payment.succeeded', 'payment.failed', 'payment.refunded'], w.type), w.sent_at, w.event_id
"""
MARK_APPLIED = """
update webhook_events set applied_at = %(now)s, outcome = %(outcome)s
where provider = %(provider)s and event_id = %(event_id)s
"""
MARK_FAILING = """
update webhook_events set outcome = %(outcome)s
where provider = %(provider)s and event_id = %(event_id)s
"""


async def apply_waiting(tx: Tx, payment_id: UUID) -> int:
    """Apply what was said of a payment and has had no effect yet; how many events had one now.

    The caller holds lock_payment_id, or the row of a payment that exists. Without a payment nothing is applied.
    """
    applied = 0
    for event in await tx.all(LIST_UNAPPLIED, {"payment_id": payment_id}, into=ProviderEvent):
        named = {"provider": event.provider, "event_id": event.event_id, "now": tx.now}
        try:
            async with tx.savepoint():
                outcome = await _apply(tx, payment_id, event)
        except Exception as error:
            if is_transient(error):
                raise
            # A bug of ours must not cost the provider's word: it is stored, shown as failing and tried again.
            log.exception("webhook not applied", event_id=event.event_id, correlation_id=str(payment_id))
            await tx.execute(MARK_FAILING, named | {"outcome": f"failing: {type(error).__name__}"})
            continue
        if outcome:
            applied += await tx.execute(MARK_APPLIED, named | {"outcome": outcome})
    return applied


async def _apply(tx: Tx, payment_id: UUID, event: ProviderEvent) -> str | None:
    """The outcome; None: too early."""
    payment = await store.lock_payment(tx, payment_id)
    if event.type == FAILED:
        return APPLIED if await fail_once(tx, payment) else STALE
    assert event.amount_cents is not None
    assert event.currency is not None
    if event.type == SUCCEEDED:
        if await capture_once(tx, payment, event.amount_cents, event.currency):
            return APPLIED
        same = (payment.captured_cents, payment.captured_currency) == (event.amount_cents, event.currency)
        return ALREADY if same else _odd(event, DIFFERS)
    assert event.type == REFUNDED
    return await _apply_refund(tx, payment, event) if payment.captured_at else None


async def _apply_refund(tx: Tx, payment: Payment, event: ProviderEvent) -> str:
    if event.currency != payment.captured_currency:
        return _odd(event, "refused: CURRENCY_MISMATCH")
    try:
        refund = await refund_payment(
            tx,
            payment.id,
            amount_cents=event.amount_cents,
            note=None,
            source="provider",
            provider_refund_id=event.refund_id,
        )
    except DomainError as refusal:
        return _odd(event, f"refused: {refusal.problem_code}")
    return APPLIED if refund.new else ALREADY


def _odd(event: ProviderEvent, outcome: str) -> str:
    log.warning(
        "webhook contradicts what we know",
        event_id=event.event_id,
        outcome=outcome,
        correlation_id=str(event.payment_id),
    )
    return outcome


# Payments of which something could be applied now; what failed before comes last.
LIST_APPLICABLE = """
select w.payment_id
from webhook_events w join payments p on p.id = w.payment_id and p.provider = w.provider
where w.applied_at is null and (w.type <> 'payment.refunded' or p.captured_at is not null)
group by w.payment_id order by bool_or(w.outcome is not null), min(w.received_at) limit %(limit)s
"""


async def apply_pending_webhooks(tx: Tx, limit: int = 100) -> int:
    """Take up what was stored and not applied; how many events had an effect. For the reconciler."""
    applied = 0
    for payment_id in sorted(await tx.values(LIST_APPLICABLE, {"limit": limit})):
        await store.lock_payment_id(tx, payment_id)
        applied += await apply_waiting(tx, payment_id)
    return applied


@dataclass(frozen=True, slots=True)
class Unclaimed:
    """Money that came for a payment that nobody knows."""

    provider: str
    event_id: str
    payment_id: UUID
    amount_cents: int
    currency: str
    received_at: datetime


LIST_UNCLAIMED = """
select w.provider, w.event_id, w.payment_id, w.amount_cents, w.currency, w.received_at
from webhook_events w
where w.type = 'payment.succeeded' and w.applied_at is null and w.received_at <= %(until)s
  and not exists (select from payments p where p.id = w.payment_id and p.provider = w.provider)
order by w.received_at
"""


class NotUnclaimed(Conflict):
    """This is no unclaimed money: it has had its effect, or is being applied, or there is none."""

    code = "NOT_UNCLAIMED"


SETTLE_UNCLAIMED = """
update webhook_events w set applied_at = %(now)s, outcome = %(outcome)s
where w.provider = %(provider)s and w.event_id = %(event_id)s and w.type = 'payment.succeeded' and w.applied_at is null
  and not exists (select from payments p where p.id = w.payment_id and p.provider = w.provider)
returning w.provider, w.event_id, w.payment_id, w.amount_cents, w.currency, w.received_at
"""


async def settle_unclaimed(tx: Tx, provider: str, event_id: str) -> Unclaimed:
    """A person has dealt with it: it is listed no more, and buys nothing if its payment appears.

    Raises NotUnclaimed.
    """
    named = {"provider": provider, "event_id": event_id, "outcome": DEALT_WITH, "now": tx.now}
    settled = await tx.find(SETTLE_UNCLAIMED, named, into=Unclaimed)
    if settled is None:
        raise NotUnclaimed
    return settled


async def list_unclaimed(tx: Tx, older_than: timedelta) -> list[Unclaimed]:
    """Captured webhooks that have matched no payment for that long, oldest first."""
    return await tx.all(LIST_UNCLAIMED, {"until": tx.now - older_than}, into=Unclaimed)
