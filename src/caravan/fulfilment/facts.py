"""What the database knows about some payments, gathered in one pass: the ground that diagnose and repair stand on.

No coordinates: whether a student has a place at all is said by the stored reason, never by a value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any
from uuid import UUID

from caravan.db import Tx
from caravan.deliveries import Stage
from caravan.eventlog.codec import UNREADABLE
from caravan.fulfilment.gaps import HOPS


@dataclass(frozen=True, slots=True)
class Facts:
    """One payment: its money, its stage, and how the event of its stage's hop fared. Ages in seconds."""

    payment_id: UUID
    student_id: UUID
    course_id: UUID | None
    provider: str
    status: str
    amount_cents: int
    captured_cents: int | None
    refunded_cents: int
    currency: str
    created_at: datetime
    captured_at: datetime | None
    accepted_at: datetime | None
    timezone: str | None  # the student's when it was sold
    # webhooks
    webhooks: int
    webhook_at: datetime | None
    webhook_type: str | None
    webhooks_unapplied: int
    # where it is
    stage: str | None
    purchase_id: UUID | None
    purchased_at: datetime | None
    allocation_id: UUID | None
    allocation_status: str | None
    allocated_at: datetime | None
    trainer_id: UUID | None
    trainer_name: str | None
    booking_live: bool | None
    total: int | None
    scheduled: int | None
    completed: int | None
    student_absent: int | None
    refunded: int | None
    owed: int | None
    # the register
    registered: bool
    since: datetime | None
    reason: str | None
    reason_since: datetime | None
    detail: dict[str, Any] | None
    held: bool
    # the hop out of this stage; of owed sessions, the one that is next for them
    hop_stage: str | None
    event_type: str | None
    consumer_group: str | None
    event_pending: bool  # said by this very transaction, so not in the log yet
    event_id: UUID | None
    event_at: datetime | None
    event_age_seconds: float | None
    processed_event_id: UUID | None
    processed_at: datetime | None
    dead_letter_id: UUID | None
    dead_letter_at: datetime | None
    dead_letter_code: str | None
    dead_letter_error: str | None
    dead_letter_attempts: int | None
    dead_letter_parked: bool | None  # False: discarded by somebody
    # the group of the hop
    workers_alive: int
    worker_seen_at: datetime | None
    failing_worker: str | None
    failing_event_id: UUID | None
    failing_since: datetime | None
    failing_error: str | None
    # with Kafka, of an event that carries there
    relayed: bool | None  # None: there is no relay, or the workers read the outbox now
    relays_alive: int
    relay_error: str | None

    @property
    def undelivered(self) -> bool:
        """Of captured money: something is still to be done for it, whatever the register says."""
        return self.stage == Stage.PAID or bool(self.owed)

    @property
    def replayable(self) -> bool:
        """A dead letter is parked that its handler can be given again; one that can't be read is no use to it."""
        return bool(self.dead_letter_parked) and self.dead_letter_code not in UNREADABLE


# Everything diagnose wants to know about some payments. The hop is what should take a payment out of its stage; its
# event is the last one said about the payment, the one processed is that one (or, without it, the last of its type).
GATHER_FACTS = """
with hop as (
  select * from unnest(%(stages)b::text[], %(event_types)b::text[], %(groups)b::text[])
    as h(stage, event_type, consumer_group)
), group_state as (
  select h.consumer_group,
         (count(w.name) filter (where w.expires_at > clock_timestamp()))::int as workers_alive,
         max(w.heartbeat_at) as worker_seen_at
  from (select distinct consumer_group from hop) h left join workers w using (consumer_group)
  group by h.consumer_group
)
select p.id as payment_id, p.student_id, coalesce(f.course_id, c.course_id) as course_id, p.provider, p.status,
       p.amount_cents, p.captured_cents, p.refunded_cents, p.currency::text as currency, p.created_at, p.captured_at,
       p.accepted_at, coalesce(pu.timezone, c.timezone) as timezone,
       hook.webhooks, hook.webhook_at, hook.webhook_type, hook.webhooks_unapplied,
       f.stage, f.purchase_id, pu.created_at as purchased_at, f.allocation_id, a.status as allocation_status,
       a.updated_at as allocated_at, f.trainer_id, t.name as trainer_name, b.live as booking_live,
       f.total, f.scheduled, f.completed, f.student_absent, f.refunded, f.owed,
       u.payment_id is not null as registered, u.since, u.reason, u.reason_since, u.detail,
       coalesce(u.held, false) as held,
       hop.stage as hop_stage, hop.event_type, hop.consumer_group, false as event_pending,
       e.event_id, e.occurred_at as event_at,
       extract(epoch from clock_timestamp() - e.occurred_at)::float8 as event_age_seconds,
       d.event_id as processed_event_id, d.processed_at,
       l.id as dead_letter_id, l.created_at as dead_letter_at, l.code as dead_letter_code, l.error as dead_letter_error,
       l.attempts as dead_letter_attempts, l.parked as dead_letter_parked,
       coalesce(g.workers_alive, 0) as workers_alive, g.worker_seen_at,
       w.name as failing_worker, w.failing_event_id, w.failing_since, w.last_error as failing_error,
       relay.relayed, coalesce(relays.alive, 0) as relays_alive, relays.last_error as relay_error
from payments p
join checkouts c on c.id = p.checkout_id
left join fulfilments f on f.payment_id = p.id
left join student_course_purchases pu on pu.id = f.purchase_id
left join trainer_allocations a on a.id = f.allocation_id
left join trainers t on t.id = f.trainer_id
left join bookings b on b.id = a.booking_id
left join undelivered u on u.payment_id = p.id
left join lateral (
  select count(*)::int as webhooks, max(received_at) as webhook_at,
         (array_agg(type order by received_at desc))[1] as webhook_type,
         (count(*) filter (where applied_at is null))::int as webhooks_unapplied
  from webhook_events where payment_id = p.id
) hook on true
left join hop on hop.stage = case
  when f.stage = 'scheduled' and f.owed = 0 then null
  when f.stage = 'scheduled' and exists (
    select from bookings o cross join lateral unnest(o.starts) slot
    where o.purchase_id = f.purchase_id and o.live
      and not exists (select from tutoring_sessions t where t.booking_id = o.id and t.starts_at = slot)
  ) then 'allocated'  -- time is booked, its sessions are missing
  else f.stage end
left join lateral (
  select event_id, occurred_at, xid, id, partition from outbox
  where correlation_id = p.id::text and type = hop.event_type order by id desc limit 1
) e on true
left join lateral (
  select event_id, processed_at from processed_events
  where correlation_id = p.id::text and consumer_group = hop.consumer_group and event_type = hop.event_type
    and (e.event_id is null or event_id = e.event_id)
  order by processed_at desc limit 1
) d on true
left join lateral (
  select id, created_at, code, error, attempts, status = 'parked' as parked from dead_letters
  where correlation_id = p.id::text and consumer_group = hop.consumer_group
    and (status = 'parked' or (status = 'discarded' and event_id = e.event_id))
  order by parked desc, (event_type = hop.event_type) desc, created_at desc limit 1
) l on true
left join group_state g on g.consumer_group = hop.consumer_group
left join lateral (
  select name, failing_event_id, failing_since, last_error from workers
  where consumer_group = hop.consumer_group and expires_at > clock_timestamp() and last_error is not null
  order by (failing_event_id = e.event_id) desc nulls last, failing_since limit 1
) w on true
left join lateral (
  select pg_visible_in_snapshot(e.xid, c.window_start)
    or (c.window_end is not null and pg_visible_in_snapshot(e.xid, c.window_end) and e.id <= c.last_id) as relayed
  from installation i join log_cursors c on c.consumer_group = 'outbox-relay' and e.partition = any(c.partitions)
  where i.carrier = 'kafka' limit 1
) relay on true
left join (
  select (count(*) filter (where expires_at > clock_timestamp()))::int as alive, max(last_error) as last_error
  from workers where consumer_group = 'outbox-relay'
) relays on true
where p.id = any(%(payment_ids)b::uuid[])
order by p.created_at desc, p.id desc
"""


async def gather_facts(tx: Tx, payment_ids: Sequence[UUID]) -> list[Facts]:
    """One row per payment that exists, the newest first."""
    found = await tx.all(
        GATHER_FACTS,
        {
            "payment_ids": list(payment_ids),
            "stages": [str(hop.stage) for hop in HOPS],
            "event_types": [hop.event_type for hop in HOPS],
            "groups": [hop.group for hop in HOPS],
        },
        into=Facts,
    )
    said = {(event.correlation_id, event.type) for event in tx.outgoing}
    return [
        replace(facts, event_pending=True) if (str(facts.payment_id), facts.event_type) in said else facts
        for facts in found
    ]


RECENT_PAYMENTS = """
select id from payments order by created_at desc, id desc limit %(limit)s
"""

# A course is where the terms name it, or (imported money) where the metadata does.
PAYMENTS_OF_STUDENT = """
select p.id from payments p join checkouts c on c.id = p.checkout_id
where p.student_id = %(student_id)s
  and (%(course_id)s::uuid is null or c.course_id = %(course_id)s or p.metadata->>'courseId' = %(course_id)s::text)
order by p.created_at desc, p.id desc limit %(limit)s
"""

PAYMENTS_OF_COURSE = """
select p.id from payments p join checkouts c on c.id = p.checkout_id
where c.course_id = %(course_id)s or p.metadata->>'courseId' = %(course_id)s::text
order by p.created_at desc, p.id desc limit %(limit)s
"""

PAYMENT_OF_PURCHASE = """
select payment_id from student_course_purchases where id = %(purchase_id)s
"""


async def choose_payments(
    tx: Tx,
    *,
    student_id: UUID | None = None,
    course_id: UUID | None = None,
    payment_id: UUID | None = None,
    purchase_id: UUID | None = None,
    limit: int = 20,
) -> list[UUID]:
    """The payments that a question is about: the most exact id given decides; without any, the most recent ones."""
    if payment_id is not None:
        return [payment_id]
    if purchase_id is not None:
        return await tx.values(PAYMENT_OF_PURCHASE, {"purchase_id": purchase_id})
    if student_id is not None:
        return await tx.values(PAYMENTS_OF_STUDENT, {"student_id": student_id, "course_id": course_id, "limit": limit})
    if course_id is not None:
        return await tx.values(PAYMENTS_OF_COURSE, {"course_id": course_id, "limit": limit})
    return await tx.values(RECENT_PAYMENTS, {"limit": limit})
