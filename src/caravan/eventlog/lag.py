"""How far each group is behind, in messages and in seconds, whether or not a worker of it ever ran."""

from __future__ import annotations

from dataclasses import dataclass

from caravan.db import Tx


@dataclass(frozen=True, slots=True)
class GroupLag:
    """`messages`: events that wait; `seconds`: age of the oldest (0 where none waits); `workers_alive` by lease, and
    so `reconciler_alive`."""

    group: str
    service: str
    messages: int
    seconds: float
    workers_alive: int
    progress_age_seconds: float | None
    reconciler_alive: bool = False

    @property
    def state(self) -> str:
        """idle (nothing waiting), working, behind, down (events wait, nobody is there) or unknown (nothing waits, and
        nobody is there who would say)."""
        if not self.workers_alive:
            return "down" if self.messages else "unknown"
        if not self.messages:
            return "idle"
        return "behind" if self.seconds > BEHIND_SECONDS else "working"

    @property
    def waiting(self) -> str:
        """`1 event waits`, `12 events wait`."""
        return "1 event waits" if self.messages == 1 else f"{self.messages} events wait"

    @property
    def sentence(self) -> str:
        return self.tell(f"caravan serve {self.service}")

    def tell(self, start: str) -> str:
        """The state in a sentence; `start` is the command that starts a missing worker here."""
        if self.state == "idle":
            return "Idle: nothing waiting."
        if self.state == "unknown":
            return f"Unknown: nothing waits, and no {self.service} is alive to say so. Start it: {start}"
        if self.state == "down":
            mended = self.reconciler_alive and self.service in MENDED
            meanwhile = SLOWLY if mended else "nothing will start until one does."
            return f"Down? {self.waiting} and no {self.service} is alive: {meanwhile} Start it: {start}"
        if self.state == "behind":
            return f"Behind: {self.waiting}, the oldest for {self.seconds:.0f} s."
        return f"Working: {self.waiting}, the oldest for {self.seconds:.1f} s."


BEHIND_SECONDS = 10.0
# Whose work the reconciler finds undone in the tables, where no event is heard.
MENDED = frozenset({"purchase-worker", "allocation-worker", "session-worker"})
SLOWLY = "no event is heard, and the reconciler does what is missing meanwhile, slowly."

# Events that a group hears and has not got past: after its open window, or in it and beyond the last one done. With
# Kafka its place only trails behind (see trail), so what it has done is looked up: event by event, as `offset 0` makes
# it, for a join's plan depends on statistics that are old while much is going on (decision 0018). The relay hears
# everything.
LIST_LAG = """
select g.name as "group", g.service, coalesce(waiting.messages, 0)::int as messages,
       coalesce(extract(epoch from clock_timestamp() - waiting.oldest), 0)::float8 as seconds,
       (select count(*) from workers w where w.consumer_group = g.name and w.expires_at > clock_timestamp())::int
         as workers_alive,
       (select min(extract(epoch from clock_timestamp() - w.progress_at)) from workers w
        where w.consumer_group = g.name and w.expires_at > clock_timestamp())::float8 as progress_age_seconds,
       exists (select from workers w where w.service = 'reconciler' and w.expires_at > clock_timestamp())
         as reconciler_alive
from consumer_groups g
left join lateral (
  select count(*) as messages, min(e.occurred_at) as oldest
  from (
    select partitions, window_start, window_end, last_id from log_cursors where consumer_group = g.name
    union all
    select null, '3:3:'::pg_snapshot, null, 0 where not exists (select from log_cursors where consumer_group = g.name)
  ) c
  join lateral (
    select o.occurred_at, o.xid, o.id, o.partition, o.event_id from outbox o
    where (o.type = any(g.types) or g.name = 'outbox-relay') and o.xid >= pg_snapshot_xmax(c.window_start)
    union all
    select o.occurred_at, o.xid, o.id, o.partition, o.event_id from outbox o
    where (o.type = any(g.types) or g.name = 'outbox-relay')
      and o.xid = any(array(select pg_snapshot_xip(c.window_start)))
  ) e on (c.partitions is null or e.partition = any(c.partitions))
    and not (c.window_end is not null and pg_visible_in_snapshot(e.xid, c.window_end) and e.id <= c.last_id)
    and not exists (select from processed_events p where p.consumer_group = g.name and p.event_id = e.event_id
                    offset 0)
    and not exists (select from dead_letters d where d.consumer_group = g.name and d.event_id = e.event_id)
) waiting on true
order by g.name
"""


async def list_lag(tx: Tx) -> list[GroupLag]:
    return await tx.all(LIST_LAG, into=GroupLag)
