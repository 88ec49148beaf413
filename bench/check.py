"""What must be true after a run, or the run has no number."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import psycopg

from caravan.db import Database
from caravan.fulfilment import invariants


class Wrong(Exception):
    """A run left something undone or broken: it has no figure."""


# The payments of the run (history is older than a day), each with what there should be one of, and how many sessions.
COUNT_DELIVERED = """
with mine as (
  select p.id, p.student_id, c.sessions from payments p join checkouts c on c.id = p.checkout_id
  where p.captured_at > now() - interval '1 day'
), made as (
  select m.id, m.sessions,
    (select count(*) from student_course_purchases u where u.payment_id = m.id) as purchases,
    (select count(*) from student_course_purchases u join trainer_allocations a on a.purchase_id = u.id
     where u.payment_id = m.id and a.status = 'approved') as allocations,
    (select count(*) from student_course_purchases u join bookings b on b.purchase_id = u.id
     where u.payment_id = m.id and b.live and cardinality(b.starts) = m.sessions) as bookings,
    (select count(*) from student_course_purchases u join tutoring_sessions s on s.purchase_id = u.id
     where u.payment_id = m.id and s.status = 'scheduled') as numbered,
    (select count(*) from student_feed f where f.student_id = m.student_id and f.type = 'SESSIONS_SCHEDULED'
     and f.data ->> 'paymentId' = m.id::text) as told
  from mine m
)
select count(*), count(*) filter (where purchases = 1), count(*) filter (where allocations = 1),
  count(*) filter (where bookings = 1), count(*) filter (where numbered = sessions), count(*) filter (where told = 1),
  coalesce(sum(numbered), 0)
from made
"""
DELIVERED_COLUMNS = ("payments", "with one purchase", "with one approved allocation", "with one whole booking",
                     "with all their sessions", "told to the student")  # fmt: skip
STILL_UNDELIVERED = "select coalesce(reason, 'no reason'), count(*) from undelivered group by 1 order by 2 desc"

# Of anybody's live bookings that touch the future: do two of them overlap? (The constraints say no; look all the same.)
OVERLAPS = """
with taken as (
  select b.id, b.trainer_id, b.student_id, slot as starts_at, slot + make_interval(mins => b.minutes) as ends_at
  from bookings b cross join lateral unnest(b.starts) slot where b.live and b.created_at > now() - interval '1 day'
), in_a_row as (
  select starts_at < lag(ends_at) over (partition by trainer_id order by starts_at) as trainer_twice,
         starts_at < lag(ends_at) over (partition by student_id order by starts_at) as student_twice from taken
)
select count(*) from in_a_row where trainer_twice or student_twice
"""
FEED_GAPS = """
select count(*) from (
  select h.student_id from student_feed_heads h left join student_feed f using (student_id)
  where h.student_id in (select student_id from payments where captured_at > now() - interval '1 day')
  group by h.student_id, h.seq having count(f.seq) <> h.seq or max(f.seq) is distinct from h.seq) gap
"""


async def check_delivered(url: str, n: int) -> int:
    """What everybody's run must have left, ours and the peers': the number of session rows. Raises Wrong."""
    async with await psycopg.AsyncConnection.connect(url) as connection:

        async def rows(query: str) -> list[tuple[Any, ...]]:
            return await (await connection.execute(query.encode())).fetchall()

        [counted] = await rows(COUNT_DELIVERED)
        *found, sessions = counted
        said = [f"{count} of {n} {what}" for what, count in zip(DELIVERED_COLUMNS, found, strict=True) if count != n]
        said += [f"{count} undelivered: {reason}" for reason, count in await rows(STILL_UNDELIVERED)]
        [(overlaps,)] = await rows(OVERLAPS)
        said += [f"{overlaps} sessions overlap"] * bool(overlaps)
        [(gaps,)] = await rows(FEED_GAPS)
        said += [f"{gaps} feeds have gaps"] * bool(gaps)
    if said:
        raise Wrong("; ".join(said))
    return int(sessions)


# Every event that was said has been heard by every group that listens, before the clock is stopped.
UNHEARD = """
select g.name, count(*) from outbox o join consumer_groups g on o.type = any(g.types)
where not exists (select from processed_events e where e.consumer_group = g.name and e.event_id = o.event_id)
group by 1
"""
DEAD = "select count(*) from dead_letters"


async def check(url: str, n: int, *, whole: bool = True) -> int:
    """Our own run: the above, nothing unheard, nothing parked, and (`whole`) every invariant of the product.

    The number of session rows. Raises Wrong.
    """
    sessions = await check_delivered(url, n)
    async with Database(url) as db, db.transaction(read_only=True) as tx:
        said = [f"{group} has not heard {count} events" for group, count in await tx.tuples(UNHEARD)]
        dead = await tx.value(DEAD)
        said += [f"{dead} dead letters"] * bool(dead)
        if whole and not said:
            await tx.execute("set local statement_timeout = '10min'")  # whole tables, on a busy machine
            said += [str(found) for found in await invariants.check(tx, leeway=timedelta(0))]
    if said:
        raise Wrong("; ".join(said))
    return sessions
