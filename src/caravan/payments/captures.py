"""Money came, or didn't. The one place that says PURCHASE_CONFIRMED.

Everything here looks at the tables and does what is missing, so it can be run again, in any order.
"""

from __future__ import annotations

from uuid import UUID

import structlog

from caravan import deliveries
from caravan.db import Tx
from caravan.deliveries import Block, Reason, Stage
from caravan.errors import Conflict
from caravan.eventlog import outbox
from caravan.events import PurchaseConfirmed
from caravan.payments import coins, store
from caravan.payments.model import Checkout, Payment, Status, advances, obstacle

log: structlog.stdlib.BoundLogger = structlog.get_logger()


class NothingToAccept(Conflict):
    """The payment does not wait for somebody to accept its amount."""

    code = "NOTHING_TO_ACCEPT"


async def capture_once(tx: Tx, payment: Payment, amount_cents: int, currency: str) -> bool:
    """Write down what came for a payment, take its coins, and let it go on. False: it was captured before.

    Counts whenever it is heard: after a failure, after the checkout's time, days later. The caller holds its row.
    """
    if not advances(payment.status, Status.SUCCEEDED):
        return False
    payment = await store.mark_captured(tx, payment.id, amount_cents, currency)
    await deliveries.open_deliveries(tx, [payment.id])
    await _settle(tx, payment)
    # After the checkout's lock, as when somebody tries again, and after what another attempt kept is free.
    shortfall = await coins.capture_coins(tx, payment.student_id, payment.id, payment.coins)
    if shortfall:
        log.warning("coins were spent before a late success", correlation_id=str(payment.id), shortfall=shortfall)
    return True


async def settle_captured(tx: Tx, payment_id: UUID) -> None:
    """Decide what becomes of captured money: it pays its checkout (PURCHASE_CONFIRMED), or waits with the reason.

    Changes nothing where that is decided, or nothing is captured, or all of it went back. Raises NotFound.
    """
    await _settle(tx, await store.lock_payment(tx, payment_id), waited=True)


async def _settle(tx: Tx, payment: Payment, *, waited: bool = False) -> None:
    """`waited`: it may have a reason in the register, which money that has just come can't have."""
    if payment.captured_at is None or payment.status is Status.REFUNDED:
        return
    checkout = await store.lock_checkout(tx, payment.checkout_id)
    if checkout.paid_by == payment.id:
        return
    reason = obstacle(payment, checkout.paid_by)
    if reason is None:
        await _confirm(tx, checkout, payment, waited=waited)
    else:
        await deliveries.block(tx, [_waiting(payment, reason, checkout.paid_by)])


async def _confirm(tx: Tx, checkout: Checkout, payment: Payment, *, waited: bool) -> None:
    others = await store.pay_checkout(tx, payment)
    if waited:
        await deliveries.unblock(tx, [payment.id], Stage.PAID)
    confirmed = PurchaseConfirmed(
        payment_id=payment.id,
        student_id=payment.student_id,
        course_id=checkout.course_id,
        checkout_id=checkout.id,
    )
    outbox.append(tx, [confirmed])
    log.info("PURCHASE_CONFIRMED event emitted", count=1, correlation_id=str(payment.id))
    # Nobody needs to pay any more: the coins that another attempt keeps are this one's to take.
    await coins.release_reservations(tx, [other.id for other in others if other.coins])
    # Money that waited for its amount to be accepted can't buy this checkout any more.
    came = [other for other in others if other.captured_at and other.status is not Status.REFUNDED]
    await deliveries.block(tx, [_waiting(other, Reason.PAID_TWICE, payment.id) for other in came])


def _waiting(payment: Payment, reason: Reason, paid_by: UUID | None) -> Block:
    if reason is Reason.PAID_TWICE:
        return Block(payment.id, Stage.PAID, reason, {"paidBy": str(paid_by)})
    detail = {
        "askedCents": payment.amount_cents,
        "askedCurrency": payment.currency,
        "capturedCents": payment.captured_cents,
        "capturedCurrency": payment.captured_currency,
    }
    return Block(payment.id, Stage.PAID, reason, detail)


async def accept_amount(tx: Tx, payment_id: UUID) -> None:
    """An operator says that another amount than asked for will do: the payment goes on, as far as it can.

    Raises NotFound; NothingToAccept where it doesn't wait for that.
    """
    payment = await store.lock_payment(tx, payment_id)
    checkout = await store.lock_checkout(tx, payment.checkout_id)
    waits = payment.captured_at is not None and payment.status is not Status.REFUNDED
    if not waits or obstacle(payment, checkout.paid_by) is not Reason.AMOUNT_MISMATCH:
        raise NothingToAccept
    await store.mark_accepted(tx, payment.id)
    await settle_captured(tx, payment.id)


async def fail_once(tx: Tx, payment: Payment) -> bool:
    """A payment failed: its coins are free again. False: stale news. The caller holds its row."""
    if not advances(payment.status, Status.FAILED):
        return False
    await store.mark_failed(tx, payment.id)
    await coins.release_reservations(tx, [payment.id])
    return True
