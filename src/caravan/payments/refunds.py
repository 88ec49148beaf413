"""Money goes back: all of it ends the purchase, a part takes away the sessions that are named. Owns refunds.

A refund locks its payment FOR NO KEY UPDATE, and whoever makes purchases or allocations holds it FOR SHARE: the second
to commit sees the first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal
from uuid import UUID

from caravan import deliveries
from caravan.db import Tx
from caravan.deliveries import Reason
from caravan.errors import Conflict, Invalid
from caravan.eventlog import outbox
from caravan.events import PurchaseRefunded
from caravan.ids import new_id
from caravan.payments import coins, store
from caravan.payments.model import COINS, Payment, Status, obstacle
from caravan.payments.providers import Provider
from caravan.web.formats import counted, money

Source = Literal["admin", "provider"]


class NotCaptured(Conflict):
    """The payment has no money to give back: none came, or all of it went back."""

    code = "NOT_REFUNDABLE"


class RefundTooLarge(Invalid):
    """More than what is left of the payment."""

    code = "REFUND_TOO_LARGE"


class RefundAmountInvalid(Invalid):
    """A refund gives back at least one cent."""

    code = "REFUND_AMOUNT_INVALID"


class RefundSessionsMissing(Invalid):
    """A part of the money takes away sessions: say how many or which (0 for none)."""

    code = "REFUND_SESSIONS_REQUIRED"


class RefundSessionsInvalid(Invalid):
    """These sessions can't be taken away: they don't exist, are held already, or were taken away before."""

    code = "REFUND_SESSIONS_INVALID"


class RefundIdTaken(Conflict):
    """The provider's refund belongs to another payment."""

    code = "REFUND_ID_TAKEN"


class NotPaidTwice(Conflict):
    """Only the second payment of a checkout is paid out in coins."""

    code = "NOT_PAID_TWICE"


class NotWholeCoins(Invalid):
    """The amount is no whole number of coins."""

    code = "NOT_WHOLE_COINS"


@dataclass(frozen=True, slots=True)
class Refund:
    """A row of refunds. `full`: nothing of the payment is left now, its purchase ended. `new`: made by this call."""

    id: UUID
    payment_id: UUID
    amount_cents: int
    sessions: int
    session_seqs: list[int]
    full: bool
    new: bool


# A refund that we know already, by its provider's id or by ours.
FIND_REFUND = """
select r.id, r.payment_id, r.amount_cents, r.sessions, r.session_seqs, p.status = 'refunded' as "full", false as new
from refunds r join payments p on p.id = r.payment_id
where r.provider = %(provider)s and r.provider_refund_id = %(provider_refund_id)s or r.id = %(refund_id)s
"""

INSERT_REFUND = """
insert into refunds (id, payment_id, provider, provider_refund_id, amount_cents, sessions, session_seqs, source, note,
                     created_at)
values (%(id)s, %(payment_id)s, %(provider)s, %(provider_refund_id)s, %(amount_cents)s, %(sessions)s,
        %(session_seqs)s::smallint[], %(source)s, %(note)s, %(now)s)
"""

# What a partial refund may take away: the sessions bought, those gone by earlier refunds, those held already.
GET_REFUNDABLE = """
select coalesce(pu.purchase_tier, c.sessions, 0)::int as total, pu.id as purchase_id,
       (select coalesce(sum(r.sessions), 0)::int from refunds r where r.payment_id = p.id) as refunded,
       array(select unnest(r.session_seqs) from refunds r where r.payment_id = p.id) as refunded_seqs,
       array(select t.seq from tutoring_sessions t
             where t.purchase_id = pu.id and t.status in ('completed', 'student_absent')) as held_seqs
from payments p join checkouts c on c.id = p.checkout_id left join student_course_purchases pu on pu.payment_id = p.id
where p.id = %(payment_id)s
"""


async def refund_payment(
    tx: Tx,
    payment_id: UUID,
    *,
    amount_cents: int | None = None,
    sessions: Sequence[int] | int | None = None,
    note: str | None,
    source: Source,
    provider_refund_id: str | None = None,
    provider: Provider | None = None,
    refund_id: UUID | None = None,
) -> Refund:
    """Write down that money went back, and say so. Idempotent by the provider and its refund's id, and by ours.

    Without the provider's id the refund is ours, and `provider`, where given, is asked to send the money. `refund_id`:
    whoever may run this again (a transaction whose commit was not answered is) makes it once, before.
    `amount_cents` None, or all that is left: full; the purchase ends, and the coins come back. Else partial: `sessions`
    says how many (the last ones) or which (numbers) are taken away; an operator must say it, 0 too, a provider doesn't
    know and takes none. Raises NotFound, NotCaptured, RefundTooLarge and the other errors above.
    """
    payment = await store.lock_payment(tx, payment_id)
    known = await _find(tx, payment, provider_refund_id, refund_id) if provider_refund_id or refund_id else None
    if known:
        return known
    if payment.captured_at is None or payment.status is Status.REFUNDED:
        raise NotCaptured
    left = payment.remaining_cents
    amount = left if amount_cents is None else amount_cents
    if amount > left:
        asked, rest = (money(cents, payment.captured_currency or payment.currency) for cents in (amount, left))
        raise RefundTooLarge(f"{asked} is more than the {rest} that is left.", extra={"remainingCents": left})
    if amount < 0 or (amount == 0 and left > 0):
        raise RefundAmountInvalid
    full = amount == left
    taken, seqs = (0, []) if full else await _check_sessions(tx, payment, sessions, source)
    refund = Refund(refund_id or new_id(), payment.id, amount, taken, seqs, full, new=True)
    if provider_refund_id is None:
        ours = f"refund_{refund.id}"
        provider_refund_id = provider.refund(payment, amount, ours) if provider and amount else ours
    await _book(tx, payment, refund, payment.provider, provider_refund_id, source, note)
    return refund


async def _find(tx: Tx, payment: Payment, provider_refund_id: str | None, refund_id: UUID | None) -> Refund | None:
    named = {"provider": payment.provider, "provider_refund_id": provider_refund_id, "refund_id": refund_id}
    known = await tx.find(FIND_REFUND, named, into=Refund)
    if known and known.payment_id != payment.id:
        raise RefundIdTaken
    return known


async def _check_sessions(
    tx: Tx, payment: Payment, sessions: Sequence[int] | int | None, source: Source
) -> tuple[int, list[int]]:
    """How many sessions a partial refund takes away, and which, if that was said."""
    if sessions is None:
        if source == "admin":
            raise RefundSessionsMissing
        return 0, []
    bought = await tx.one(GET_REFUNDABLE, {"payment_id": payment.id})
    seqs = [] if isinstance(sessions, int) else sorted(sessions)
    count = sessions if isinstance(sessions, int) else len(seqs)
    left = bought["total"] - bought["refunded"] - len(bought["held_seqs"])
    if not 0 <= count <= left:
        raise RefundSessionsInvalid(f"{counted(count, 'session')} can't be taken away: {max(0, left)} left to take.")
    gone = {*bought["refunded_seqs"], *bought["held_seqs"]}
    wrong = [seq for seq in seqs if seq in gone or not 1 <= seq <= bought["total"]]
    if wrong or len(set(seqs)) < len(seqs):
        raise RefundSessionsInvalid(extra={"sessions": wrong or seqs})
    return count, seqs


async def _book(
    tx: Tx, payment: Payment, refund: Refund, provider: str, provider_refund_id: str, source: Source, note: str | None
) -> None:
    """The row, the payment's new state, and the word, together."""
    row = {
        "id": refund.id,
        "payment_id": payment.id,
        "provider": provider,
        "provider_refund_id": provider_refund_id,
        "amount_cents": refund.amount_cents,
        "sessions": refund.sessions,
        "session_seqs": refund.session_seqs,
        "source": source,
        "note": note,
        "now": tx.now,
    }
    await tx.execute(INSERT_REFUND, row)
    status = Status.REFUNDED if refund.full else Status.PARTIALLY_REFUNDED
    await store.mark_refunded(tx, payment.id, refund.amount_cents, status)
    if refund.full:
        await coins.return_coins(tx, payment.id)
        await deliveries.close_deliveries(tx, [payment.id])
    seen = await store.find_payment_view(tx, payment.id)
    assert seen
    refunded = PurchaseRefunded(
        payment_id=payment.id,
        student_id=payment.student_id,
        course_id=seen["course_id"],
        purchase_id=seen["purchase_id"],
        refund_id=refund.id,
        amount_cents=refund.amount_cents,
        currency=payment.captured_currency or payment.currency,
        full=refund.full,
        sessions=refund.sessions,
        session_seqs=tuple(refund.session_seqs),
    )
    outbox.append(tx, [refunded])


async def refund_by_operator(
    tx: Tx,
    providers: Mapping[str, Provider],
    payment_id: UUID,
    *,
    amount_cents: int | None = None,
    sessions: Sequence[int] | int | None = None,
    note: str,
    refund_id: UUID | None = None,
) -> Refund:
    """Send money back because an operator says so: through the payment's provider, where one was asked for money.

    Raises what refund_payment raises.
    """
    payment = await store.lock_payment(tx, payment_id)
    return await refund_payment(
        tx,
        payment_id,
        amount_cents=amount_cents,
        sessions=sessions,
        note=note,
        source="admin",
        provider=providers.get(payment.provider),
        refund_id=refund_id,
    )


async def refund_as_coins(tx: Tx, payment_id: UUID, *, coin_value_cents: int, note: str) -> Refund:
    """Pay out money that came twice in coins of the same value: a full refund, given to the student.

    Raises NotFound, NotCaptured, NotPaidTwice, NotWholeCoins (a coin is worth `coin_value_cents`).
    """
    payment = await store.lock_payment(tx, payment_id)
    if payment.captured_at is None or payment.status is Status.REFUNDED:
        raise NotCaptured
    checkout = await store.lock_checkout(tx, payment.checkout_id)
    if obstacle(payment, checkout.paid_by) is not Reason.PAID_TWICE:
        raise NotPaidTwice
    amount = payment.remaining_cents
    if amount % coin_value_cents or payment.captured_currency != payment.currency:
        raise NotWholeCoins
    refund = Refund(new_id(), payment.id, amount, 0, [], full=True, new=True)
    await _book(tx, payment, refund, COINS, str(payment.id), "admin", note)
    if amount:
        await coins.grant_coins(tx, payment.student_id, amount // coin_value_cents, note, payment_id=payment.id)
    return refund
