"""A PostgreSQL of one's own in a temporary folder, gone afterwards; what killed runs left is swept away."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self

from caravan.db.embedded import EmbeddedPostgres, EmbeddedPostgresError
from caravan.db.migrate import migrate

MEMORY_DISK = Path("/dev/shm")  # noqa: S108 - mkdtemp makes a private folder in it


def memory_disk(bytes_min: int) -> Path | None:
    """Where there is one with room: containers may give it no more than 64 MB."""
    try:
        return MEMORY_DISK if shutil.disk_usage(MEMORY_DISK).free > bytes_min else None
    except OSError:
        return None


def make_folder(prefix: str, parent: Path | None = None) -> Path:
    """A folder that `sweep` knows by its name; PostgreSQL's own user gets in too, when root runs this."""
    folder = Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-", dir=parent))
    folder.chmod(0o711)
    return folder


class PrivatePostgres:
    """A context manager; `url` while it runs. Synchronous, used from one thread, as the embedded server is."""

    def __init__(self, folder: Path, settings: dict[str, str]) -> None:
        self.folder = folder
        self.postgres = EmbeddedPostgres(folder, extra_settings=settings)
        self.url = ""

    def __enter__(self) -> Self:
        try:
            self.url = self.postgres.start()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._remove()

    def _remove(self) -> None:
        try:
            self.postgres.stop()
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)


def migrate_now(url: str) -> None:
    """From synchronous code, whether or not a loop runs in this thread."""
    with ThreadPoolExecutor(1) as thread:
        thread.submit(lambda: asyncio.run(migrate(url))).result()


def sweep(prefix: str) -> None:
    """Runs that were killed left a server and a folder each: end those whose process is gone."""
    if not Path("/proc/self").exists():
        return  # only where we can tell who lives
    parents = {Path(tempfile.gettempdir()), MEMORY_DISK}
    for folder in [each for parent in parents if parent.is_dir() for each in parent.glob(f"{prefix}*-*")]:
        owner = folder.name.removeprefix(prefix).split("-")[0]
        try:
            if folder.stat().st_uid != os.geteuid() or not owner.isdigit() or Path(f"/proc/{owner}").exists():
                continue
            left = EmbeddedPostgres(folder)
            if left.is_running():
                left.start()  # takes it over
                left.stop()
        except (FileNotFoundError, EmbeddedPostgresError):
            continue  # another run sweeps too
        shutil.rmtree(folder, ignore_errors=True)
