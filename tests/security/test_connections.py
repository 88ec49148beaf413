"""Connections that say too much, or never finish what they say: answered or ended, never kept."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator

import pytest
from fastapi import FastAPI

from caravan.apps import connections
from caravan.apps.web import make_server
from caravan.settings import Settings

HANDSHAKE = (
    b"Host: caravan.test\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
)


@pytest.fixture
async def port() -> AsyncIterator[int]:
    app = FastAPI()
    app.add_api_route("/", lambda: {"a": 1}, methods=["GET", "POST"])
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    server = make_server(app, Settings())
    serving = asyncio.create_task(server.serve([listener]))
    await server.listening.wait()
    yield listener.getsockname()[1]
    server.should_exit = True
    await serving


async def said(port: int, request: bytes) -> bytes:
    """What the server answers until it closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request)
        async with asyncio.timeout(10):
            return await reader.read()
    finally:
        writer.close()


@pytest.mark.parametrize(
    "request_",
    [
        b"GET /ws?ticket=" + b"x" * 10_000 + b" HTTP/1.1\r\n" + HANDSHAKE + b"\r\n",
        b"GET /ws HTTP/1.1\r\n" + HANDSHAKE + b"X: " + b"x" * 10_000 + b"\r\n\r\n",
        b"GET /ws HTTP/1.1\r\n" + HANDSHAKE + b"".join(b"X%d: 1\r\n" % n for n in range(300)) + b"\r\n",
        b"POST /ws HTTP/1.1\r\n" + HANDSHAKE + b"Content-Length: 1\r\n\r\nx",
        b"GET / HTTP/1.1\r\nHost: caravan.test\r\nX: " + b"x" * 80_000,
    ],
    ids=["long address", "long header", "many headers", "not GET", "endless header"],
)
async def test_too_much(port: int, request_: bytes) -> None:
    assert (await said(port, request_)).startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize(
    "request_",
    [b"", b"GET / HTTP/1.1\r\nHos", b"POST / HTTP/1.1\r\nHost: caravan.test\r\nContent-Length: 9\r\n\r\n{"],
    ids=["nothing", "half a head", "half a body"],
)
async def test_never_finished(port: int, request_: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "REQUEST_SECONDS", 0.1)
    await said(port, request_)  # returns, because the connection ends


async def test_one_after_another_on_one_connection(port: int) -> None:
    request = b"GET / HTTP/1.1\r\nHost: caravan.test\r\n\r\n"
    last = request.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    assert (await said(port, request * 3 + last)).count(b"200 OK") == 4
