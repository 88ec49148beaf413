"""Carts: shapes, whose it is, and that a purchase empties them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID

import httpx2
import pytest

from caravan.carts.handlers import empty_carts
from caravan.carts.operations import ITEMS_MAX, add_item, list_items
from caravan.carts.routes import router
from caravan.db import Database, Tx
from caravan.events import PurchaseConfirmed
from caravan.ids import new_id
from caravan.purchases.operations import create_purchases
from tests.builders import a_course, a_paid_checkout, a_student
from tests.clients import an_account, bearer, client_of, make_app


@dataclass
class Cart:
    client: httpx2.AsyncClient
    headers: dict[str, str]
    stranger: dict[str, str]
    student_id: UUID
    course_id: UUID
    item: dict[str, Any]

    @property
    def path(self) -> str:
        return f"/api/v1/students/{self.student_id}/cart"

    async def add(self, **changes: Any) -> httpx2.Response:
        return await self.client.post(self.path, json=self.item | changes, headers=self.headers)

    async def items(self) -> list[dict[str, Any]]:
        return (await self.client.get(self.path, headers=self.headers)).json()["items"]


@pytest.fixture
async def cart(db: Database) -> AsyncIterator[Cart]:
    parent, stranger = await an_account(db, "asha@example.com"), await an_account(db, "other@example.com")
    async with db.transaction() as tx:
        student_id, course_id = await a_student(tx), await a_course(tx)
        await tx.execute(
            "insert into account_students (account_id, student_id) values (%(account)s, %(student)s)",
            {"account": parent.account_id, "student": student_id},
        )
        start = (tx.now + timedelta(days=5)).date().isoformat()
    item = {
        "courseId": str(course_id),
        "sessionCount": 30,
        "learningMode": "online",
        "groupSize": 1,
        "timeSlot": "6:00 AM",
        "startDate": start,
    }
    async with client_of(make_app(db, router)) as client:
        yield Cart(client, await bearer(db, parent), await bearer(db, stranger), student_id, course_id, item)


async def test_put_look_take_out(cart: Cart) -> None:
    added = await cart.add()
    assert added.status_code == 201
    expected = cart.item | {"id": added.json()["id"], "title": "Robotics", "amountCents": 360_000, "currency": "INR"}
    assert added.json() == expected
    assert await cart.items() == [expected]
    for status in (204, 404):
        removed = await cart.client.delete(f"{cart.path}/{expected['id']}", headers=cart.headers)
        assert removed.status_code == status
    assert await cart.items() == []


async def test_slots_are_written_one_way_and_aliases_are_read(cart: Cart) -> None:
    item = {name: value for name, value in cart.item.items() if name not in ("timeSlot", "startDate")}
    item |= {"preferredTimeSlot": "06:00", "preferredDate": cart.item["startDate"]}
    added = await cart.client.post(cart.path, json=item, headers=cart.headers)
    assert (added.json()["timeSlot"], added.json()["startDate"]) == ("6:00 AM", cart.item["startDate"])


async def test_what_is_not_sold_like_this_has_no_price(cart: Cart) -> None:
    assert (await cart.add(sessionCount=29)).json()["amountCents"] is None


@pytest.mark.parametrize(
    ("changes", "status", "code"),
    [
        ({"courseId": str(new_id())}, 404, "COURSE_NOT_FOUND"),
        ({"timeSlot": "half past"}, 422, "INVALID_SLOT"),
        ({"sessionCount": 401}, 422, "INVALID_REQUEST"),
        ({"startDate": 5}, 422, "INVALID_REQUEST"),
        ({"learningMode": "moon"}, 422, "INVALID_REQUEST"),
    ],
)
async def test_what_cannot_be_put_in(cart: Cart, changes: dict[str, Any], status: int, code: str) -> None:
    refused = await cart.add(**changes)
    assert (refused.status_code, refused.json()["code"]) == (status, code)
    assert await cart.items() == []


async def test_a_cart_is_bounded(cart: Cart) -> None:
    for _ in range(ITEMS_MAX):
        assert (await cart.add()).status_code == 201
    full = await cart.add()
    assert (full.status_code, full.json()["code"]) == (422, "CART_FULL")


async def test_somebody_elses_cart_is_not_there(cart: Cart) -> None:
    item_id = (await cart.add()).json()["id"]
    for headers, status in ((cart.stranger, 404), ({}, 401)):
        answers = [
            await cart.client.get(cart.path, headers=headers),
            await cart.client.post(cart.path, json=cart.item, headers=headers),
            await cart.client.delete(f"{cart.path}/{item_id}", headers=headers),
        ]
        assert [answer.status_code for answer in answers] == [status] * 3
    assert len(await cart.items()) == 1


# --- emptied by the purchase ---


async def put(tx: Tx, student_id: UUID, course_id: UUID) -> None:
    await add_item(
        tx,
        student_id,
        course_id,
        session_count=10,
        learning_mode="home",
        group_size=1,
        time_slot="7 PM",
        start_date=tx.now.date(),
    )


async def courses_in(db: Database, student_id: UUID) -> list[UUID]:
    async with db.transaction() as tx:
        return [item.course_id for item in await list_items(tx, student_id)]


async def test_a_purchase_takes_its_course_out_whatever_was_known(db: Database) -> None:
    async with db.transaction() as tx:
        student_id, sibling = await a_student(tx), await a_student(tx)
        bought, other = await a_course(tx), await a_course(tx)
        for who, course in ((student_id, bought), (student_id, bought), (student_id, other), (sibling, bought)):
            await put(tx, who, course)
        payment = await a_paid_checkout(tx, student_id, bought)
    heard = PurchaseConfirmed(
        payment_id=payment.id, student_id=student_id, course_id=bought, checkout_id=payment.checkout_id
    )
    async with db.transaction() as tx:
        await empty_carts(tx, [heard])
    assert await courses_in(db, student_id) == [bought, bought, other]  # no purchase, nothing taken
    async with db.transaction() as tx:
        await create_purchases(tx, [payment.id])
        await empty_carts(tx, [heard])
    assert await courses_in(db, student_id) == [other]
    assert await courses_in(db, sibling) == [bought]
    async with db.transaction() as tx:
        await put(tx, student_id, bought)
    async with db.transaction() as tx:
        await empty_carts(tx, [heard])
    assert await courses_in(db, student_id) == [other, bought]  # heard again: what is new stays
