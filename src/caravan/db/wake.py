"""Wake-up hints between processes: one LISTEN connection, and one coalesced NOTIFY outside the business transactions.

A NOTIFY takes a lock of the whole cluster until its commit is flushed; so it has a transaction of its own, without
waiting for the flush (the rows it speaks of are already durable). Losing a hint costs time, never truth: every
listener also polls.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import psycopg
import structlog

CHANNEL = "caravan"
PAYLOAD_BYTES_MAX = 7900  # PostgreSQL refuses 8000
EVERYTHING = "*"
PING_SECONDS = 20.0

log: structlog.stdlib.BoundLogger = structlog.get_logger()

Listener = Callable[[frozenset[str]], None]


class Wake:
    """Hints of this process and of the others.

    `send` tells this process's listeners at once and the other processes by one NOTIFY for whatever has gathered.
    A listener gets the set of keys; EVERYTHING in it means: look at all you care for.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._listeners: list[Listener] = []
        self._pending: set[str] = set()
        self._gathered = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    def subscribe(self, listener: Listener) -> None:
        self._listeners.append(listener)

    def unsubscribe(self, listener: Listener) -> None:
        self._listeners.remove(listener)

    async def start(self, *, listen: bool = True) -> None:
        self._tasks.append(asyncio.create_task(self._notify_forever(), name="wake-notify"))
        if listen:
            self._tasks.append(asyncio.create_task(self._listen_forever(), name="wake-listen"))

    async def stop(self) -> None:
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
        while True:
            try:
                async with await _connect(self._url) as connection:
                    await connection.execute("set synchronous_commit = off")
                    while True:
                        await self._gathered.wait()
                        self._gathered.clear()
                        keys, self._pending = self._pending, set()
                        payload = " ".join(sorted(keys))
                        if len(payload) > PAYLOAD_BYTES_MAX:
                            payload = EVERYTHING
                        await connection.execute("select pg_notify(%s, %s)", (CHANNEL, payload))
            except psycopg.Error as error:
                log.warning("wake-up hint not sent, pollers will find it", error=str(error).strip())
                await asyncio.sleep(0.2)

    async def _listen_forever(self) -> None:
        while True:
            try:
                async with await _connect(self._url) as connection:
                    await connection.execute(f"listen {CHANNEL}")
                    self._tell(frozenset((EVERYTHING,)))  # whatever was said while nobody listened
                    while True:
                        async for note in connection.notifies(timeout=PING_SECONDS):
                            self._tell(frozenset(note.payload.split()))
                        await connection.execute("select 1")  # a half-open socket answers nothing: find out
            except psycopg.Error as error:
                log.warning("listening for hints again", error=str(error).strip())
                await asyncio.sleep(0.2)


async def _connect(url: str) -> psycopg.AsyncConnection[Any]:
    return await psycopg.AsyncConnection.connect(
        url,
        autocommit=True,
        application_name="caravan wake",
        keepalives_idle=5,
        keepalives_interval=2,
        connect_timeout=5,
    )
