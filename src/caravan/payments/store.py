"""The SQL of checkouts and payments."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, time
from typing import Any
from uuid import UUID

from psycopg.types.json import Jsonb

from caravan.calendar import format_slot
from caravan.db import Tx
from caravan.errors import NotFound
from caravan.payments.model import Checkout, Offer, Order, Payment, Status

# --- what an order is judged by ---

# The course, the student's zone and the price of the tier, of one moment.
FIND_OFFER = """
select c.title, c.session_minutes, c.weekdays, c.learning_modes, c.group_sizes, c.retired_at, s.timezone,
       t.amount_cents, t.currency
from courses c
join students s on s.id = %(student_id)s
left join course_tiers t on t.course_id = c.id and t.sessions = %(sessions)s and t.group_size = %(group_size)s
where c.id = %(course_id)s
"""


async def find_offer(tx: Tx, order: Order) -> Offer | None:
    """None: no such course (or no such student)."""
    named = {
        "student_id": order.student_id,
        "course_id": order.course_id,
        "sessions": order.session_count,
        "group_size": order.group_size,
    }
    return await tx.find(FIND_OFFER, named, into=Offer)


# The purchase (or hold) whose booked time overlaps some slots of the same length, the earliest one.
FIND_CLASH = """
select b.purchase_id, p.course_id
from bookings b left join student_course_purchases p on p.id = b.purchase_id
where b.student_id = %(student_id)s and b.live and (b.expires_at is null or b.expires_at > %(now)s)
  and b.during && (select range_agg(tstzrange(s, s + make_interval(mins => %(minutes)s)))
                   from unnest(%(starts)b::timestamptz[]) s)
order by lower(b.during) limit 1
"""


async def find_clash(tx: Tx, student_id: UUID, starts: Sequence[datetime], minutes: int) -> dict[str, Any] | None:
    """{purchase_id, course_id} (both None for a hold) of what the student has booked at one of these times."""
    named = {"student_id": student_id, "starts": list(starts), "minutes": minutes, "now": tx.now}
    return await tx.find(FIND_CLASH, named)


# --- checkouts ---

# Buyers of the same student, course and slot pass one after another, until each one's transaction ends.
LOCK_SLOT = """
select pg_advisory_xact_lock(hashtextextended(
  'checkout ' || %(student_id)s::text || ' ' || %(course_id)s::text || ' ' || %(slot_start)s::text, 0))
"""


async def lock_slot(tx: Tx, student_id: UUID, course_id: UUID, slot_start: time) -> None:
    """Let nobody else open a checkout of this student, course and slot before this transaction ends.

    Not a constraint, because "open" is a matter of the clock and of intent, not of the rows: a checkout closes by
    getting older, and `again` makes a second one right. What may never be broken, that a checkout is bought once, is
    a constraint (checkouts.paid_by, and UNIQUE on purchases).
    """
    named = {"student_id": str(student_id), "course_id": str(course_id), "slot_start": slot_start.isoformat()}
    await tx.execute(LOCK_SLOT, named)


# A checkout that could still be paid, equal in student, course and slot, its latest payment, and what it is for.
FIND_OPEN_CHECKOUT = """
select c.id as checkout_id, p.id as payment_id, c.sessions, c.learning_mode, c.group_size, c.start_date,
       p.amount_cents, p.currency::text as currency
from checkouts c join payments p on p.checkout_id = c.id
where c.student_id = %(student_id)s and c.course_id = %(course_id)s and c.slot_start = %(slot_start)s
  and c.paid_by is null and c.expires_at > %(now)s
order by p.created_at desc, p.id desc limit 1
"""


async def find_open_checkout(tx: Tx, student_id: UUID, course_id: UUID, slot_start: time) -> dict[str, Any] | None:
    """The newest one."""
    named = {"student_id": student_id, "course_id": course_id, "slot_start": slot_start, "now": tx.now}
    return await tx.find(FIND_OPEN_CHECKOUT, named)


INSERT_CHECKOUT = """
insert into checkouts (id, account_id, student_id, course_id, sessions, price_cents, currency, session_minutes,
                       weekdays, learning_mode, group_size, timezone, slot_start, start_date, cart_item_id, raw,
                       created_at, expires_at)
values (%(id)s, %(account_id)s, %(student_id)s, %(course_id)s, %(sessions)s, %(price_cents)s, %(currency)s,
        %(session_minutes)s, %(weekdays)s::smallint[], %(learning_mode)s, %(group_size)s, %(timezone)s, %(slot_start)s,
        %(start_date)s, %(cart_item_id)s, %(raw)s, %(created_at)s, %(expires_at)s)
"""


async def insert_checkout(tx: Tx, checkout: Checkout, raw: dict[str, Any]) -> None:
    await tx.execute(INSERT_CHECKOUT, row_of(checkout, raw, tx.now))


def row_of(checkout: Checkout, raw: dict[str, Any], created_at: datetime) -> dict[str, Any]:
    """What INSERT_CHECKOUT is given. `raw`: the request as it came."""
    return {
        "id": checkout.id,
        "account_id": checkout.account_id,
        "student_id": checkout.student_id,
        "course_id": checkout.course_id,
        "sessions": checkout.sessions,
        "price_cents": checkout.price_cents,
        "currency": checkout.currency,
        "session_minutes": checkout.session_minutes,
        "weekdays": checkout.weekdays,
        "learning_mode": checkout.learning_mode,
        "group_size": checkout.group_size,
        "timezone": checkout.timezone,
        "slot_start": checkout.slot_start,
        "start_date": checkout.start_date,
        "cart_item_id": checkout.cart_item_id,
        "raw": Jsonb(raw),
        "created_at": created_at,
        "expires_at": checkout.expires_at,
    }


# One checkout, locked: who pays it and who tries again pass one after another.
LOCK_CHECKOUT = """
select id, account_id, student_id, course_id, sessions, price_cents, currency, session_minutes, weekdays, learning_mode,
       group_size, timezone, slot_start, start_date, cart_item_id, expires_at, paid_by
from checkouts where id = %(checkout_id)s for update
"""


async def lock_checkout(tx: Tx, checkout_id: UUID) -> Checkout:
    """Raises NotFound."""
    checkout = await tx.find(LOCK_CHECKOUT, {"checkout_id": checkout_id}, into=Checkout)
    if checkout is None:
        raise NotFound("There is no such checkout.")
    return checkout


FIND_CHECKOUT_STUDENT = "select student_id from checkouts where id = %(checkout_id)s"


async def find_checkout_student(tx: Tx, checkout_id: UUID) -> UUID | None:
    """Whose checkout it is."""
    return await tx.value(FIND_CHECKOUT_STUDENT, {"checkout_id": checkout_id})


# --- payments ---

# Whoever makes a payment and whoever hears of it pass one after another, also before its row exists.
LOCK_PAYMENT_ID = "select pg_advisory_xact_lock(hashtextextended('payment ' || %(payment_id)s::text, 0))"


async def lock_payment_id(tx: Tx, payment_id: UUID) -> None:
    """Taken before the payment's row, by its creation, its capture and its webhooks.

    So a webhook either sees the payment or is seen by its creation, and never waits unnoticed.
    """
    await tx.execute(LOCK_PAYMENT_ID, {"payment_id": str(payment_id)})


def metadata_of(checkout: Checkout) -> dict[str, Any]:
    """What runbooks read in payments.metadata."""
    return {
        "courseId": str(checkout.course_id),
        "sessionCount": checkout.sessions,
        "timeSlot": format_slot(checkout.slot_start) if checkout.slot_start else None,
        "startDate": checkout.start_date.isoformat() if checkout.start_date else None,
        "learningMode": checkout.learning_mode,
        "groupSize": checkout.group_size,
        "cartItemId": str(checkout.cart_item_id) if checkout.cart_item_id else None,
    }


INSERT_PAYMENT = """
insert into payments (id, checkout_id, account_id, student_id, provider, status, amount_cents, currency, coins,
                      metadata, traceparent, created_at, updated_at)
values (%(id)s, %(checkout_id)s, %(account_id)s, %(student_id)s, %(provider)s, 'created', %(amount_cents)s,
        %(currency)s, %(coins)s, %(metadata)s, %(traceparent)s, %(now)s, %(now)s)
"""


async def insert_payment(tx: Tx, payment: Payment, *, account_id: UUID | None, metadata: dict[str, Any]) -> None:
    values = {
        "id": payment.id,
        "checkout_id": payment.checkout_id,
        "account_id": account_id,
        "student_id": payment.student_id,
        "provider": payment.provider,
        "amount_cents": payment.amount_cents,
        "currency": payment.currency,
        "coins": payment.coins,
        "metadata": Jsonb(metadata),
        "traceparent": tx.trace,
        "now": tx.now,
    }
    await tx.execute(INSERT_PAYMENT, values)


FIND_PAYMENT = """
select id, checkout_id, student_id, provider, status, amount_cents, currency, coins, captured_cents, captured_currency,
       captured_at, refunded_cents, accepted_at, created_at
from payments where id = %(payment_id)s
"""
# One payment until the transaction ends: against its other news, its refunds, and whoever makes its purchase (who holds
# it FOR SHARE). Rows that only refer to it, as another attempt's entry in the ledger of coins does, need not wait.
LOCK_PAYMENT = """
select id, checkout_id, student_id, provider, status, amount_cents, currency, coins, captured_cents, captured_currency,
       captured_at, refunded_cents, accepted_at, created_at
from payments where id = %(payment_id)s for no key update
"""


async def find_payment(tx: Tx, payment_id: UUID) -> Payment | None:
    return await tx.find(FIND_PAYMENT, {"payment_id": payment_id}, into=Payment)


async def lock_payment(tx: Tx, payment_id: UUID) -> Payment:
    """Raises NotFound."""
    payment = await tx.find(LOCK_PAYMENT, {"payment_id": payment_id}, into=Payment)
    if payment is None:
        raise NotFound("There is no such payment.")
    return payment


# The payments of a checkout, oldest first.
LIST_PAYMENTS_OF_CHECKOUT = """
select id, checkout_id, student_id, provider, status, amount_cents, currency, coins, captured_cents, captured_currency,
       captured_at, refunded_cents, accepted_at, created_at
from payments where checkout_id = %(checkout_id)s order by created_at, id
"""


async def list_payments_of_checkout(tx: Tx, checkout_id: UUID) -> list[Payment]:
    return await tx.all(LIST_PAYMENTS_OF_CHECKOUT, {"checkout_id": checkout_id}, into=Payment)


# A payment pays its checkout, which nobody had paid; and the payments of that checkout, oldest first.
PAY_CHECKOUT = """
with paid as (
  update checkouts set paid_by = %(payment_id)s where id = %(checkout_id)s and paid_by is null returning id
)
select p.id, p.checkout_id, p.student_id, p.provider, p.status, p.amount_cents, p.currency, p.coins, p.captured_cents,
       p.captured_currency, p.captured_at, p.refunded_cents, p.accepted_at, p.created_at
from paid join payments p on p.checkout_id = paid.id order by p.created_at, p.id
"""


async def pay_checkout(tx: Tx, payment: Payment) -> list[Payment]:
    """The other attempts to pay it. The caller holds the checkout's lock and has seen that nobody has paid it."""
    named = {"checkout_id": payment.checkout_id, "payment_id": payment.id}
    attempts = await tx.all(PAY_CHECKOUT, named, into=Payment)
    assert attempts, "a checkout is paid once"
    return [other for other in attempts if other.id != payment.id]


MARK_CAPTURED = """
update payments set status = 'succeeded', captured_cents = %(amount_cents)s, captured_currency = %(currency)s,
  captured_at = %(now)s, updated_at = %(now)s
where id = %(payment_id)s
returning id, checkout_id, student_id, provider, status, amount_cents, currency, coins, captured_cents,
          captured_currency, captured_at, refunded_cents, accepted_at, created_at
"""


async def mark_captured(tx: Tx, payment_id: UUID, amount_cents: int, currency: str) -> Payment:
    """The payment as it is now."""
    named = {"payment_id": payment_id, "amount_cents": amount_cents, "currency": currency, "now": tx.now}
    return await tx.one(MARK_CAPTURED, named, into=Payment)


MARK_FAILED = "update payments set status = 'failed', updated_at = %(now)s where id = %(payment_id)s"


async def mark_failed(tx: Tx, payment_id: UUID) -> None:
    await tx.execute(MARK_FAILED, {"payment_id": payment_id, "now": tx.now})


MARK_ACCEPTED = "update payments set accepted_at = %(now)s, updated_at = %(now)s where id = %(payment_id)s"


async def mark_accepted(tx: Tx, payment_id: UUID) -> None:
    await tx.execute(MARK_ACCEPTED, {"payment_id": payment_id, "now": tx.now})


MARK_REFUNDED = """
update payments set status = %(status)s, refunded_cents = refunded_cents + %(amount_cents)s, updated_at = %(now)s
where id = %(payment_id)s
"""


async def mark_refunded(tx: Tx, payment_id: UUID, amount_cents: int, status: Status) -> None:
    named = {"payment_id": payment_id, "amount_cents": amount_cents, "status": str(status), "now": tx.now}
    await tx.execute(MARK_REFUNDED, named)


# A payment as its buyer sees it: where its delivery is, and why it waits.
FIND_PAYMENT_VIEW = """
select p.id, p.checkout_id, p.student_id, c.course_id, p.provider, p.status, p.amount_cents, p.currency, p.coins,
       p.captured_cents, p.refunded_cents, p.created_at, f.stage, f.purchase_id, u.reason
from payments p
join checkouts c on c.id = p.checkout_id
left join fulfilments f on f.payment_id = p.id
left join undelivered u on u.payment_id = p.id
where p.id = %(payment_id)s
"""


async def find_payment_view(tx: Tx, payment_id: UUID) -> dict[str, Any] | None:
    return await tx.find(FIND_PAYMENT_VIEW, {"payment_id": payment_id})
