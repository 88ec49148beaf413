"""Every place where the product touches the world, counted while it runs; and at any of them, a fault.

A point is a statement (begin, commit and savepoints are statements too: all of them pass `AsyncCursor.execute`), a
wake-up hint (`Wake.send`), a frame for a socket (`Socket.put`) or commands to Redis (`Redis._exchange`). They are
wrapped from outside while `Points` is installed; the product knows nothing of it.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import pkgutil
import signal
import socket
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import Any

import psycopg
from psycopg import sql

import caravan
from caravan.db.redis import Command, Redis
from caravan.db.wake import Wake
from caravan.realtime.gateway import Socket


class Fault(StrEnum):
    """What goes wrong. Each happens before the touch (instead of it, where it can't follow) or after it."""

    KILLED = "killed"  # SIGKILL, nothing runs any more
    EXCEPTION = "exception"  # a bug
    LIED = "done-reported-failed"  # before: neither done; after: done, and the caller hears that the connection failed
    SERIALIZATION = "40001"
    DEADLOCK = "40P01"
    DROPPED = "connection-dropped"
    CANCELLED = "cancelled"


BEFORE, AFTER = "before", "after"
STATEMENT, HINT, FRAME, CACHE = "statement", "hint", "frame", "cache"
# The others are no statements: the database can't answer them. What can happen there is what is left.
ELSEWHERE = (Fault.KILLED, Fault.EXCEPTION, Fault.DROPPED, Fault.CANCELLED)


class Bug(Exception):
    """The injected bug."""


@dataclass(frozen=True, slots=True)
class Point:
    kind: str
    label: str


@dataclass(frozen=True, slots=True)
class Strike:
    """A fault at the `at`th point from now on (from 0), or from the strike before it.

    With a label only the points of that name count: a statement keeps its name and turn in every case, its number not,
    because how often a search is repeated depends on the purchase.
    """

    at: int
    when: str
    fault: Fault
    label: str = ""

    def __str__(self) -> str:
        place = f"{self.label}#{self.at}" if self.label else self.at
        return f"{place}{'+' if self.when == AFTER else '-'}{self.fault}"


Place = tuple[str, int]  # a label, and the how manieth of that name (from 0)


def places_of(seen: Sequence[Point]) -> list[Place]:
    """Where each of a run's points is, in a way that other runs of the same step share."""
    turns = Counter[str]()
    places: list[Place] = []
    for point in seen:
        places.append((point.label, turns[point.label]))
        turns[point.label] += 1
    return places


def strikes_at(point: Point) -> list[tuple[str, Fault]]:
    """All that can go wrong at a point."""
    if point.kind != STATEMENT:
        return [(when, fault) for when in (BEFORE, AFTER) for fault in ELSEWHERE]
    # A commit that was done can't fail to be serialised any more; everything else can come after it.
    impossible = {Fault.SERIALIZATION, Fault.DEADLOCK} if point.label == "commit" else set[Fault]()
    return [(when, fault) for when in (BEFORE, AFTER) for fault in Fault if when == BEFORE or fault not in impossible]


class Points:
    """Installed once per process; idle unless something is counted or struck."""

    def __init__(self) -> None:
        self.seen: list[Point] = []
        self.fired: list[Fault] = []
        self.task: asyncio.Task[Any] | None = None
        self._watching = False
        self._pending: list[Strike] = []
        self._left = 0
        self._execute = psycopg.AsyncCursor[Any].execute
        self._send = Wake.send
        self._put = Socket.put
        self._exchange = Redis._exchange  # pyright: ignore[reportPrivateUsage]

    def install(self) -> None:
        points = self

        async def execute(cursor: Any, query: Any, params: Any = None, **options: Any) -> Any:
            return await points.statement(cursor, query, params, options)

        def send(wake: Wake, keys: Iterable[str]) -> None:
            points.touch(Point(HINT, "wake-up hint"), lambda: points._send(wake, keys))

        def put(receiver: Socket, frame: str) -> None:
            points.touch(Point(FRAME, "frame to a socket"), lambda: points._put(receiver, frame))

        async def exchange(redis: Redis, commands: Sequence[Command]) -> list[Any]:
            return await points.exchange(redis, commands)

        setattr(Redis, "_exchange", exchange)  # noqa: B010
        setattr(psycopg.AsyncCursor, "execute", execute)  # noqa: B010 - the checker knows that it isn't the same
        setattr(Wake, "send", send)  # noqa: B010
        setattr(Socket, "put", put)  # noqa: B010

    def uninstall(self) -> None:
        psycopg.AsyncCursor.execute = self._execute
        Wake.send = self._send
        Socket.put = self._put
        setattr(Redis, "_exchange", self._exchange)  # noqa: B010

    @contextmanager
    def watching(self, strikes: Sequence[Strike] = ()) -> Generator[None]:
        """Count the points that are passed, and strike. `seen` and `fired` tell afterwards."""
        self.seen, self.fired = [], []
        self._pending = list(strikes)
        self._left = strikes[0].at if strikes else -1
        self._watching = True
        try:
            yield
        finally:
            self._watching = False

    @contextmanager
    def paused(self) -> Generator[None]:
        """For what the harness itself asks meanwhile."""
        watching, self._watching = self._watching, False
        try:
            yield
        finally:
            self._watching = watching

    @property
    def pending(self) -> list[Strike]:
        """What has not been struck yet."""
        return self._pending

    # -- the touches

    async def statement(self, cursor: Any, query: Any, params: Any, options: dict[str, Any]) -> Any:
        if not self._watching:
            return await self._execute(cursor, query, params, **options)
        strike = self._pass(Point(STATEMENT, label_of(query)))
        if strike and strike.when == BEFORE:
            await self._strike(strike, cursor.connection)
        result = await self._execute(cursor, query, params, **options)
        if strike and strike.when == AFTER:
            await self._strike(strike, cursor.connection)
        return result

    async def exchange(self, redis: Redis, commands: Sequence[Command]) -> list[Any]:
        strike = self._pass(Point(CACHE, f"Redis {commands[0][0]}")) if self._watching else None
        if strike and strike.when == BEFORE:
            self._strike_now(strike)
        answers = await self._exchange(redis, commands)
        if strike and strike.when == AFTER:
            self._strike_now(strike)
        return answers

    def touch(self, point: Point, do: Callable[[], None]) -> None:
        strike = self._pass(point) if self._watching else None
        if strike and strike.when == BEFORE:
            self._strike_now(strike)
        do()
        if strike and strike.when == AFTER:
            self._strike_now(strike)

    def _pass(self, point: Point) -> Strike | None:
        self.seen.append(point)
        if not self._pending:
            return None
        if self._pending[0].label in ("", point.label):
            self._left -= 1
        if self._left >= 0 or (self._pending[0].when, self._pending[0].fault) not in strikes_at(point):
            return None  # not yet; or a second fault that can't happen here, and does at the next point where it can
        strike = self._pending.pop(0)
        self.fired.append(strike.fault)
        self._left = self._pending[0].at if self._pending else -1
        return strike

    # -- the faults

    async def _strike(self, strike: Strike, connection: psycopg.AsyncConnection[Any]) -> None:
        match strike.fault:
            case Fault.LIED:
                raise psycopg.OperationalError("the connection failed before the answer came (injected)")
            case Fault.SERIALIZATION | Fault.DEADLOCK:
                # Said by the server itself, so that the transaction is in the state in which it then is.
                cursor = connection.cursor()
                await self._execute(cursor, RAISE[strike.fault])
            case Fault.DROPPED:
                drop(connection)
            case _:
                self._strike_now(strike)

    def _strike_now(self, strike: Strike) -> None:
        match strike.fault:
            case Fault.KILLED:
                os.kill(os.getpid(), signal.SIGKILL)
            case Fault.CANCELLED:
                assert self.task is not None
                self.task.cancel()
            case Fault.DROPPED:
                raise ConnectionError("the listener's connection is gone (injected)")
            case _:
                raise Bug("injected")


RAISE = {
    Fault.SERIALIZATION: b"do $$ begin raise exception 'injected' using errcode = '40001'; end $$",
    Fault.DEADLOCK: b"do $$ begin raise exception 'injected' using errcode = '40P01'; end $$",
}


def drop(connection: psycopg.AsyncConnection[Any]) -> None:
    """Cut the wire; the server rolls back when it notices, we hear of it at the next statement."""
    with socket.socket(fileno=os.dup(connection.pgconn.socket)) as wire:
        wire.shutdown(socket.SHUT_RDWR)


def label_of(query: Any) -> str:
    """The statement's name in the product where it is a constant, else its first words."""
    if isinstance(query, sql.Composable):
        query = query.as_bytes()
    text = query.decode() if isinstance(query, bytes) else str(query)
    name = _constants().get(text)
    return name or " ".join(text.split())[:40].split(";")[0].replace("/", " ")  # a case's name has a / between strikes


@cache
def _constants() -> dict[str, str]:
    found: dict[str, str] = {}
    for module in pkgutil.walk_packages(caravan.__path__, "caravan."):
        if module.name.endswith("__main__"):
            continue
        for name, value in vars(importlib.import_module(module.name)).items():
            if name.isupper() and isinstance(value, str) and " " in value:
                found.setdefault(value, f"{module.name.removeprefix('caravan.')}.{name}")
    return found


points = Points()
