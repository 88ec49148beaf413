"""One connection to a Redis that can be lost at any time, and is only ever a help: nobody waits for it.

All commands of the process go over one connection, in order, so a caller that goes away leaves its answer to be read
and dropped: no one can be given another's. The connection is made and made again in the background; until it stands,
and as soon as one answer is late, every call fails at once. So a Redis that hangs costs a few calls
`ANSWER_SECONDS`, and all later ones nothing.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from math import inf
from time import monotonic
from typing import Any, Final, Self

import structlog

from caravan.telemetry.metrics import REDIS_ERRORS, REDIS_OUTAGES, REDIS_UP

CONNECT_SECONDS: Final = 1.0
ANSWER_SECONDS: Final = 0.2
GRACE_SECONDS: Final = 0.01  # for an answer that came while our own loop was busy
PAUSE_SECONDS_MIN: Final = 0.05
PAUSE_SECONDS_MAX: Final = 1.0

log: structlog.stdlib.BoundLogger = structlog.get_logger()

Command = Sequence[str | bytes | int]


class RedisError(Exception):
    """Redis was no help this time; the caller goes on without."""


class RedisAway(RedisError):
    """There is no connection, or it broke before the answer came."""


class RedisRefused(RedisError):
    """Redis answered with an error: it is full, read-only, or was asked nonsense."""


def make_connection(url: str) -> Any:
    """A connection of redis-py, not made yet; nothing in it waits by itself. Imported here: few have a Redis."""
    from redis.asyncio.connection import Connection, parse_url

    options: dict[str, Any] = dict(parse_url(url))
    kind = options.pop("connection_class", Connection)
    return kind(**options, protocol=2, socket_timeout=None, socket_connect_timeout=CONNECT_SECONDS, driver_info=None)


async def connect(url: str) -> Any:
    """An open connection, signed in and answering. Raises RedisAway, with what is wrong in one line."""
    from redis.exceptions import AuthenticationError, AuthorizationError
    from redis.exceptions import RedisError as ClientError

    connection = make_connection(url)
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            await connection.connect()
            await connection.send_command("PING", check_health=False)
            await connection.read_response(timeout=inf)
    except BaseException as error:
        await connection.disconnect(nowait=True)
        if isinstance(error, TimeoutError):
            raise RedisAway(f"no answer within {CONNECT_SECONDS:.0f} s") from None
        if isinstance(error, (AuthenticationError, AuthorizationError)):
            raise RedisAway(f"wrong user or password ({_line(error)})") from None
        if isinstance(error, (ClientError, OSError)):
            raise RedisAway(_line(error)) from None
        raise
    return connection


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def pause_seconds(attempt: int) -> float:
    """How long to wait after the `attempt`th failure in a row, from 1: doubled, capped, with jitter."""
    longest = min(PAUSE_SECONDS_MAX, PAUSE_SECONDS_MIN * 2**attempt)
    return longest * random.uniform(0.5, 1)  # noqa: S311 - jitter


class Redis:
    """Redis behind one address (`REDIS_URL`). `open` it; `call` and `ask` answer or raise RedisError, soon."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._wire: Any = None
        self._waiting: deque[asyncio.Future[Any]] = deque()
        self._found = asyncio.Event()
        self._keeping: asyncio.Task[None] | None = None
        self._lost_at: float | None = None
        self._refused: set[str] = set()
        self._why: str | None = None

    def open(self) -> Self:
        """Begin to connect; returns at once."""
        self._keeping = asyncio.create_task(self._keep(), name="redis")
        self._keeping.add_done_callback(_say_why)
        return self

    async def close(self) -> None:
        if self._keeping is not None:
            self._keeping.cancel()
            with suppress(asyncio.CancelledError):
                await self._keeping
            self._keeping = None

    async def __aenter__(self) -> Self:
        return self.open()

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def is_up(self) -> bool:
        return self._wire is not None

    async def wait_until_up(self, seconds: float) -> bool:
        """For whoever has nothing else to do: a command, a test."""
        try:
            async with asyncio.timeout(seconds):
                await self._found.wait()
        except TimeoutError:
            pass
        return self.is_up

    # -------------------------------------------------------------- asking

    async def call(self, *command: str | bytes | int) -> Any:
        """The answer to one command. Raises RedisAway, RedisRefused."""
        [answer] = await self.ask([command])
        return answer

    async def ask(self, commands: Sequence[Command]) -> list[Any]:
        """The answers to several commands, sent together. Raises as `call` does, for the first that failed."""
        if not commands:
            return []
        try:
            answers = await self._exchange(commands)
        except RedisAway:
            REDIS_ERRORS.labels("away").inc()
            raise
        except OSError as error:
            REDIS_ERRORS.labels("away").inc()
            raise RedisAway(_line(error)) from error
        for command, answer in zip(commands, answers, strict=True):
            self._judge(str(command[0]), answer)
        return answers

    async def _exchange(self, commands: Sequence[Command]) -> list[Any]:
        """Send and wait; the answers, of which some may be exceptions. Here the process touches Redis."""
        wire = self._wire
        if wire is None:
            raise RedisAway("there is no connection")
        loop = asyncio.get_running_loop()
        answers = [loop.create_future() for _ in commands]
        # Nothing may come between putting these into the line and writing: answers are told apart by their order.
        packed = wire.pack_commands(commands)
        self._waiting.extend(answers)
        late = loop.call_later(ANSWER_SECONDS, self._expire, wire, answers[-1], GRACE_SECONDS)
        try:
            await wire.send_packed_command(packed, check_health=False)
            return [await answer for answer in answers]
        except RedisAway:
            raise
        except Exception as error:  # redis-py closed the connection; the reader hears of it too
            self._drop(wire)
            raise RedisAway(_line(error)) from error
        finally:
            late.cancel()
            for answer in answers:
                if not answer.cancel() and not answer.cancelled():  # this caller went away, or stopped at the first
                    answer.exception()

    def _expire(self, wire: Any, answer: asyncio.Future[Any], grace_seconds: float) -> None:
        if answer.done() or wire is not self._wire:
            return
        if grace_seconds:
            asyncio.get_running_loop().call_later(grace_seconds, self._expire, wire, answer, 0.0)
            return
        self._drop(wire, f"no answer within {ANSWER_SECONDS * 1000:.0f} ms")

    def _judge(self, name: str, answer: Any) -> None:
        """Raises RedisRefused for an error; says once that this kind of command is refused, and once that it isn't."""
        if not isinstance(answer, Exception):
            if name in self._refused:
                self._refused.discard(name)
                log.info("Redis takes it again", command=name, setting="REDIS_URL")
            return
        REDIS_ERRORS.labels("refused").inc()
        if name not in self._refused:
            self._refused.add(name)
            log.warning("Redis refuses, going on without", command=name, setting="REDIS_URL", error=_line(answer))
        raise RedisRefused(_line(answer))

    # -------------------------------------------------------------- the connection

    async def _keep(self) -> None:
        """Connect, read answers until the connection breaks, and connect again."""
        attempt = 0
        try:
            while True:
                try:
                    wire = await connect(self.url)
                except RedisAway as error:
                    attempt += 1
                    if attempt > 1:  # a process that starts may be too busy itself to hear the first answer in time
                        self._tell_lost(str(error))
                    await asyncio.sleep(pause_seconds(attempt))
                    continue
                attempt = 0
                self._tell_found()
                self._wire = wire
                self._found.set()
                try:
                    error = await self._read(wire)
                finally:
                    self._drop(wire)
                self._tell_lost(error)
                await asyncio.sleep(pause_seconds(0))
        finally:
            REDIS_UP.set(0)

    async def _read(self, wire: Any) -> str:
        """Give answers to those who wait, in order; why it ended, in a line."""
        from redis.exceptions import ResponseError

        try:
            while True:
                try:
                    answer = await wire.read_response(timeout=inf, disconnect_on_error=False)
                except ResponseError as error:
                    answer = error
                waiting = self._waiting.popleft()
                if not waiting.done():
                    waiting.set_result(answer)
        except Exception as error:
            return self._why or _line(error)

    def _drop(self, wire: Any, why: str | None = None) -> None:
        """This connection is over: everybody who waits on it hears so now."""
        if wire is not self._wire:
            return
        self._wire = None
        self._found.clear()
        self._why = why
        waiting, self._waiting = self._waiting, deque()
        for answer in waiting:
            if not answer.done():
                answer.set_exception(RedisAway(why or "the connection broke"))
        close_now(wire)

    def _tell_lost(self, error: str) -> None:
        if self._lost_at is None:
            self._lost_at = monotonic()
            self._refused.clear()
            REDIS_UP.set(0)
            REDIS_OUTAGES.inc()
            log.warning("Redis is away, going on without it", setting="REDIS_URL", error=error)

    def _tell_found(self) -> None:
        REDIS_UP.set(1)
        if self._lost_at is not None:
            log.info("Redis is back", seconds=round(monotonic() - self._lost_at, 1))
        self._lost_at = None


def _say_why(ended: asyncio.Task[None]) -> None:
    if not ended.cancelled() and (error := ended.exception()):
        log.error("Redis is given up", exc_info=error)  # a bug; the process goes on without


def close_now(connection: Any) -> None:
    """Cut it, without waiting for a server that may never answer; its reader wakes up."""
    writer: Any = getattr(connection, "_writer", None)
    if writer is not None:
        writer.transport.abort()
        connection._close()
