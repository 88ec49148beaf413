"""With Kafka: keep a group's place in the outbox close behind what the group has done.

The place is where failing over begins, what lag is counted from, and what the outbox may be trimmed up to. It moves by
windows, as a consumer's does, but only over windows of which the group has processed (or openly given up) everything.
"""

from __future__ import annotations

from dataclasses import replace
from uuid import UUID

from caravan.db import Database, Tx
from caravan.eventlog import postgres_log
from caravan.eventlog.outbox import PARTITIONS
from caravan.eventlog.postgres_log import BEGINNING, Cursor, Fenced
from caravan.ids import new_id

# The places of a group that no worker owns: nobody works from the outbox.
LIST_FREE_CURSORS = """
select id, partitions, window_start::text, window_end::text, last_id, highest_id,
       (select stats_reset from pg_stat_bgwriter)
from log_cursors where consumer_group = %(group)s and owner is null
"""

# Is there anything in a window that the group hears and has not got past? (At most one row is looked for.)
FIND_UNDONE = """
select o.id from outbox o
where o.id > %(last_id)s and o.id <= %(highest_id)s and o.partition = any(%(partitions)b::smallint[])
  and o.type = any(%(types)b::text[])
  and pg_visible_in_snapshot(o.xid, %(end)s::pg_snapshot) and not pg_visible_in_snapshot(o.xid, %(start)s::pg_snapshot)
  and not exists (select from processed_events p where p.consumer_group = %(group)s and p.event_id = o.event_id)
  and not exists (select from dead_letters d where d.consumer_group = %(group)s and d.event_id = o.event_id)
limit 1
"""

# Unless somebody took it, or moved it, meanwhile.
MOVE_FREE_CURSOR = """
update log_cursors set window_start = %(end)s::pg_snapshot, window_end = null, last_id = 0, highest_id = 0,
  updated_at = now()
where id = %(id)s and owner is null and partitions = %(partitions)b::smallint[]
  and window_start::text = %(start)s and last_id = %(stored_last_id)s
  and (select stats_reset from pg_stat_bgwriter) is not distinct from %(life)s
"""


class Trail:
    """One group's trail, walked by each of its workers; two at once do no harm."""

    def __init__(self, db: Database, group: str, types: list[str]) -> None:
        self._db = db
        self._group = group
        self._types = types
        self._windows: dict[UUID, tuple[Cursor, Cursor]] = {}  # by cursor: as stored, and with the window looked at

    async def create(self, tx: Tx) -> None:
        """A group that has no place yet starts at the oldest event."""
        await tx.execute(
            postgres_log.CREATE_CURSOR,
            {"id": new_id(), "group": self._group, "partitions": list(range(PARTITIONS)), "start": BEGINNING},
        )

    async def step(self) -> None:
        """Move past the window that was opened the last time, if all of it is done by now; open the next."""
        async with self._db.transaction(read_only=True) as tx:
            stored = [
                Cursor(row[0], tuple(row[1]), *row[2:])
                for row in await tx.tuples(LIST_FREE_CURSORS, {"group": self._group})
            ]
        windows: dict[UUID, tuple[Cursor, Cursor]] = {}
        for cursor in stored:
            known, window = self._windows.get(cursor.id, (cursor, cursor))
            if known != cursor or window.window_end is None:
                window = cursor
            elif await self._move(cursor, window):
                cursor = window = replace(cursor, window_start=window.window_end, window_end=None, last_id=0)
            if window.window_end is None:
                try:
                    window = await postgres_log.open_window(self._db, window)
                except Fenced:  # the server crashed between the two questions
                    continue
            windows[cursor.id] = cursor, window
        self._windows = windows

    async def _move(self, stored: Cursor, window: Cursor) -> bool:
        async with self._db.transaction() as tx:
            place = {
                "id": stored.id,
                "group": self._group,
                "types": self._types,
                "partitions": list(stored.partitions),
                "start": window.window_start,
                "end": window.window_end,
                "last_id": window.last_id,
                "highest_id": window.highest_id,
                "stored_last_id": stored.last_id,
                "life": stored.life,
            }
            if await tx.value(FIND_UNDONE, place) is not None:
                return False
            return bool(await tx.execute(MOVE_FREE_CURSOR, place | {"start": stored.window_start}))
