"""What PostgreSQL itself needs: the very rows that our run left, written again by set-based SQL that knows them all.

The same tables, constraints, indexes and durability, the same four stages as transactions of a page each, begun
from a copy of the same database. The rows wait in tables beside; nothing is matched, computed or sent. Afterwards both
databases are compared row by row. The same once more without the two constraints that keep anybody's time from being
taken twice: what they cost. Pairs run alternately; the floor has the number of connections that is best for it.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import psycopg

from bench.check import Wrong
from bench.counting import count_since, read_counters, server_cpu_seconds
from bench.fulfil import READY, prepare
from bench.parts import Context, Result
from bench.report import spread, table
from bench.runs import fulfil
from bench.server import Server
from caravan.eventlog.consumer import PAGE_EVENTS_MAX

GIVEN = "bench_given"
UNGUARDED = "bench_unguarded"
BATCH = PAGE_EVENTS_MAX
CONNECTIONS = (1, 2, 4)

# What fulfilment writes, how to tell a row's stage and place in it from our run, and what can't be alike: the log's
# ids and transaction ids are the server's own.
WRITTEN: dict[str, str] = {
    "student_course_purchases": "t.*",
    "bookings": "t.*",
    "trainer_allocations": "t.*",
    "tutoring_sessions": "t.*",
    "processed_events": "t.*",
    "student_feed": "t.*",
    "student_feed_heads": "t.*",
    "undelivered": "t.*",
    "outbox": "event_id, type, topic, source, subject, partition_key, partition, correlation_id, causation_id,"
    " traceparent, data_version, data, occurred_at",
}

# ------------------------------------------------------------------ the rows, put beside

# In our run's database: each payment's batch, in every stage, is by the order in which our log spoke of its money. One
# batch goes through all stages on one connection, so a row is never ahead of what it refers to.
NUMBER_PAYMENTS = """
create schema given;
create table given.place as
select o.correlation_id as payment, o.type, paid.batch
from outbox o
join (select correlation_id, (row_number() over (order by id) - 1) / {batch} as batch
      from outbox where type = 'PURCHASE_CONFIRMED') paid using (correlation_id);
create table given.purchases as
select p.batch, t.* from student_course_purchases t
join given.place p on p.type = 'PURCHASE_CONFIRMED' and p.payment = t.payment_id::text order by p.batch, t.id;
create table given.bookings as
select p.batch, t.* from bookings t join student_course_purchases u on u.id = t.purchase_id
join given.place p on p.type = 'PURCHASE_CREATED' and p.payment = u.payment_id::text order by p.batch, t.id;
create table given.allocations as
select p.batch, t.* from trainer_allocations t join student_course_purchases u on u.id = t.purchase_id
join given.place p on p.type = 'PURCHASE_CREATED' and p.payment = u.payment_id::text order by p.batch, t.id;
create table given.sessions as
select p.batch, t.* from tutoring_sessions t join student_course_purchases u on u.id = t.purchase_id
join given.place p on p.type = 'TRAINER_ALLOCATED' and p.payment = u.payment_id::text
order by p.batch, t.purchase_id, t.seq;
create table given.delivered as
select p.batch, p.payment::uuid as payment_id from given.place p where p.type = 'TRAINER_ALLOCATED' order by 1;
create table given.said as
select c.stage, p.batch, o.event_id, o.type, o.topic, o.source, o.subject, o.partition_key, o.partition,
  o.correlation_id, o.causation_id, o.traceparent, o.data_version, o.data, o.occurred_at
from outbox o
join (values ('PURCHASE_CREATED', 'PURCHASE_CONFIRMED', 1), ('COURSE_ACCESS_GRANTED', 'PURCHASE_CONFIRMED', 1),
             ('TRAINER_ALLOCATED', 'PURCHASE_CREATED', 2), ('SESSIONS_SCHEDULED', 'TRAINER_ALLOCATED', 3))
  as c(type, cause, stage) using (type)
join given.place p on p.type = c.cause and p.payment = o.correlation_id order by c.stage, p.batch, o.id;
create table given.fed as
select s.stage, s.batch, f.* from student_feed f join given.said s using (event_id)
order by s.stage, s.batch, f.student_id, f.seq;
create table given.heads as
select stage, batch, student_id, count(*) as said from given.fed group by 1, 2, 3 order by 1, 2, 3;
create table given.heard as
select case e.consumer_group when 'purchase-creation-workers' then 1 when 'trainer-allocation-workers' then 2
                             when 'session-scheduling-workers' then 3 else 4 end as stage,
  (row_number() over (partition by e.consumer_group order by o.id) - 1) / {batch} as batch, e.*
from processed_events e join outbox o using (event_id) order by 1, 2, o.id;
create index on given.purchases (batch);
create index on given.bookings (batch);
create index on given.allocations (batch);
create index on given.sessions (batch);
create index on given.delivered (batch);
create index on given.said (stage, batch);
create index on given.fed (stage, batch);
create index on given.heads (stage, batch);
create index on given.heard (stage, batch);
"""
LIST_GIVEN = "select tablename from pg_tables where schemaname = 'given' and tablename <> 'place' order by 1"
DEFINE_GIVEN = """
select 'create table given.' || c.relname || ' (' || string_agg(quote_ident(a.attname) || ' ' ||
  format_type(a.atttypid, a.atttypmod), ', ' order by a.attnum) || ')'
from pg_class c join pg_namespace n on n.oid = c.relnamespace join pg_attribute a on a.attrelid = c.oid and a.attnum > 0
where n.nspname = 'given' and c.relkind = 'r' and c.relname <> 'place' group by c.relname
"""
INDEX_GIVEN = "select indexdef from pg_indexes where schemaname = 'given'"

DROP_GUARDS = """
alter table bookings drop constraint bookings_trainer_free, drop constraint bookings_student_free
"""
WARM = """
create extension if not exists pg_prewarm;
select sum(pg_prewarm(c.oid)) from pg_class c join pg_namespace n on n.oid = c.relnamespace
where n.nspname in ('public', 'given') and c.relkind in ('r', 'i', 't') and c.relpersistence = 'p'
"""

# ------------------------------------------------------------------ the stages, each a transaction

SAY = (
    # The students' counters (in one order, or two connections would wait for each other), the feed, the log.
    """insert into student_feed_heads as head (student_id, seq)
       select student_id, said from given.heads where stage = %(stage)s and batch = %(batch)s order by student_id
       on conflict (student_id) do update set seq = head.seq + excluded.seq""",
    """insert into student_feed (student_id, seq, event_id, type, data, created_at)
       select student_id, seq, event_id, type, data, created_at
       from given.fed where stage = %(stage)s and batch = %(batch)s""",
    """insert into outbox (event_id, type, topic, source, subject, partition_key, partition, correlation_id,
         causation_id, traceparent, data_version, data, occurred_at)
       select event_id, type, topic, source, subject, partition_key, partition, correlation_id, causation_id,
         traceparent, data_version, data, occurred_at from given.said where stage = %(stage)s and batch = %(batch)s""",
)
HEAR = """insert into processed_events (consumer_group, event_id, event_type, correlation_id, source, processed_at)
  select consumer_group, event_id, event_type, correlation_id, source, processed_at
  from given.heard where stage = %(stage)s and batch = %(batch)s"""
MOVE = """update log_cursors set window_start = pg_current_snapshot(), last_id = last_id + 1, updated_at = now()
  where consumer_group = %(group)s and partitions = array[%(lane)s]::smallint[]"""
PURCHASE = "insert into student_course_purchases select {columns} from given.purchases where batch = %(batch)s"
BOOK = "insert into bookings select {columns} from given.bookings where batch = %(batch)s"
ALLOCATE = "insert into trainer_allocations select {columns} from given.allocations where batch = %(batch)s"
NUMBER = "insert into tutoring_sessions select {columns} from given.sessions where batch = %(batch)s"
DELIVER = """delete from undelivered u using given.delivered d
  where d.batch = %(batch)s and u.payment_id = d.payment_id"""

GROUPS = ("purchase-creation-workers", "trainer-allocation-workers", "session-scheduling-workers",
          "cache-invalidation-workers")  # fmt: skip
TABLES = {
    PURCHASE: "student_course_purchases",
    BOOK: "bookings",
    ALLOCATE: "trainer_allocations",
    NUMBER: "tutoring_sessions",
}
STAGES: tuple[tuple[str, ...], ...] = (
    (HEAR, PURCHASE, *SAY, MOVE),
    (HEAR, BOOK, ALLOCATE, *SAY, MOVE),
    (HEAR, NUMBER, DELIVER, *SAY, MOVE),
    (HEAR, MOVE),
)
# A position in the log of each group for each connection, as our workers have.
CREATE_CURSORS = """
insert into log_cursors (id, consumer_group, partitions, window_start)
select new_id(), name, array[lane]::smallint[], '3:3:' from consumer_groups, generate_series(0, %s) lane
"""
COLUMNS = """
select string_agg(quote_ident(attname), ', ' order by attnum) from pg_attribute
where attrelid = %s::regclass and attnum > 0 and not attisdropped
"""
COUNT_BATCHES = "select max(batch) + 1 from given.heard where stage = %s"


async def write_floor(url: str, connections: int) -> float:
    """Write everything through so many connections; the seconds it took. Each batch goes through its stages in order;
    the hearing of the last group follows behind."""
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
        columns = {t: (await _row(connection, COLUMNS, [t]))[0] for t in TABLES.values()}
        batches = [(await _row(connection, COUNT_BATCHES, [stage]))[0] for stage in (1, 4)]
    stages = [[s.format(columns=columns[TABLES[s]]) if s in TABLES else s for s in stage] for stage in STAGES]
    work: list[tuple[int, int]] = []
    per_batch = -(-batches[1] // batches[0])
    for batch in range(batches[0]):
        work += [(batch, stage) for stage in (1, 2, 3)]
        work += [(b, 4) for b in range(batch * per_batch, min(batches[1], (batch + 1) * per_batch))]
    lanes: list[list[tuple[int, int]]] = [[] for _ in range(connections)]
    for batch, stage in work:
        lanes[(batch // per_batch if stage == 4 else batch) % connections].append((batch, stage))
    opened = [await psycopg.AsyncConnection.connect(url, autocommit=True, prepare_threshold=0) for _ in lanes]
    began = time.monotonic()
    try:
        await asyncio.gather(*(_lane(opened[k], k, lane, stages) for k, lane in enumerate(lanes)))
        return time.monotonic() - began
    finally:
        for connection in opened:
            await connection.close()


async def _lane(
    connection: psycopg.AsyncConnection[Any],
    number: int,
    work: Sequence[tuple[int, int]],
    stages: Sequence[Sequence[str]],
) -> None:
    for batch, stage in work:
        named = {"batch": batch, "stage": stage, "group": GROUPS[stage - 1], "lane": number}
        async with connection.transaction():
            for statement in stages[stage - 1]:
                await connection.execute(statement.encode(), named)


# ------------------------------------------------------------------ the part


@dataclass(frozen=True, slots=True)
class Written:
    """`cpu_us`: the server's sessions, per fulfilment."""

    per_second: float
    cpu_us: float


@dataclass(slots=True)
class Rounds:
    """Fulfilments/s and processors' µs per fulfilment of each, in the order of the runs."""

    per_second: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    cpu_us: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def add(self, name: str, per_second: float, cpu_us: float) -> None:
        self.per_second[name].append(per_second)
        self.cpu_us[name].append(cpu_us)

    def ratio(self, name: str, of: str) -> dict[str, Any]:
        """Of the rates, round by round."""
        pairs = zip(self.per_second[name], self.per_second[of], strict=True)
        return spread([a / b for a, b in pairs], 3)


async def run(context: Context) -> Result:
    n, trainers = context.pick(1_000, 10_000), context.pick(200, 2_000)
    with Server() as server:
        await prepare(server, READY, n, trainers, context.seed)
        ours_url = server.create("ours", READY)
        warm(ours_url)
        await fulfil(ours_url, n)
        take_rows(server, ours_url)
        workers, ours = await _best_of_ours(server, context, n)
        tried = {c: round((await _floor(server, GIVEN, n, c)).per_second, 1) for c in CONNECTIONS}
        connections = max(tried, key=lambda c: tried[c])
        rounds = await _alternate(server, context, n, workers, connections)
        alike = compare(ours_url, server.url_of("floor"))
        before = read_counters(url := _copy(server, GIVEN))
        await write_floor(url, 1)
        needs = count_since(url, before).per(n)
        del needs["statements"]
    share, guards = rounds.ratio("ours", "floor"), rounds.ratio("floor", "unguarded")
    found = {name: spread(rates) for name, rates in rounds.per_second.items()}
    cpu = {name: spread(us) for name, us in rounds.cpu_us.items()}
    cpu_share = round(cpu["floor"]["median"] / cpu["ours"]["median"], 3)
    result = Result(
        {
            "payments": n,
            "trainers": trainers,
            "workers": workers,
            "ours_by_workers": ours,
            "connections": connections,
            "by_connections": {str(c): rate for c, rate in tried.items()},
            "rows_compared": alike,
            "per_second": found["floor"]["median"],
            "runs": found,
            "share": share,
            "guards": guards,
            "cpu_us": cpu,
            "cpu_share": cpu_share,
            "per_fulfilment": needs,
        },
        {"floor": share["median"], "guards": guards["median"]},
    )
    result.lines = [
        *table(
            ["", "fulfilments/s", "least", "most", "µs of the processors"],
            [[k, v["median"], v["min"], v["max"], cpu[k]["median"]] for k, v in found.items()],
        ),
        f"ours with {workers} workers, the floor with {connections} connections; {alike:,} rows alike",
        f"ours / floor: {share['median']} ({share['min']} to {share['max']}); by the processors' time: {cpu_share}",
        f"floor / without guards: {guards['median']} ({guards['min']} to {guards['max']})",
        "the floor per fulfilment: " + ", ".join(f"{value:,} {name}" for name, value in needs.items()),
    ]
    return result


async def _alternate(server: Server, context: Context, n: int, workers: int, connections: int) -> Rounds:
    """Ours, the floor, the floor without guards, and again: each from a copy of its own, warm."""
    rounds = Rounds()
    for _ in range(context.pick(3, 5)):
        url = server.create("run", READY)
        warm(url)
        done = await fulfil(url, n, workers=workers, whole=False)
        rounds.add("ours", done.per_second, sum(done.cpu_us.values()))
        for name, template in (("floor", GIVEN), ("unguarded", UNGUARDED)):
            written = await _floor(server, template, n, connections)
            rounds.add(name, written.per_second, written.cpu_us)
        context.say(", ".join(f"{name} {rates[-1]:,.0f}" for name, rates in rounds.per_second.items()))
    return rounds


async def _best_of_ours(server: Server, context: Context, n: int) -> tuple[int, dict[str, float]]:
    tried: dict[int, float] = {}
    for workers in (1, 2, 3):
        url = server.create("run", READY)
        warm(url)
        tried[workers] = round((await fulfil(url, n, workers=workers, whole=False)).per_second, 1)
        context.say(f"ours with {workers} workers: {tried[workers]:,.0f} fulfilments/s")
    return max(tried, key=lambda w: tried[w]), {str(w): rate for w, rate in tried.items()}


async def _floor(server: Server, template: str, n: int, connections: int) -> Written:
    url = _copy(server, template)
    cpu = server_cpu_seconds(url)
    seconds = await write_floor(url, connections)
    return Written(n / seconds, round((server_cpu_seconds(url) - cpu) / n * 1e6, 1))


def _copy(server: Server, template: str) -> str:
    url = server.create("floor" if template == GIVEN else "unguarded", template)
    warm(url)
    return url


def warm(url: str) -> None:
    """Into shared buffers, for everybody alike: a copied database has nothing there."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(WARM)


def take_rows(server: Server, ours_url: str) -> None:
    """Make the templates of the floor: the database as it was before our run, and beside it what our run left."""
    given_url = server.create(GIVEN, READY)
    with psycopg.connect(ours_url, autocommit=True) as ours, psycopg.connect(given_url, autocommit=True) as given:
        ours.execute(NUMBER_PAYMENTS.format(batch=BATCH).encode())
        given.execute("create schema given")
        for (definition,) in ours.execute(DEFINE_GIVEN).fetchall():
            given.execute(definition.encode())
        for (name,) in ours.execute(LIST_GIVEN).fetchall():
            out = f"copy given.{name} to stdout (format binary)".encode()
            with (
                ours.cursor().copy(out) as source,
                given.cursor() as cursor,
                cursor.copy(f"copy given.{name} from stdin (format binary)".encode()) as target,
            ):
                for block in source:
                    target.write(block)
        for (definition,) in ours.execute(INDEX_GIVEN).fetchall():
            if "given.place" not in definition:
                given.execute(definition.encode())
        ours.execute("drop schema given cascade")
        given.execute(CREATE_CURSORS, [max(CONNECTIONS) - 1])
    server.settle(GIVEN)
    with psycopg.connect(server.create(UNGUARDED, GIVEN), autocommit=True) as connection:
        connection.execute(DROP_GUARDS)
    server.settle(UNGUARDED)


def compare(ours_url: str, floor_url: str) -> int:
    """How many rows are alike; raises Wrong where a table that fulfilment writes differs in any."""
    rows = 0
    with psycopg.connect(ours_url) as ours, psycopg.connect(floor_url) as floor:
        for name, columns in WRITTEN.items():
            query = (
                f"select count(*), md5(string_agg(row, '' order by row))"  # noqa: S608 - names of ours
                f" from (select md5(r::text) as row from (select {columns} from {name} t) r) hashed"
            ).encode()
            a, b = ours.execute(query).fetchone(), floor.execute(query).fetchone()
            if a != b:
                raise Wrong(f"the floor's {name} are not ours: {b} for {a}")
            rows += a[0] if a else 0
    return rows


async def _row(connection: psycopg.AsyncConnection[Any], query: str, values: Sequence[Any]) -> tuple[Any, ...]:
    row = await (await connection.execute(query.encode(), values)).fetchone()
    assert row is not None
    return row
