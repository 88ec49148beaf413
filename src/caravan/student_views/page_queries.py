"""What the pages show beyond the views."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final
from uuid import UUID

from caravan.db import Tx
from caravan.db.tx import Row
from caravan.errors import NotFound

# A child's home is for the trainer who is on the way there, not for one who may come some day.
PLACE_SHOWN: Final = timedelta(hours=2)


@dataclass(frozen=True, slots=True)
class Student:
    """`version` is where the student's feed ended in this page's snapshot: the page listens from there on."""

    id: UUID
    name: str
    timezone: str
    version: int


# The students of a family, with the ends of their feeds.
LIST_STUDENTS = """
select s.id, s.name, s.timezone, coalesce(h.seq, 0) as version
from students s left join student_feed_heads h on h.student_id = s.id
where s.id = any(%(student_ids)b::uuid[]) order by s.name, s.id
"""


async def list_students(tx: Tx, student_ids: frozenset[UUID]) -> list[Student]:
    return await tx.all(LIST_STUDENTS, {"student_ids": list(student_ids)}, into=Student)


# Courses on sale, each with its prices; one of them where an id is given.
LIST_COURSES = """
select c.id, c.title, c.category, c.session_minutes, c.weekdays, c.learning_modes, c.group_sizes, t.tiers
from courses c
join lateral (
  select jsonb_agg(jsonb_build_object('sessions', sessions, 'group_size', group_size, 'amount_cents', amount_cents,
           'currency', currency) order by group_size, sessions) as tiers
  from course_tiers where course_id = c.id
) t on t.tiers is not null
where c.retired_at is null and (%(course_id)s::uuid is null or c.id = %(course_id)s)
order by c.category, c.title, c.id
"""


async def list_courses(tx: Tx) -> list[Row]:
    return await tx.all(LIST_COURSES, {"course_id": None})


async def get_course(tx: Tx, course_id: UUID) -> Row:
    """Raises NotFound for one that is not on sale."""
    row = await tx.find(LIST_COURSES, {"course_id": course_id})
    if row is None:
        raise NotFound("There is no such course on sale.")
    return row


# A payment with what it is for; slot and start as ordered, and as they are now where others were chosen since.
FIND_CHECKOUT = """
select p.id, p.student_id, p.status, p.provider, p.amount_cents, p.currency, p.captured_at, p.checkout_id,
       o.expires_at, o.paid_by, o.sessions, o.learning_mode, o.group_size, o.timezone, o.price_cents, o.course_id,
       o.slot_start as ordered_slot_start, o.start_date as ordered_start_date,
       coalesce(pu.slot_start, o.slot_start) as slot_start, coalesce(pu.start_date, o.start_date) as start_date,
       coalesce(c.title, 'Course') as title
from payments p join checkouts o on o.id = p.checkout_id left join courses c on c.id = o.course_id
left join student_course_purchases pu on pu.payment_id = p.id
where p.id = %(payment_id)s
"""


async def get_checkout(tx: Tx, payment_id: UUID) -> Row:
    """Raises NotFound."""
    row = await tx.find(FIND_CHECKOUT, {"payment_id": payment_id})
    if row is None:
        raise NotFound("There is no such payment.")
    return row


# What a student began to buy and hasn't paid: the newest attempt of each open checkout.
LIST_UNPAID = """
select distinct on (o.id) p.id as payment_id, p.status, p.amount_cents, p.currency,
       coalesce(c.title, 'Course') as title, o.sessions, o.learning_mode, o.group_size, o.slot_start, o.start_date
from checkouts o join payments p on p.checkout_id = o.id left join courses c on c.id = o.course_id
where o.student_id = %(student_id)s and o.paid_by is null and o.expires_at > %(now)s and p.captured_at is null
order by o.id, p.created_at desc
"""


async def list_unpaid(tx: Tx, student_id: UUID) -> list[Row]:
    return await tx.all(LIST_UNPAID, {"student_id": student_id, "now": tx.now})


# A purchase's sessions by number, with who holds each.
LIST_PURCHASE_SESSIONS = """
select s.seq, s.starts_at, s.ends_at, s.status, t.name as trainer_name
from tutoring_sessions s left join trainers t on t.id = s.trainer_id
where s.purchase_id = %(purchase_id)s order by s.seq
"""


async def list_purchase_sessions(tx: Tx, purchase_id: UUID) -> list[Row]:
    return await tx.all(LIST_PURCHASE_SESSIONS, {"purchase_id": purchase_id})


FIND_PURCHASE = """
select payment_id, student_id from student_course_purchases where id = %(purchase_id)s
"""


async def get_purchase(tx: Tx, purchase_id: UUID) -> Row:
    """Whose it is and what paid it. Raises NotFound."""
    row = await tx.find(FIND_PURCHASE, {"purchase_id": purchase_id})
    if row is None:
        raise NotFound("There is no such course of yours.")
    return row


FIND_TRAINER = "select id, name, timezone, active from trainers where id = %(trainer_id)s"

# What a trainer holds from now on, by time; found through the bookings that take the trainer's time.
LIST_TRAINER_SESSIONS = """
select s.purchase_id, s.seq, s.starts_at, s.ends_at, c.title, st.name as student_name, p.learning_mode, p.purchase_tier,
       p.learning_mode = 'home' and s.starts_at <= %(shown_until)s as shows_place,
       (s.starts_at at time zone %(timezone)s)::date as day, (s.starts_at at time zone %(timezone)s)::time as begins,
       (s.ends_at at time zone %(timezone)s)::time as ends
from bookings b
join tutoring_sessions s on s.purchase_id = b.purchase_id and s.booking_id = b.id
join student_course_purchases p on p.id = s.purchase_id
left join courses c on c.id = s.course_id
left join students st on st.id = s.student_id
where b.trainer_id = %(trainer_id)s and b.live and s.trainer_id = %(trainer_id)s
  and s.status = 'scheduled' and s.ends_at > %(now)s
order by s.starts_at, s.id limit %(limit)s
"""


async def get_schedule(tx: Tx, trainer_id: UUID, limit: int) -> tuple[Row, list[Row]]:
    """The trainer, and the next `limit` sessions with day and time in the trainer's zone."""
    trainer = await tx.one(FIND_TRAINER, {"trainer_id": trainer_id})
    named: dict[str, Any] = {
        "trainer_id": trainer_id,
        "timezone": trainer["timezone"],
        "now": tx.now,
        "shown_until": tx.now + PLACE_SHOWN,
        "limit": limit,
    }
    return trainer, await tx.all(LIST_TRAINER_SESSIONS, named)


class PlaceNotShown(NotFound):
    """There is no such session of yours at a student's home, or it is over, or more than two hours away."""

    code = "PLACE_NOT_SHOWN"


# Where one of the trainer's sessions is; no row for one that isn't booked, isn't at home, or whose time isn't now.
FIND_PLACE = """
select s.student_id, s.purchase_id, s.seq, st.name as student_name, st.latitude, st.longitude
from tutoring_sessions s
join bookings b on b.id = s.booking_id
join student_course_purchases p on p.id = s.purchase_id
join students st on st.id = s.student_id
where s.purchase_id = %(purchase_id)s and s.seq = %(seq)s
  and b.trainer_id = %(trainer_id)s and b.live and s.trainer_id = %(trainer_id)s
  and p.learning_mode = 'home' and s.status = 'scheduled'
  and s.ends_at > %(now)s and s.starts_at <= %(shown_until)s
"""


async def get_place(tx: Tx, trainer_id: UUID, purchase_id: UUID, seq: int) -> Row:
    """Raises PlaceNotShown, in the same words whatever the reason."""
    named = {"trainer_id": trainer_id, "purchase_id": purchase_id, "seq": seq}
    row = await tx.find(FIND_PLACE, named | {"now": tx.now, "shown_until": tx.now + PLACE_SHOWN})
    if row is None:
        raise PlaceNotShown
    return row
