"""The server's side of a connection, with an end to its patience: uvicorn waits for ever for the rest of a request."""

from __future__ import annotations

import asyncio
from typing import Any, Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

REQUEST_SECONDS: Final = 20.0  # a whole request, with its body, from its first byte (or from the connection's opening)
HEAD_BYTES_MAX: Final = 64 * 1024
# What uvicorn's WebSocket side reads of a handshake; it says nothing at all to a longer one.
HANDSHAKE_LINE_BYTES_MAX: Final = 8000
HANDSHAKE_HEADERS_MAX: Final = 100


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
