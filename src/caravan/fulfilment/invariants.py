"""What must always be true, whoever wrote the tables and however often something crashed.

Each invariant is one query that returns offenders: (subject, said), where `subject` is the id of what is wrong and
`said` the fact in words. `leeway` is for what becomes true a moment later, through a worker; the others hold at every
commit. `check` reads whole tables: it is for tests, the proof harness and the doctor, not for a timer. Those that are
`deep` read the log or every text: they are for `caravan doctor --deep`, and look back a day where the past is trimmed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import LiteralString

from psycopg import sql

from caravan.db import Tx
from caravan.db.tx import Query
from caravan.events import ALL

AT_ONCE = timedelta(0)
SOON = timedelta(seconds=30)
OFFENDERS_MAX = 20
LOOK_BACK = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Invariant:
    """`sql` None: what it asks depends on the schema, see `check`."""

    name: str
    sql: LiteralString | None
    leeway: timedelta = AT_ONCE
    deep: bool = False


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

# A refunded purchase takes nobody's time any more, except for a slot that had begun when its refund was heard of.
REFUNDED_IS_UNDONE = """
select f.payment_id::text as subject, 'is refunded, but its purchase is active' as said
from fulfilments f join payments p on p.id = f.payment_id join student_course_purchases pu on pu.id = f.purchase_id
where p.status = 'refunded' and pu.is_active and p.updated_at <= %(before)s
union all
select pu.id::text, 'is refunded, but a session is still to come'
from student_course_purchases pu join tutoring_sessions t on t.purchase_id = pu.id
where not pu.is_active and t.status = 'scheduled' and t.starts_at > %(now)s and pu.updated_at <= %(before)s
union all
select pu.id::text, 'is refunded, but a trainer''s time is taken'
from student_course_purchases pu join bookings b on b.purchase_id = pu.id
where not pu.is_active and b.live and pu.updated_at <= %(before)s
  and upper(b.during) > %(now)s and exists (select 1 from unnest(b.starts) slot where slot > %(now)s)
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
# session was missed by everybody: that is owed, not a broken booking. Whom operators keep, or whose start somebody has
# to agree to, waits with booked time.
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
  and not exists (select from undelivered u join student_course_purchases pu on pu.payment_id = u.payment_id
                  where pu.id = b.purchase_id and u.reason in ('STAGE_PAUSED', 'START_PASSED', 'OPERATOR_HOLD'))
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

# What was bought is what was sold: the quantity that the checkout froze or, for imported money, that its metadata says.
TIER_IS_SOLD = """
select pu.id::text as subject,
       'has tier ' || pu.purchase_tier || ', but ' || coalesce(sold.sessions::text, 'nobody knows how many')
       || ' were sold' as said
from student_course_purchases pu
join payments p on p.id = pu.payment_id
join checkouts c on c.id = pu.checkout_id
cross join lateral (
  select coalesce(c.sessions::numeric, case when jsonb_typeof(p.metadata -> 'sessionCount') = 'number'
    then (p.metadata ->> 'sessionCount')::numeric end) as sessions) sold
where pu.purchase_tier is distinct from sold.sessions
limit %(limit)s
"""

# Only the money that was asked for, or that an operator accepted, buys something.
PAID_AS_ASKED = """
select pu.id::text as subject, 'was bought for ' || coalesce(p.captured_cents::text, 'nothing') || ' '
       || coalesce(p.captured_currency, p.currency) || ' instead of ' || p.amount_cents || ' ' || p.currency as said
from student_course_purchases pu join payments p on p.id = pu.payment_id
where p.accepted_at is null and (p.captured_cents, coalesce(p.captured_currency, p.currency))
  is distinct from (p.amount_cents, p.currency)
limit %(limit)s
"""

# States that no sequence of legal transitions leads to, as far as rows can tell.
STATES_ARE_LEGAL = """
select pu.id::text as subject, 'was bought with money that did not come' as said
from student_course_purchases pu join payments p on p.id = pu.payment_id where p.captured_at is null
union all
select pu.id::text, 'ended, but its payment is ' || p.status
from student_course_purchases pu join payments p on p.id = pu.payment_id
where not pu.is_active and p.status <> 'refunded'
union all
select c.id::text, 'is paid by ' || c.paid_by || ', which is ' || p.status || ' and belongs to ' || p.checkout_id
from checkouts c join payments p on p.id = c.paid_by where p.checkout_id <> c.id or p.captured_at is null
union all
select w.event_id, 'was applied, but its payment is ' || coalesce(p.status, 'not there')
from webhook_events w left join payments p on p.id = w.payment_id
where w.outcome = 'applied' and w.type = 'payment.succeeded' and p.captured_at is null
union all
select e.payment_id::text, 'has ' || e.kind || ' coins, but is ' || p.status
from coin_entries e join payments p on p.id = e.payment_id
where e.kind in ('captured', 'shortfall', 'returned') and p.captured_at is null
union all
select t.id::text, 'is ' || t.status || ', but has not begun'
from tutoring_sessions t where t.status in ('completed', 'student_absent') and t.starts_at > %(now)s
union all
select d.id::text, 'is parked, but ' || d.consumer_group || ' has processed its event'
from dead_letters d join processed_events e on e.consumer_group = d.consumer_group and e.event_id = d.event_id
where d.status = 'parked'
limit %(limit)s
"""

# Every change of the last day has its event, in the log with it.
CHANGES_ARE_SAID = """
select p.id::text as subject, 'paid its checkout, and PURCHASE_CONFIRMED was said ' || said.times || ' times' as said
from payments p join checkouts c on c.paid_by = p.id
cross join lateral (select count(*) as times from outbox o
                    where o.correlation_id = p.id::text and o.type = 'PURCHASE_CONFIRMED') said
where p.captured_at > %(day_ago)s and said.times <> 1
  and exists (select from webhook_events w
              where w.payment_id = p.id and w.type = 'payment.succeeded' and w.outcome = 'applied')
union all
select pu.id::text, 'was created without PURCHASE_CREATED'
from student_course_purchases pu
where pu.created_at > %(day_ago)s and not exists (
  select from outbox o where o.correlation_id = pu.payment_id::text and o.type = 'PURCHASE_CREATED')
union all
select b.id::text, 'was booked without TRAINER_ALLOCATED'
from bookings b join student_course_purchases pu on pu.id = b.purchase_id
where b.created_at > %(day_ago)s and not exists (
  select from outbox o where o.correlation_id = pu.payment_id::text and o.type = 'TRAINER_ALLOCATED'
    and o.data ->> 'bookingId' = b.id::text)
union all
select pu.id::text, 'has ' || numbered.times || ' sessions, but SESSIONS_SCHEDULED spoke of ' || said.times
from student_course_purchases pu
cross join lateral (select count(*) as times from tutoring_sessions t where t.purchase_id = pu.id) numbered
cross join lateral (select coalesce(sum((o.data ->> 'sessionCount')::int), 0) as times from outbox o
                    where o.correlation_id = pu.payment_id::text and o.type = 'SESSIONS_SCHEDULED') said
where pu.created_at > %(day_ago)s and said.times < numbered.times
union all
select r.id::text, 'was refunded, and PURCHASE_REFUNDED was said ' || said.times || ' times'
from refunds r
cross join lateral (select count(*) as times from outbox o
                    where o.correlation_id = r.payment_id::text and o.type = 'PURCHASE_REFUNDED'
                      and o.data ->> 'refundId' = r.id::text) said
where r.created_at > %(day_ago)s and said.times <> 1
union all
select u.payment_id::text, 'waits for ' || u.reason || ' without PURCHASE_BLOCKED'
from undelivered u
where u.reason_since > %(day_ago)s and not exists (
  select from outbox o where o.correlation_id = u.payment_id::text and o.type = 'PURCHASE_BLOCKED'
    and o.data ->> 'reason' = u.reason)
limit %(limit)s
"""

# What a group has got past it has processed, or given up openly. (What it has not got past is lag, no violation.)
EVENTS_REACH_GROUPS = """
select o.event_id::text as subject, o.type || ' was passed over by ' || g.name as said
from outbox o
join consumer_groups g on o.type = any(g.types)
join log_cursors c on c.consumer_group = g.name and o.partition = any(c.partitions)
where o.occurred_at > %(day_ago)s
  and (pg_visible_in_snapshot(o.xid, c.window_start)
       or (c.window_end is not null and pg_visible_in_snapshot(o.xid, c.window_end) and o.id <= c.last_id))
  and not exists (select from processed_events e where e.consumer_group = g.name and e.event_id = o.event_id)
  and not exists (select from dead_letters d where d.consumer_group = g.name and d.event_id = o.event_id)
limit %(limit)s
"""

# A mark without its effect: the group believes that it has done what is not there, and nothing says why.
PROCESSED_HAS_EFFECT = """
select f.payment_id::text as subject, e.event_type || ' is marked as processed, but it is ' || f.stage as said
from processed_events e
join fulfilments f on e.correlation_id = f.payment_id::text
left join undelivered u on u.payment_id = f.payment_id
where e.processed_at between %(day_ago)s and %(before)s and u.reason is null
  and (e.event_type = 'PURCHASE_CONFIRMED' and e.consumer_group = 'purchase-creation-workers' and f.stage = 'paid'
       or e.event_type = 'PURCHASE_CREATED' and e.consumer_group = 'trainer-allocation-workers'
          and f.stage = 'purchased' and f.owed > 0
       or e.event_type = 'TRAINER_ALLOCATED' and e.consumer_group = 'session-scheduling-workers'
          and f.stage = 'allocated' and f.owed > 0)
limit %(limit)s
"""

# What a student may see is on the student's feed.
VISIBLE_IS_FED = """
select o.event_id::text as subject, o.type || ' is not on the feed of student ' || (o.data ->> 'studentId') as said
from outbox o
where o.occurred_at > %(day_ago)s and o.type = any(%(visible)b::text[]) and o.data ? 'studentId' and not exists (
  select from student_feed f where f.student_id = (o.data ->> 'studentId')::uuid and f.event_id = o.event_id)
limit %(limit)s
"""

# Dead letters that somebody with a name resolved: one audit row each, with that name.
WRITES_ARE_AUDITED = """
select d.id::text as subject,
       'was ' || d.status || ' by ' || d.resolved_by || ' and has ' || written.times || ' audit rows' as said
from dead_letters d
cross join lateral (select count(*) as times from audit_log l
                    where l.subject_id = d.id::text and l.actor = d.resolved_by) written
where d.status <> 'parked' and written.times <> 1
  and (d.resolved_by like 'cli:%%' or exists (select from accounts a where a.email = d.resolved_by))
limit %(limit)s
"""

# A place, to three decimals or more, in any text: of a student or a trainer, whose own rows alone may have it.
LIST_TEXTS = """
select c.table_name, c.column_name from information_schema.columns c
join information_schema.tables t using (table_schema, table_name)
where c.table_schema = 'public' and t.table_type = 'BASE TABLE' and c.data_type in ('text', 'jsonb', 'json')
  and not exists (select from pg_inherits i where i.inhrelid = format('%I.%I', t.table_schema, t.table_name)::regclass)
order by 1, 2
"""
PLACES = sql.SQL("""
with places as materialized (
  select latitude::text as latitude, longitude::text as longitude from students where latitude is not null
  union select latitude::text, longitude::text from trainers where latitude is not null
), """)
PLACES_IN = sql.SQL(r"""{name} as (
  select {column}::text as text from {table} where {column}::text ~ '\d\.\d{{3}}')""")
PLACE_TOLD = sql.SQL(r"""
select {title} as subject, 'holds coordinates' as said
where exists (
  select from {name} t cross join lateral regexp_matches(t.text, '-?\d{{1,3}}\.\d{{3,}}', 'g') number
  join places p on p.latitude = number[1] and strpos(t.text, p.longitude) > 0)""")


async def _places_told(tx: Tx) -> Query:
    """The query over every text column there is, so that a new one is in it."""
    columns = [(table, column, f"{table}.{column}") for table, column in await tx.tuples(LIST_TEXTS)]
    named = [
        (
            PLACES_IN.format(name=sql.Identifier(title), column=sql.Identifier(column), table=sql.Identifier(table)),
            PLACE_TOLD.format(name=sql.Identifier(title), title=sql.Literal(title)),
        )
        for table, column, title in columns
    ]
    texts, told = zip(*named, strict=True)
    return sql.Composed([PLACES, sql.SQL(", ").join(texts), sql.SQL(" union all ").join(told)])


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
    Invariant("TierIsSold", TIER_IS_SOLD),
    Invariant("PaidAsAsked", PAID_AS_ASKED),
    Invariant("StatesAreLegal", STATES_ARE_LEGAL),
    Invariant("ChangesAreSaid", CHANGES_ARE_SAID, deep=True),
    Invariant("EventsReachGroups", EVENTS_REACH_GROUPS, deep=True),
    Invariant("ProcessedHasEffect", PROCESSED_HAS_EFFECT, SOON, deep=True),
    Invariant("VisibleIsFed", VISIBLE_IS_FED, deep=True),
    Invariant("WritesAreAudited", WRITES_ARE_AUDITED, deep=True),
    Invariant("PlacesAreKept", None, deep=True),
)
SHALLOW: tuple[Invariant, ...] = tuple(invariant for invariant in INVARIANTS if not invariant.deep)


async def check(
    tx: Tx, invariants: Sequence[Invariant] = INVARIANTS, *, leeway: timedelta | None = None
) -> list[Violation]:
    """The invariants that do not hold now. `leeway` replaces each one's own: zero after a drain."""
    violations: list[Violation] = []
    named = {
        "now": tx.now,
        "day_ago": tx.now - LOOK_BACK,
        "limit": OFFENDERS_MAX,
        "visible": [event.type for event in ALL if event.visible],
    }
    for invariant in invariants:
        query = await _places_told(tx) if invariant.sql is None else invariant.sql
        before = tx.now - (invariant.leeway if leeway is None else leeway)
        rows = await tx.tuples(query, named | {"before": before})
        if rows:
            violations.append(Violation(invariant.name, tuple((subject, said) for subject, said in rows)))
    return violations
