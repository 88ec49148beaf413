"""Make the books whole from the providers' records, after a database was restored from an older backup.

What a provider knows and we don't is taken in as its webhook would be: once, whatever we have already. A payment that
was made after the backup is made again from the terms that we gave the provider with it; one without terms is unclaimed
money.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

import structlog
from psycopg.types.json import Jsonb

from caravan.db import Database, Tx
from caravan.payments import store
from caravan.payments.model import Checkout, Payment, Status
from caravan.payments.providers import REFUNDED, SUCCEEDED, Provider, ProviderRecord
from caravan.payments.webhooks import take_in
from caravan.web.formats import counted

log: structlog.stdlib.BoundLogger = structlog.get_logger()

SOURCE = "payment-service"
SLACK = timedelta(hours=1)  # providers' clocks and ours, and what was under way


@dataclass(slots=True)
class Refilled:
    """`read`: records looked at. The others: what we did not know. `unclaimed`: nobody knows whose. `asked`: whether
    there was a provider to ask; without one nothing is known of the money that came meanwhile."""

    since: datetime
    asked: bool = True
    read: int = 0
    captured: int = 0
    refunded: int = 0
    remade: int = 0
    unclaimed: int = 0

    @property
    def sentence(self) -> str:
        if not self.asked:
            return (
                "No payment provider was asked, for none is set here that keeps records (the sandbox's are in"
                " CARAVAN_SANDBOX_BOOKS): money that came after the backup is missing. Set what payment-service has,"
                ' and run `caravan refill --note "..."`.'
            )
        return (
            f"The providers' records since {self.since:%Y-%m-%d %H:%M %Z} ({self.read}) brought"
            f" {counted(self.captured, 'captured payment')} ({self.remade} made again),"
            f" {counted(self.refunded, 'refund')} and {counted(self.unclaimed, 'payment')} that nobody here knows."
        )


# The last moment of which these books know anything.
LAST_KNOWN = """
select coalesce(greatest((select max(updated_at) from payments), (select max(received_at) from webhook_events)),
                'epoch'::timestamptz)
"""


async def refill(db: Database, providers: Mapping[str, Provider], since: datetime | None = None) -> Refilled:
    """Take in what providers know since then (None: since these books' last word, with an hour's slack).

    May run at any time and again: an edge of its own, each record in its own transaction.
    """
    if since is None:
        async with db.transaction(SOURCE, read_only=True) as tx:
            since = await tx.value(LAST_KNOWN) - SLACK
    assert since is not None
    done = Refilled(since, asked=bool(providers))
    for provider in providers.values():
        for record in await asyncio.to_thread(_read, provider, since):
            done.read += 1
            await _take_in(db, record, done)
    log.info("refilled from the providers' records", read=done.read, captured=done.captured, remade=done.remade)
    return done


def _read(provider: Provider, since: datetime) -> list[ProviderRecord]:
    return list(provider.list_records(since))


async def _take_in(db: Database, record: ProviderRecord, done: Refilled) -> None:
    event = record.event
    assert event.payment_id
    payment_id = event.payment_id

    async def work(tx: Tx) -> tuple[Payment | None, Payment | None, bool]:
        await store.lock_payment_id(tx, payment_id)
        before = await store.find_payment(tx, payment_id)
        remade = before is None and record.payment is not None and record.checkout is not None
        if remade and record.payment and record.checkout:
            await _remake(tx, record.checkout, record.payment)
        await take_in(tx, event)
        after = await store.find_payment(tx, payment_id)
        if after is not None and after.captured_at == tx.now:
            await tx.execute(DATE_CAPTURE, {"payment_id": payment_id, "sent_at": event.sent_at})
        return before, after, remade

    before, after, remade = await db.transact(work, SOURCE)
    if after is None:
        done.unclaimed += event.type == SUCCEEDED
        return
    done.remade += remade
    done.captured += event.type == SUCCEEDED and after.captured_at != (before.captured_at if before else None)
    done.refunded += event.type == REFUNDED and after.refunded_cents != (before.refunded_cents if before else 0)


# Money that came before we knew of it came when it came: a start that has passed since was chosen in good time.
DATE_CAPTURE = """
update payments set captured_at = least(captured_at, greatest(%(sent_at)s, created_at)) where id = %(payment_id)s
"""

# Two payments may be of one checkout.
REMAKE_CHECKOUT = f"{store.INSERT_CHECKOUT} on conflict (id) do nothing"
# A student who was entered after the backup has no coins either.
INSERT_PAYMENT = """
insert into payments (id, checkout_id, account_id, student_id, provider, status, amount_cents, currency, coins,
                      metadata, traceparent, created_at, updated_at)
values (%(id)s, %(checkout_id)s, %(account_id)s, %(student_id)s, %(provider)s, %(status)s, %(amount_cents)s,
        %(currency)s, case when exists (select from students where id = %(student_id)s) then %(coins)s else 0 end,
        %(metadata)s, %(traceparent)s, %(created_at)s, %(now)s)
"""


async def _remake(tx: Tx, checkout: Checkout, payment: Payment) -> None:
    """As it was asked for, under the ids that the provider and the family know."""
    metadata = store.metadata_of(checkout)
    raw = {"from": "the provider's records"}
    await tx.execute(REMAKE_CHECKOUT, store.row_of(checkout, raw, payment.created_at))
    await tx.execute(
        INSERT_PAYMENT,
        {
            "id": payment.id,
            "checkout_id": payment.checkout_id,
            "account_id": checkout.account_id,
            "student_id": payment.student_id,
            "provider": payment.provider,
            "status": str(Status.CREATED),
            "amount_cents": payment.amount_cents,
            "currency": payment.currency,
            "coins": payment.coins,
            "metadata": Jsonb(metadata),
            "traceparent": tx.trace,
            "created_at": payment.created_at,
            "now": tx.now,
        },
    )
