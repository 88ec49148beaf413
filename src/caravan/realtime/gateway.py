"""The one task that moves frames from students' feeds to sockets.

A socket has a cursor per student: the last number it was given. A hint, the poll, a resume and room in a queue that was
full all do the same: they make the gateway read the feed after the cursor. So catching up and live are one path, and a
socket that is slow costs a bounded queue and nothing else, because what it has not read yet stays in the feed.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import monotonic
from uuid import UUID

import psycopg
import psycopg_pool
import structlog

from caravan.db import Database
from caravan.db.wake import EVERYTHING, Wake
from caravan.realtime import protocol
from caravan.realtime.access import Visitor, recheck
from caravan.realtime.feed import Answer, Ask, list_heads, read_feeds
from caravan.realtime.traces import trace_frames
from caravan.telemetry import tracing

POLL_SECONDS = 2.0
RECHECK_SECONDS = 5.0
RETRY_SECONDS = 1.0
QUEUE_FRAMES_MAX = 64
ASKS_PER_READ = 500

log: structlog.stdlib.BoundLogger = structlog.get_logger()


def nobody() -> None:
    """Whom a socket stirs that no connection holds."""


@dataclass(eq=False, slots=True)
class Socket:
    """One connection: its cursors, its queue, and why it must end.

    `held` until the client has had the chance to say where it left off. `stirred` is called whenever there is something
    in the queue, or it must end; it must not block or raise.
    """

    token_hash: bytes
    cursors: dict[UUID, int]
    held: bool = True
    queue: deque[str] = field(default_factory=deque[str])
    closing: int | None = None
    stirred: Callable[[], None] = nobody

    @property
    def room(self) -> int:
        return 0 if self.held or self.closing else max(0, QUEUE_FRAMES_MAX - len(self.queue))

    def put(self, frame: str) -> None:
        self.queue.append(frame)
        self.stirred()

    def end(self, code: int) -> None:
        """Close it with this code, without what is still queued."""
        self.closing = code
        self.stirred()


class Gateway:
    """Every socket of this process. `run` it beside the server; routes `join`, `resume` and `leave`."""

    def __init__(self, db: Database, wake: Wake) -> None:
        self._db = db
        self._sockets: set[Socket] = set()
        self._by_student: dict[str, set[Socket]] = {}
        self._news: set[str] = set()
        self._everything = False
        self._stirred = asyncio.Event()
        self.frames_sent = 0
        self._wake = wake
        wake.subscribe(self._hear)

    @property
    def sockets(self) -> int:
        return len(self._sockets)

    def join(self, visitor: Visitor) -> Socket:
        """A socket that hears nothing yet: `resume` says from where, or that it begins at the heads it came with."""
        socket = Socket(visitor.token_hash, dict(visitor.heads))
        self._sockets.add(socket)
        for student in socket.cursors:
            self._remember(socket, student)
        return socket

    def resume(self, socket: Socket, after: Mapping[UUID, int] | None = None) -> None:
        socket.held = False
        socket.cursors.update(after or {})
        self.stir(socket)

    def begin_unasked(self, socket: Socket) -> None:
        """No resume came: its stream begins where the feeds ended when it was let in, and a hello says so."""
        if socket.held:
            socket.put(protocol.hello(socket.cursors))
            self.resume(socket)

    def stir(self, socket: Socket) -> None:
        """Look at its students again: it has room now, or other cursors."""
        self._news.update(str(student) for student in socket.cursors)
        self._stirred.set()

    def leave(self, socket: Socket) -> None:
        self._sockets.discard(socket)
        for student in socket.cursors:
            self._forget(socket, student)

    async def run(self, stop: asyncio.Event) -> None:
        """Deliver until `stop`; database trouble is waited out, the poll finds what was missed."""
        stopper = asyncio.create_task(_set_when(stop, self._stirred))
        polled = rechecked = monotonic()
        try:
            while not stop.is_set():
                await self._wait(min(polled + POLL_SECONDS, rechecked + RECHECK_SECONDS) - monotonic())
                try:
                    if monotonic() >= rechecked + RECHECK_SECONDS:
                        await self._recheck()
                        rechecked = monotonic()
                    if self._everything or monotonic() >= polled + POLL_SECONDS:
                        self._everything = False
                        await self._poll()
                        polled = monotonic()
                    await self._deliver()
                except (psycopg.Error, psycopg_pool.PoolTimeout) as error:
                    log.warning("feeds not read, trying again", error=str(error).strip())
                    self._everything = True
                    await asyncio.sleep(RETRY_SECONDS)
        finally:
            stopper.cancel()

    def _hear(self, keys: frozenset[str]) -> None:
        self._everything = self._everything or EVERYTHING in keys
        ours = keys & self._by_student.keys()
        self._news |= ours
        if ours or (self._everything and self._sockets):
            self._stirred.set()

    async def _wait(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(max(0, seconds)):
                await self._stirred.wait()
        except TimeoutError:
            pass
        self._stirred.clear()

    async def _poll(self) -> None:
        """One statement for everybody who is connected; none where nobody is."""
        if not self._by_student:
            return
        async with self._db.transaction("websocket-server", read_only=True) as tx:
            heads = await list_heads(tx, [UUID(key) for key in self._by_student])
        for student, head in heads.items():
            if any(socket.cursors.get(student) != head for socket in self._by_student.get(str(student), ())):
                self._news.add(str(student))

    async def _deliver(self) -> None:
        """Read on for every socket that has news and room, until none is left."""
        while asks := self._asks():
            frames = self._hand_out(asks, await read_feeds(self._db, asks))
            if tracing.active() and frames:
                await trace_frames(self._db, frames)

    def _hand_out(self, asks: Sequence[Ask], answers: Sequence[Answer]) -> Counter[str]:
        """Queue what was read; to how many sockets each frame went."""
        frames: Counter[str] = Counter()
        for ask, answer in zip(asks, answers, strict=True):
            for socket in list(self._by_student.get(str(ask.student), ())):
                if socket.cursors.get(ask.student) != ask.after or not socket.room:
                    continue  # it moved while we read, and stirred us
                if answer.resync:
                    socket.cursors[ask.student] = answer.head
                    socket.put(protocol.resync(ask.student, answer.head))
                for seq, frame in answer.frames[: socket.room] if not answer.resync else ():
                    socket.cursors[ask.student] = seq
                    socket.put(frame)
                    self.frames_sent += 1
                    frames[frame] += 1
                if socket.cursors[ask.student] < answer.head:
                    self._news.add(str(ask.student))
        return frames

    def _asks(self) -> list[Ask]:
        """The distinct places to read on from: sockets at the same place share one reading."""
        rooms: dict[tuple[UUID, int], int] = {}
        while self._news and len(rooms) < ASKS_PER_READ:
            key = self._news.pop()
            for socket in self._by_student.get(key, ()):
                if socket.room:
                    place = UUID(key), socket.cursors[UUID(key)]
                    rooms[place] = max(rooms.get(place, 0), socket.room)
        return [Ask(student, after, room) for (student, after), room in rooms.items()]

    async def _recheck(self) -> None:
        """Who may still listen, and to whom: a disabled account or an ended session loses its sockets."""
        sockets = list(self._sockets)
        if not sockets:
            return
        async with self._db.transaction("websocket-server", read_only=True) as tx:
            visitors = await recheck(tx, {socket.token_hash for socket in sockets})
        for socket in self._sockets.intersection(sockets):  # some have left while we asked
            visitor = visitors.get(socket.token_hash)
            if visitor is None:
                socket.end(protocol.CLOSE_UNAUTHORIZED)
                continue
            for student in socket.cursors.keys() - visitor.heads.keys():
                self._forget(socket, student)
                del socket.cursors[student]
            for student in visitor.heads.keys() - socket.cursors.keys():
                socket.cursors[student] = visitor.heads[student]
                self._remember(socket, student)

    def _remember(self, socket: Socket, student: UUID) -> None:
        listening = self._by_student.setdefault(str(student), set())
        if not listening:
            self._wake.watch(str(student))
        listening.add(socket)

    def _forget(self, socket: Socket, student: UUID) -> None:
        listening = self._by_student.get(str(student), set())
        listening.discard(socket)
        if not listening and self._by_student.pop(str(student), None) is not None:
            self._wake.unwatch(str(student))


async def _set_when(stop: asyncio.Event, stirred: asyncio.Event) -> None:
    await stop.wait()
    stirred.set()
