"""The SQL of sessions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

import msgspec

from caravan.db import Tx
from caravan.deliveries import Stage


class Account(msgspec.Struct, frozen=True):
    """How a purchase's sessions add up: `owed` is what is neither done, scheduled nor refunded.

    `excess`: how many more are done and refunded than were bought; never more than 0 unless somebody is wrong.
    """

    purchase_id: UUID
    payment_id: UUID
    student_id: UUID
    course_id: UUID
    active: bool
    held: bool
    pause_id: UUID | None
    paused_before: bool
    numbered: bool
    scheduled: int
    owed: int
    excess: int

    @property
    def stage(self) -> Stage:
        """Of one that is not delivered: where it is on the road."""
        return Stage.SCHEDULED if self.numbered else Stage.ALLOCATED


# Refunds are read from where they are decided, so it does not matter whether the purchase has heard of them already.
# Each table is asked once for the whole page, not once per purchase: however deep its index has grown, that is a walk
# along a few leaves (docs/decisions/0019).
LIST_ACCOUNTS = """
with pu as materialized (
  select * from student_course_purchases where id = any(%(purchase_ids)b::uuid[])
), p as materialized (
  select id, status from payments where id = any(array(select payment_id from pu))
), u as materialized (
  select * from undelivered where payment_id = any(array(select payment_id from pu))
), numbered as materialized (
  select purchase_id, count(*) filter (where status = 'scheduled') as scheduled,
    count(*) filter (where status in ('completed', 'student_absent')) as done
  from tutoring_sessions where purchase_id = any(%(purchase_ids)b::uuid[]) group by purchase_id
)
select pu.id as purchase_id, pu.payment_id, pu.student_id, pu.course_id,
  pu.is_active and p.status <> 'refunded' as active,
  coalesce(u.held, false) as held,
  coalesce(u.reason = 'STAGE_PAUSED' and u.detail ->> 'stage' = 'allocated', false) as paused_before,
  case when (select exists (select from pauses)) then paused_by('allocated', pu.course_id, pu.student_id) end
    as pause_id, numbered.purchase_id is not null as numbered, t.scheduled::int,
  (pu.purchase_tier - t.done - t.scheduled - gone.refunded)::int as owed,
  (t.done + gone.refunded - pu.purchase_tier)::int as excess
from pu
join p on p.id = pu.payment_id
left join u on u.payment_id = pu.payment_id
left join numbered on numbered.purchase_id = pu.id
cross join lateral (
  select coalesce(numbered.scheduled, 0) as scheduled, coalesce(numbered.done, 0) as done) t
cross join lateral (
  select least(pu.purchase_tier, greatest(pu.refunded_sessions, coalesce(sum(sessions), 0))) as refunded
  from refunds where payment_id = pu.payment_id) gone
order by pu.id
"""


async def list_accounts(tx: Tx, purchase_ids: Sequence[UUID]) -> list[Account]:
    """The purchases that exist, by id."""
    return await tx.all(LIST_ACCOUNTS, {"purchase_ids": list(purchase_ids)}, into=Account)


# Sessions whose time was given back. (Bookings keep what has begun, unless a refund took just that.)
CANCEL_SESSIONS = """
with cancelled as (
  update tutoring_sessions t set status = 'cancelled'
  where t.purchase_id = any(%(purchase_ids)b::uuid[]) and t.status = 'scheduled'
    and not exists (select from bookings b where b.id = t.booking_id and b.live and t.starts_at = any(b.starts))
  returning t.purchase_id, t.seq::int
)
select purchase_id, array_agg(seq order by seq) as seqs from cancelled group by purchase_id
"""


async def cancel_sessions(tx: Tx, purchase_ids: Sequence[UUID]) -> dict[UUID, list[int]]:
    """The numbers of the sessions that end here, by purchase."""
    if not purchase_ids:
        return {}
    return dict(await tx.tuples(CANCEL_SESSIONS, {"purchase_ids": list(purchase_ids)}))


# Those of some purchases that have booked time to come without a session.
LIST_UNNUMBERED = """
select distinct b.purchase_id from bookings b cross join lateral unnest(b.starts) slot
where b.purchase_id = any(%(purchase_ids)b::uuid[]) and b.live and slot > %(now)s
  and not exists (select from tutoring_sessions t
                  where t.purchase_id = b.purchase_id and t.booking_id = b.id and t.starts_at = slot)
"""


async def list_unnumbered(tx: Tx, purchase_ids: Sequence[UUID]) -> set[UUID]:
    return set(await tx.values(LIST_UNNUMBERED, {"purchase_ids": list(purchase_ids), "now": tx.now}))


class Scheduled(msgspec.Struct, frozen=True):
    """New sessions of a purchase."""

    purchase_id: UUID
    allocation_id: UUID
    count: int
    first_starts_at: datetime
    last_ends_at: datetime


# Number the booked slots that have no session yet, after those that are numbered already. All of a purchase's or none:
# where more is booked than owed, allocations are about to trim. What began before it had a number was missed by
# everybody, and stays owed; where that was the start, all wait until somebody agrees to another. A session's id is its
# purchase's with the number in the last four digits: random ids would cost as much as the rows.
INSERT_SESSIONS = """
with pu as materialized (
  select id, course_id from student_course_purchases where id = any(%(purchase_ids)b::uuid[])
), a as materialized (
  select id, purchase_id from trainer_allocations
  where purchase_id = any(%(purchase_ids)b::uuid[]) and status in ('approved', 'completed')
), numbered as materialized (
  select purchase_id, max(seq) as last_seq from tutoring_sessions
  where purchase_id = any(%(purchase_ids)b::uuid[]) group by purchase_id
), booked as materialized (
  select id, purchase_id, student_id, trainer_id, starts, minutes from bookings
  where purchase_id = any(%(purchase_ids)b::uuid[]) and live
), rooms as materialized (
  select room.purchase_id, room.owed, pu.course_id, a.id as allocation_id, left(pu.id::text, 32) as stem,
    coalesce(numbered.last_seq, 0) as last_seq
  from unnest(%(purchase_ids)b::uuid[], %(owed)b::int[]) as room(purchase_id, owed)
  join pu on pu.id = room.purchase_id
  join a on a.purchase_id = room.purchase_id
  left join numbered on numbered.purchase_id = room.purchase_id
), slots as (
  select r.*, b.id as booking_id, b.student_id, b.trainer_id, slot as starts_at,
    slot + make_interval(mins => b.minutes) as ends_at,
    row_number() over (partition by r.purchase_id order by slot) as place,
    count(*) over (partition by r.purchase_id) as total
  from rooms r join booked b on b.purchase_id = r.purchase_id cross join lateral unnest(b.starts) slot
  where slot > %(now)s and (r.last_seq = 0 or not exists (
    select from tutoring_sessions t
    where t.purchase_id = b.purchase_id and t.booking_id = b.id and t.starts_at = slot))
), inserted as (
  insert into tutoring_sessions (purchase_id, seq, id, allocation_id, booking_id, student_id, course_id, trainer_id,
    starts_at, ends_at, status)
  select s.purchase_id, s.last_seq + s.place, (s.stem || lpad(to_hex(s.last_seq + s.place), 4, '0'))::uuid,
    s.allocation_id, s.booking_id, s.student_id, s.course_id, s.trainer_id, s.starts_at, s.ends_at, 'scheduled'
  from slots s
  where s.total <= s.owed
    and (s.total = s.owed or s.last_seq > 0 or not exists (
      select from booked b where b.purchase_id = s.purchase_id and b.starts[1] <= %(now)s))
  order by s.purchase_id, s.starts_at
  returning purchase_id, allocation_id, starts_at, ends_at
)
select purchase_id, allocation_id, count(*)::int as count, min(starts_at) as first_starts_at,
  max(ends_at) as last_ends_at
from inserted group by purchase_id, allocation_id
"""


async def insert_sessions(tx: Tx, owed: dict[UUID, int]) -> list[Scheduled]:
    """Make the sessions that are booked; `owed` is by purchase, the limit of each. The server expands the slots."""
    if not owed:
        return []
    params = {"purchase_ids": list(owed), "owed": list(owed.values()), "now": tx.now}
    return await tx.all(INSERT_SESSIONS, params, into=Scheduled)


@dataclass(frozen=True, slots=True)
class Session:
    purchase_id: UUID
    seq: int
    starts_at: datetime
    status: str


FIND_SESSION = """
select purchase_id, seq::int, starts_at, status from tutoring_sessions
where purchase_id = %(purchase_id)s and seq = %(seq)s
"""


async def find_session(tx: Tx, purchase_id: UUID, seq: int) -> Session | None:
    return await tx.find(FIND_SESSION, {"purchase_id": purchase_id, "seq": seq}, into=Session)


MARK_SESSION = """
update tutoring_sessions set status = %(status)s where purchase_id = %(purchase_id)s and seq = %(seq)s
"""


async def mark_session(tx: Tx, purchase_id: UUID, seq: int, status: str) -> None:
    await tx.execute(MARK_SESSION, {"purchase_id": purchase_id, "seq": seq, "status": status})
