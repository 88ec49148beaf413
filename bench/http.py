"""A client that costs little: HTTP/1.1 over a kept-alive connection, one request at a time, answers of known length."""

from __future__ import annotations

import asyncio


class Connection:
    """To a server on this machine. `request` sends prepared bytes and returns the status and the body."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, port: int) -> Connection:
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    async def request(self, head: bytes) -> tuple[int, bytes]:
        self._writer.write(head)
        answer = await self._reader.readuntil(b"\r\n\r\n")
        status = int(answer[9:12])
        at = answer.lower().find(b"content-length:")
        length = int(answer[at + 15 : answer.index(b"\r\n", at)]) if at >= 0 else 0
        return status, await self._reader.readexactly(length) if length else b""

    @property
    def ended(self) -> bool:
        """Whether the server has hung up, as it does with those that are idle."""
        return self._reader.at_eof()

    def close(self) -> None:
        self._writer.close()


def head(method: str, path: str, token: str) -> bytes:
    """A whole request without a body."""
    lines = [
        f"{method} {path} HTTP/1.1",
        "Host: 127.0.0.1",
        f"Authorization: Bearer {token}",
        "Content-Length: 0",
        "\r\n",
    ]
    return "\r\n".join(lines).encode()
