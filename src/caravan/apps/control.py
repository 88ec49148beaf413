"""The supervisor's door: one JSON line in, one out, over DIR/control.sock (mode 0600).

`{"command": "status"}`, `{"command": "stop" | "start", "name": "purchase-worker"}`; the answer has `ok`, and `error` or
the status: `{"ok": true, "url": ..., "services": {"purchase-worker": {"state": "running", "pid": 12}, ...}}`.
`{"command": "metrics"}` is answered with the figures of the workers' process, see apps/metrics.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

PATH_BYTES_MAX = 100  # of a Unix socket's address (108 with its end, less on other systems)
LINE_BYTES_MAX = 64_000
ANSWER_SECONDS_MAX = 20.0


class NotRunning(Exception):
    """No `caravan up` runs on this data folder."""


@contextmanager
def address(path: Path) -> Generator[str]:
    """The socket's address, which a long folder name would not fit into: then by way of a descriptor of the folder."""
    if len(os.fsencode(path)) <= PATH_BYTES_MAX:
        yield str(path)
        return
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


def listen(path: Path) -> socket.socket:
    """A socket that only our own user may speak to; call it with the folder's lock in hand."""
    path.unlink(missing_ok=True)
    server = socket.socket(socket.AF_UNIX)
    before = os.umask(0o177)
    try:
        with address(path) as name:
            server.bind(name)
    finally:
        os.umask(before)
    server.listen(8)
    return server


def ask(path: Path, **request: object) -> dict[str, Any]:
    """Send one request to the supervisor of this folder. Raises NotRunning; an `ok: false` is the caller's to judge."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(ANSWER_SECONDS_MAX)
        try:
            with address(path) as name:
                client.connect(name)
        except OSError as error:
            raise NotRunning(f"No caravan runs on {path.parent}: start one with `caravan up`.") from error
        client.sendall(json.dumps(request).encode() + b"\n")
        with client.makefile("rb") as answers:
            line = answers.readline(LINE_BYTES_MAX)
    if not line:
        raise NotRunning(f"The caravan on {path.parent} ended while it was asked.")
    return cast("dict[str, Any]", json.loads(line))
