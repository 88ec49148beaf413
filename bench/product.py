"""`caravan up` as its users start it, over a database of the benchmark's: a supervisor, the web, the workers."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from bench.check import Wrong
from bench.http import Connection, head
from harness.processes import free_port

READY_SECONDS_MAX = 60
SECRET = "whsec_YmVuY2htYXJrLWJlbmNobWFyay1iZW5jaG1hcms="  # noqa: S105 - of a provider that moves no money


@dataclass(frozen=True, slots=True)
class Product:
    """Where it answers, and its first process."""

    port: int
    pid: int


@asynccontextmanager
async def product(url: str, **settings: str) -> AsyncGenerator[Product]:
    """Ready to be used. `settings`: more of its environment."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="caravan-bench-") as folder:
        given = {
            "POSTGRES_URL": url,
            "CARAVAN_PORT": str(port),
            "CARAVAN_DATA_DIR": f"{folder}/data",
            "CARAVAN_SANDBOX_WEBHOOK_SECRET": SECRET,
        }
        process = await start("-m", "caravan", "up", more=given | settings)
        try:
            await _until_ready(port, process)
            yield Product(port, process.pid)
        finally:
            await stop(process)


async def start(*arguments: str, more: dict[str, str] | None = None, pipe: bool = False) -> asyncio.subprocess.Process:
    """Python with these arguments; what it says is dropped, or (`pipe`) read by the caller."""
    return await asyncio.create_subprocess_exec(
        sys.executable,
        *arguments,
        env=os.environ | (more or {}),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE if pipe else asyncio.subprocess.DEVNULL,
        stderr=None if pipe else asyncio.subprocess.DEVNULL,
    )


async def stop(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.send_signal(signal.SIGTERM)
    await process.wait()


async def _until_ready(port: int, process: asyncio.subprocess.Process) -> None:
    until = time.monotonic() + READY_SECONDS_MAX
    while time.monotonic() < until and process.returncode is None:
        try:
            connection = await Connection.open(port)
            status, _ = await connection.request(head("GET", "/readyz", ""))
            connection.close()
            if status == 200:
                return
        except (OSError, asyncio.IncompleteReadError):
            pass
        await asyncio.sleep(0.1)
    raise Wrong("caravan up did not become ready")
