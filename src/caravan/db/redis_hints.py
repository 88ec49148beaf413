"""Hints over Redis: one channel per student, heard by the processes where that student is connected.

A hint says that something happened, never what: whoever hears it reads the feed. So it may be lost, doubled or late;
`Wake` sends each one over PostgreSQL too, marked, for those who don't hear Redis at that moment.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from contextlib import suppress
from math import inf
from typing import Any, Final

from caravan.db.redis import Redis, RedisAway, RedisError, close_now, connect, pause_seconds
from caravan.telemetry.metrics import REDIS_CHANNELS, REDIS_HINTS

PREFIX: Final = "student:"
PING_SECONDS: Final = 2.0
SILENT_SECONDS: Final = 5.0  # without even an answer to a ping: the connection is half open
CHANNELS_PER_COMMAND: Final = 500

Listener = Callable[[frozenset[str]], None]


class RedisHints:
    """`publish` to everybody; `watch` what concerns this process. One connection of its own, made at the first watch.

    `tell` gets keys that may have news; EVERYTHING is never among them, because what is watched is told key by key
    when its subscription stands.
    """

    def __init__(self, redis: Redis, tell: Listener) -> None:
        self._redis = redis
        self._tell = tell
        self._watched: set[str] = set()
        self._asked: set[str] = set()
        self._heard: set[str] = set()
        self._changed = asyncio.Event()
        self._listening: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._listening = asyncio.create_task(self._listen_forever(), name="redis-hints")

    async def stop(self) -> None:
        if self._listening is not None:
            self._listening.cancel()
            with suppress(asyncio.CancelledError):
                await self._listening
            self._listening = None

    def watch(self, key: str) -> None:
        self._watched.add(key)
        self._changed.set()

    def unwatch(self, key: str) -> None:
        self._watched.discard(key)
        self._changed.set()

    def hears(self, key: str) -> bool:
        """Whether what is published about `key` reaches this process now."""
        return key in self._heard

    @property
    def hears_all(self) -> bool:
        """Whether that is so of everything that is watched."""
        return self._watched <= self._heard

    async def publish(self, keys: Collection[str]) -> bool:
        """Whether Redis took all of them; what it has taken may still be lost on its way."""
        try:
            await self._redis.ask([("PUBLISH", PREFIX + key, "") for key in keys])
        except RedisError:
            REDIS_HINTS.labels("failed").inc(len(keys))
            return False
        REDIS_HINTS.labels("published").inc(len(keys))
        return True

    # -------------------------------------------------------------- listening

    async def _listen_forever(self) -> None:
        attempt = 0
        while True:
            while not self._watched:
                self._changed.clear()
                await self._changed.wait()
            try:
                connection = await connect(self._redis.url)
            except RedisAway:  # the commands' connection says so
                attempt += 1
                await asyncio.sleep(pause_seconds(attempt))
                continue
            attempt = 0
            try:
                async with asyncio.TaskGroup() as parts:
                    parts.create_task(self._ask(connection))
                    parts.create_task(self._listen(connection))
            except* _Broken:
                pass
            finally:
                close_now(connection)
                lost, self._heard = frozenset(self._heard), set()
                self._asked = set()
                REDIS_CHANNELS.set(0)
            self._tell(lost)  # what was on its way when the connection broke
            await asyncio.sleep(pause_seconds(0))

    async def _ask(self, connection: Any) -> None:
        """Subscribe to what is watched and to nothing else; ping in between."""
        while True:
            self._changed.clear()
            wanted = set(self._watched)
            for verb, keys in (("SUBSCRIBE", wanted - self._asked), ("UNSUBSCRIBE", self._asked - wanted)):
                ordered = sorted(keys)
                for at in range(0, len(ordered), CHANNELS_PER_COMMAND):
                    some = ordered[at : at + CHANNELS_PER_COMMAND]
                    await _sent(connection, verb, *(PREFIX + key for key in some))
            self._asked = wanted
            try:
                async with asyncio.timeout(PING_SECONDS):
                    await self._changed.wait()
            except TimeoutError:
                await _sent(connection, "PING")

    async def _listen(self, connection: Any) -> None:
        while True:
            try:
                async with asyncio.timeout(SILENT_SECONDS):
                    kind, channel, *_ = await connection.read_response(timeout=inf, disconnect_on_error=False)
            except Exception as error:
                raise _Broken from error
            key = channel.decode().removeprefix(PREFIX)
            if kind == b"message":
                REDIS_HINTS.labels("heard").inc()
            elif kind == b"subscribe":
                self._heard.add(key)
            elif kind == b"unsubscribe":
                self._heard.discard(key)
                continue
            else:
                continue  # the answer to a ping
            REDIS_CHANNELS.set(len(self._heard))
            self._tell(frozenset((key,)))


class _Broken(Exception):
    """The subscription's connection is over."""


async def _sent(connection: Any, *command: str) -> None:
    try:
        await connection.send_command(*command, check_health=False)
    except Exception as error:
        raise _Broken from error
