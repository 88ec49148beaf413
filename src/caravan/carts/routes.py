"""HTTP of carts."""

from __future__ import annotations

from datetime import date
from typing import Annotated, Literal
from uuid import UUID

from fastapi import APIRouter
from pydantic import AliasChoices, Field

from caravan.carts import operations
from caravan.db import Tx
from caravan.errors import NotFound
from caravan.web import audit
from caravan.web.auth import Actor
from caravan.web.deps import Db
from caravan.web.policies import allow
from caravan.web.schemas import CalendarDate, In, Out

SOURCE = "payment-service"

router = APIRouter(prefix="/api/v1/students/{student_id}/cart", tags=["carts"])


class ItemIn(In):
    course_id: UUID
    session_count: int = Field(strict=True, ge=1, le=400)
    learning_mode: Literal["online", "home", "center"]
    group_size: int = Field(1, strict=True, ge=1, le=50)
    time_slot: str = Field(max_length=100, validation_alias=AliasChoices("timeSlot", "preferredTimeSlot", "time_slot"))
    start_date: CalendarDate = Field(validation_alias=AliasChoices("startDate", "date", "preferredDate", "start_date"))


class ItemOut(Out):
    """`amount_cents`: the catalogue's price now; null: not sold like this (any more)."""

    id: UUID
    course_id: UUID
    title: str
    session_count: int
    learning_mode: str
    group_size: int
    time_slot: str
    start_date: date
    amount_cents: int | None
    currency: str | None


class CartOut(Out):
    items: list[ItemOut]


FIND_STUDENT = "select id from students where id = %(student_id)s"


async def _require_student(tx: Tx, actor: Actor, student_id: UUID) -> None:
    actor.require_student(student_id)
    if not await tx.value(FIND_STUDENT, {"student_id": student_id}):
        raise NotFound("There is no such student.")


@router.get("")
async def get_cart(student_id: UUID, actor: Annotated[Actor, allow("carts:read")], db: Db) -> CartOut:
    async with db.transaction(SOURCE, read_only=True) as tx:
        await _require_student(tx, actor, student_id)
        return CartOut(items=[ItemOut.model_validate(item) for item in await operations.list_items(tx, student_id)])


@router.post("", status_code=201)
async def post_item(student_id: UUID, body: ItemIn, actor: Annotated[Actor, allow("carts:update")], db: Db) -> ItemOut:
    async def work(tx: Tx) -> ItemOut:
        await _require_student(tx, actor, student_id)
        item = await operations.add_item(
            tx,
            student_id,
            body.course_id,
            session_count=body.session_count,
            learning_mode=body.learning_mode,
            group_size=body.group_size,
            time_slot=body.time_slot,
            start_date=body.start_date,
        )
        await _keep(tx, actor, item.id)
        return ItemOut.model_validate(item)

    return await db.transact(work, source=SOURCE)


@router.delete("/{item_id}", status_code=204)
async def delete_item(student_id: UUID, item_id: UUID, actor: Annotated[Actor, allow("carts:update")], db: Db) -> None:
    async def work(tx: Tx) -> None:
        actor.require_student(student_id)
        await operations.remove_item(tx, student_id, item_id)
        await _keep(tx, actor, item_id)

    await db.transact(work, source=SOURCE)


async def _keep(tx: Tx, actor: Actor, item_id: UUID) -> None:
    await audit.record_for_family(tx, actor, action="carts:update", subject_type="cart item", subject_id=item_id)
