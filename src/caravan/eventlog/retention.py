"""Make the log's next partitions ahead, drop those that are old and done, and let go of what no longer matters."""

from __future__ import annotations

from datetime import timedelta
from typing import LiteralString

from psycopg import sql

from caravan.db import Tx

PARTITION_IDS = 1_000_000
LOG_DAYS = 30
FEED_DAYS = 90
PROCESSED_DAYS = 120  # longer than any redelivery

LAST_ID = "select coalesce(max(id), 0) from outbox"

LIST_PARTITIONS = r"""
select c.relname, substring(c.relname from 'outbox_(\d+)$')::bigint as number
from pg_inherits i join pg_class c on c.oid = i.inhrelid
where i.inhparent = 'outbox'::regclass and c.relname ~ '^outbox_\d+$' order by number
"""

# Made apart and attached, as who speaks need not wait for that. Made in its place, it would shut the whole log.
MAKE_PARTITION: LiteralString = "create table {} (like outbox including defaults)"
ATTACH_PARTITION: LiteralString = "alter table outbox attach partition {} for values from ({}) to ({})"

# The net holds what nobody had made a partition for in time: such a partition can't be made any more.
LAST_ID_IN_REST = "select coalesce(max(id), -1) from outbox_rest"

# The lowest id that some group may want: what its open window does not show comes in a later one, whatever its id.
# (Offset 0: through the index on xid, not along all ids.)
LOWEST_WANTED = """
select min(o.id) from log_cursors c cross join lateral (
  select id from outbox
  where xid >= pg_snapshot_xmin(c.window_start)
    and not (c.window_end is not null and pg_visible_in_snapshot(xid, c.window_end) and id <= c.last_id)
  offset 0) o
"""


async def maintain(tx: Tx) -> dict[str, int]:
    """Bounded housekeeping, run by the reconciler; counts of what was done."""
    await tx.value("select pg_advisory_xact_lock(hashtextextended('log retention', 0))")
    return {
        "feed_rows_trimmed": await _trim_feed(tx),
        "processed_rows_trimmed": await _trim_processed(tx),
        "workers_forgotten": await tx.execute("delete from workers where expires_at < now() - interval '1 day'"),
        **await _partition(tx),
    }


async def _partition(tx: Tx) -> dict[str, int]:
    """Last, and only if it is soon had: attaching shuts the net to readers, dropping the whole log to all."""
    await tx.execute("set local lock_timeout = '300ms'")
    return {
        "partitions_made": await _make_ahead(tx),
        "partitions_dropped": await _drop_old(tx),
        "rest_rows_trimmed": await _trim_rest(tx),
    }


async def _make_ahead(tx: Tx) -> int:
    current = await tx.value(LAST_ID) // PARTITION_IDS
    first = max(current, await tx.value(LAST_ID_IN_REST) // PARTITION_IDS + 1)
    present = {row["number"] for row in await tx.all(LIST_PARTITIONS)}
    missing = [number for number in range(first, current + 3) if number not in present]
    for number in missing:
        name = sql.Identifier(f"outbox_{number}")
        await tx.execute(sql.SQL(MAKE_PARTITION).format(name))
        low, high = sql.Literal(number * PARTITION_IDS), sql.Literal((number + 1) * PARTITION_IDS)
        await tx.execute(sql.SQL(ATTACH_PARTITION).format(name, low, high))
    return len(missing)


async def _drop_old(tx: Tx) -> int:
    """A partition goes whole: when its newest event is old and every group has got past it."""
    old = await _list_old(tx)
    wanted = await tx.value(LOWEST_WANTED) if old else None
    dropped = 0
    for number, name in old:
        if wanted is not None and wanted < (number + 1) * PARTITION_IDS:
            break
        await tx.execute(sql.SQL("drop table {}").format(name))
        dropped += 1
    return dropped


async def _list_old(tx: Tx) -> list[tuple[int, sql.Identifier]]:
    current = await tx.value(LAST_ID) // PARTITION_IDS
    old: list[tuple[int, sql.Identifier]] = []
    for row in await tx.all(LIST_PARTITIONS):
        name = sql.Identifier(row["relname"])
        newest = await tx.value(sql.SQL("select occurred_at from {} order by id desc limit 1").format(name))
        if row["number"] >= current or (newest is not None and newest > tx.now - timedelta(days=LOG_DAYS)):
            break
        old.append((row["number"], name))
    return old


# What the net caught goes as it would with a partition of its own.
TRIM_REST = """
delete from outbox_rest where id in (
  select id from outbox_rest
  where occurred_at < %(before)s and (%(wanted)s::bigint is null or id < %(wanted)s) order by id limit 10000)
"""


async def _trim_rest(tx: Tx) -> int:
    if await tx.value(LAST_ID_IN_REST) < 0:
        return 0
    wanted = await tx.value(LOWEST_WANTED)
    return await tx.execute(TRIM_REST, {"before": tx.now - timedelta(days=LOG_DAYS), "wanted": wanted})


# A bounded piece of each student's past; clients that ask for it are told to resync.
TRIM_FEED = """
delete from student_feed f using (
  select student_id, seq from student_feed where created_at < %(before)s limit 10000) old
where f.student_id = old.student_id and f.seq = old.seq
"""


async def _trim_feed(tx: Tx) -> int:
    return await tx.execute(TRIM_FEED, {"before": tx.now - timedelta(days=FEED_DAYS)})


# Event ids are time-ordered, so the oldest of each group are at the left edge of its part of the key.
TRIM_PROCESSED = """
delete from processed_events p using consumer_groups g cross join lateral (
  select event_id, processed_at from processed_events where consumer_group = g.name order by event_id limit 2500) old
where old.processed_at < %(before)s and p.consumer_group = g.name and p.event_id = old.event_id
"""


async def _trim_processed(tx: Tx) -> int:
    return await tx.execute(TRIM_PROCESSED, {"before": tx.now - timedelta(days=PROCESSED_DAYS)})
