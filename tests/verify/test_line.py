"""A client of the load keeps its connections as a browser does."""

from __future__ import annotations

import asyncio

from verify.load import Line

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"


async def test_a_connection_that_the_server_has_closed_meanwhile_is_no_lost_answer() -> None:
    """Servers hang up after some seconds without a request: that was none of theirs to answer."""
    closed = asyncio.Event()

    async def answer_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(ANSWER)
        await writer.drain()
        writer.close()
        await writer.wait_closed()
        closed.set()

    async with await asyncio.start_server(answer_once, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        line = Line()
        for _ in range(2):
            closed.clear()
            assert await line.ask(port, "POST", "/", {}) == (200, {})
            await closed.wait()
            assert await line._open[port][0].read() == b""  # the end has arrived
        line.close()
