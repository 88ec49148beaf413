"""After a dump was restored into another cluster: the log's transaction ids belong to the old one, so count anew."""

from __future__ import annotations

import structlog

from caravan.db import Database
from caravan.eventlog.postgres_log import SNAPSHOT

log: structlog.stdlib.BoundLogger = structlog.get_logger()

MOVED = """
select system_identifier <> (select system_identifier from pg_control_system()) from installation for update
"""

# What some group has not got past gets this transaction's id, in its old order by id; groups that had it already know
# it by their processed_events. The rest must be older than anything the new cluster will write.
REBASE_WAITING = """
update outbox set xid = pg_current_xact_id()
where id in (
  select o.id from log_cursors c join consumer_groups g on g.name = c.consumer_group
  join outbox o on o.partition = any(c.partitions) and o.type = any(g.types)
    and not pg_visible_in_snapshot(o.xid, c.window_start)
    and not (c.window_end is not null and pg_visible_in_snapshot(o.xid, c.window_end) and o.id <= c.last_id))
"""
REBASE_DONE = "update outbox set xid = '3'::xid8 where xid <> pg_current_xact_id() and xid <> '3'::xid8"
REBASE_CURSORS = """
update log_cursors set window_start = %(snapshot)s::pg_snapshot, window_end = null, last_id = 0, highest_id = 0,
  owner = null, owner_incarnation = null
"""
REMEMBER = "update installation set system_identifier = (select system_identifier from pg_control_system())"


async def rebase_if_moved(db: Database) -> bool:
    """True where the database came from another cluster and the log was rebased; run before anything consumes."""
    async with db.connection() as connection:
        row = await (await connection.execute(SNAPSHOT)).fetchone()  # before this transaction has an id of its own
    assert row is not None
    async with db.transaction("migrate") as tx:
        if not await tx.value(MOVED):
            return False
        await tx.execute("set local statement_timeout = 0")
        waiting = await tx.execute(REBASE_WAITING)
        await tx.execute(REBASE_DONE)
        await tx.execute(REBASE_CURSORS, {"snapshot": row[0]})
        await tx.execute(REMEMBER)
    log.warning("the database was restored into another cluster: the event log was rebased", waiting_events=waiting)
    return True
