"""What a job has to do, for every peer the same: one captured payment becomes a purchase, a booking, an allocation,
sessions and rows on the student's feed, and leaves the register of undelivered money.

Tuned for one payment at a time: three statements in one transaction, prepared once per connection. The exclusion
constraints of `bookings` guard the time; who loses a race asks again and takes the next best. The slots come from
`caravan.calendar`, which all may use, and trainers from shortlists as ours. What ours writes besides (log, claims, why
this trainer) is left out.

`Fetch` runs one statement with $1, $2 ... and returns its rows: asyncpg's own, or psycopg's as below.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from typing import Any, TypeVar, cast
from uuid import UUID, uuid5

import msgspec
import psycopg

from caravan import calendar, events
from caravan.allocations.search import REACHES, minutes_of_week
from caravan.eventlog.codec import encode_data
from caravan.ids import new_id

T = TypeVar("T")
Fetch = Callable[..., Awaitable[Sequence[Sequence[Any]]]]

NOTICE = timedelta(hours=12)
SEARCHES_MAX = 20
# The same for every connection of every peer, as ours has it for each transaction.
CONNECTION_SETTINGS = {"jit": "off", "application_name": "peer"}


class NobodyFree(Exception):
    """No trainer is left for these sessions: the job fails, and the run has no number."""


@dataclass(slots=True)
class Sale:
    """What was paid for: one row of READ_SALE, then the ids of what is about to be made of it."""

    payment_id: UUID
    checkout_id: UUID
    student_id: UUID
    course_id: UUID
    sessions: int
    minutes: int
    weekdays: list[int]
    mode: str
    group_size: int
    zone: str
    slot_start: time
    start_date: date
    latitude: float | None
    longitude: float | None
    now: datetime
    purchase_id: UUID = field(default_factory=new_id)
    allocation_id: UUID = field(default_factory=new_id)
    booking_id: UUID = field(default_factory=new_id)
    trainer_id: UUID | None = None
    starts: list[datetime] = field(init=False)

    def __post_init__(self) -> None:
        pattern = calendar.Pattern(self.slot_start, self.minutes, tuple(self.weekdays), self.zone)
        not_before = self.now.astimezone(UTC) + NOTICE
        self.starts = calendar.session_starts(pattern, self.start_date, self.sessions, not_before=not_before)

    def _names(self) -> dict[str, Any]:
        return {
            "payment_id": self.payment_id,
            "student_id": self.student_id,
            "course_id": self.course_id,
            "purchase_id": self.purchase_id,
        }

    def created(self) -> events.Event:
        return events.PurchaseCreated(**self._names(), session_count=self.sessions)

    def granted(self) -> events.Event:
        return events.CourseAccessGranted(**self._names())

    def allocated(self) -> events.Event:
        assert self.trainer_id
        return events.TrainerAllocated(
            **self._names(),
            allocation_id=self.allocation_id,
            booking_id=self.booking_id,
            trainer_id=self.trainer_id,
            session_count=self.sessions,
        )

    def scheduled(self) -> events.Event:
        return events.SessionsScheduled(
            **self._names(),
            allocation_id=self.allocation_id,
            session_count=self.sessions,
            first_starts_at=self.starts[0],
            last_ends_at=self.starts[-1] + timedelta(minutes=self.minutes),
        )

    def values(self, said: Sequence[events.Event] = ()) -> dict[str, Any]:
        """The parameters of every statement; `said` goes onto the feed."""
        slot, start = calendar.format_slot(self.slot_start), self.start_date.isoformat()
        sold = {"sessionCount": self.sessions, "tierFrom": "checkout", "timeSlot": slot, "startDate": start}
        booked = {"sessionCount": self.sessions, "schedule": {"timeSlot": slot, "date": start}}
        return {
            "payment": self.payment_id,
            "checkout": self.checkout_id,
            "student": self.student_id,
            "course": self.course_id,
            "sessions": self.sessions,
            "minutes": self.minutes,
            "weekdays": self.weekdays,
            "mode": self.mode,
            "group_size": self.group_size,
            "zone": self.zone,
            "slot_start": self.slot_start,
            "start_date": self.start_date,
            "latitude": self.latitude,
            "longitude": self.longitude,
            "purchase": self.purchase_id,
            "allocation": self.allocation_id,
            "booking": self.booking_id,
            "trainer": self.trainer_id,
            "starts": self.starts,
            "week": list(minutes_of_week(self.starts)),
            "terms": msgspec.json.encode(sold).decode(),
            "allocation_terms": msgspec.json.encode(booked).decode(),
            "event_ids": [new_id() for _ in said],
            "types": [event.type for event in said],
            "data": [encode_data(event) for event in said],
        }


class Statement:
    """SQL with :names, as drivers like it best: numbered, the same text every time, so that it is prepared once."""

    def __init__(self, text: str) -> None:
        self.names: list[str] = []
        self.text = re.sub(r"(?<!:):([a-z_]+)", self._number, text)

    def _number(self, found: re.Match[str]) -> str:
        if found[1] not in self.names:
            self.names.append(found[1])
        return f"${self.names.index(found[1]) + 1}"

    async def rows(self, fetch: Fetch, values: dict[str, Any]) -> Sequence[Sequence[Any]]:
        return await fetch(self.text, *[values[name] for name in self.names])


READ_SALE = Statement("""
select p.id, c.id, p.student_id, c.course_id, c.sessions::int, c.session_minutes::int, c.weekdays::int[],
  c.learning_mode, c.group_size::int, c.timezone, c.slot_start, c.start_date, s.latitude, s.longitude, now(), pu.id
from payments p
join checkouts c on c.id = p.checkout_id and c.paid_by = p.id
join students s on s.id = p.student_id
left join student_course_purchases pu on pu.payment_id = p.id
where p.id = :payment::uuid and p.status = 'succeeded'
""")

# The same shortlist as ours, for one need: of a few trainers of the course who are open then (for lessons at home the
# nearest, else the next in a shuffled order from a place that the purchase's id decides) the least loaded who is free.
SHORTLIST = Statement("""
with r as materialized (
  select during, range_merge(during) as span,
    (select range_agg(int4range(m, m + :minutes::int)) from unnest(:week::int[]) m) as week
  from (select range_agg(tstzrange(s, s + make_interval(mins => :minutes::int))) as during
        from unnest(:starts::timestamptz[]) s) series
)
select c.trainer_id
from r
cross join lateral (
  select near.trainer_id, d.km
  from (
    (select tc.trainer_id from trainer_courses tc where :mode::text = 'home' and tc.course_id = :course::uuid
     order by tc.place <-> on_map(:latitude::float8, :longitude::float8) limit :looked_at::int)
    union all
    (select tc.trainer_id from trainer_courses tc where :mode::text <> 'home' and tc.course_id = :course::uuid
       and uuid_hash(tc.trainer_id) >= uuid_hash(:purchase::uuid)
     order by uuid_hash(tc.trainer_id) limit :looked_at::int)
    union all
    (select tc.trainer_id from trainer_courses tc where :mode::text <> 'home' and tc.course_id = :course::uuid
       and uuid_hash(tc.trainer_id) < uuid_hash(:purchase::uuid)
     order by uuid_hash(tc.trainer_id) limit :looked_at::int)
  ) near
  cross join lateral (
    select t.active and :mode::text = any(t.modes) as offers, t.latitude, t.longitude, t.radius_km
    from trainers t where t.id = near.trainer_id offset 0) t
  cross join lateral (
    select case when :mode::text = 'home'
      then distance_km(:latitude::float8, :longitude::float8, t.latitude, t.longitude) end as km) d
  cross join lateral (
    select case when r.week <@ h.always then r.span <@ h.known when r.week <@ h.ever then h.open @> r.during
      else false end as open
    from trainer_time h where h.trainer_id = near.trainer_id offset 0) h
  where t.offers and (:mode::text <> 'home' or d.km <= t.radius_km) and h.open
  limit :most::int) c
cross join lateral (
  select coalesce(sum(cardinality(k.starts)), 0) as load, coalesce(bool_or(k.during && r.during), false) as busy
  from bookings k where k.trainer_id = c.trainer_id and k.live and k.during && r.span) b
where not b.busy
order by b.load, c.km, c.trainer_id limit 1
""")

# Where no shortlist serves: the best of everybody. All who pass the cheap filters are put in order first; open hours,
# stored out of line and dear to read, are then looked at only until somebody has them.
SEARCH_TRAINER = Statement("""
with series as materialized (
  select range_agg(tstzrange(s, s + make_interval(mins => :minutes::int))) as during,
    tstzmultirange(tstzrange(min(s), max(s) + make_interval(mins => :minutes::int))) as around
  from unnest(:starts::timestamptz[]) s
), ranked as materialized (
  select t.id, r.during
  from series r
  join trainer_courses tc on tc.course_id = :course::uuid
  join trainers t on t.id = tc.trainer_id and t.active and :mode::text = any(t.modes)
  cross join lateral (
    select case when :mode::text = 'home'
      then distance_km(:latitude::float8, :longitude::float8, t.latitude, t.longitude) end as km) d
  cross join lateral (
    select coalesce(sum(cardinality(k.starts)), 0) as load, coalesce(bool_or(k.during && r.during), false) as busy
    from bookings k where k.trainer_id = t.id and k.live and k.during && r.around) b
  where (:mode::text <> 'home' or d.km <= t.radius_km) and not b.busy
  order by b.load, d.km, t.id
)
select id from ranked
where (select h.open @> ranked.during from trainer_time h where h.trainer_id = ranked.id)
limit 1
""")

# What the writing statements are made of, each a WITH query. A payment buys once: the constraint decides.
PURCHASE = """
purchase as (
  insert into student_course_purchases (id, checkout_id, payment_id, student_id, course_id, purchase_tier,
    session_minutes, weekdays, learning_mode, group_size, timezone, slot_start, start_date, metadata)
  select :purchase::uuid, :checkout::uuid, :payment::uuid, :student::uuid, :course::uuid, :sessions::int,
    :minutes::int, :weekdays::smallint[], :mode::text, :group_size::int, :zone::text, :slot_start::time,
    :start_date::date, :terms::jsonb
  where not :bought::boolean
  on conflict do nothing returning id
)"""
# {after}: a relation with one row where it is to be done, and none where not.
BOOKING = """
booking as (
  insert into bookings (id, kind, purchase_id, trainer_id, student_id, starts, minutes, during)
  select :booking::uuid, 'package', :purchase::uuid, :trainer::uuid, :student::uuid, :starts::timestamptz[],
    :minutes::int, (select range_agg(tstzrange(s, s + make_interval(mins => :minutes::int)))
                    from unnest(:starts::timestamptz[]) s)
  from {after} on conflict do nothing returning id
), allocation as (
  insert into trainer_allocations (id, purchase_id, student_id, course_id, trainer_id, booking_id, status, metadata)
  select :allocation::uuid, :purchase::uuid, :student::uuid, :course::uuid, :trainer::uuid, id, 'approved',
    :allocation_terms::jsonb
  from booking
)"""
DELIVERED = """
delivered as (
  delete from undelivered where payment_id = :payment::uuid and exists (select from {after}) returning payment_id
)"""
SESSIONS = """
numbered as (
  insert into tutoring_sessions (purchase_id, seq, allocation_id, booking_id, student_id, course_id, trainer_id,
    starts_at, ends_at, status)
  select :purchase::uuid, slot.n, :allocation::uuid, :booking::uuid, :student::uuid, :course::uuid, :trainer::uuid,
    slot.at, slot.at + make_interval(mins => :minutes::int), 'scheduled'
  from delivered cross join unnest(:starts::timestamptz[]) with ordinality as slot(at, n)
)"""
FEED = """
heads as (
  insert into student_feed_heads as head (student_id, seq)
  select :student::uuid, cardinality(:types::text[]) from {after}
  on conflict (student_id) do update set seq = head.seq + excluded.seq returning seq
), fed as (
  insert into student_feed (student_id, seq, event_id, type, data, created_at)
  select :student::uuid, seq - cardinality(:types::text[]) + e.n, e.id, e.type, e.data::jsonb, now()
  from heads
  cross join unnest(:event_ids::uuid[], :types::text[], :data::text[]) with ordinality as e(id, type, data, n)
  returning seq
)"""


def _joined(*parts: str) -> Statement:
    *queries, answer = parts
    return Statement(f"with {', '.join(queries)} select count(*)::int from {answer}")  # noqa: S608 - constants


# All of it at once. 1: done; 0: the trainer's time was lost (the purchase is made: :bought from now on), or another
# job of this payment was first.
FULFIL = _joined(
    PURCHASE,
    "bought as (select id from purchase union all select :purchase::uuid where :bought::boolean)",
    BOOKING.format(after="bought"),
    DELIVERED.format(after="booking"),
    SESSIONS,
    FEED.format(after="booking"),
    "booking",
)
# The same in three steps, for those whose transactions are the steps of a workflow. Each may run again.
CREATE_PURCHASE = _joined(PURCHASE, FEED.format(after="purchase"), "purchase")
ALLOCATE = _joined(BOOKING.format(after="(select) one"), FEED.format(after="booking"), "booking")
SCHEDULE = _joined(DELIVERED.format(after="(select) one"), SESSIONS, FEED.format(after="delivered"), "heads")
FIND_BOOKING = Statement("select trainer_id from bookings where id = :booking::uuid")


async def read_sale(fetch: Fetch, payment_id: UUID) -> Sale | None:
    """None: it is bought already, by this job's earlier life or a twin."""
    [row] = await READ_SALE.rows(fetch, {"payment": payment_id})
    return Sale(*row[:-1]) if row[-1] is None else None


async def read_sale_again(fetch: Fetch, payment_id: UUID) -> Sale:
    """For a step that may run twice: whatever is made of it has the same ids each time."""
    [row] = await READ_SALE.rows(fetch, {"payment": payment_id})
    return Sale(*row[:-1], *(uuid5(payment_id, name) for name in ("purchase", "allocation", "booking")))


async def search_trainer(fetch: Fetch, sale: Sale) -> UUID:
    """The best of a few who is free now; if need be of more, of all. Raises NobodyFree."""
    values = sale.values()
    for reach in REACHES:
        rows = await SHORTLIST.rows(fetch, values | {"most": reach.most, "looked_at": reach.looked_at})
        if rows:
            return rows[0][0]
    rows = await SEARCH_TRAINER.rows(fetch, values)
    if not rows:
        raise NobodyFree(f"nobody for payment {sale.payment_id}")
    return rows[0][0]


async def fulfil(fetch: Fetch, payment_id: UUID) -> None:
    """The whole job; the caller's transaction makes it all or nothing."""
    sale = await read_sale(fetch, payment_id)
    if sale is None:
        return
    for attempt in range(SEARCHES_MAX):
        sale.trainer_id = await search_trainer(fetch, sale)
        said = [sale.created(), sale.granted(), sale.allocated(), sale.scheduled()]
        [[done]] = await FULFIL.rows(fetch, sale.values(said) | {"bought": attempt > 0})
        if done:
            return
    raise NobodyFree(f"lost {SEARCHES_MAX} races for payment {payment_id}")


async def create_purchase(fetch: Fetch, sale: Sale) -> None:
    await CREATE_PURCHASE.rows(fetch, sale.values([sale.created(), sale.granted()]) | {"bought": False})


async def book(fetch: Fetch, sale: Sale) -> bool:
    """The time of `sale.trainer_id`; False where it was lost."""
    [[done]] = await ALLOCATE.rows(fetch, sale.values([sale.allocated()]))
    return bool(done)


async def allocate(fetch: Fetch, sale: Sale) -> None:
    """Finds and books a trainer; `sale` knows who."""
    for _ in range(SEARCHES_MAX):
        sale.trainer_id = await search_trainer(fetch, sale)
        if await book(fetch, sale):
            return
        mine = await FIND_BOOKING.rows(fetch, {"booking": sale.booking_id})
        if mine:  # of this step's earlier life
            sale.trainer_id = mine[0][0]
            return
    raise NobodyFree(f"lost {SEARCHES_MAX} races for payment {sale.payment_id}")


async def schedule(fetch: Fetch, sale: Sale) -> None:
    await SCHEDULE.rows(fetch, sale.values([sale.scheduled()]))


# ------------------------------------------------------------------ psycopg, for the peers that bring it


def _plain(value: Any) -> Any:
    """Instants as one text: psycopg would wrap each on its own, which costs more than the statement."""
    if not isinstance(value, list):
        return value
    items = cast(list[Any], value)
    return f"{{{','.join(map(datetime.isoformat, items))}}}" if items and isinstance(items[0], datetime) else items


def fetch_with(connection: psycopg.AsyncConnection[Any]) -> Fetch:
    async def fetch(query: str, *values: Any) -> Sequence[Sequence[Any]]:
        async with psycopg.AsyncRawCursor(connection) as cursor:
            await cursor.execute(query.encode(), [_plain(value) for value in values], prepare=True)
            return await cursor.fetchall()

    return fetch


def fetch_at_once(connection: psycopg.Connection[Any]) -> Fetch:
    """For a program without an event loop; see `finish`."""

    async def fetch(query: str, *values: Any) -> Sequence[Sequence[Any]]:
        with psycopg.RawCursor(connection) as cursor:
            cursor.execute(query.encode(), [_plain(value) for value in values], prepare=True)
            return cursor.fetchall()

    return fetch


def finish(job: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that never waits, because its `fetch` doesn't."""
    try:
        job.send(None)
    except StopIteration as stop:
        return stop.value
    raise RuntimeError("it waits for an event loop")
