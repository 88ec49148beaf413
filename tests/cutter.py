"""A line to PostgreSQL that is cut: every connection ends after so many bytes of the server's."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from psycopg.conninfo import conninfo_to_dict, make_conninfo

CHUNK_BYTES = 65536


class Cutter:
    """Hands on what a client and the server at `url` say, on a port of this machine. Use as a context.

    `bytes_max`: what each connection hears of the server before it is cut, in the middle of a message as it may be;
    None: it lasts. `cut` counts those that were.
    """

    def __init__(self, url: str) -> None:
        given = conninfo_to_dict(url)
        self._socket = f"{given['host']}/.s.PGSQL.{given['port']}"
        self.url = url  # of the line, once it is there
        self.bytes_max: int | None = None
        self.cut = 0
        self.heard = 0  # bytes of the server, on all connections

    async def __aenter__(self) -> Cutter:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        self.url = make_conninfo(self.url, host="127.0.0.1", port=port, sslmode="disable")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _serve(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        server, to_server = await asyncio.open_unix_connection(self._socket)
        asking = asyncio.create_task(_hand_on(client, to_server))
        try:
            await self._answer(server, to_client)
        finally:
            asking.cancel()
            to_client.transport.abort()
            to_server.transport.abort()

    async def _answer(self, server: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        heard = 0
        while said := await server.read(CHUNK_BYTES):
            left = None if self.bytes_max is None else max(0, self.bytes_max - heard)
            to_client.write(said[:left])
            heard += len(said)
            self.heard += len(said)
            if left is not None and len(said) >= left:
                with suppress(OSError):
                    await to_client.drain()
                to_client.close()  # what was written goes out first
                self.cut += 1
                return


async def _hand_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while said := await reader.read(CHUNK_BYTES):
            writer.write(said)
            await writer.drain()
    writer.close()
