"""The SQL of allocations, except for the search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from uuid import UUID

import msgspec

from caravan.allocations.plan import Slot, State
from caravan.db import Tx
from caravan.ids import new_ids

# Refunds are read from where they are decided, so it does not matter whether the purchase has heard of them already.
# Each table is asked once for the whole page, not once per purchase: however deep its index has grown, that is a walk
# along a few leaves (docs/decisions/0019).
LIST_STATES = """
with pu as materialized (
  select * from student_course_purchases where id = any(%(purchase_ids)b::uuid[])
), p as materialized (
  select id, status, captured_at from payments where id = any(array(select payment_id from pu))
), u as materialized (
  select * from undelivered where payment_id = any(array(select payment_id from pu))
), s as materialized (
  select id, latitude from students where id = any(array(select student_id from pu))
), a as materialized (
  select id, purchase_id, status, trainer_id, booking_id from trainer_allocations
  where purchase_id = any(%(purchase_ids)b::uuid[]) and status <> 'cancelled'
), taken as materialized (
  select distinct purchase_id from bookings where purchase_id = any(%(purchase_ids)b::uuid[]) and live
), t as materialized (
  select purchase_id, count(*) as numbered, count(*) filter (where status in ('completed', 'student_absent')) as done
  from tutoring_sessions where purchase_id = any(%(purchase_ids)b::uuid[]) group by purchase_id
)
select pu.id as purchase_id, pu.payment_id, pu.student_id, pu.course_id, pu.purchase_tier as tier,
  least(pu.purchase_tier, greatest(pu.refunded_sessions, r.sessions))::int as refunded, r.seqs as refunded_seqs,
  pu.is_active and p.status <> 'refunded' as active, pu.session_minutes as minutes, pu.weekdays, pu.learning_mode,
  pu.timezone, pu.slot_start, pu.start_date, coalesce(s.latitude is not null, false) as located,
  u.payment_id is not null as registered, coalesce(u.held, false) as held,
  case when u.reason = 'STAGE_PAUSED' and u.detail ->> 'stage' = 'allocated' then null else u.reason end as reason,
  u.since as waiting_since,
  case when (select exists (select from pauses)) then paused_by('purchased', pu.course_id, pu.student_id) end
    as pause_id, p.captured_at,
  a.id as allocation_id, a.status as allocation_status, a.trainer_id, tr.active as trainer_active,
  exists (select from bookings b where b.id = a.booking_id and b.live) as allocation_booked,
  taken.purchase_id is not null as booked, coalesce(t.numbered, 0) as numbered, coalesce(t.done, 0) as done
from pu
join p on p.id = pu.payment_id
left join u on u.payment_id = pu.payment_id
left join s on s.id = pu.student_id
left join a on a.purchase_id = pu.id
left join taken on taken.purchase_id = pu.id
left join t on t.purchase_id = pu.id
left join trainers tr on tr.id = a.trainer_id
cross join lateral (
  select coalesce(sum(sessions), 0) as sessions,
    array(select unnest(session_seqs)::int from refunds where payment_id = pu.payment_id) as seqs
  from refunds where payment_id = pu.payment_id) r
order by pu.start_date, u.since, pu.id
"""


async def list_states(tx: Tx, purchase_ids: Sequence[UUID]) -> list[State]:
    """The purchases that exist, the nearest start first, then the longest waiting."""
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
            "ids": new_ids(len(decided)),
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
