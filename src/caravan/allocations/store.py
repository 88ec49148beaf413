"""The SQL of allocations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import msgspec

from caravan import bookings
from caravan.allocations.matching import Candidate, Need
from caravan.allocations.plan import Slot, State
from caravan.db import Tx
from caravan.ids import new_id

# Refunds are read from where they are decided, so it does not matter whether the purchase has heard of them already.
LIST_STATES = """
select pu.id as purchase_id, pu.payment_id, pu.student_id, pu.course_id, pu.purchase_tier as tier,
  least(pu.purchase_tier, greatest(pu.refunded_sessions, r.sessions))::int as refunded, r.seqs as refunded_seqs,
  pu.is_active and p.status <> 'refunded' as active, pu.session_minutes as minutes, pu.weekdays, pu.learning_mode,
  pu.timezone, pu.slot_start, pu.start_date, coalesce(s.latitude is not null, false) as located,
  u.payment_id is not null as registered, coalesce(u.held, false) as held, u.reason, u.since as waiting_since,
  a.id as allocation_id, a.status as allocation_status, a.trainer_id, tr.active as trainer_active,
  exists (select from bookings b where b.id = a.booking_id and b.live) as allocation_booked,
  exists (select from bookings b where b.purchase_id = pu.id and b.live) as booked, t.numbered, t.done
from student_course_purchases pu
join payments p on p.id = pu.payment_id
left join undelivered u on u.payment_id = pu.payment_id
left join students s on s.id = pu.student_id
left join trainer_allocations a on a.purchase_id = pu.id and a.status <> 'cancelled'
left join trainers tr on tr.id = a.trainer_id
cross join lateral (
  select coalesce(sum(sessions), 0) as sessions,
    array(select unnest(session_seqs)::int from refunds where payment_id = pu.payment_id) as seqs
  from refunds where payment_id = pu.payment_id) r
cross join lateral (
  select count(*) as numbered, count(*) filter (where status in ('completed', 'student_absent')) as done
  from tutoring_sessions where purchase_id = pu.id) t
where pu.id = any(%(purchase_ids)b::uuid[])
order by u.since, pu.id
"""


async def list_states(tx: Tx, purchase_ids: Sequence[UUID]) -> list[State]:
    """The purchases that exist, the longest waiting first."""
    return await tx.all(LIST_STATES, {"purchase_ids": list(purchase_ids)}, into=State)


# Booked time whose outcome is open: a scheduled session, or to come and not numbered yet. (What began without a number
# was missed by everybody.)
LIST_SLOTS = """
select b.purchase_id, b.id as booking_id, t.active as trainer_active, slot as starts_at, slot <= %(now)s as begun,
  s.seq
from bookings b
join trainers t on t.id = b.trainer_id
cross join lateral unnest(b.starts) slot
left join tutoring_sessions s on s.purchase_id = b.purchase_id and s.booking_id = b.id and s.starts_at = slot
where b.purchase_id = any(%(purchase_ids)b::uuid[]) and b.live
  and (s.status = 'scheduled' or s.status is null and slot > %(now)s)
order by b.purchase_id, slot
"""


async def list_slots(tx: Tx, purchase_ids: Sequence[UUID]) -> list[Slot]:
    return await tx.all(LIST_SLOTS, {"purchase_ids": list(purchase_ids), "now": tx.now}, into=Slot)


@dataclass(frozen=True, slots=True)
class Search:
    """What the database says about one need.

    `counts`: trainers left after each filter, in order: teaches, active, offersMode, open, free, withinRadius.
    `clash`: another purchase of the student at that time. `candidates`: the best, best first.
    """

    clash: UUID | None
    clashes: bool
    counts: dict[str, int]
    candidates: list[Candidate]


# For each need: how many trainers each filter leaves, and the best of those who pass them all. Everything but the
# distance is the same for all needs of one course, mode and series, so it is worked out once for those (`combos`).
# Open hours are stored out of line, so they are read once per trainer, and cut to the time that is asked about.
# Load: the sessions of the trainer's live bookings that touch the time between the first slot and the last.
# Places are compared here and nowhere else: only distances leave the database.
SEARCH_TRAINERS = f"""
with {bookings.SERIES},
needs as materialized (
  select n.*, r.during, s.latitude, s.longitude
  from unnest(%(ordinals)b::int[], %(courses)b::uuid[], %(modes)b::text[], %(students)b::uuid[], %(need_series)b::int[],
              %(current)b::uuid[], %(limits)b::int[])
    as n(ordinal, course_id, mode, student_id, series, current_trainer, most)
  join series r using (series) left join students s on s.id = n.student_id
), combos as materialized (
  select distinct n.course_id, n.mode, n.series from needs n
), hours as materialized (
  select tt.trainer_id, tt.open * horizon.during as open
  from trainer_time tt
  cross join (select tstzmultirange(range_merge(range_agg(during))) as during from series) horizon
  where tt.trainer_id in (
    select tc.trainer_id from trainer_courses tc where tc.course_id in (select course_id from combos))
), judged as materialized (
  select c.course_id, c.mode, c.series, t.id as trainer_id, t.latitude, t.longitude, t.radius_km, t.active,
    t.active and c.mode = any(t.modes) as offers, v.open, v.open and not b.busy as free, b.load
  from combos c
  join series r using (series)
  join trainer_courses tc on tc.course_id = c.course_id
  join trainers t on t.id = tc.trainer_id
  left join hours h on h.trainer_id = t.id
  cross join lateral (
    select t.active and c.mode = any(t.modes) and coalesce(h.open @> r.during, false) as open) v
  left join lateral (
    select coalesce(sum(cardinality(k.starts)), 0)::int as load, coalesce(bool_or(k.during && r.during), false) as busy
    from bookings k
    where k.trainer_id = t.id and k.live and k.during && tstzmultirange(range_merge(r.during))) b on v.open
  where %(only)s::uuid is null or t.id = %(only)s
), counted as materialized (
  select course_id, mode, series, count(*)::int as teaches, (count(*) filter (where active))::int as active,
    (count(*) filter (where offers))::int as offers, (count(*) filter (where open))::int as open,
    (count(*) filter (where free))::int as free
  from judged group by course_id, mode, series
), reachable as (
  select n.ordinal, n.most, j.trainer_id, j.load, d.km, row_number() over (
    partition by n.ordinal
    order by (j.trainer_id is not distinct from n.current_trainer) desc, j.load, d.km, j.trainer_id) as place
  from needs n join judged j using (course_id, mode, series)
  cross join lateral (
    select case when n.mode = 'home' then distance_km(n.latitude, n.longitude, j.latitude, j.longitude) end as km) d
  where j.free and (n.mode <> 'home' or d.km <= j.radius_km)
), best as (
  select ordinal, count(*)::int as within,
    array_agg(trainer_id order by place) filter (where place <= most) as trainers,
    array_agg(load order by place) filter (where place <= most) as loads,
    array_agg(km order by place) filter (where place <= most) as kms
  from reachable group by ordinal
)
select n.ordinal, clash.id is not null as clashes, clash.purchase_id as clash,
  coalesce(c.teaches, 0) as teaches, coalesce(c.active, 0) as active, coalesce(c.offers, 0) as offers,
  coalesce(c.open, 0) as open, coalesce(c.free, 0) as free, coalesce(b.within, 0) as within, b.trainers, b.loads, b.kms
from needs n
left join counted c using (course_id, mode, series)
left join best b using (ordinal)
left join lateral (
  select k.id, k.purchase_id from bookings k where k.student_id = n.student_id and k.live and k.during && n.during
  order by k.id limit 1) clash on true
"""  # noqa: S608 - put together from constants

CANDIDATES_SHOWN = 8
CANDIDATES_MAX = 64


async def search_trainers(tx: Tx, needs: Sequence[tuple[Need, UUID, str]], *, only: UUID | None = None) -> list[Search]:
    """An answer for each (need, course, mode), in their order; `only` asks about one trainer.

    The later of two needs for one course gets a longer list, so that a batch can hand out enough different trainers.
    """
    series, numbers = bookings.pack_series([need.series for need, _, _ in needs])
    seen: dict[UUID, int] = {}
    limits: list[int] = []
    for _, course_id, _ in needs:
        seen[course_id] = seen.get(course_id, -1) + 1
        limits.append(min(CANDIDATES_MAX, CANDIDATES_SHOWN + seen[course_id]))
    rows = await tx.all(
        SEARCH_TRAINERS,
        {
            **series,
            "ordinals": list(range(len(needs))),
            "courses": [course_id for _, course_id, _ in needs],
            "modes": [mode for _, _, mode in needs],
            "students": [need.student_id for need, _, _ in needs],
            "need_series": numbers,
            "current": [need.current_trainer for need, _, _ in needs],
            "limits": limits,
            "only": only,
        },
    )
    return [_search(row) for row in sorted(rows, key=lambda row: row["ordinal"])]


def _search(row: Mapping[str, Any]) -> Search:
    return Search(
        clash=row["clash"],
        clashes=row["clashes"],
        counts={
            "teaches": row["teaches"],
            "active": row["active"],
            "offersMode": row["offers"],
            "open": row["open"],
            "free": row["free"],
            "withinRadius": row["within"],
        },
        candidates=[
            Candidate(*columns)
            for columns in zip(row["trainers"] or (), row["loads"] or (), row["kms"] or (), strict=True)
        ],
    )


@dataclass(frozen=True, slots=True)
class Decided:
    """What an allocation is to say: with a trainer and booking it is approved, without it waits."""

    state: State
    trainer_id: UUID | None
    booking_id: UUID | None
    metadata: Mapping[str, object]
    decision: Mapping[str, object]


# One allocation that is not cancelled per purchase: a new one, or the waiting one moves on. A waiting one that would
# say the same again is left alone; one with a trainer keeps them (a make-up is not a new allocation).
UPSERT_ALLOCATIONS = """
insert into trainer_allocations as a (id, purchase_id, student_id, course_id, trainer_id, booking_id, status, metadata,
  decision, created_at, updated_at)
select n.id, n.purchase_id, n.student_id, n.course_id, n.trainer_id, n.booking_id,
  case when n.booking_id is null then 'waiting' else 'approved' end, n.metadata::jsonb, n.decision::jsonb,
  %(now)s, %(now)s
from unnest(%(ids)b::uuid[], %(purchases)b::uuid[], %(students)b::uuid[], %(courses)b::uuid[], %(trainers)b::uuid[],
    %(booking_ids)b::uuid[], %(metadata)b::text[], %(decisions)b::text[])
  as n(id, purchase_id, student_id, course_id, trainer_id, booking_id, metadata, decision)
order by n.purchase_id
on conflict (purchase_id) where status <> 'cancelled' do update set
  trainer_id = excluded.trainer_id, booking_id = excluded.booking_id, status = excluded.status,
  metadata = excluded.metadata, decision = excluded.decision, updated_at = excluded.updated_at
where a.status = 'waiting' and (excluded.status = 'approved' or a.metadata <> excluded.metadata
                                or a.decision - 'asOf' is distinct from excluded.decision - 'asOf')
returning purchase_id, id
"""


async def upsert_allocations(tx: Tx, decided: Sequence[Decided]) -> dict[UUID, UUID]:
    """The allocations that were made or changed, by purchase."""
    if not decided:
        return {}
    rows = await tx.tuples(
        UPSERT_ALLOCATIONS,
        {
            "ids": [new_id() for _ in decided],
            "purchases": [d.state.purchase_id for d in decided],
            "students": [d.state.student_id for d in decided],
            "courses": [d.state.course_id for d in decided],
            "trainers": [d.trainer_id for d in decided],
            "booking_ids": [d.booking_id for d in decided],
            "metadata": [msgspec.json.encode(d.metadata).decode() for d in decided],
            "decisions": [msgspec.json.encode(d.decision).decode() for d in decided],
            "now": tx.now,
        },
    )
    return dict(rows)


MARK_ALLOCATIONS = """
update trainer_allocations a set status = n.status, updated_at = %(now)s
from unnest(%(ids)b::uuid[], %(statuses)b::text[]) as n(id, status) where a.id = n.id and a.status <> n.status
"""


async def mark_allocations(tx: Tx, statuses: Mapping[UUID, str]) -> None:
    """Let allocations end (`cancelled`, `completed`) or go on (`approved`)."""
    if statuses:
        await tx.execute(MARK_ALLOCATIONS, {"ids": list(statuses), "statuses": list(statuses.values()), "now": tx.now})


# A rest that waited for a trainer until refunds took it: what is still to come is with who has the last of it.
HAND_OVER = """
update trainer_allocations a set status = 'approved', booking_id = b.id, trainer_id = b.trainer_id, updated_at = %(now)s
from (select distinct on (purchase_id) purchase_id, id, trainer_id from bookings
      where purchase_id = any(%(purchase_ids)b::uuid[]) and live
      order by purchase_id, starts[cardinality(starts)] desc) b
where a.purchase_id = b.purchase_id and a.status = 'waiting'
"""


async def hand_over(tx: Tx, purchase_ids: Sequence[UUID]) -> None:
    if purchase_ids:
        await tx.execute(HAND_OVER, {"purchase_ids": list(purchase_ids), "now": tx.now})


@dataclass(frozen=True, slots=True)
class Allocation:
    id: UUID
    purchase_id: UUID
    trainer_id: UUID | None
    status: str


FIND_ALLOCATION = """
select id, purchase_id, trainer_id, status from trainer_allocations where id = %(allocation_id)s
"""


async def find_allocation(tx: Tx, allocation_id: UUID) -> Allocation | None:
    return await tx.find(FIND_ALLOCATION, {"allocation_id": allocation_id}, into=Allocation)


LIST_COURSES_TAUGHT = """
select distinct course_id from trainer_courses where trainer_id = any(%(trainer_ids)b::uuid[])
"""


async def list_courses_taught(tx: Tx, trainer_ids: Sequence[UUID]) -> list[UUID]:
    return await tx.values(LIST_COURSES_TAUGHT, {"trainer_ids": list(trainer_ids)})


# The purchases that have time to come with a trainer who left.
LIST_DESERTED = """
select distinct b.purchase_id from bookings b join trainers t on t.id = b.trainer_id
where b.trainer_id = any(%(trainer_ids)b::uuid[]) and not t.active and b.live and b.purchase_id is not null
  and b.during && tstzmultirange(tstzrange(%(now)s, null)) and b.starts[cardinality(b.starts)] > %(now)s
limit %(most)s
"""


async def list_deserted(tx: Tx, trainer_ids: Sequence[UUID], most: int) -> list[UUID]:
    return await tx.values(LIST_DESERTED, {"trainer_ids": list(trainer_ids), "now": tx.now, "most": most})
