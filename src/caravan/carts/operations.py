"""Put into a cart, look, take out."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from uuid import UUID

from psycopg import errors as pg

from caravan.calendar import format_slot, parse_slot
from caravan.db import Tx
from caravan.errors import Invalid, NotFound
from caravan.ids import new_id

ITEMS_MAX = 50


class CourseNotFound(NotFound):
    """There is no such course."""

    code = "COURSE_NOT_FOUND"


class CartFull(Invalid):
    """A cart holds 50 items at most."""

    code = "CART_FULL"


@dataclass(frozen=True, slots=True)
class Item:
    """A row of cart_items. `amount_cents` is the catalogue's price now; None: not sold like this (any more)."""

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


# A student's cart, oldest first, with the prices of now.
LIST_ITEMS = """
select i.id, i.course_id, c.title, i.session_count, i.learning_mode, i.group_size, i.time_slot, i.start_date,
       case when c.retired_at is null then t.amount_cents end as amount_cents, t.currency
from cart_items i
join courses c on c.id = i.course_id
left join course_tiers t on t.course_id = i.course_id and t.sessions = i.session_count and t.group_size = i.group_size
where i.student_id = %(student_id)s
order by i.created_at, i.id
"""


async def list_items(tx: Tx, student_id: UUID) -> list[Item]:
    return await tx.all(LIST_ITEMS, {"student_id": student_id}, into=Item)


# Nothing is inserted into a full cart.
INSERT_ITEM = """
insert into cart_items (id, student_id, course_id, session_count, learning_mode, group_size, time_slot, start_date,
                        created_at)
select %(id)s, %(student_id)s, %(course_id)s, %(session_count)s, %(learning_mode)s, %(group_size)s, %(time_slot)s,
       %(start_date)s, %(now)s
where (select count(*) from cart_items where student_id = %(student_id)s) < %(items_max)s::int
"""


async def add_item(
    tx: Tx,
    student_id: UUID,
    course_id: UUID,
    *,
    session_count: int,
    learning_mode: str,
    group_size: int,
    time_slot: str,
    start_date: date,
) -> Item:
    """Put a course into the cart; the slot is kept as we write it. Raises CourseNotFound, CartFull, InvalidSlot."""
    values = {
        "id": new_id(),
        "student_id": student_id,
        "course_id": course_id,
        "session_count": session_count,
        "learning_mode": learning_mode,
        "group_size": group_size,
        "time_slot": _spell(time_slot),
        "start_date": start_date,
        "items_max": ITEMS_MAX,
        "now": tx.now,
    }
    try:
        async with tx.savepoint():
            added = await tx.execute(INSERT_ITEM, values)
    except pg.ForeignKeyViolation:
        raise CourseNotFound from None
    if not added:
        raise CartFull
    return next(item for item in await list_items(tx, student_id) if item.id == values["id"])


def _spell(time_slot: str) -> str:
    """A slot that names its end keeps it: the checkout compares it with the course's length."""
    slot = parse_slot(time_slot)
    return time_slot if slot.minutes else format_slot(slot.start)


DELETE_ITEM = "delete from cart_items where id = %(item_id)s and student_id = %(student_id)s"


async def remove_item(tx: Tx, student_id: UUID, item_id: UUID) -> None:
    """Raises NotFound."""
    if not await tx.execute(DELETE_ITEM, {"item_id": item_id, "student_id": student_id}):
        raise NotFound("There is no such item in this cart.")
