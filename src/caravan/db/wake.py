"""Wake-up hints between processes: one LISTEN connection, and one coalesced NOTIFY outside the business transactions.

A NOTIFY takes a lock of the whole cluster until its commit is flushed; so it has a transaction of its own, without
waiting for the flush (the rows it speaks of are already durable). Losing a hint costs time, never truth: every
listener also polls.

With a Redis the keys go over it first (`RedisHints`), and the NOTIFY that follows is marked: whoever hears Redis takes
no key from it twice, whoever doesn't has lost nothing. Workers are woken by the NOTIFY either way.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from contextlib import suppress
from time import monotonic
from typing import Any

import psycopg
import structlog

from caravan.db.pool import has_ended
from caravan.db.redis import Redis
from caravan.db.redis_hints import RedisHints

CHANNEL = "caravan"
PAYLOAD_BYTES_MAX = 7900  # PostgreSQL refuses 8000
EVERYTHING = "*"
KIND = "#"  # begins a key that says what kind of thing happened, not to whom; there are few, so they always fit
ALSO_PUBLISHED = "+"  # the first word of a payload whose keys went over Redis too
PING_SECONDS = 20.0
RETRY_SECONDS = 0.2

log: structlog.stdlib.BoundLogger = structlog.get_logger()

Listener = Callable[[frozenset[str]], None]


class _Way:
    """One way that hints go, out or in: it is told once that it is lost, and once that it is found again."""

    def __init__(self, lost: str, found: str) -> None:
        self._lost, self._found = lost, found
        self._lost_at: float | None = None

    def tell_lost(self, error: psycopg.Error) -> None:
        if self._lost_at is None:
            self._lost_at = monotonic()
            log.warning(self._lost, error=str(error).strip())

    def tell_found(self) -> None:
        if self._lost_at is not None:
            log.info(self._found, seconds=round(monotonic() - self._lost_at, 1))
        self._lost_at = None


class Wake:
    """Hints of this process and of the others.

    `send` tells this process's listeners at once and the other processes by one NOTIFY for whatever has gathered.
    A listener gets the set of keys; EVERYTHING in it means: look at all you care for. One that cares for a student
    says so by `watch`.
    """

    def __init__(self, url: str, redis: Redis | None = None) -> None:
        self._url = url
        self._over_redis = RedisHints(redis, self._tell) if redis else None
        self._listeners: list[Listener] = []
        self._subscribed = asyncio.Event()
        self._pending: set[str] = set()
        self._gathered = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._own_pid = 0  # of the connection that notifies: what it says is known here

    def subscribe(self, listener: Listener) -> None:
        self._listeners.append(listener)
        self._subscribed.set()

    def unsubscribe(self, listener: Listener) -> None:
        self._listeners.remove(listener)
        if not self._listeners:
            self._subscribed.clear()

    def watch(self, key: str) -> None:
        """This process has to hear of `key` now."""
        if self._over_redis:
            self._over_redis.watch(key)

    def unwatch(self, key: str) -> None:
        if self._over_redis:
            self._over_redis.unwatch(key)

    async def start(self, *, listen: bool = True) -> None:
        if listen and self._over_redis:
            self._over_redis.start()
        self._tasks.append(asyncio.create_task(self._notify_forever(), name="wake-notify"))
        if listen:
            self._tasks.append(asyncio.create_task(self._listen_forever(), name="wake-listen"))

    async def stop(self) -> None:
        if self._over_redis:
            await self._over_redis.stop()
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with suppress(asyncio.CancelledError):
                await task
        self._tasks.clear()

    def send(self, keys: Iterable[str]) -> None:
        """For `Database.on_hints`: never blocks, never raises."""
        keys = frozenset(keys)
        self._tell(keys)
        self._pending |= keys
        self._gathered.set()

    def _tell(self, keys: frozenset[str]) -> None:
        for listener in self._listeners:
            listener(keys)

    async def _notify_forever(self) -> None:
        way = _Way("wake-up hints not sent, pollers will find what waits", "wake-up hints are sent again")
        while True:
            try:
                async with await _connect(self._url) as connection:
                    await connection.execute("set synchronous_commit = off")
                    self._own_pid = connection.info.backend_pid
                    while True:
                        await self._gathered.wait()
                        if has_ended(connection):  # while nothing was said: the first hint after a crash matters too
                            break
                        self._gathered.clear()
                        keys, self._pending = self._pending, set()
                        payload = await self._publish(keys)
                        await connection.execute("select pg_notify(%s, %s)", (CHANNEL, payload))
                        way.tell_found()
            except psycopg.Error as error:
                way.tell_lost(error)
            except Exception as error:  # one bug must not silence this process for good
                log.error("wake-up hint not sent, pollers will find it", exc_info=error)
            self._pending.add(EVERYTHING)  # what was to be said is not known any more
            self._gathered.set()
            await asyncio.sleep(RETRY_SECONDS)

    async def _publish(self, keys: set[str]) -> str:
        """Over Redis, where there is one; what the NOTIFY is to say."""
        published = False
        kinds = {key for key in keys if key.startswith(KIND)}
        if self._over_redis and EVERYTHING not in keys:
            published = await self._over_redis.publish(keys - kinds)
        said = " ".join(sorted(keys))
        if len(said) > PAYLOAD_BYTES_MAX:
            said = " ".join([EVERYTHING, *sorted(kinds)])
        return f"{ALSO_PUBLISHED} {said}" if published else said

    def _hear(self, payload: str) -> None:
        """A NOTIFY; the workers look for themselves, whatever it says."""
        keys = payload.split()
        if keys[:1] == [ALSO_PUBLISHED] and self._over_redis:
            listening = self._over_redis
            if EVERYTHING in keys and listening.hears_all:
                keys.remove(EVERYTHING)
            keys = [key for key in keys if not listening.hears(key)]
        self._tell(frozenset(keys))

    async def _listen_forever(self) -> None:
        """As long as somebody here wants to hear: each process that listens is woken by every NOTIFY."""
        way = _Way("wake-up hints not heard, polling meanwhile", "wake-up hints are heard again")
        while True:
            await self._subscribed.wait()
            try:
                async with await _connect(self._url) as connection:
                    await connection.execute(f"listen {CHANNEL}")
                    way.tell_found()
                    self._tell(frozenset((EVERYTHING,)))  # whatever was said while nobody listened
                    await self._hear_from(connection)
            except psycopg.Error as error:
                way.tell_lost(error)
            except Exception as error:  # a listener's bug: the others go on hearing
                log.error("wake-up hint not taken in, listening anew", exc_info=error)
            await asyncio.sleep(RETRY_SECONDS)

    async def _hear_from(self, connection: psycopg.AsyncConnection[Any]) -> None:
        """Until a hint comes that nobody here wants any more."""
        while True:
            async for note in connection.notifies(timeout=PING_SECONDS):
                if not self._listeners:
                    return
                if note.pid != self._own_pid:
                    self._hear(note.payload)
            await connection.execute("select 1")  # a half-open socket answers nothing: find out


async def _connect(url: str) -> psycopg.AsyncConnection[Any]:
    return await psycopg.AsyncConnection.connect(
        url,
        autocommit=True,
        application_name="caravan wake",
        keepalives_idle=5,
        keepalives_interval=2,
        connect_timeout=5,
    )
