"""The data folder: one `caravan up` at a time, and where its parts are.

DIR/lock           held by the supervisor and by the processes it started, for as long as any of them lives
DIR/control.sock   mode 0600: what `caravan` commands ask the supervisor
DIR/demo.json      mode 0600: the demo's accounts
DIR/sandbox-books.jsonl  what the sandbox provider remembers of the money it took
DIR/caravan.log    what the services say, where the supervisor's own output is a terminal
DIR/postgres/      the embedded database, see caravan.db.embedded
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from pathlib import Path
from typing import Any, cast

LOG_BYTES_MAX = 10_000_000
ORPHANS_SECONDS_MAX = 8.0  # how long the children of a killed supervisor may take to end
POLL_SECONDS = 0.02


class FolderRefused(Exception):
    """The data folder cannot be used; the message is one line that says what to do."""


class DataFolder:
    """One data folder. `take` it before anything else; the lock goes when the last holder of `lock_fd` ends."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.lock_fd = -1

    @property
    def control(self) -> Path:
        return self.path / "control.sock"

    @property
    def demo(self) -> Path:
        return self.path / "demo.json"

    @property
    def sandbox_books(self) -> Path:
        return self.path / "sandbox-books.jsonl"

    @property
    def log(self) -> Path:
        return self.path / "caravan.log"

    def take(self) -> None:
        """Raises FolderRefused; waits a moment for the children of a supervisor that was killed."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise FolderRefused(
                f"{error.filename or self.path}: {error.strerror}. Choose another data folder with --data."
            ) from None
        deadline = time.monotonic() + ORPHANS_SECONDS_MAX
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                holder = os.pread(lock, 20, 0).decode().strip()
                if _lives(holder) or time.monotonic() > deadline:
                    os.close(lock)
                    raise FolderRefused(
                        f"{self.path} is in use by another caravan (process {holder or 'unknown'}):"
                        " stop that one, or choose another folder with --data."
                    ) from None
            time.sleep(POLL_SECONDS)
        os.ftruncate(lock, 0)
        os.pwrite(lock, str(os.getpid()).encode(), 0)
        self.lock_fd = lock

    def release(self) -> None:
        if self.lock_fd >= 0:
            os.ftruncate(self.lock_fd, 0)
            os.close(self.lock_fd)
            self.lock_fd = -1

    def read_demo(self) -> dict[str, Any]:
        """What demo.json says; empty where there is none that can be read."""
        try:
            document = json.loads(self.demo.read_text())
        except (OSError, ValueError):
            return {}
        return cast("dict[str, Any]", document) if isinstance(document, dict) else {}

    def open_log(self) -> int:
        """A descriptor to append to the log file; an old, large one is put aside."""
        if self.log.exists() and self.log.stat().st_size > LOG_BYTES_MAX:
            self.log.replace(self.log.with_suffix(".log.1"))
        return os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def _lives(pid: str) -> bool:
    if not pid.isdigit():
        return True  # it has just been taken, and is not written yet
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def write_private(path: Path, text: str) -> None:
    """Replace a file by one that only its owner may read, whole or not at all."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)
