"""`student:home:{id}` and `student:learning:{id}` in Redis: answers of the API, each with the version that it shows.

Three things keep it right, whatever Redis does:

- A cached view is shown only where its mark is the student's present one: the number and id of the last event on the
  student's feed, read from PostgreSQL (one row by its key) for every request. Nothing that Redis says is believed, so
  Redis may be flushed, restored from an old dump, or come back after an hour with what it held then.
- A value is written only over one that is not newer (`PUT`), and the cache-worker raises the version that is asked for
  (`FENCE`) without writing a value: who has read the old state slowly can't put it back.
- What changes without an event ends by itself: the next session when it is over, a course's or trainer's name after a
  minute at most.

Who may look is asked before this is; no answer here holds anything of authorisation, nor a coordinate.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from time import monotonic
from typing import Final
from uuid import UUID

from caravan.db import Database, Tx
from caravan.db.redis import Redis, RedisError
from caravan.student_views.queries import Head, find_end
from caravan.telemetry.metrics import VIEW_FENCES, VIEW_READS, VIEW_WRITES

SECONDS_MAX: Final = 60  # how long a renamed course or trainer may be shown by the old name
JITTER: Final = 0.2
FENCE_SECONDS: Final = 120  # longer than anybody can be at reading a view


class Shown(StrEnum):
    """Which view."""

    HOME = "home"
    LEARNING = "learning"


@dataclass(frozen=True, slots=True)
class Made:
    """A view as it is answered. `until`: when time alone will change it."""

    head: Head
    now: datetime
    until: datetime | None
    body: bytes


Make = Callable[[Tx], Awaitable[Made]]

# A value is its mark, a line end and the answer: `7 0198... <student>\n{"version":7,...}`; a fence is `7\n`.
# Put a value, unless a newer one or a higher fence stands there.
PUT: Final = """
local held = tonumber(string.match(redis.call('getrange', KEYS[1], 0, 19), '^%d+'))
if held and held > tonumber(ARGV[1]) then return 0 end
redis.call('set', KEYS[1], ARGV[2], 'px', ARGV[3])
return 1
"""
# Raise fences, each to its version; a value of that version or a newer one stays, unless all of that age has to go.
FENCE: Final = """
local gone = 0
for at, key in ipairs(KEYS) do
  local version = ARGV[at + 2]
  local start = redis.call('getrange', key, 0, 39)
  local held = tonumber(string.match(start, '^%d+'))
  local forced = ARGV[2] == 'all' and held == tonumber(version)
  if not held or held < tonumber(version) or forced then
    if string.match(start, '^%d+ ') then gone = gone + 1 end
    redis.call('set', key, version .. '\\n', 'ex', ARGV[1])
  end
end
return gone
"""


def key_of(shown: Shown, student_id: UUID) -> str:
    return f"student:{shown}:{student_id}"


def mark_of(head: Head, student_id: UUID) -> bytes:
    """What a value must begin with to be shown now. The student's id is in it too: nobody is shown another's view."""
    return f"{head.version} {head.event_id or '-'} {student_id}\n".encode()


class ViewCache:
    """The views of this process, by way of Redis. `read` at the edge; `fence` from the cache-worker."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._making: dict[tuple[Shown, UUID, Head], asyncio.Task[bytes]] = {}

    async def read(self, db: Database, student_id: UUID, shown: Shown, make: Make) -> bytes:
        """The view as it is now, from Redis or made by `make`; raises what that raises.

        However many ask for the same at once, this process makes it once. Other processes may make it at the same time,
        each once: there are few, and a lock among them could be held by one that has died.
        """
        held = await self._get(shown, student_id)
        head = await find_end(db, student_id)
        mark = mark_of(head, student_id)
        if held is not None and held.startswith(mark):
            VIEW_READS.labels(shown, "hit").inc()
            return held[len(mark) :]
        if held is not None:
            VIEW_READS.labels(shown, "stale" if b" " in held.partition(b"\n")[0] else "miss").inc()
        # By head: what was begun before this request's head was there may be older than what it must be answered.
        place = shown, student_id, head
        making = self._making.get(place)
        if making is None:
            making = self._making[place] = asyncio.create_task(self._make(db, student_id, shown, make))
            making.add_done_callback(lambda done: self._made(place, done))
        return await asyncio.shield(making)

    async def peek(self, student_id: UUID, shown: Shown, head: Head) -> bytes | None:
        """What Redis would show at this head, for whoever doubts it; None where that is nothing."""
        try:
            held: bytes | None = await self._redis.call("GET", key_of(shown, student_id))
        except RedisError:
            return None
        mark = mark_of(head, student_id)
        return held[len(mark) :] if held is not None and held.startswith(mark) else None

    def _made(self, place: tuple[Shown, UUID, Head], done: asyncio.Task[bytes]) -> None:
        del self._making[place]
        if not done.cancelled():
            done.exception()  # whoever waited has heard it; perhaps nobody does any more

    async def _make(self, db: Database, student_id: UUID, shown: Shown, make: Make) -> bytes:
        began = monotonic()
        async with db.transaction("student-service", read_only=True) as tx:
            made = await make(tx)
        await self._put(shown, student_id, made, monotonic() - began)
        return made.body

    async def _get(self, shown: Shown, student_id: UUID) -> bytes | None:
        try:
            held: bytes | None = await self._redis.call("GET", key_of(shown, student_id))
        except RedisError:
            VIEW_READS.labels(shown, "error").inc()
            return None
        if held is None:
            VIEW_READS.labels(shown, "miss").inc()
        return held

    async def _put(self, shown: Shown, student_id: UUID, made: Made, age_seconds: float) -> None:
        seconds = SECONDS_MAX * random.uniform(1 - JITTER, 1)  # noqa: S311 - jitter: they don't all end at once
        if made.until is not None:
            seconds = min(seconds, (made.until - made.now) / timedelta(seconds=1) - age_seconds)
        if seconds < 0.001:
            return
        value = mark_of(made.head, student_id) + made.body
        try:
            stored = await self._redis.call(
                "EVAL", PUT, 1, key_of(shown, student_id), made.head.version, value, int(seconds * 1000)
            )
        except RedisError:
            VIEW_WRITES.labels(shown, "error").inc()
            return
        VIEW_WRITES.labels(shown, "stored" if stored else "refused").inc()

    async def fence(self, versions: Mapping[UUID, int]) -> bool:
        """From now on no value of these students older than its version is taken; whether Redis heard it."""
        try:
            await self._fence(versions, "older")
        except RedisError:
            VIEW_FENCES.labels("error").inc(len(versions))
            return False
        VIEW_FENCES.labels("done").inc(len(versions))
        return True

    async def clear(self, student_id: UUID, version: int) -> int:
        """Forget both views, also where they are of this very version; how many were there. Raises RedisError."""
        return await self._fence({student_id: version}, "all")

    async def _fence(self, versions: Mapping[UUID, int], which: str) -> int:
        if not versions:
            return 0
        keys = [(key_of(shown, student), version) for student, version in versions.items() for shown in Shown]
        names, numbers = [key for key, _ in keys], [version for _, version in keys]
        return int(await self._redis.call("EVAL", FENCE, len(names), *names, FENCE_SECONDS, which, *numbers))
