"""What must always be true, whoever wrote the tables and however often something crashed.

Each invariant is one query that returns offenders: (subject, said), where `subject` is the id of what is wrong and
`said` the fact in words. `leeway` is for what becomes true a moment later, through a worker; the others hold at every
commit. `check` reads whole tables: it is for tests, the proof harness and the doctor, not for a timer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import LiteralString

from caravan.db import Tx

AT_ONCE = timedelta(0)
SOON = timedelta(seconds=30)
OFFENDERS_MAX = 20


@dataclass(frozen=True, slots=True)
class Invariant:
    name: str
    sql: LiteralString
    leeway: timedelta = AT_ONCE


@dataclass(frozen=True, slots=True)
class Violation:
    """`offenders` are the first OFFENDERS_MAX as (id, what is wrong with it)."""

    name: str
    offenders: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        return f"{self.name}: " + "; ".join(f"{subject} {said}" for subject, said in self.offenders)


# The promise: captured money is delivered, refunded, or waits with a reason. No third case.
PAID_IS_DELIVERED = """
select f.payment_id::text as subject, 'is ' || f.stage || ', owes ' || f.owed || ' and waits without a reason' as said
from fulfilments f left join undelivered u on u.payment_id = f.payment_id
where f.captured_at <= %(before)s and u.reason is null and (u.since is null or u.since <= %(before)s)
  and (f.stage = 'paid' or f.owed > 0)
limit %(limit)s
"""

# The register of undelivered money is what the tables say.
REGISTER_IS_TRUE = """
select f.payment_id::text as subject,
       'is ' || f.stage || ', owes ' || f.owed || ' and is ' || case when u.payment_id is null then 'not ' else '' end
       || 'registered' as said
from fulfilments f left join undelivered u on u.payment_id = f.payment_id
where (u.payment_id is not null) <> (f.stage = 'paid' or f.owed > 0)
limit %(limit)s
"""

# Only captured money is undelivered.
REGISTER_IS_MONEY = """
select u.payment_id::text as subject, 'is registered as undelivered, but was not captured' as said
from undelivered u left join fulfilments f on f.payment_id = u.payment_id where f.payment_id is null
limit %(limit)s
"""

# A checkout is bought once, by the attempt that it names; another captured attempt is PAID_TWICE or refunded.
CHECKOUT_BOUGHT_ONCE = """
select c.id::text as subject, 'has ' || count(pu.id) || ' purchases' as said
from checkouts c join student_course_purchases pu on pu.checkout_id = c.id group by c.id having count(pu.id) > 1
union all
select pu.id::text,
       'was bought by payment ' || pu.payment_id || ', but its checkout says ' || coalesce(c.paid_by::text, 'nobody')
from student_course_purchases pu join checkouts c on c.id = pu.checkout_id
where c.paid_by is distinct from pu.payment_id
union all
select p.id::text, 'is a second capture without PAID_TWICE'
from payments p join checkouts c on c.id = p.checkout_id left join undelivered u on u.payment_id = p.id
where p.captured_at is not null and p.status <> 'refunded' and c.paid_by <> p.id
  and not coalesce(u.held or u.reason = 'PAID_TWICE', false)
limit %(limit)s
"""

# One live allocation per purchase; an approved one stands on a live booking with the same trainer and student.
ALLOCATION_IS_BOOKED = """
select a.purchase_id::text as subject, 'has ' || count(*) || ' live allocations' as said
from trainer_allocations a where a.status <> 'cancelled' group by a.purchase_id having count(*) > 1
union all
select a.id::text, 'is approved without a live booking of its trainer, student and purchase'
from trainer_allocations a left join bookings b on b.id = a.booking_id
where a.status = 'approved'
  and (b.live is not true
       or (b.trainer_id, b.student_id, b.purchase_id) is distinct from (a.trainer_id, a.student_id, a.purchase_id))
limit %(limit)s
"""

# tier = completed + student_absent + live future + refunded + owed, with nothing below zero.
TIER_ADDS_UP = """
select pu.id::text as subject, 'has tier ' || pu.purchase_tier || ', but ' || s.taken || ' sessions taken and '
       || pu.refunded_sessions || ' refunded' as said
from student_course_purchases pu
join lateral (select count(*) as taken from tutoring_sessions t
              where t.purchase_id = pu.id and t.status in ('scheduled', 'completed', 'student_absent')) s on true
where pu.is_active and s.taken + pu.refunded_sessions > pu.purchase_tier
limit %(limit)s
"""

# A refunded purchase takes nobody's time any more.
REFUNDED_IS_UNDONE = """
select f.payment_id::text as subject, 'is refunded, but its purchase is active' as said
from fulfilments f join payments p on p.id = f.payment_id join student_course_purchases pu on pu.id = f.purchase_id
where p.status = 'refunded' and pu.is_active and p.updated_at <= %(before)s
union all
select pu.id::text, 'is refunded, but a session is still to come'
from student_course_purchases pu join tutoring_sessions t on t.purchase_id = pu.id
where not pu.is_active and t.status = 'scheduled' and pu.updated_at <= %(before)s
union all
select pu.id::text, 'is refunded, but a trainer''s time is taken'
from student_course_purchases pu join bookings b on b.purchase_id = pu.id
where not pu.is_active and b.live and upper(b.during) > %(now)s and pu.updated_at <= %(before)s
limit %(limit)s
"""

# A booking's list of slots and its range are the same time (a multirange merges neighbours; the list does not).
SLOTS_ARE_THE_RANGE = """
select b.id::text as subject, 'lists other slots than its range covers' as said
from bookings b
cross join lateral (
  select range_agg(tstzrange(s, s + make_interval(mins => b.minutes))) as covered,
         count(*) <> count(distinct s) as twice
  from unnest(b.starts) s
) slots
where b.live and (b.during <> slots.covered or slots.twice)
limit %(limit)s
"""

# The sessions of a booking are its slots: none without, and (after a moment) none missing. What began before it had a
# session was missed by everybody: that is owed, not a broken booking.
SESSIONS_ARE_THE_SLOTS = """
select t.id::text as subject, 'is scheduled outside of its booking ' || t.booking_id as said
from tutoring_sessions t left join bookings b on b.id = t.booking_id
where t.status = 'scheduled'
  and (b.live is not true or t.starts_at <> all(b.starts)
       or t.ends_at <> t.starts_at + make_interval(mins => b.minutes)
       or (t.trainer_id, t.student_id, t.purchase_id) is distinct from (b.trainer_id, b.student_id, b.purchase_id))
union all
select b.id::text, 'has a slot at ' || slot || ' without a session'
from bookings b cross join lateral unnest(b.starts) slot
where b.live and b.kind <> 'hold' and b.created_at <= %(before)s and slot > %(now)s
  and not exists (select from tutoring_sessions t where t.booking_id = b.id and t.starts_at = slot)
limit %(limit)s
"""

# Nobody is in two sessions at once, whatever wrote them.
NOBODY_TWICE = """
select t.id::text as subject, 'begins before the one before it ends, for ' || t.who as said
from (
  select id, starts_at, 'trainer ' || trainer_id as who,
         max(ends_at) over (partition by trainer_id order by starts_at, id
                            rows between unbounded preceding and 1 preceding) as busy_until
  from tutoring_sessions where status in ('scheduled', 'completed')
  union all
  select id, starts_at, 'student ' || student_id,
         max(ends_at) over (partition by student_id order by starts_at, id
                            rows between unbounded preceding and 1 preceding)
  from tutoring_sessions where status in ('scheduled', 'completed')
) t where t.starts_at < t.busy_until
limit %(limit)s
"""

# What refunds gave back is what the payment says; nothing is given back twice.
MONEY_ADDS_UP = """
select p.id::text as subject, 'says ' || p.refunded_cents || ' given back, its refunds ' || coalesce(r.cents, 0) as said
from payments p
left join (select payment_id, sum(amount_cents) as cents from refunds group by payment_id) r on r.payment_id = p.id
where p.refunded_cents <> coalesce(r.cents, 0)
union all
select p.id::text, 'is refunded, but kept ' || p.captured_cents - p.refunded_cents
from payments p where p.status = 'refunded' and p.captured_cents <> p.refunded_cents
limit %(limit)s
"""

# Nobody has spent more coins than there were; a captured payment's coins are taken (or written down as a shortfall).
COINS_ADD_UP = """
select e.student_id::text as subject, 'has spent more coins than there were' as said
from coin_entries e group by e.student_id
having sum(case e.kind when 'granted' then e.coins when 'returned' then e.coins
                       when 'captured' then -e.coins else 0 end) < 0
union all
select p.id::text, 'took ' || coalesce(c.coins, 0) || ' of ' || p.coins || ' coins'
from payments p
left join (select payment_id, sum(coins) as coins from coin_entries
           where kind in ('captured', 'shortfall') group by payment_id) c on c.payment_id = p.id
where p.captured_at is not null and p.coins <> coalesce(c.coins, 0)
limit %(limit)s
"""

# A feed is 1..n without a gap, up to its head; only its beginning may be trimmed.
FEED_IS_GAP_FREE = """
select h.student_id::text as subject, 'feed ends at ' || coalesce(f.last, 0) || ' of ' || h.seq || ' with '
       || coalesce(f.entries, 0) || ' entries from ' || coalesce(f.first, 0) as said
from student_feed_heads h
left join (select student_id, min(seq) as first, max(seq) as last, count(*) as entries
           from student_feed group by student_id) f on f.student_id = h.student_id
where f.last is not null and (f.last <> h.seq or f.entries <> f.last - f.first + 1)
limit %(limit)s
"""

INVARIANTS: tuple[Invariant, ...] = (
    Invariant("PaidIsDelivered", PAID_IS_DELIVERED, SOON),
    Invariant("RegisterIsTrue", REGISTER_IS_TRUE),
    Invariant("RegisterIsMoney", REGISTER_IS_MONEY),
    Invariant("CheckoutBoughtOnce", CHECKOUT_BOUGHT_ONCE),
    Invariant("AllocationIsBooked", ALLOCATION_IS_BOOKED),
    Invariant("TierAddsUp", TIER_ADDS_UP),
    Invariant("RefundedIsUndone", REFUNDED_IS_UNDONE, SOON),
    Invariant("SlotsAreTheRange", SLOTS_ARE_THE_RANGE),
    Invariant("SessionsAreTheSlots", SESSIONS_ARE_THE_SLOTS, SOON),
    Invariant("NobodyTwice", NOBODY_TWICE),
    Invariant("MoneyAddsUp", MONEY_ADDS_UP),
    Invariant("CoinsAddUp", COINS_ADD_UP),
    Invariant("FeedIsGapFree", FEED_IS_GAP_FREE),
)


async def check(
    tx: Tx, invariants: Sequence[Invariant] = INVARIANTS, *, leeway: timedelta | None = None
) -> list[Violation]:
    """The invariants that do not hold now. `leeway` replaces each one's own: zero after a drain."""
    violations: list[Violation] = []
    for invariant in invariants:
        before = tx.now - (invariant.leeway if leeway is None else leeway)
        rows = await tx.tuples(invariant.sql, {"before": before, "now": tx.now, "limit": OFFENDERS_MAX})
        if rows:
            violations.append(Violation(invariant.name, tuple((subject, said) for subject, said in rows)))
    return violations
