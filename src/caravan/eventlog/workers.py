"""Who is alive: heartbeats by the database's clock, written from the worker's own loop.

A row says more than "a process is up": `progress_at` is the last completed turn of the worker's loop, `failing_*` what
it cannot get past. A worker's lease on its cursors is this row; a worker whose loop hangs beats on but renews it no
more, so that others take its work. (One that is slow inside a live transaction keeps it: its cursor is locked.)
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass, field
from datetime import datetime
from uuid import UUID

from caravan.db import Tx
from caravan.ids import new_id

HEARTBEAT_SECONDS = 2.0
LEASE_SECONDS = 6.0
HUNG_SECONDS = 3.0  # without coming round; idle, a loop comes round every second


class Superseded(Exception):
    """Another process runs under this worker's name: this one must end."""


@dataclass(slots=True)
class Worker:
    """A worker's identity and what it tells of itself. `name` stays the same over restarts; `incarnation` never."""

    service: str
    group: str | None
    build: str
    name: str
    incarnation: UUID = field(default_factory=new_id)
    events_done: int = 0
    progressed: bool = True  # since the last heartbeat
    failing_event_id: UUID | None = None
    failing_since: datetime | None = None
    last_error: str | None = None

    def failed(self, error: str, at: datetime, event_id: UUID | None = None) -> None:
        self.failing_event_id = event_id
        self.failing_since = self.failing_since or at
        self.last_error = error[:500]

    def recovered(self) -> None:
        self.failing_event_id = self.failing_since = self.last_error = None


# A worker starts: a predecessor of the same name is superseded.
ENTER_WORKER = """
insert into workers (name, incarnation, service, consumer_group, host, pid, build, started_at, heartbeat_at, expires_at,
                     progress_at)
values (%(name)s, %(incarnation)s, %(service)s, %(group)s, %(host)s, %(pid)s, %(build)s, clock_timestamp(),
        clock_timestamp(), clock_timestamp() + make_interval(secs => %(lease)s), clock_timestamp())
on conflict (name) do update set incarnation = excluded.incarnation, service = excluded.service,
  consumer_group = excluded.consumer_group, host = excluded.host, pid = excluded.pid, build = excluded.build,
  started_at = excluded.started_at, heartbeat_at = excluded.heartbeat_at, expires_at = excluded.expires_at,
  progress_at = excluded.progress_at, events_done = 0, failing_event_id = null, failing_since = null, last_error = null
"""


async def enter(tx: Tx, worker: Worker) -> None:
    await tx.execute(
        ENTER_WORKER,
        {
            "name": worker.name,
            "incarnation": worker.incarnation,
            "service": worker.service,
            "group": worker.group,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "build": worker.build,
            "lease": LEASE_SECONDS,
        },
    )


HEARTBEAT = """
update workers set heartbeat_at = clock_timestamp(),
  expires_at = case when %(renewed)s then clock_timestamp() + make_interval(secs => %(lease)s) else expires_at end,
  progress_at = case when %(progressed)s then clock_timestamp() else progress_at end, events_done = %(events_done)s,
  failing_event_id = %(failing_event_id)s, failing_since = %(failing_since)s, last_error = %(last_error)s
where name = %(name)s and incarnation = %(incarnation)s
"""


async def beat(tx: Tx, worker: Worker, *, renewed: bool = True) -> None:
    """Tell how it goes and renew the lease, or (not `renewed`) let it run out; raises Superseded."""
    touched = await tx.execute(
        HEARTBEAT,
        {
            "name": worker.name,
            "incarnation": worker.incarnation,
            "lease": LEASE_SECONDS,
            "renewed": renewed,
            "progressed": worker.progressed,
            "events_done": worker.events_done,
            "failing_event_id": worker.failing_event_id,
            "failing_since": worker.failing_since,
            "last_error": worker.last_error,
        },
    )
    if not touched:
        raise Superseded(f"another process runs as {worker.name}")
    worker.progressed = False


LEAVE_WORKER = "delete from workers where name = %(name)s and incarnation = %(incarnation)s"


async def leave(tx: Tx, worker: Worker) -> None:
    """A clean stop: seen at once, not when the lease ends."""
    await tx.execute(LEAVE_WORKER, {"name": worker.name, "incarnation": worker.incarnation})


@dataclass(frozen=True, slots=True)
class WorkerRow:
    """A worker as the database knows it; `alive` by the database's clock, ages in seconds."""

    name: str
    service: str
    consumer_group: str | None
    host: str
    pid: int
    build: str
    started_at: datetime
    heartbeat_at: datetime
    heartbeat_age_seconds: float
    progress_age_seconds: float
    alive: bool
    events_done: int
    failing_event_id: UUID | None
    failing_since: datetime | None
    last_error: str | None


LIST_WORKERS = """
select name, service, consumer_group, host, pid, build, started_at, heartbeat_at,
       extract(epoch from clock_timestamp() - heartbeat_at)::float8 as heartbeat_age_seconds,
       extract(epoch from clock_timestamp() - progress_at)::float8 as progress_age_seconds,
       expires_at > clock_timestamp() as alive, events_done, failing_event_id, failing_since, last_error
from workers order by service, name
"""


async def list_workers(tx: Tx) -> list[WorkerRow]:
    return await tx.all(LIST_WORKERS, into=WorkerRow)
