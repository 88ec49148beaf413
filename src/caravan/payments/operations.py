"""Buy and pay: a checkout with its frozen terms, attempts to pay it, and what an attempt comes to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import time
from typing import Any
from uuid import UUID

from caravan.calendar import (
    check_requested_start,
    check_slot_length,
    parse_slot,
    session_starts,
)
from caravan.catalog import list_holidays
from caravan.db import Tx
from caravan.errors import Conflict, Invalid, NotFound
from caravan.ids import new_id
from caravan.payments import coins, store
from caravan.payments.captures import capture_once
from caravan.payments.model import NOBODY, SANDBOX, Checkout, Offer, Order, Payment, Rules, Status, advances
from caravan.payments.providers import SUCCEEDED, Provider, ProviderOff, SandboxProvider, sandbox_body
from caravan.payments.webhooks import apply_waiting, take_in


class CourseNotFound(NotFound):
    """There is no such course, or no such student."""

    code = "COURSE_NOT_FOUND"


class CourseRetired(Invalid):
    """This course is not sold any more."""

    code = "COURSE_RETIRED"


class ModeNotOffered(Invalid):
    """This course is not held in this way."""

    code = "MODE_NOT_OFFERED"


class GroupSizeNotOffered(Invalid):
    """This course is not held for a group of this size."""

    code = "GROUP_SIZE_NOT_OFFERED"


class TierUnknown(Invalid):
    """This course is not sold in this number of sessions."""

    code = "TIER_UNKNOWN"


class PriceChanged(Conflict):
    """The price is another one than expected."""

    code = "PRICE_CHANGED"


class CoinsExceedPrice(Invalid):
    """More coins than the price is worth."""

    code = "COINS_EXCEED_PRICE"


class StudentConflict(Conflict):
    """The student has other sessions booked at some of these times."""

    code = "STUDENT_CONFLICT"


class CheckoutOpen(Conflict):
    """The same course at the same time of day is being paid already: go on with that, or say `again`."""

    code = "CHECKOUT_OPEN"


class CheckoutPaid(Conflict):
    """This checkout is paid."""

    code = "CHECKOUT_PAID"


class CheckoutExpired(Conflict):
    """This checkout is over: its price and times are not kept any longer. Begin a new one."""

    code = "CHECKOUT_EXPIRED"


class PaymentNotConfirmable(Conflict):
    """Only the sandbox lets its payments be confirmed by hand."""

    code = "PAYMENT_NOT_CONFIRMABLE"


@dataclass(frozen=True, slots=True)
class Created:
    """A new payment, and what its buyer needs to pay it."""

    payment: Payment
    checkout: dict[str, Any]


# --- a new checkout ---


async def create_payment(
    tx: Tx,
    order: Order,
    rules: Rules,
    providers: Mapping[str, Provider],
    *,
    account_id: UUID | None,
    payment_id: UUID | None = None,
) -> Created:
    """Freeze what is sold into a checkout and make the first attempt to pay it. The student is the caller's matter.

    `payment_id`: for money whose id is known before (imports, rehearsals). Raises the errors above, those of
    calendar (INVALID_SLOT, START_IN_PAST, START_TOO_SOON, START_TOO_FAR), and COINS_INSUFFICIENT.
    """
    offer = await store.find_offer(tx, order)
    if offer is None:
        raise CourseNotFound
    checkout = _freeze(tx, order, offer, rules, account_id)
    holidays = await list_holidays(tx)
    check_requested_start(
        order.start_date,
        checkout.pattern,
        tx.now,
        notice=rules.notice,
        horizon_days=rules.start_horizon_days,
        holidays=holidays,
    )
    assert checkout.slot_start is not None
    await store.lock_slot(tx, order.student_id, order.course_id, checkout.slot_start)
    if not order.again:
        await _refuse_open(tx, order, checkout.slot_start)
    starts = session_starts(
        checkout.pattern, order.start_date, order.session_count, not_before=tx.now + rules.notice, holidays=holidays
    )
    clash = await store.find_clash(tx, order.student_id, starts, offer.session_minutes)
    if clash:
        raise StudentConflict(extra={"purchaseId": _text(clash["purchase_id"]), "courseId": _text(clash["course_id"])})
    await store.insert_checkout(tx, checkout, order.raw)
    return await _attempt(tx, checkout, order.coins, rules, providers, account_id, payment_id)


def _freeze(tx: Tx, order: Order, offer: Offer, rules: Rules, account_id: UUID | None) -> Checkout:
    """The terms of an order, judged by the catalogue."""
    if offer.retired_at:
        raise CourseRetired
    if order.learning_mode not in offer.learning_modes:
        raise ModeNotOffered(extra={"learningModes": offer.learning_modes})
    if order.group_size not in offer.group_sizes:
        raise GroupSizeNotOffered(extra={"groupSizes": offer.group_sizes})
    if offer.amount_cents is None or offer.currency is None:
        raise TierUnknown
    if order.expected_amount_cents not in (None, offer.amount_cents):
        raise PriceChanged(extra={"amountCents": offer.amount_cents, "currency": offer.currency})
    slot = parse_slot(order.time_slot)
    check_slot_length(slot, offer.session_minutes)
    return Checkout(
        id=new_id(),
        account_id=account_id,
        student_id=order.student_id,
        course_id=order.course_id,
        sessions=order.session_count,
        price_cents=offer.amount_cents,
        currency=offer.currency,
        session_minutes=offer.session_minutes,
        weekdays=offer.weekdays,
        learning_mode=order.learning_mode,
        group_size=order.group_size,
        timezone=offer.timezone,
        slot_start=slot.start,
        start_date=order.start_date,
        cart_item_id=order.cart_item_id,
        expires_at=tx.now + rules.checkout_lifetime,
        paid_by=None,
    )


async def _refuse_open(tx: Tx, order: Order, slot_start: time) -> None:
    already = await store.find_open_checkout(tx, order.student_id, order.course_id, slot_start)
    if already:
        raise CheckoutOpen(extra=_names_of_open(already))


def _names_of_open(checkout: dict[str, Any]) -> dict[str, object]:
    """Which order is open, and what it is for: whoever chose other terms can tell the two apart."""
    return {
        "checkoutId": str(checkout["checkout_id"]),
        "paymentId": str(checkout["payment_id"]),
        "sessionCount": checkout["sessions"],
        "learningMode": checkout["learning_mode"],
        "groupSize": checkout["group_size"],
        "startDate": checkout["start_date"].isoformat() if checkout["start_date"] else None,
        "amountCents": checkout["amount_cents"],
        "currency": checkout["currency"],
    }


def _text(id_: UUID | None) -> str | None:
    return str(id_) if id_ else None


# --- another attempt ---


async def retry_payment(
    tx: Tx,
    checkout_id: UUID,
    rules: Rules,
    providers: Mapping[str, Provider],
    *,
    account_id: UUID | None,
    coins_wanted: int | None = None,
) -> Created:
    """Another attempt under a checkout, with its price and terms. Raises NotFound, CheckoutPaid, CheckoutExpired.

    `coins_wanted` None: as many as the attempt before. The newest attempt alone keeps coins; what earlier ones had is
    free again, and taken again should one of them succeed after all.
    """
    checkout = await store.lock_checkout(tx, checkout_id)
    earlier = await store.list_payments_of_checkout(tx, checkout.id)
    # Money that waits for its amount to be accepted hasn't paid the checkout, but asking for more would be wrong.
    if checkout.paid_by or any(one.captured_at and one.status is not Status.REFUNDED for one in earlier):
        raise CheckoutPaid(extra={"checkoutId": str(checkout.id), "paymentId": _text(checkout.paid_by)})
    if checkout.expires_at <= tx.now:
        raise CheckoutExpired
    await coins.release_reservations(tx, [one.id for one in earlier])
    wanted = coins_wanted if coins_wanted is not None else earlier[-1].coins if earlier else 0
    return await _attempt(tx, checkout, wanted, rules, providers, account_id, None)


async def _attempt(
    tx: Tx,
    checkout: Checkout,
    coins_wanted: int,
    rules: Rules,
    providers: Mapping[str, Provider],
    account_id: UUID | None,
    payment_id: UUID | None,
) -> Created:
    amount = checkout.price_cents - coins_wanted * rules.coin_value_cents
    if amount < 0:
        raise CoinsExceedPrice(extra={"maxCoins": checkout.price_cents // rules.coin_value_cents})
    if amount and SANDBOX not in providers:
        raise ProviderOff
    payment = Payment(
        id=payment_id or new_id(),
        checkout_id=checkout.id,
        student_id=checkout.student_id,
        provider=SANDBOX if amount else NOBODY,
        status=Status.CREATED,
        amount_cents=amount,
        currency=checkout.currency,
        coins=coins_wanted,
        captured_cents=None,
        captured_currency=None,
        captured_at=None,
        refunded_cents=0,
        accepted_at=None,
        created_at=tx.now,
    )
    await store.lock_payment_id(tx, payment.id)
    await store.insert_payment(tx, payment, account_id=account_id, metadata=store.metadata_of(checkout))
    if coins_wanted:
        await coins.reserve_coins(
            tx, checkout.student_id, payment.id, coins_wanted, until=tx.now + rules.checkout_lifetime
        )
    captured = amount == 0 and await capture_once(tx, payment, 0, checkout.currency)
    asked = providers[payment.provider].checkout(payment, checkout) if amount else {}
    if await apply_waiting(tx, payment.id) or captured:
        payment = await store.lock_payment(tx, payment.id)
    return Created(payment, {"provider": payment.provider} | asked)


# --- what an attempt comes to ---


async def capture(tx: Tx, payment_id: UUID, amount_cents: int, currency: str) -> bool:
    """Money came for a payment: write it down and let it go on, or wait with the reason. False: known already.

    What was said too early (a refund) is applied after it. Raises NotFound.
    """
    new = await capture_once(tx, await lock_payment(tx, payment_id), amount_cents, currency)
    await apply_waiting(tx, payment_id)
    return new


async def confirm_payment(tx: Tx, payment_id: UUID, providers: Mapping[str, Provider]) -> None:
    """Let the sandbox say that a payment succeeded: signed, checked, stored and applied as any webhook is.

    A payment that is captured already stays as it is. Raises NotFound, PaymentNotConfirmable.
    """
    await confirm_locked(tx, await lock_payment(tx, payment_id), providers)


async def lock_payment(tx: Tx, payment_id: UUID) -> Payment:
    """A payment against all news of it, as `capture` and `confirm_locked` want it. Raises NotFound."""
    await store.lock_payment_id(tx, payment_id)
    return await store.lock_payment(tx, payment_id)


async def confirm_locked(tx: Tx, payment: Payment, providers: Mapping[str, Provider]) -> None:
    """`confirm_payment` of one that `lock_payment` gave. Raises PaymentNotConfirmable."""
    if not advances(payment.status, Status.SUCCEEDED):
        return
    sandbox = providers.get(payment.provider)
    if not isinstance(sandbox, SandboxProvider):
        raise PaymentNotConfirmable
    body = sandbox_body(SUCCEEDED, payment, tx.now)
    await take_in(tx, sandbox.verify(sandbox.sign(f"confirm_{payment.id}", tx.now, body), body, tx.now))


async def get_payment_view(tx: Tx, payment_id: UUID) -> dict[str, Any]:
    """A payment as its buyer sees it, with the stage of its delivery and why it waits. Raises NotFound."""
    seen = await store.find_payment_view(tx, payment_id)
    if seen is None:
        raise NotFound("There is no such payment.")
    return seen
