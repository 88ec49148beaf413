"""Whose time is taken. A booking is a list of slots of one trainer and one student; nobody has two at once.

Owns: bookings. Says: BOOKING_RELEASED. Exclusion constraints decide who gets a time, whoever writes; here a lost race
is an answer, not an error. `starts`, `minutes` and `during` of a row always tell the same time: `during` is computed
in the database from the other two, by the same expression wherever a row is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date, datetime
from typing import Any, Literal
from uuid import UUID

import msgspec

from caravan.db import Tx
from caravan.eventlog import outbox
from caravan.events import BookingReleased

Kind = Literal["package", "single"]


class Series(msgspec.Struct, frozen=True):
    """When: the slots' starts (aware, increasing) and the length of each in minutes."""

    starts: tuple[datetime, ...]
    minutes: int


class Wish(msgspec.Struct, frozen=True):
    """A booking to be made. `id` is the caller's: it is how the caller knows which wishes came true."""

    id: UUID
    kind: Kind
    purchase_id: UUID
    trainer_id: UUID
    student_id: UUID
    series: Series


# Payments first and purchases second, each in the order of ids: the count is taken before the first purchase is looked
# at. A refund waits for us, or we see it.
LOCK_PURCHASES = """
with paid as materialized (
  select id from payments where id = any(array(
    select payment_id from student_course_purchases where id = any(%(purchase_ids)b::uuid[])))
  order by id for share
)
select id from student_course_purchases
where id = any(%(purchase_ids)b::uuid[]) and (select count(*) from paid) > 0
order by id for no key update
"""


async def lock_purchases(tx: Tx, purchase_ids: Sequence[UUID]) -> None:
    """Whoever changes what a purchase has booked, or its sessions, holds its row, and its payment's for sharing."""
    await tx.execute(LOCK_PURCHASES, {"purchase_ids": list(purchase_ids)})


# The series of a batch as rows: (series, minutes, starts, during). Every different series crosses the wire once; the
# slots of all lie end to end in one array. A CTE, for statements that take `pack_series`' parameters.
SERIES = """
series as materialized (
  select numbered.*,
    (select range_agg(tstzrange(s, s + make_interval(mins => minutes))) from unnest(starts) s) as during
  from (select series, minutes, (%(slots)b::timestamptz[])[first:last] as starts
        from unnest(%(series)b::int[], %(series_minutes)b::smallint[], %(series_first)b::int[], %(series_last)b::int[])
          as u(series, minutes, first, last)) numbered
)"""


def pack_series(wanted: Sequence[Series]) -> tuple[dict[str, Any], list[int]]:
    """The parameters of SERIES, and for each of `wanted` the number of its row."""
    numbers: dict[Series, int] = {}
    found = [numbers.setdefault(series, len(numbers)) for series in wanted]
    slots: list[datetime] = []
    firsts: list[int] = []
    lasts: list[int] = []
    for series in numbers:
        firsts.append(len(slots) + 1)
        slots.extend(series.starts)
        lasts.append(len(slots))
    params = {
        "slots": slots,
        "series": list(range(len(numbers))),
        "series_minutes": [series.minutes for series in numbers],
        "series_first": firsts,
        "series_last": lasts,
    }
    return params, found


# Book what is still free, in the order of trainer and first start, so that crossing batches wait for each other in one
# direction. Whatever overlaps a live booking of the trainer or of the student is left out, without an error.
INSERT_BOOKINGS = f"""
with {SERIES}
insert into bookings (id, kind, purchase_id, trainer_id, student_id, starts, minutes, during, created_at)
select w.id, w.kind, w.purchase_id, w.trainer_id, w.student_id, s.starts, s.minutes, s.during, %(now)s
from unnest(%(ids)b::uuid[], %(kinds)b::text[], %(purchase_ids)b::uuid[], %(trainer_ids)b::uuid[],
            %(student_ids)b::uuid[], %(wish_series)b::int[])
  as w(id, kind, purchase_id, trainer_id, student_id, series)
join series s using (series)
order by w.trainer_id, s.starts[1]
on conflict do nothing
returning id
"""  # noqa: S608 - put together from constants


async def insert_bookings(tx: Tx, wishes: Sequence[Wish]) -> set[UUID]:
    """Make bookings; the ids of those that came true. A loser's time was taken by somebody else, and that is committed.

    Each is all of its slots or nothing. Waits for transactions that are taking the same time.
    """
    if not wishes:
        return set()
    series, numbers = pack_series([wish.series for wish in wishes])
    return set(
        await tx.values(
            INSERT_BOOKINGS,
            {
                **series,
                "ids": [wish.id for wish in wishes],
                "kinds": [wish.kind for wish in wishes],
                "purchase_ids": [wish.purchase_id for wish in wishes],
                "trainer_ids": [wish.trainer_id for wish in wishes],
                "student_ids": [wish.student_id for wish in wishes],
                "wish_series": numbers,
                "now": tx.now,
            },
        )
    )


# For each (student, series) the first live booking that the student has at the same time, if any.
FIND_CLASHES = f"""
with {SERIES}
select n.ordinal, k.purchase_id
from unnest(%(ordinals)b::int[], %(student_ids)b::uuid[], %(wish_series)b::int[]) as n(ordinal, student_id, series)
join series r using (series)
cross join lateral (
  select k.purchase_id from bookings k where k.student_id = n.student_id and k.live and k.during && r.during
  order by k.id limit 1) k
"""  # noqa: S608 - put together from constants


async def find_clashes(tx: Tx, wanted: Sequence[tuple[UUID, Series]]) -> dict[int, UUID | None]:
    """Those of `wanted` (student, when), by their place in it, where the student is taken; by which purchase."""
    series, numbers = pack_series([series for _, series in wanted])
    rows = await tx.tuples(
        FIND_CLASHES,
        {
            **series,
            "ordinals": list(range(len(wanted))),
            "student_ids": [student for student, _ in wanted],
            "wish_series": numbers,
        },
    )
    return dict(rows)


class Missed(msgspec.Struct, frozen=True):
    """A purchase without any session, whose first booked time nobody numbered before it was over.

    `start`: the day on which it was to begin; `next`: the day of the first slot that is still to come, if there is one.
    """

    purchase_id: UUID
    start: date
    next: date | None

    @property
    def detail(self) -> dict[str, object]:
        """What a screen may say beside START_PASSED."""
        return {"start": str(self.start), "next": str(self.next)} if self.next else {"start": str(self.start)}


LIST_MISSED = """
select pu.id as purchase_id, (min(slot) at time zone pu.timezone)::date as start,
  (min(slot) filter (where slot > %(now)s) at time zone pu.timezone)::date as next
from student_course_purchases pu
join bookings b on b.purchase_id = pu.id and b.live
cross join lateral unnest(b.starts) slot
where pu.id = any(%(purchase_ids)b::uuid[])
  and not exists (select from tutoring_sessions t where t.purchase_id = pu.id)
group by pu.id having min(slot) <= %(now)s
"""


async def list_missed(tx: Tx, purchase_ids: Sequence[UUID]) -> dict[UUID, Missed]:
    """Those of some purchases whose start has passed while we kept them from it (a pause, workers that were off)."""
    if not purchase_ids:
        return {}
    found = await tx.all(LIST_MISSED, {"purchase_ids": list(purchase_ids), "now": tx.now}, into=Missed)
    return {missed.purchase_id: missed for missed in found}


# What of a purchase's booked time has begun by then; null: all of it.
LIST_BOOKED = """
select b.id, slot from bookings b cross join lateral unnest(b.starts) slot
where b.purchase_id = %(purchase_id)s and b.live and slot <= coalesce(%(until)s, 'infinity'::timestamptz)
"""


async def release_booked(tx: Tx, purchase_id: UUID, *, until: datetime | None = None) -> None:
    """Give a purchase's booked time back: all of it, or what has begun by then. The caller holds its lock."""
    slots = await tx.tuples(LIST_BOOKED, {"purchase_id": purchase_id, "until": until})
    await release_slots(tx, [(booking_id, slot) for booking_id, slot in slots])


# Give some slots of live bookings back. A booking without slots is live no more; it keeps the list, for the record.
RELEASE_SLOTS = """
with given as (
  select booking_id, array_agg(slot) as slots from unnest(%(booking_ids)b::uuid[], %(slots)b::timestamptz[])
    as u(booking_id, slot) group by booking_id
), locked as (
  select b.id, b.starts, b.minutes from bookings b join given on given.booking_id = b.id
  where b.live and b.starts && given.slots order by b.trainer_id, b.starts[1] for update of b
), remaining as (
  select locked.id, count(slot) as left_over, array_agg(slot order by slot) as starts,
         range_agg(tstzrange(slot, slot + make_interval(mins => minutes))) as during
  from locked join given on given.booking_id = locked.id
  left join lateral unnest(locked.starts) slot on slot <> all(given.slots)
  group by locked.id
)
update bookings b set live = left_over > 0,
  starts = case when left_over > 0 then r.starts else b.starts end,
  during = case when left_over > 0 then r.during else b.during end
from remaining r where b.id = r.id
returning b.id as booking_id, b.trainer_id, b.student_id, b.purchase_id,
  (select pu.payment_id from student_course_purchases pu where pu.id = b.purchase_id) as payment_id
"""


async def release_slots(tx: Tx, slots: Sequence[tuple[UUID, datetime]]) -> set[UUID]:
    """Free (booking, start) pairs again; the bookings that changed. What is free already is left alone."""
    if not slots:
        return set()
    rows = await tx.all(
        RELEASE_SLOTS, {"booking_ids": [booking for booking, _ in slots], "slots": [start for _, start in slots]}
    )
    outbox.append(tx, [BookingReleased(**row) for row in rows])
    return {row["booking_id"] for row in rows}
