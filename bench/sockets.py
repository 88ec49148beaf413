"""A crowd that listens and says nothing: `python -m bench.sockets PORT`, with one token a line on standard input.

Opens a WebSocket per token, answers pings, says `open` when all have got their first frame, ends when its input does.
"""

from __future__ import annotations

import asyncio
import sys

import uvloop
from websockets.asyncio.client import ClientConnection, connect

AT_ONCE = 40
FIRST_FRAME_SECONDS = 60


async def listen(port: int, token: str, gate: asyncio.Semaphore) -> ClientConnection:
    async with gate:
        connection = await connect(
            f"ws://127.0.0.1:{port}/ws",
            additional_headers={"Authorization": f"Bearer {token}"},
            compression=None,
            open_timeout=FIRST_FRAME_SECONDS,
            ping_interval=None,
        )
    async with asyncio.timeout(FIRST_FRAME_SECONDS):
        await connection.recv()
    return connection


async def main(port: int) -> None:
    loop = asyncio.get_running_loop()
    orders = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)
    tokens: list[str] = []
    while line := (await orders.readline()).decode().strip():  # an empty line ends the list
        tokens.append(line)
    gate = asyncio.Semaphore(AT_ONCE)
    connections = await asyncio.gather(*(listen(port, token, gate) for token in tokens))
    print("open", flush=True)
    await orders.read()
    for connection in connections:
        connection.transport.abort()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1])))
