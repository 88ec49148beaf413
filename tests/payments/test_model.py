from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from itertools import product

import pytest

from caravan.deliveries import Reason
from caravan.ids import new_id
from caravan.payments.model import Payment, Status, advances, obstacle

NOW = datetime(2026, 1, 1, tzinfo=UTC)
PAYMENT = Payment(
    id=new_id(),
    checkout_id=new_id(),
    student_id=new_id(),
    provider="sandbox",
    status=Status.SUCCEEDED,
    amount_cents=360_000,
    currency="INR",
    coins=0,
    captured_cents=360_000,
    captured_currency="INR",
    captured_at=NOW,
    refunded_cents=0,
    accepted_at=None,
    created_at=NOW,
)


def test_success_counts_after_failure_and_failure_not_after_success() -> None:
    assert advances(Status.FAILED, Status.SUCCEEDED)
    assert not advances(Status.SUCCEEDED, Status.FAILED)
    assert not advances(Status.REFUNDED, Status.SUCCEEDED)
    assert advances(Status.PARTIALLY_REFUNDED, Status.REFUNDED)


@pytest.mark.parametrize(("one", "other"), [*product(Status, Status)])
def test_of_two_statuses_at_most_one_follows_the_other(one: Status, other: Status) -> None:
    assert (advances(one, other) + advances(other, one)) == (one is not other)


def test_what_captured_money_waits_for() -> None:
    other = new_id()
    more = replace(PAYMENT, captured_cents=360_001)
    dollars = replace(PAYMENT, captured_currency="USD")
    assert obstacle(PAYMENT, None) is None
    assert obstacle(PAYMENT, PAYMENT.id) is None
    assert obstacle(PAYMENT, other) is Reason.PAID_TWICE
    assert obstacle(more, None) is Reason.AMOUNT_MISMATCH
    assert obstacle(dollars, None) is Reason.AMOUNT_MISMATCH
    assert obstacle(more, other) is Reason.PAID_TWICE
    assert obstacle(replace(more, accepted_at=NOW), None) is None
