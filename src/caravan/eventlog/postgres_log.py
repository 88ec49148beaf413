"""The log in PostgreSQL, read by windows between two snapshots.

Ids commit out of order, so a cursor on the id would lose events. Instead a window holds what is visible at its end and
was not at its start: a late commit simply arrives in a later window, and a long writer stalls nobody. Within a window
the id orders: a student's events get their ids under the lock of the student's counter, so their order is kept.

A snapshot that is not stored ends with the server's life: after a crash PostgreSQL gives out again the transaction ids
that left no durable trace (a rollback's, a NOTIFY's), and the snapshot would take what they say for seen. A stored one
is safe: the transaction that stored it has a later id, and is durable.

A cursor is a position for some of a group's partitions. The worker that owns it locks its row in the transaction of
the batch, which fences a frozen predecessor; splitting it between two workers needs the same lock, and nothing else.
Figures: shared research, "The log by windows between snapshots".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any
from uuid import UUID

from caravan.db import Database, Tx
from caravan.eventlog.codec import Envelope
from caravan.eventlog.outbox import PARTITIONS
from caravan.ids import new_id

BEGINNING = "3:3:"  # a snapshot that has seen nothing: a new group starts at the oldest event


@dataclass(frozen=True, slots=True)
class Cursor:
    """A place in the log. Between windows `window_end` is None; within one `last_id` is the last event done.

    `life`: when the server whose transaction ids its snapshots speak of last recovered; see the module.
    """

    id: UUID
    partitions: tuple[int, ...]
    window_start: str
    window_end: str | None
    last_id: int
    highest_id: int
    life: datetime | None

    def finished(self) -> Cursor:
        assert self.window_end is not None
        return replace(self, window_start=self.window_end, window_end=None, last_id=0, highest_id=0)


CRASHED = "the server has crashed: a snapshot of its earlier life may count as seen what is not"


class Fenced(Exception):
    """Another worker owns the cursor now, or the server has crashed since: drop it, nothing was done."""


SNAPSHOT = "select pg_current_snapshot()::text"

# The end of a window, and the ids between which its events lie, of those that concern a cursor's group: through the
# index on xid, from the start's xmax to the end's, plus what was in progress at the start (`between`, for after a large
# batch the planner takes one transaction for half of the log, and reads it all). What a statement sees is what its
# snapshot shows. Statistics do not survive a crash: when these begin tells one life of the server from the
# next. The last column is null, as no transaction that had written may ask; it also keeps the planner from parallel
# workers, which take 10 ms to start.
FIND_WINDOW = """
select pg_current_snapshot()::text, (select stats_reset from pg_stat_bgwriter), min(id), max(id),
  pg_current_xact_id_if_assigned()
from (
  select id, partition, type from outbox
  where xid >= pg_snapshot_xmax(%(start)s::pg_snapshot) and xid < pg_snapshot_xmax(pg_current_snapshot())
  union all
  select late.* from pg_snapshot_xip(%(start)s::pg_snapshot) as running(xid)
  cross join lateral (
    select id, partition, type from outbox where xid between running.xid and running.xid offset 0) late
) as event
where partition = any(%(partitions)b::smallint[])
  and (type = any(%(types)b::text[]) or type <> all(%(known)b::text[]))
"""


async def open_window(db: Database, cursor: Cursor, types: Sequence[str] = (), known: Sequence[str] = ()) -> Cursor:
    """A cursor with a window to read, or without one where nothing has been said since for a group that hears `types`,
    and what is not `known`; without these, for anybody. Raises Fenced after a crash.

    The snapshot is taken outside any transaction of ours: one that had written would count itself as seen.
    """
    params = {
        "start": cursor.window_start,
        "partitions": list(cursor.partitions),
        "types": list(types),
        "known": list(known),
    }
    async with db.connection() as connection:
        found = await connection.execute(FIND_WINDOW, params, prepare=True)
        row = await found.fetchone()
    assert row is not None
    end, life, lowest, highest, _ours = row
    if life != cursor.life:
        raise Fenced(CRASHED)
    if lowest is None:
        return replace(cursor, window_start=end)
    return replace(cursor, window_end=end, last_id=lowest - 1, highest_id=highest)


# The owner locks its cursor for the batch: whoever wants to take it over waits, or is already recorded here.
LOCK_CURSOR = """
select partitions, (select stats_reset from pg_stat_bgwriter) as life from log_cursors
where id = %(id)s and owner = %(owner)s and owner_incarnation = %(incarnation)s for no key update
"""


async def lock_cursor(tx: Tx, cursor: Cursor, owner: str, incarnation: UUID) -> Cursor:
    """The cursor with its present partitions (another worker may have taken half of them); raises Fenced."""
    rows = await tx.tuples(LOCK_CURSOR, {"id": cursor.id, "owner": owner, "incarnation": incarnation})
    return _locked(cursor, rows[0] if rows else None)


def _locked(cursor: Cursor, row: tuple[Any, ...] | None) -> Cursor:
    if row is None:
        raise Fenced(f"cursor {cursor.id} belongs to another worker")
    partitions, life = row[:2]
    if life != cursor.life:
        raise Fenced(CRASHED)
    return replace(cursor, partitions=tuple(partitions))


# The events of a window that concern a group, for the partitions of a cursor: what it hears, and what nobody knows (to
# be parked).
PAGE = """
from outbox
where id > %(last_id)s and id <= %(highest_id)s and partition = any(mine.partitions)
  and (type = any(%(types)b::text[]) or type <> all(%(known)b::text[]))
  and pg_visible_in_snapshot(xid, %(end)s::pg_snapshot) and not pg_visible_in_snapshot(xid, %(start)s::pg_snapshot)
order by id limit %(limit)s
"""

# Lock the cursor and read its page. A wait for the lock does no harm: the window ended before this statement began, so
# the statement sees all of it; of the cursor it sees the row that it has locked.
LOCKED_PAGE = f"""
mine as ({LOCK_CURSOR}), page as materialized (
  select event.*
  from mine cross join lateral (
    select id, event_id, source, type, subject, occurred_at, data, correlation_id, causation_id, partition_key,
           traceparent, data_version
    {PAGE}
  ) event
)"""  # noqa: S608 - put together from constants

READ_PAGE = f"""
with {LOCKED_PAGE}
select mine.partitions, mine.life, page.* from mine left join page on true order by page.id
"""  # noqa: S608 - put together from constants


async def read_page(
    tx: Tx, cursor: Cursor, owner: str, incarnation: UUID, types: list[str], known: list[str], limit: int
) -> tuple[Cursor, list[tuple[int, Envelope]]]:
    """Lock the cursor, and read the next events of its open window with their positions, at most `limit`.

    Raises Fenced, as lock_cursor does.
    """
    rows = await tx.tuples(READ_PAGE, _page_params(cursor, owner, incarnation, types, known, limit))
    cursor = _locked(cursor, rows[0] if rows else None)
    events = [row[2:] for row in rows if row[2] is not None]
    return cursor, [(event[0], _envelope(event)) for event in events]


# The same; and claim the page for the group, and move the cursor past it. A page that is not full ends the window. Of a
# page that is only noted comes back what nobody knows. (`in` as a column is a hash table; as a condition it would be a
# join, and a loop in a loop where the planner takes the page for short.)
TAKE_PAGE = f"""
with {LOCKED_PAGE}, claimed as (
  insert into processed_events (consumer_group, event_id, event_type, correlation_id, source, processed_at)
  select %(group)s, event_id, type, correlation_id, source, %(now)s from page order by id
  on conflict (consumer_group, event_id) do nothing
  returning event_id
), passed as (
  select count(*)::int as events, max(id) as last_id, count(*) = %(limit)s as is_full from page
), moved as (
  update log_cursors cursor set updated_at = now(),
    window_start = case when is_full then %(start)s else %(end)s end::pg_snapshot,
    window_end = case when is_full then %(end)s end::pg_snapshot,
    last_id = case when is_full then passed.last_id else 0 end,
    highest_id = case when is_full then %(highest_id)s else 0 end
  from mine, passed where cursor.id = %(id)s and events > 0
)
select mine.partitions, mine.life, events, last_id, page.event_id in (select event_id from claimed) as is_new, page.*
from mine cross join passed left join page on not %(noted)s or page.type <> all(%(known)b::text[])
order by page.id
"""  # noqa: S608 - put together from constants


@dataclass(frozen=True, slots=True)
class Taken:
    """A page whose events are claimed. `cursor`: behind it; `events`: how many they are; `new`: those to be handled."""

    cursor: Cursor
    events: int
    new: list[Envelope]


async def take_page(
    tx: Tx,
    group: str,
    cursor: Cursor,
    owner: str,
    incarnation: UUID,
    types: list[str],
    known: list[str],
    limit: int,
    *,
    noted: bool = False,
) -> Taken:
    """Lock the cursor, claim the next events of its open window, at most `limit`, and move past them.

    `new`: what the group has not done before; of what is only `noted`, what is not `known`. Raises Fenced, as
    lock_cursor does.
    """
    more = {"group": group, "now": tx.now, "noted": noted}
    rows = await tx.tuples(TAKE_PAGE, _page_params(cursor, owner, incarnation, types, known, limit) | more)
    cursor = _locked(cursor, rows[0] if rows else None)
    events, last_id = rows[0][2:4]
    moved = replace(cursor, last_id=last_id) if events == limit else cursor.finished()
    return Taken(moved, events, [_envelope(row[5:]) for row in rows if row[4]])


def _page_params(
    cursor: Cursor, owner: str, incarnation: UUID, types: list[str], known: list[str], limit: int
) -> dict[str, Any]:
    return {
        "id": cursor.id,
        "owner": owner,
        "incarnation": incarnation,
        "last_id": cursor.last_id,
        "highest_id": cursor.highest_id,
        "types": types,
        "known": known,
        "start": cursor.window_start,
        "end": cursor.window_end,
        "limit": limit,
    }


def _envelope(row: tuple[Any, ...]) -> Envelope:
    return Envelope(
        id=row[1],
        source=row[2],
        type=row[3],
        subject=row[4],
        time=row[5],
        data=row[6],
        correlationid=row[7],
        causationid=row[8],
        partitionkey=row[9],
        traceparent=row[10],
        dataversion=row[11],
    )


# Note how far the group is: in the transaction of the effect.
MOVE_CURSOR = """
update log_cursors set window_start = %(start)s::pg_snapshot, window_end = %(end)s::pg_snapshot, last_id = %(last_id)s,
  highest_id = %(highest_id)s, updated_at = now()
where id = %(id)s
"""


async def move_cursor(tx: Tx, cursor: Cursor) -> None:
    await tx.execute(
        MOVE_CURSOR,
        {
            "id": cursor.id,
            "start": cursor.window_start,
            "end": cursor.window_end,
            "last_id": cursor.last_id,
            "highest_id": cursor.highest_id,
        },
    )


# ------------------------------------------------------------------ membership

LOCK_GROUP = "select pg_advisory_xact_lock(hashtextextended('log group ' || %(group)s, 0))"

CREATE_CURSOR = """
insert into log_cursors (id, consumer_group, partitions, window_start)
select %(id)s, %(group)s, %(partitions)b::smallint[], %(start)s::pg_snapshot
where not exists (select from log_cursors where consumer_group = %(group)s)
"""

# What nobody owns: never owned, given back, or its owner's lease is over by the database's clock; and what an earlier
# life of this same worker owned. A row that its owner holds locked is left for the next time.
TAKE_CURSORS = """
update log_cursors set owner = %(owner)s, owner_incarnation = %(incarnation)s
where id in (
  select c.id from log_cursors c
  where c.consumer_group = %(group)s and (c.owner, c.owner_incarnation) is distinct from (%(owner)s, %(incarnation)s)
    and (c.owner is null or c.owner = %(owner)s or not exists (
      select from workers w
      where w.name = c.owner and w.incarnation = c.owner_incarnation and w.expires_at > clock_timestamp()))
  order by c.id for update skip locked)
"""

LIST_OWN_CURSORS = """
select id, partitions, window_start::text, window_end::text, last_id, highest_id,
       (select stats_reset from pg_stat_bgwriter)
from log_cursors
where consumer_group = %(group)s and owner = %(owner)s and owner_incarnation = %(incarnation)s order by id for update
"""

# The largest share of somebody else, to be halved; waits for the batch that holds it.
LOCK_LARGEST_CURSOR = """
select id, partitions from log_cursors
where consumer_group = %(group)s and cardinality(partitions) > 1
order by cardinality(partitions) desc, id limit 1 for update
"""

SHRINK_CURSOR = "update log_cursors set partitions = %(partitions)b::smallint[] where id = %(id)s"

SPLIT_CURSOR = """
insert into log_cursors (id, consumer_group, partitions, window_start, window_end, last_id, highest_id, owner,
                         owner_incarnation)
select %(new_id)s, consumer_group, %(partitions)b::smallint[], window_start, window_end, last_id, highest_id, %(owner)s,
       %(incarnation)s
from log_cursors where id = %(id)s
"""

DELETE_CURSOR = "delete from log_cursors where id = %(id)s"


async def join_group(tx: Tx, group: str, owner: str, incarnation: UUID) -> list[Cursor]:
    """The cursors that this worker owns from now on: free ones, its own of before, or half of the largest share."""
    key = {"group": group, "owner": owner, "incarnation": incarnation}
    await tx.value(LOCK_GROUP, {"group": group})
    await tx.execute(
        CREATE_CURSOR,
        {"id": new_id(), "group": group, "partitions": list(range(PARTITIONS)), "start": BEGINNING},
    )
    await tx.execute(TAKE_CURSORS, key)
    mine = await _own(tx, key)
    if not mine:
        await _split_largest(tx, key)
        mine = await _own(tx, key)
    return await _merge(tx, mine)


async def _own(tx: Tx, key: dict[str, Any]) -> list[Cursor]:
    rows = await tx.tuples(LIST_OWN_CURSORS, key)
    return [Cursor(row[0], tuple(row[1]), *row[2:]) for row in rows]


async def _split_largest(tx: Tx, key: dict[str, Any]) -> None:
    largest = await tx.find(LOCK_LARGEST_CURSOR, {"group": key["group"]})
    if largest is None:
        return
    kept, given = largest["partitions"][::2], largest["partitions"][1::2]
    await tx.execute(SHRINK_CURSOR, {"id": largest["id"], "partitions": kept})
    await tx.execute(SPLIT_CURSOR, {**key, "id": largest["id"], "new_id": new_id(), "partitions": given})


async def _merge(tx: Tx, mine: list[Cursor]) -> list[Cursor]:
    """Cursors of one worker that stand at the same place become one: one poll then serves them all."""
    kept: dict[tuple[str, str | None, int], Cursor] = {}
    for cursor in mine:
        place = (cursor.window_start, cursor.window_end, cursor.last_id)
        twin = kept.get(place)
        if twin is None:
            kept[place] = cursor
            continue
        kept[place] = replace(twin, partitions=tuple(sorted(twin.partitions + cursor.partitions)))
        await tx.execute(SHRINK_CURSOR, {"id": twin.id, "partitions": list(kept[place].partitions)})
        await tx.execute(DELETE_CURSOR, {"id": cursor.id})
    return list(kept.values())


LEAVE_GROUP = """
update log_cursors set owner = null, owner_incarnation = null
where owner = %(owner)s and owner_incarnation = %(incarnation)s
"""


async def leave_group(tx: Tx, owner: str, incarnation: UUID) -> None:
    """A clean stop: others need not wait for the lease to end."""
    await tx.execute(LEAVE_GROUP, {"owner": owner, "incarnation": incarnation})
