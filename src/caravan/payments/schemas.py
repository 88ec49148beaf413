"""JSON of payments at the edge."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import AliasChoices, Field, model_validator

from caravan.payments.model import Order, Payment
from caravan.web.schemas import CalendarDate, In, Out

Coins = Annotated[int, Field(strict=True, ge=0, le=1_000_000)]


class PaymentIn(In):
    """An order, or `{checkoutId}` for another attempt to pay one (then only `coins` is read beside it)."""

    checkout_id: UUID | None = None
    student_id: UUID | None = None
    course_id: UUID | None = None
    session_count: Annotated[int, Field(strict=True, ge=1, le=400)] | None = None
    learning_mode: Literal["online", "home", "center"] | None = None
    group_size: Annotated[int, Field(strict=True, ge=1, le=50)] = 1
    time_slot: Annotated[str, Field(max_length=100)] | None = Field(
        None, validation_alias=AliasChoices("timeSlot", "preferredTimeSlot", "time_slot")
    )
    start_date: CalendarDate | None = Field(
        None, validation_alias=AliasChoices("startDate", "date", "preferredDate", "start_date")
    )
    coins: Coins | None = None
    cart_item_id: UUID | None = None
    expected_amount_cents: Annotated[int, Field(strict=True, ge=0)] | None = None
    again: Annotated[bool, Field(strict=True)] = False

    @model_validator(mode="after")
    def _is_whole(self) -> PaymentIn:
        if self.checkout_id is None:
            needed = {
                "studentId": self.student_id,
                "courseId": self.course_id,
                "sessionCount": self.session_count,
                "learningMode": self.learning_mode,
                "timeSlot": self.time_slot,
                "startDate": self.start_date,
            }
            missing = [name for name, value in needed.items() if value is None]
            if missing:
                raise ValueError(f"is missing: {', '.join(missing)}")
        return self

    def order(self, raw: dict[str, Any]) -> Order:
        """The order that this is; not for `{checkoutId}`."""
        assert self.student_id
        assert self.course_id
        assert self.session_count
        assert self.learning_mode
        assert self.time_slot is not None
        assert self.start_date
        return Order(
            student_id=self.student_id,
            course_id=self.course_id,
            session_count=self.session_count,
            learning_mode=self.learning_mode,
            group_size=self.group_size,
            time_slot=self.time_slot,
            start_date=self.start_date,
            raw=raw,
            coins=self.coins or 0,
            cart_item_id=self.cart_item_id,
            expected_amount_cents=self.expected_amount_cents,
            again=self.again,
        )


class CreatedOut(Out):
    """`amount_cents`: what is left to pay, in the currency's minor unit. `checkout`: {provider, ...} to pay it."""

    id: UUID
    checkout_id: UUID
    status: str
    amount_cents: int
    currency: str
    coins: int
    checkout: dict[str, Any]

    @staticmethod
    def of(payment: Payment, checkout: dict[str, Any]) -> CreatedOut:
        return CreatedOut(
            id=payment.id,
            checkout_id=payment.checkout_id,
            status=payment.status,
            amount_cents=payment.amount_cents,
            currency=payment.currency,
            coins=payment.coins,
            checkout=checkout,
        )


class PaymentOut(Out):
    """`stage` and `reason` (why it waits): from the capture on."""

    id: UUID
    checkout_id: UUID
    student_id: UUID
    course_id: UUID | None
    purchase_id: UUID | None
    provider: str
    status: str
    amount_cents: int
    currency: str
    coins: int
    captured_cents: int | None
    refunded_cents: int
    stage: str | None
    reason: str | None
    created_at: datetime


class ReceivedOut(Out):
    """`new` false: we had this event already."""

    new: bool
