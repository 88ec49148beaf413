"""The judge of the kills: what clients were told against what is there."""

from __future__ import annotations

from datetime import date
from typing import Any

import pytest

from caravan.ids import new_id
from verify.history import Order, Told, _contradictions

PAYMENT = new_id()
DELIVERED: dict[str, Any] = {
    "payment_id": PAYMENT,
    "status": "succeeded",
    "sessions": 5,
    "scheduled": 5,
    "numbered": 5,
    "purchases": 1,
    "allocations": 1,
    "confirmed": 1,
    "purchased": 1,
    "allocated": 1,
    "scheduled_said": 1,
    "stage": "scheduled",
    "owed": 0,
    "registered": False,
    "reason": None,
}
UNPAID = DELIVERED | {"status": "created", "purchases": 0, "confirmed": 0}


def an_order(created: Told, paid: Told) -> Order:
    return Order("order-1", new_id(), "", new_id(), 5, "06:00", date(2026, 12, 1), False, True, created, paid)


@pytest.mark.parametrize(
    ("created", "paid", "rows"),
    [
        (Told.OK, Told.OK, [DELIVERED]),
        (Told.OK, Told.UNKNOWN, [DELIVERED]),
        (Told.OK, Told.UNKNOWN, [UNPAID]),
        (Told.OK, Told.NOTHING, [UNPAID]),
        (Told.UNKNOWN, Told.NOTHING, [UNPAID]),
        (Told.UNKNOWN, Told.NOTHING, []),
        (Told.FAILED, Told.NOTHING, []),
    ],
)
def test_what_agrees(created: Told, paid: Told, rows: list[dict[str, Any]]) -> None:
    assert not _contradictions(an_order(created, paid), rows)


@pytest.mark.parametrize(
    ("created", "paid", "rows"),
    [
        (Told.OK, Told.OK, []),
        (Told.OK, Told.OK, [UNPAID]),
        (Told.OK, Told.OK, [DELIVERED, DELIVERED]),
        (Told.OK, Told.NOTHING, [DELIVERED]),
        (Told.FAILED, Told.NOTHING, [UNPAID]),
        (Told.UNKNOWN, Told.NOTHING, [DELIVERED]),
        (Told.OK, Told.UNKNOWN, [UNPAID | {"purchases": 1}]),
        *(
            (Told.OK, Told.OK, [DELIVERED | {name: 2}])
            for name in ("purchases", "allocations", "confirmed", "numbered")
        ),
        *((Told.OK, Told.OK, [DELIVERED | {name: 0}]) for name in ("purchased", "allocated", "scheduled_said")),
        (Told.OK, Told.OK, [DELIVERED | {"scheduled": 4, "owed": 1}]),
        (Told.OK, Told.OK, [DELIVERED | {"registered": True}]),
    ],
)
def test_what_does_not(created: Told, paid: Told, rows: list[dict[str, Any]]) -> None:
    assert _contradictions(an_order(created, paid), rows)


def test_two_answers_that_name_two_payments() -> None:
    order = an_order(Told.OK, Told.OK)
    order.payments_told = {PAYMENT, new_id()}
    assert _contradictions(order, [DELIVERED])
