"""Years of delivered purchases, to see whether the past makes the present slower.

20 sessions each, daily, at one of 16 hours of a trainer: most are over and completed, FUTURE of them are to come. Rows
are as fulfilment leaves them; what retention has taken away by then (the log, feeds, marks) is not there, but each
student's counter is. Written by set-based SQL without constraints, which are put on again afterwards and so hold.
"""

from __future__ import annotations

from typing import Any

import psycopg

SESSIONS_EACH = 20
FUTURE = 400  # packages to come: as many whatever the past, so that matching has the same work
HOURS = 16
HEARD_EACH = 5  # entries of a student's feed for a purchase that is delivered

# One row per purchase. Ids are of version 7 and of an earlier time than those that a run makes.
MAKE_ID = """
create function pg_temp.make_id(kind int, n bigint) returns uuid language sql immutable as $$
  select (lpad(to_hex(1717986918400 + n), 12, '0') || '7' || lpad(to_hex(kind), 3, '0') || '8'
    || substr(md5(kind || '/' || n), 1, 15))::uuid
$$
"""
LIST_PAST = """
create temp table past as
with trainer as materialized (
  select row_number() over (order by id) - 1 as t, id from trainers
), taught as materialized (
  select distinct on (trainer_id) trainer_id, course_id from trainer_courses order by trainer_id, course_id
), numbered as (
  select i, i %% %(trainers)s as t, i / %(trainers)s as place, i < %(future)s as to_come
  from generate_series(0, %(purchases)s - 1) i
)
select i, to_come, trainer.id as trainer_id, taught.course_id,
  pg_temp.make_id(2, i) as checkout_id, pg_temp.make_id(3, i) as payment_id, pg_temp.make_id(4, i) as purchase_id,
  pg_temp.make_id(5, i) as booking_id, pg_temp.make_id(6, i) as allocation_id,
  -- Two purchases a student, one after the other; whose time is to come has that one only.
  pg_temp.make_id(1, case when to_come then 100000000 + i
    else t + %(trainers)s * (place %% {hours} + {hours} * (place / {hours} / 2)) end) as student_id,
  case when to_come then date_trunc('day', now()) + interval '5 days'
    else date_trunc('day', now()) - make_interval(days => (30 + 25 * (place / {hours}))::int) end
    + interval '30 minutes' + interval '1 hour' * case when to_come then 4 + (abs(hashint8(t)::bigint) + place) %% 8
                                                       else place %% {hours} end as first_at
from numbered join trainer using (t) join taught on taught.trainer_id = trainer.id order by i
"""
WRITE_PAST = """
analyze past;
insert into students (id, name, timezone, created_at)
  select distinct student_id, 'A student', 'Asia/Kolkata', now() - interval '3 years' from past;
insert into student_feed_heads (student_id, seq)
  select student_id, {heard} * count(*) from past group by student_id;
insert into checkouts (id, student_id, course_id, sessions, price_cents, currency, session_minutes, weekdays,
    learning_mode, timezone, slot_start, start_date, raw, created_at, expires_at, paid_by)
  select checkout_id, student_id, course_id, {each}, 240000, 'INR', 60, '{{1,2,3,4,5,6,7}}', 'online',
    'Asia/Kolkata', (first_at at time zone 'Asia/Kolkata')::time, (first_at at time zone 'Asia/Kolkata')::date, '{{}}',
    first_at - interval '7 days', first_at - interval '7 days', payment_id from past;
insert into payments (id, checkout_id, student_id, provider, status, amount_cents, currency, captured_cents,
    captured_currency, captured_at, metadata, created_at, updated_at)
  select payment_id, checkout_id, student_id, 'sandbox', 'succeeded', 240000, 'INR', 240000, 'INR',
    first_at - interval '7 days', '{{"sessionCount": {each}}}', first_at - interval '7 days',
    first_at - interval '7 days' from past;
insert into student_course_purchases (id, checkout_id, payment_id, student_id, course_id, purchase_tier,
    session_minutes, weekdays, learning_mode, group_size, timezone, slot_start, start_date, metadata, created_at)
  select purchase_id, checkout_id, payment_id, student_id, course_id, {each}, 60,
    '{{1,2,3,4,5,6,7}}', 'online', 1, 'Asia/Kolkata', (first_at at time zone 'Asia/Kolkata')::time,
    (first_at at time zone 'Asia/Kolkata')::date, '{{}}', first_at - interval '7 days' from past;
insert into bookings (id, kind, purchase_id, trainer_id, student_id, starts, minutes, during, created_at)
  select booking_id, 'package', purchase_id, trainer_id, student_id, s.starts, 60, s.during,
    first_at - interval '7 days'
  from past cross join lateral (
    select array_agg(slot order by slot) as starts, range_agg(tstzrange(slot, slot + interval '1 hour')) as during
    from (select first_at + d * interval '1 day' as slot from generate_series(0, {each} - 1) d) slots) s;
insert into trainer_allocations (id, purchase_id, student_id, course_id, trainer_id, booking_id, status, metadata,
    created_at, updated_at)
  select allocation_id, purchase_id, student_id, course_id, trainer_id, booking_id,
    case when to_come then 'approved' else 'completed' end, '{{"sessionCount": {each}}}', first_at - interval '7 days',
    first_at from past;
insert into tutoring_sessions (purchase_id, seq, id, allocation_id, booking_id, student_id, course_id, trainer_id,
    starts_at, ends_at, status)
  select purchase_id, d + 1, new_id(), allocation_id, booking_id, student_id, course_id, trainer_id,
    first_at + d * interval '1 day', first_at + d * interval '1 day' + interval '1 hour',
    case when to_come then 'scheduled' else 'completed' end
  from past cross join generate_series(0, {each} - 1) d
"""

# The large tables' indexes are built afterwards, from the present schema's own words.
LIST_CONSTRAINTS = """
select conname, pg_get_constraintdef(oid) from pg_constraint
where conrelid = %s::regclass and contype in ('p', 'u', 'x') order by contype = 'p' desc
"""
LIST_INDEXES = """
select indexrelid::regclass::text, pg_get_indexdef(indexrelid) from pg_index
where indrelid = %s::regclass and not exists (select from pg_constraint where conindid = indexrelid)
"""
LARGE = ("bookings", "tutoring_sessions")


def write_history(url: str, sessions: int) -> None:
    """About so many sessions in the past of a marketplace that has none; its trainers' weeks fill up evenly."""
    with psycopg.connect(url) as connection:
        counted = connection.execute("select count(*) from trainers").fetchone()
        assert counted is not None
        connection.execute("set session_replication_role = replica")  # no foreign keys, row by row
        connection.execute("set local work_mem = '256MB'")
        put_on: list[str] = []
        for name in LARGE:
            put_on += _take_off(connection, name)
        numbers = {"trainers": counted[0], "purchases": sessions // SESSIONS_EACH, "future": FUTURE}
        connection.execute(MAKE_ID)
        connection.execute(LIST_PAST.format(hours=HOURS).encode(), numbers)
        connection.execute(WRITE_PAST.format(each=SESSIONS_EACH, heard=HEARD_EACH).encode())
        for statement in put_on:
            connection.execute(statement.encode())


def _take_off(connection: psycopg.Connection[Any], name: str) -> list[str]:
    """Drop a table's indexes; the statements that put them on again."""
    put_on: list[str] = []
    for index, definition in connection.execute(LIST_INDEXES, [name]).fetchall():
        connection.execute(f"drop index {index}".encode())
        put_on.append(definition)
    for constraint, definition in connection.execute(LIST_CONSTRAINTS, [name]).fetchall():
        connection.execute(f"alter table {name} drop constraint {constraint} cascade".encode())
        put_on.append(f"alter table {name} add constraint {constraint} {definition}")
    return put_on
