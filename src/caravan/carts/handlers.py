"""What a cart does when a course was bought."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from caravan.db import Tx
from caravan.events import Event, PurchaseConfirmed

# By student and course, whatever the client knew of cart items; only where the purchase exists, and only what was in
# the cart before it, so that an event that is heard again takes nothing new away.
DELETE_BOUGHT_ITEMS = """
delete from cart_items i using student_course_purchases p
where p.payment_id = any(%(payment_ids)b::uuid[])
  and i.student_id = p.student_id and i.course_id = p.course_id and i.created_at <= p.created_at
"""


async def empty_carts(tx: Tx, events: Sequence[Event]) -> None:
    """Take what was bought out of the carts. Runs in the purchase's transaction, after it was made."""
    payment_ids: list[UUID] = [event.payment_id for event in events if isinstance(event, PurchaseConfirmed)]
    if payment_ids:
        await tx.execute(DELETE_BOUGHT_ITEMS, {"payment_ids": payment_ids})
