"""The views, one statement each, straight from the truth."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from caravan.db import Database, Tx
from caravan.db.tx import Row
from caravan.deliveries import Stage
from caravan.errors import NotFound
from caravan.student_views.cursor import Cursor

# Home: what goes on or waits. Learning: every course that was ever paid for, also completed and refunded ones.
HOME: tuple[Stage, ...] = (Stage.PAID, Stage.PURCHASED, Stage.ALLOCATED, Stage.SCHEDULED)
LEARNING: tuple[Stage, ...] = tuple(Stage)


@dataclass(frozen=True, slots=True)
class Head:
    """Where a student's feed ends: its last number and that event's id (None: nothing was said, or it is trimmed).

    The id tells two histories apart that reach the same number, as before and after a backup was restored.
    """

    version: int
    event_id: UUID | None


@dataclass(frozen=True, slots=True)
class View:
    """`head` is where the student's feed ended in the snapshot of the items, `now` when that was."""

    head: Head
    now: datetime
    items: list[Row]


# A student's captured payments in some stages, each with its course, trainer, next session and the business reason why
# it waits; and the end of the student's feed. One row without a payment where there is nothing to show. A refund of all
# of it names no sessions: what was not held counts as refunded.
LIST_ITEMS = """
select coalesce(h.seq, 0) as version, e.event_id, now() as now,
       exists (select from students s where s.id = asked.student_id) as known, i.*
from (select %(student_id)s::uuid) as asked(student_id)
left join student_feed_heads h on h.student_id = asked.student_id
left join student_feed e on e.student_id = h.student_id and e.seq = h.seq
left join lateral (
  select f.payment_id, f.purchase_id, f.course_id, coalesce(c.title, 'Course') as title, f.stage, u.reason,
         f.captured_at as paid_at, f.captured_cents as amount_cents, f.currency,
         coalesce(pu.timezone, o.timezone, 'UTC') as timezone,
         t.id as trainer_id, t.name as trainer_name,
         f.total, f.scheduled, f.completed, f.student_absent, f.cancelled, f.owed,
         case when f.stage = 'refunded' then f.total - f.scheduled - f.completed - f.student_absent - f.owed
           else f.refunded end as refunded,
         f.refunded_cents,
         case when f.stage = 'refunded' then (select max(r.created_at) from refunds r where r.payment_id = f.payment_id)
           end as refunded_at,
         n.id as next_id, n.seq as next_seq, n.starts_at as next_starts_at, n.ends_at as next_ends_at
  from fulfilments f
  join checkouts o on o.id = f.checkout_id
  left join student_course_purchases pu on pu.id = f.purchase_id
  left join courses c on c.id = f.course_id
  left join undelivered u on u.payment_id = f.payment_id
  left join trainers t on t.id = f.trainer_id
  left join lateral (
    select s.id, s.seq, s.starts_at, s.ends_at from tutoring_sessions s
    where s.purchase_id = f.purchase_id and s.status = 'scheduled' and s.ends_at > now()
    order by s.starts_at, s.seq limit 1
  ) n on true
  where f.student_id = asked.student_id and f.stage = any(%(stages)b::text[])
    and (%(payment_id)s::uuid is null or f.payment_id = %(payment_id)s)
) i on true
order by i.paid_at desc, i.payment_id desc
"""


# Where the feeds of some students end.
LIST_ENDS = """
select asked.student_id, coalesce(h.seq, 0) as version, f.event_id
from unnest(%(student_ids)b::uuid[]) as asked(student_id)
left join student_feed_heads h on h.student_id = asked.student_id
left join student_feed f on f.student_id = h.student_id and f.seq = h.seq
"""


async def list_ends(tx: Tx, student_ids: Collection[UUID]) -> dict[UUID, Head]:
    """A student of whom nothing was said yet is at 0."""
    rows = await tx.tuples(LIST_ENDS, {"student_ids": list(student_ids)})
    return {student: Head(version, event_id) for student, version, event_id in rows}


async def find_end(db: Database, student_id: UUID) -> Head:
    """The same of one student, in one round trip: a statement on a row by its key needs no transaction around it."""
    [row] = await db.all(LIST_ENDS, {"student_ids": [student_id]})
    return Head(row["version"], row["event_id"])


async def get_view(
    db: Tx | Database, student_id: UUID, stages: Sequence[Stage], *, payment_id: UUID | None = None
) -> View:
    """One statement, so of one state. Raises NotFound where nothing is known of the student."""
    rows = await db.all(
        LIST_ITEMS,
        {"student_id": student_id, "stages": [str(stage) for stage in stages], "payment_id": payment_id},
    )
    items = [row for row in rows if row["payment_id"] is not None]
    if not items and not rows[0]["known"]:
        raise NotFound("There is no such student.")
    return View(Head(rows[0]["version"], rows[0]["event_id"]), rows[0]["now"], items)


# A page of a student's sessions, by time. The purchases are found by their index, their sessions by the key.
LIST_SESSIONS = """
select s.id, s.purchase_id, s.seq, s.course_id, s.trainer_id, s.starts_at, s.ends_at, s.status
from student_course_purchases p join tutoring_sessions s on s.purchase_id = p.id
where p.student_id = %(student_id)s
  and (%(after_starts_at)s::timestamptz is null or (s.starts_at, s.id) > (%(after_starts_at)s, %(after_id)s::uuid))
order by s.starts_at, s.id limit %(limit)s
"""


async def list_sessions(tx: Tx, student_id: UUID, after: Cursor | None, limit: int) -> tuple[list[Row], Cursor | None]:
    """At most `limit` sessions after `after`, and where the next page begins (None: this was the last)."""
    rows = await tx.all(
        LIST_SESSIONS,
        {
            "student_id": student_id,
            "after_starts_at": after.starts_at if after else None,
            "after_id": after.id if after else None,
            "limit": limit + 1,
        },
    )
    page = rows[:limit]
    return page, Cursor(page[-1]["starts_at"], page[-1]["id"]) if len(rows) > limit else None
