"""The server's side of a connection: uvicorn's, with an end to its patience, and with WebSockets that cost little.

uvicorn waits for ever for the rest of a request, and keeps a task with all its frames, two queues and the handshake for
as long as a WebSocket is open.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Final, cast

from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.protocols.utils import ClientDisconnected
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.http11 import Request
from websockets.protocol import State

from caravan.realtime.conversation import Listener

REQUEST_SECONDS: Final = 20.0  # a whole request, with its body, from its first byte (or from the connection's opening)
HEAD_BYTES_MAX: Final = 64 * 1024
# What uvicorn's WebSocket side reads of a handshake; it says nothing at all to a longer one.
HANDSHAKE_LINE_BYTES_MAX: Final = 8000
HANDSHAKE_HEADERS_MAX: Final = 100
SWITCHING_PROTOCOLS: Final = 101
CLOSE_SECONDS: Final = 10.0  # for the client's answer to our closing a WebSocket


class BoundedHttp(HttpToolsProtocol):
    """A request that is not whole in time ends its connection; a head or a handshake beyond all measure answers 400."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._patience: asyncio.TimerHandle | None = None
        self._head_bytes = 0
        self._in_head = True

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._head_bytes += len(data)
        super().data_received(data)
        if self._in_head and self._head_bytes > HEAD_BYTES_MAX and not self.transport.is_closing():
            self.send_400_response("The request's head is too large.")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True
        if self._patience is None:
            self._wait()

    def on_headers_complete(self) -> None:
        self._in_head = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._stop_waiting()
        self._head_bytes = 0
        super().on_message_complete()

    def handle_websocket_upgrade(self) -> None:
        self._stop_waiting()
        longest = max([len(self.url), *(len(name) + len(value) for name, value in self.headers)])
        if (
            self.scope["method"] != "GET"
            or longest > HANDSHAKE_LINE_BYTES_MAX
            or len(self.headers) > HANDSHAKE_HEADERS_MAX
        ):
            self.send_400_response("This is no WebSocket handshake.")
        else:
            super().handle_websocket_upgrade()

    def _wait(self) -> None:
        self._patience = self.loop.call_later(REQUEST_SECONDS, self._give_up)

    def _stop_waiting(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _give_up(self) -> None:
        self._patience = None
        if not self.transport.is_closing():
            self.transport.close()


class WebSocketLine(WebSocketsSansIOProtocol):
    """A WebSocket that its application may take over when it is open (`realtime.conversation.Line`).

    Handshake, pings and closing stay uvicorn's. What it would queue for the application's task goes to the listener at
    once, so that no task is needed and what was for the task is let go.
    """

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._listener: Listener | None = None

    def handle_connect(self, event: Request) -> None:
        super().handle_connect(event)
        if self.response.status_code == SWITCHING_PROTOCOLS:
            extensions: dict[str, Any] = self.scope.setdefault("extensions", {})
            extensions["caravan.line"] = self

    async def run_asgi(self) -> None:
        """As uvicorn's, save that a line which was taken over stays open."""
        try:
            await cast("ASGI3Application", self.app)(self.scope, self.receive, self.send)
        except ClientDisconnected:
            pass
        except BaseException:
            self.logger.exception("Exception in ASGI application\n")
            self.send_500_response()
        else:
            if self._listener is not None:
                del self.scope, self.request, self.response
                return
            if not self.handshake_complete:
                self.logger.error("ASGI callable returned without completing handshake.")
                self.send_500_response()
        if self.close_timer is None:
            self.transport.close()

    # --- what the listener may do ---

    @property
    def free(self) -> bool:
        return self.writable.is_set()

    def take_over(self, listener: Listener) -> None:
        self._listener = listener
        earlier, self.queue = self.queue, _Handing(listener)  # pyright: ignore[reportAttributeAccessIssue] - all of it that is used
        while not earlier.empty():
            self.queue.put_nowait(earlier.get_nowait())
        self._read_on()

    def send_now(self, text: str) -> None:
        if self._is_open():
            self.conn.send_text(text.encode())
            self._write()

    def close(self, code: int) -> None:
        if self._is_open():
            self.conn.send_close(code)
            self.close_sent = True
            self._write()
            # The client answers, or not.
            self.close_timer = self.loop.call_later(CLOSE_SECONDS, self.transport.abort)

    # --- what uvicorn and the loop tell ---

    def send_receive_event_to_app(self) -> None:
        super().send_receive_event_to_app()
        if self._listener is not None:
            self._read_on()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._listener is not None:
            self._listener.pause()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._listener is not None:
            self._listener.go_on()

    def _is_open(self) -> bool:
        return self.conn.state is State.OPEN and not self.transport.is_closing()

    def _write(self) -> None:
        self.transport.write(b"".join(self.conn.data_to_send()))

    def _read_on(self) -> None:
        if self.read_paused:
            self.read_paused = False
            self.transport.resume_reading()


class _Handing:
    """In the place of the queue of a task: whatever is put here is told at once."""

    __slots__ = ("_listener",)

    def __init__(self, listener: Listener) -> None:
        self._listener = listener

    def put_nowait(self, message: Mapping[str, Any]) -> None:
        if message["type"] == "websocket.receive":
            self._listener.hear(message.get("text"))
        elif message["type"] == "websocket.disconnect":
            self._listener.gone()
