"""The ledger of coins: never a counter, never below nothing, whatever happens in whatever order."""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from caravan.db import Database, Tx
from caravan.errors import NotFound
from caravan.ids import new_id
from caravan.payments import coins
from tests.builders import a_course, a_payment, a_student
from tests.payments.helpers import in_tx, somebody_waits

LIFETIME = timedelta(minutes=30)
PAYMENTS = 3


class Model:
    """The ledger as anybody would keep it on paper."""

    def __init__(self) -> None:
        self.granted = 0
        self.wanted = dict.fromkeys(range(PAYMENTS), 0)
        self.kept: dict[int, tuple[int, datetime]] = {}
        self.taken: dict[int, int] = {}
        self.returned: set[int] = set()

    def available(self, now: datetime) -> int:
        kept = sum(n for n, until in self.kept.values() if until > now)
        taken = sum(n for payment, n in self.taken.items() if payment not in self.returned)
        return self.granted - kept - taken


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("grant"), st.just(1)),
        st.tuples(st.just("advance"), st.integers(0, PAYMENTS - 1), st.integers(4, 10)),
        st.tuples(st.just("advance"), st.integers(0, PAYMENTS - 1), st.integers(4, 10)),
        st.tuples(st.just("release"), st.integers(0, PAYMENTS - 1)),
        st.tuples(st.just("wait"), st.sampled_from([1, 31])),
        st.tuples(st.just("expire")),
    ),
    min_size=10,
    max_size=40,
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS)
async def test_the_ledger_adds_up(db: Database, steps: list[tuple[Any, ...]]) -> None:
    async with db.transaction() as tx:
        student_id, course_id = await a_student(tx), await a_course(tx)
        payments = [(await a_payment(tx, student_id, course_id, again=True)).id for _ in range(PAYMENTS)]
        await coins.grant_coins(tx, student_id, 10, "to begin with")
        model = Model()
        model.granted = 10
        for step in steps:
            await take(tx, model, student_id, payments, *step)
            available = await coins.count_available(tx, student_id)
            assert available == model.available(tx.now)
            assert available >= 0


async def take(tx: Tx, model: Model, student_id: UUID, payments: list[UUID], what: str, *how: int) -> None:
    """One step, in the ledger and on paper."""
    at = how[0] if how else 0
    if what == "advance":  # what comes next in the life of a payment's coins
        what = "reserve" if not model.wanted[at] else "return" if at in model.taken else "capture"
    if what == "grant":
        await coins.grant_coins(tx, student_id, at, "a test")
        model.granted += at
    elif what == "wait":
        tx.now += timedelta(minutes=at)
    elif what == "expire":
        await coins.release_expired(tx)
    elif what == "reserve":
        try:
            await coins.reserve_coins(tx, student_id, payments[at], how[1], tx.now + LIFETIME)
        except coins.CoinsInsufficient:
            assert how[1] > model.available(tx.now)
            return
        assert how[1] <= model.available(tx.now)
        model.wanted[at] = how[1]
        model.kept[at] = how[1], tx.now + LIFETIME
    elif what == "capture":
        shortfall = await coins.capture_coins(tx, student_id, payments[at], model.wanted[at])
        model.kept.pop(at, None)
        model.taken[at] = min(model.wanted[at], model.available(tx.now))
        assert shortfall == model.wanted[at] - model.taken[at]
    elif what == "release":
        await coins.release_reservations(tx, [payments[at]])
        model.kept.pop(at, None)
    elif what == "return":
        await coins.return_coins(tx, payments[at])
        model.returned.add(at)


async def test_who_spends_at_the_same_time_waits(db: Database) -> None:
    async with db.transaction() as tx:
        student_id, course_id = await a_student(tx), await a_course(tx)
        payments = [(await a_payment(tx, student_id, course_id, again=True)).id for _ in range(2)]
        await coins.grant_coins(tx, student_id, 10, "welcome")

    async def spend(tx: Tx) -> None:
        await coins.reserve_coins(tx, student_id, payments[1], 10, tx.now + LIFETIME)

    async with db.transaction() as tx:
        await coins.reserve_coins(tx, student_id, payments[0], 10, tx.now + LIFETIME)
        other = asyncio.create_task(in_tx(db, spend))
        await somebody_waits(tx)
    with pytest.raises(coins.CoinsInsufficient):
        await other


async def test_a_reservation_ends_by_itself_and_is_written_down_once(db: Database) -> None:
    async def work(tx: Tx) -> None:
        student_id = await a_student(tx)
        await coins.grant_coins(tx, student_id, 5, "welcome")
        await a_payment(tx, student_id, coins=5)
        tx.now += LIFETIME
        assert await coins.count_available(tx, student_id) == 5
        assert await coins.release_expired(tx) == 1
        assert await coins.release_expired(tx) == 0
        assert await coins.count_available(tx, student_id) == 5

    await in_tx(db, work)


async def test_only_students_have_coins(db: Database) -> None:
    with pytest.raises(NotFound):
        await in_tx(db, lambda tx: coins.grant_coins(tx, new_id(), 1, "who?"))


async def test_two_clocks_that_differ_take_no_coins_below_nothing(db: Database) -> None:
    async def work(tx: Tx) -> None:
        student_id, course_id = await a_student(tx), await a_course(tx)
        first, second, third = [(await a_payment(tx, student_id, course_id, again=True)).id for _ in range(3)]
        await coins.grant_coins(tx, student_id, 10, "welcome")
        await coins.reserve_coins(tx, student_id, first, 10, tx.now + LIFETIME)
        tx.now += LIFETIME
        await coins.reserve_coins(tx, student_id, second, 10, tx.now + LIFETIME)
        tx.now -= timedelta(seconds=1)  # a transaction that began before and waited
        assert await coins.capture_coins(tx, student_id, third, 5) == 5

    await in_tx(db, work)
