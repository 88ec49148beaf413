"""What happens on an open socket, in callbacks: no task waits for it, so that a socket that is idle is a few objects.

The server keeps the line (`apps/connections.WebSocketLine`): it calls a `Listener` when something happens. Everything
runs on the event loop and returns at once; what a client is too slow to take waits in the socket's bounded queue, and
behind that in the student's feed.
"""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import Protocol

from caravan.realtime import protocol
from caravan.realtime.gateway import QUEUE_FRAMES_MAX, Gateway, Socket, nobody

# How long the stream waits for a first frame that says where the client left off.
RESUME_SECONDS = 1.0
SEND_SECONDS = 10.0
BAD_FRAMES_MAX = 5
FRAMES_PER_MINUTE_MAX = 60


class Listener(Protocol):
    """Who takes a line over."""

    def hear(self, text: str | None) -> None:
        """The client said something; None: not in text."""

    def pause(self) -> None:
        """The client doesn't take what was sent: the line is not `free` until `go_on`."""

    def go_on(self) -> None: ...

    def gone(self) -> None:
        """The connection is over, whoever ended it; may be said more than once."""


class Line(Protocol):
    """An open WebSocket, as its server gives it out of hand: `scope["extensions"]["caravan.line"]`."""

    @property
    def free(self) -> bool: ...

    def take_over(self, listener: Listener) -> None:
        """From now on `listener` hears; the line stays open when the application's call returns."""

    def send_now(self, text: str) -> None:
        """At once, whether the line is free or not."""

    def close(self, code: int) -> None: ...


class Conversation:
    """Between a line and a socket of the gateway. Begins when it is made, ends with `gone`."""

    __slots__ = ("_bad", "_deadline", "_frames", "_gateway", "_line", "_minute", "_socket", "_unhold")

    def __init__(self, line: Line, socket: Socket, gateway: Gateway) -> None:
        self._line, self._socket, self._gateway = line, socket, gateway
        self._bad = self._frames = 0
        self._minute = monotonic()
        self._deadline: asyncio.TimerHandle | None = None
        self._unhold: asyncio.TimerHandle | None = None
        self._unhold = asyncio.get_running_loop().call_later(RESUME_SECONDS, self._begin_unasked)
        socket.stirred = self._move
        line.take_over(self)

    def hear(self, text: str | None) -> None:
        socket = self._socket
        if socket.closing:
            return
        if monotonic() > self._minute + 60:
            self._minute, self._frames = monotonic(), 0
        self._frames += 1
        try:
            self._gateway.resume(socket, protocol.parse_resume(text, socket.cursors.keys()))
        except protocol.FrameRefused as error:
            self._bad += 1
            socket.put(protocol.refusal(error))
        if self._bad > BAD_FRAMES_MAX or self._frames > FRAMES_PER_MINUTE_MAX:
            socket.end(protocol.CLOSE_POLICY)

    def pause(self) -> None:
        self._deadline = asyncio.get_running_loop().call_later(SEND_SECONDS, self._give_up)

    def go_on(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        self._move()
        if len(self._socket.queue) <= QUEUE_FRAMES_MAX // 2:
            self._gateway.stir(self._socket)  # it was full, perhaps: what came meanwhile is in the feed

    def gone(self) -> None:
        for timer in (self._unhold, self._deadline):
            if timer is not None:
                timer.cancel()
        self._unhold = self._deadline = None
        self._socket.stirred = nobody
        self._socket.queue.clear()
        self._gateway.leave(self._socket)

    def _move(self) -> None:
        """Send what waits, as far as the line takes it; or end."""
        socket, line = self._socket, self._line
        if socket.closing:
            self.gone()
            line.close(socket.closing)
            return
        while socket.queue and line.free:
            line.send_now(socket.queue.popleft())

    def _begin_unasked(self) -> None:
        self._unhold = None
        self._gateway.begin_unasked(self._socket)

    def _give_up(self) -> None:
        self._deadline = None
        self._socket.end(protocol.CLOSE_TRY_AGAIN_LATER)
