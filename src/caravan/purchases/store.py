"""The SQL of purchases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, time
from uuid import UUID

import msgspec

from caravan.db import Tx
from caravan.ids import new_ids
from caravan.purchases.terms import Paid, Terms

# Hold payments still: a refund of one waits for us, or we see it. In the order of ids, as everywhere.
LOCK_PAYMENTS = """
select id from payments where id = any(%(payment_ids)b::uuid[]) order by id for share
"""


async def lock_payments(tx: Tx, payment_ids: Sequence[UUID]) -> None:
    await tx.execute(LOCK_PAYMENTS, {"payment_ids": list(payment_ids)})


# Everything that decides whether a payment becomes a purchase. What a checkout does not know is filled from the course
# and the student (minutes, weekdays, zone), and the course from the metadata where it names one.
# Each table is asked once for the whole page, not once per payment: however deep its index has grown, that is a walk
# along a few leaves (docs/decisions/0019).
LIST_PAID = """
with p as materialized (
  select * from payments where id = any(%(payment_ids)b::uuid[])
), c as materialized (
  select * from checkouts where id = any(array(select checkout_id from p))
), s as materialized (
  select id, timezone from students where id = any(array(select student_id from p))
), pu as materialized (
  select id, payment_id from student_course_purchases where payment_id = any(%(payment_ids)b::uuid[])
), u as materialized (
  select payment_id, reason, held from undelivered where payment_id = any(%(payment_ids)b::uuid[])
)
select p.id as payment_id, p.status, p.captured_at is not null as captured, p.student_id, p.checkout_id,
  case when jsonb_typeof(p.metadata) = 'object' then p.metadata else '{}' end as metadata,
  p.accepted_at is null and (p.captured_cents, coalesce(p.captured_currency, p.currency))
    is distinct from (p.amount_cents, p.currency) as mismatch,
  c.paid_by, named.course_id, c.course_id is not null as course_sold, c.sessions,
  coalesce(c.session_minutes, k.session_minutes) as session_minutes,
  coalesce(c.weekdays, k.weekdays) as weekdays, c.learning_mode, c.group_size,
  coalesce(c.timezone, s.timezone) as timezone, c.slot_start, c.start_date,
  pu.id as purchase_id, u.payment_id is not null as registered, u.reason, coalesce(u.held, false) as held,
  case when (select exists (select from pauses)) then paused_by('paid', named.course_id, p.student_id) end as pause_id,
  s.id is not null as student_known, k.id is not null as course_known, k.learning_modes as course_modes
from p
join c on c.id = p.checkout_id
cross join lateral (select coalesce(c.course_id, case when p.metadata ->> 'courseId'
    ~* '^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$' then (p.metadata ->> 'courseId')::uuid end)
  as course_id) named
left join courses k on k.id = named.course_id
left join s on s.id = p.student_id
left join pu on pu.payment_id = p.id
left join u on u.payment_id = p.id
order by p.id
"""


async def list_paid(tx: Tx, payment_ids: Sequence[UUID]) -> list[Paid]:
    """The payments that exist, by id."""
    return await tx.all(LIST_PAID, {"payment_ids": list(payment_ids)}, into=Paid)


# A checkout is bought once and a payment buys once: the constraints decide, the other one's row stays. What was
# refunded before there was a purchase is taken off it from the start.
INSERT_PURCHASES = """
insert into student_course_purchases (id, checkout_id, payment_id, student_id, course_id, purchase_tier,
  refunded_sessions, session_minutes, weekdays, learning_mode, group_size, timezone, slot_start, start_date, metadata,
  created_at, updated_at)
select n.id, n.checkout_id, n.payment_id, n.student_id, n.course_id, n.tier,
  least(n.tier, (select coalesce(sum(r.sessions), 0) from refunds r where r.payment_id = n.payment_id)),
  n.minutes, n.weekdays::smallint[], n.mode, n.group_size, n.zone, n.slot_start, n.start_date, n.metadata::jsonb,
  %(now)s, %(now)s
from unnest(%(ids)b::uuid[], %(checkout_ids)b::uuid[], %(payment_ids)b::uuid[], %(student_ids)b::uuid[],
    %(course_ids)b::uuid[], %(tiers)b::smallint[], %(minutes)b::smallint[], %(weekdays)b::text[], %(modes)b::text[],
    %(group_sizes)b::smallint[], %(zones)b::text[], %(slots)b::time[], %(starts)b::date[], %(metadata)b::text[])
  as n(id, checkout_id, payment_id, student_id, course_id, tier, minutes, weekdays, mode, group_size, zone, slot_start,
       start_date, metadata)
order by n.payment_id
on conflict do nothing
returning payment_id, id
"""


async def insert_purchases(tx: Tx, sold: Sequence[tuple[Paid, Terms]]) -> dict[UUID, UUID]:
    """The new purchases, by payment."""
    if not sold:
        return {}
    rows = await tx.tuples(
        INSERT_PURCHASES,
        {
            "ids": new_ids(len(sold)),
            "checkout_ids": [paid.checkout_id for paid, _ in sold],
            "payment_ids": [paid.payment_id for paid, _ in sold],
            "student_ids": [paid.student_id for paid, _ in sold],
            "course_ids": [terms.course_id for _, terms in sold],
            "tiers": [terms.tier for _, terms in sold],
            "minutes": [terms.pattern.session_minutes for _, terms in sold],
            # unnest would flatten an array of arrays
            "weekdays": ["{" + ",".join(map(str, terms.pattern.weekdays)) + "}" for _, terms in sold],
            "modes": [terms.learning_mode for _, terms in sold],
            "group_sizes": [paid.group_size for paid, _ in sold],
            "zones": [terms.pattern.zone_name for _, terms in sold],
            "slots": [terms.pattern.start for _, terms in sold],
            "starts": [terms.start_date for _, terms in sold],
            "metadata": [msgspec.json.encode(terms.metadata).decode() for _, terms in sold],
            "now": tx.now,
        },
    )
    return dict(rows)


# The purchase's part of a refund, as the payment and its refunds have it now: running it again changes nothing.
MARK_REFUNDED = """
with locked as (
  select pu.id, pu.is_active and p.status <> 'refunded' as is_active,
    least(pu.purchase_tier, (select coalesce(sum(r.sessions), 0) from refunds r where r.payment_id = p.id)) as refunded
  from student_course_purchases pu join payments p on p.id = pu.payment_id
  where pu.payment_id = any(%(payment_ids)b::uuid[]) order by pu.id for no key update of pu
)
update student_course_purchases pu set is_active = l.is_active, refunded_sessions = l.refunded, updated_at = %(now)s
from locked l
where pu.id = l.id and (pu.is_active, pu.refunded_sessions) is distinct from (l.is_active, l.refunded::smallint)
returning pu.id
"""


async def mark_refunded(tx: Tx, payment_ids: Sequence[UUID]) -> set[UUID]:
    """The purchases that changed."""
    return set(await tx.values(MARK_REFUNDED, {"payment_ids": list(payment_ids), "now": tx.now}))


FIND_PAYMENT = """
select payment_id from student_course_purchases where id = %(purchase_id)s
"""


async def find_payment(tx: Tx, purchase_id: UUID) -> UUID | None:
    return await tx.value(FIND_PAYMENT, {"purchase_id": purchase_id})


# Fill terms that are not known; a known one stays whatever is asked.
FILL_CHECKOUT = """
update checkouts c set sessions = coalesce(c.sessions, %(sessions)s),
  slot_start = coalesce(c.slot_start, %(slot_start)s), start_date = coalesce(c.start_date, %(start_date)s),
  learning_mode = coalesce(c.learning_mode, %(learning_mode)s)
from payments p where p.id = %(payment_id)s and c.id = p.checkout_id
"""


async def fill_checkout(
    tx: Tx,
    payment_id: UUID,
    *,
    sessions: int | None,
    slot_start: time | None,
    start_date: date | None,
    learning_mode: str | None,
) -> None:
    await tx.execute(
        FILL_CHECKOUT,
        {
            "payment_id": payment_id,
            "sessions": sessions,
            "slot_start": slot_start,
            "start_date": start_date,
            "learning_mode": learning_mode,
        },
    )


@dataclass(frozen=True, slots=True)
class Waiting:
    """A purchase as somebody who wants another time for it has to see it."""

    is_active: bool
    has_trainer: bool
    session_minutes: int
    weekdays: list[int]
    timezone: str
    slot_start: time
    start_date: date


LOCK_PURCHASE = """
select pu.is_active and p.status <> 'refunded' as is_active, pu.session_minutes, pu.weekdays, pu.timezone,
  pu.slot_start, pu.start_date,
  exists (select from trainer_allocations a where a.purchase_id = pu.id and a.status in ('approved', 'completed'))
    as has_trainer
from student_course_purchases pu join payments p on p.id = pu.payment_id
where pu.id = %(purchase_id)s for no key update of pu
"""


async def lock_purchase(tx: Tx, purchase_id: UUID) -> Waiting | None:
    return await tx.find(LOCK_PURCHASE, {"purchase_id": purchase_id}, into=Waiting)


MOVE_PURCHASE = """
update student_course_purchases set slot_start = %(slot_start)s, start_date = %(start_date)s, updated_at = %(now)s,
  metadata = metadata || jsonb_build_object('timeSlot', %(time_slot)s::text, 'startDate', %(start_date)s::date)
where id = %(purchase_id)s
"""


async def move_purchase(tx: Tx, purchase_id: UUID, slot_start: time, start_date: date, time_slot: str) -> None:
    await tx.execute(
        MOVE_PURCHASE,
        {
            "purchase_id": purchase_id,
            "slot_start": slot_start,
            "start_date": start_date,
            "time_slot": time_slot,
            "now": tx.now,
        },
    )
