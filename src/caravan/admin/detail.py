"""What operators look up: one purchase with all that happened to it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date, datetime, time
from typing import Any
from uuid import UUID

from caravan.admin.purchases import Listed, list_lines
from caravan.db import Tx
from caravan.errors import NotFound
from caravan.fulfilment.facts import gather_facts
from caravan.web.formats import counted, money

EVENTS_MAX = 300


class PurchaseNotFound(NotFound):
    """There is no such purchase or payment."""

    code = "PURCHASE_NOT_FOUND"


@dataclass(frozen=True, slots=True)
class Terms:
    """What was bought: as sold, and as it is now where another slot was chosen later."""

    sessions: int | None
    session_minutes: int | None
    learning_mode: str | None
    group_size: int
    timezone: str | None
    slot_start: time | None
    start_date: date | None
    sold_slot_start: time | None
    sold_start_date: date | None
    price_cents: int
    currency: str


@dataclass(frozen=True, slots=True)
class Counts:
    """`refunded` of a purchase that ended with a refund: all that was not held, so that they add up to the total."""

    total: int
    scheduled: int
    completed: int
    student_absent: int
    cancelled: int
    refunded: int
    owed: int


@dataclass(frozen=True, slots=True)
class Allocation:
    """`decided_at`: when it came to be what its status says; of an approved one, when the trainer's time was booked."""

    id: UUID
    status: str
    trainer_id: UUID | None
    trainer_name: str | None
    decision: dict[str, Any] | None
    created_at: datetime
    decided_at: datetime


@dataclass(frozen=True, slots=True)
class Session:
    seq: int
    starts_at: datetime
    ends_at: datetime
    status: str
    trainer_id: UUID


@dataclass(frozen=True, slots=True)
class Moment:
    """Something that happened, who did it, in words. `subject` is the id it is about, for looking further."""

    at: datetime
    kind: str
    actor: str
    said: str
    subject: str


@dataclass(frozen=True, slots=True)
class Detail:
    line: Listed
    terms: Terms
    counts: Counts | None
    allocations: list[Allocation]
    sessions: list[Session]
    refunded_cents: int
    timeline: list[Moment]


FIND_PAYMENT = """
select p.id from payments p left join student_course_purchases pu on pu.payment_id = p.id
where p.id = %(id)s or pu.id = %(id)s
"""

GET_TERMS = """
select coalesce(pu.purchase_tier, c.sessions)::int as sessions,
       coalesce(pu.session_minutes, c.session_minutes)::int as session_minutes,
       coalesce(pu.learning_mode, c.learning_mode) as learning_mode,
       coalesce(pu.group_size, c.group_size)::int as group_size, coalesce(pu.timezone, c.timezone) as timezone,
       coalesce(pu.slot_start, c.slot_start) as slot_start, coalesce(pu.start_date, c.start_date) as start_date,
       c.slot_start as sold_slot_start, c.start_date as sold_start_date, c.price_cents, c.currency::text as currency
from payments p join checkouts c on c.id = p.checkout_id left join student_course_purchases pu on pu.payment_id = p.id
where p.id = %(payment_id)s
"""

FIND_COUNTS = """
select total, scheduled, completed, student_absent, cancelled, owed,
       case when stage = 'refunded' then total - scheduled - completed - student_absent - owed else refunded end
         as refunded
from fulfilments
where payment_id = %(payment_id)s and purchase_id is not null
"""

LIST_ALLOCATIONS_OF = """
select a.id, a.status, a.trainer_id, t.name as trainer_name, a.decision, a.created_at,
       case a.status when 'waiting' then a.created_at when 'approved' then coalesce(b.created_at, a.updated_at)
         else a.updated_at end as decided_at
from student_course_purchases pu join trainer_allocations a on a.purchase_id = pu.id
left join trainers t on t.id = a.trainer_id left join bookings b on b.id = a.booking_id
where pu.payment_id = %(payment_id)s order by a.created_at desc, a.id desc
"""

LIST_SESSIONS_OF = """
select t.seq, t.starts_at, t.ends_at, t.status, t.trainer_id
from student_course_purchases pu join tutoring_sessions t on t.purchase_id = pu.id
where pu.payment_id = %(payment_id)s order by t.seq
"""

# All that is known to have happened to a payment, its checkout and its purchase; each fact with who brought it about.
# Where there is an `amount`, `{}` in what is said stands for it.
LIST_TIMELINE = """
with subject as (
  select p.id as payment_id, p.checkout_id, pu.id as purchase_id
  from payments p left join student_course_purchases pu on pu.payment_id = p.id where p.id = %(payment_id)s
), attempts as (
  select p.* from payments p join subject s on s.checkout_id = p.checkout_id
)
select at, kind, actor, said, subject, amount from (
  select a.created_at as at, 'payment' as kind, coalesce(acc.email, 'unknown account') as actor,
         'Asked to pay {} through ' || a.provider as said, a.id::text as subject, 0 as rank, 0::bigint as position,
         jsonb_build_object('cents', a.amount_cents, 'currency', a.currency, 'coins', a.coins) as amount
  from attempts a left join accounts acc on acc.id = a.account_id
  union all
  select a.captured_at, 'payment', a.provider,
         'Captured {}', a.id::text, 2, 0,
         jsonb_build_object('cents', a.captured_cents, 'currency', coalesce(a.captured_currency, a.currency))
  from attempts a where a.captured_at is not null
  union all
  select w.received_at, 'webhook', w.provider,
         w.type || ' ' || w.event_id || ': ' || coalesce(w.outcome, 'not applied yet'), w.payment_id::text, 1, 0, null
  from webhook_events w where w.payment_id in (select id from attempts)
  union all
  select r.created_at, 'refund', r.source, 'Gave back {}', r.payment_id::text, 2, 0,
         jsonb_build_object('cents', r.amount_cents, 'currency', a.currency, 'sessions', r.sessions)
  from refunds r join attempts a on a.id = r.payment_id
  union all
  (select o.occurred_at, 'event', o.source, o.type || coalesce(' (' || (o.data->>'reason') || ')', ''),
          o.event_id::text, 5, o.id, null
   from outbox o where o.correlation_id in (select id::text from attempts) order by o.id desc limit %(limit)s)
  union all
  (select d.processed_at, 'processed', d.consumer_group, 'Processed ' || d.event_type, d.event_id::text, 4, 0,
          null
   from processed_events d where d.correlation_id in (select id::text from attempts)
   order by d.processed_at desc limit %(limit)s)
  union all
  select l.created_at, 'dead letter', l.consumer_group, 'Gave up on ' || l.event_type || ': ' || l.error,
         l.id::text, 6, 0, null
  from dead_letters l where l.correlation_id in (select id::text from attempts)
  union all
  select l.resolved_at, 'dead letter', coalesce(l.resolved_by, 'unknown'), l.event_type || ' was ' || l.status,
         l.id::text, 6, 0, null
  from dead_letters l where l.correlation_id in (select id::text from attempts) and l.resolved_at is not null
  union all
  select g.at, 'by hand', g.actor, g.action || coalesce(': ' || g.note, '') || coalesce('. ' || (g.after->>'did'), ''),
         g.subject_id, 3, 0, null
  from audit_log g
  where g.subject_id in (
    select id::text from attempts union all select purchase_id::text from subject
    union all select al.id::text from trainer_allocations al join subject s on s.purchase_id = al.purchase_id
    union all select l.id::text from dead_letters l where l.correlation_id in (select id::text from attempts))
) happened
order by at, rank, position, subject
"""


async def get_detail(tx: Tx, some_id: UUID, *, local: bool = False) -> Detail:
    """All about one purchase, by its own id or its payment's; `local` as `list_lines`. Raises PurchaseNotFound."""
    payment_id = await tx.value(FIND_PAYMENT, {"id": some_id})
    if payment_id is None:
        raise PurchaseNotFound
    named = {"payment_id": payment_id}
    (line,) = await list_lines(tx, [payment_id], local=local)
    (facts,) = await gather_facts(tx, [payment_id])
    return Detail(
        line=line,
        terms=await tx.one(GET_TERMS, named, into=Terms),
        counts=await tx.find(FIND_COUNTS, named, into=Counts),
        allocations=await tx.all(LIST_ALLOCATIONS_OF, named, into=Allocation),
        sessions=await tx.all(LIST_SESSIONS_OF, named, into=Session),
        refunded_cents=facts.refunded_cents,
        timeline=[_moment(**row) for row in await tx.all(LIST_TIMELINE, named | {"limit": EVENTS_MAX})],
    )


def _moment(*, said: str, amount: dict[str, Any] | None, **rest: Any) -> Moment:
    if amount:
        said = said.replace("{}", money(amount["cents"], amount["currency"]))
        if amount.get("coins"):
            said += f", with {counted(amount['coins'], 'coin')}"
        if amount.get("sessions"):
            said += f", {counted(amount['sessions'], 'session')}"
    return Moment(said=said, **rest)
