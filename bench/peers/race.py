"""The race: N captured payments wait, P processes of a peer start together, and the clock stops when all are delivered.

Each run has a copy of the same database, with the peer's queue filled before the clock starts. The clock stops when the
last fulfilment is committed, so what a queue still has to write down about its jobs costs it nothing; then everything
is checked, and a run that left anything wrong has no figure. Every peer is tried in each of its ways with 1, 2 and 4
processes; the best goes on to run in turns with ours.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any, cast
from urllib.parse import quote, urlencode
from uuid import UUID

import psycopg
from psycopg.conninfo import conninfo_to_dict

from bench.check import check_delivered
from bench.cpu import find_postmaster, tree_cpu_seconds
from bench.peers.adapter import Adapter, Way

POLL_SECONDS = 0.02
READY_SECONDS_MAX = 60


class Failed(Exception):
    """A peer's process ended, or did not come to an end: the run has no figure."""


def find_adapter(name: str) -> Adapter | None:
    """None where the peer is not installed."""
    try:
        return cast(Adapter, import_module(f"bench.peers.{name}"))
    except ModuleNotFoundError:
        return None


@asynccontextmanager
async def redis_server() -> AsyncGenerator[str | None]:
    """A Redis of our own on a free port of this machine, with an append-only file, in a temporary folder; its URL.

    None where there is no redis-server."""
    program = shutil.which("redis-server")
    if program is None:
        yield None
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tempfile.mkdtemp(prefix="caravan-redis-")
    options = ["--port", str(port), "--bind", "127.0.0.1", "--appendonly", "yes", "--save", "", "--dir", folder]
    process = await asyncio.create_subprocess_exec(program, *options, stdout=asyncio.subprocess.DEVNULL)
    try:
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        process.kill()
        await process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def as_uri(conninfo: str) -> str:
    """The spelling of a connection that every driver reads."""
    parts = conninfo_to_dict(conninfo)
    user, name = quote(str(parts.pop("user"))), quote(str(parts.pop("dbname")))
    return f"postgresql://{user}@/{name}?{urlencode(parts)}"


@dataclass(frozen=True, slots=True)
class Ran:
    """Checked, or there would be none. `cpu_us`: of the processors per fulfilment, by the workers and the server."""

    per_second: float
    cpu_us: dict[str, float]


async def race(name: str, url: str, payments: Sequence[UUID], way: Way, processes: int, redis: str = "") -> Ran:
    """From the start until all of `payments` are delivered. Raises Failed, and Wrong."""
    adapter = find_adapter(name)
    assert adapter
    way = {**way, "processes": processes}
    order = {"url": as_uri(url), "way": way, "redis": redis, "payments": [str(id_) for id_ in payments]}
    preparing = await _station(name, "prepare", order)
    if await preparing.wait():
        raise Failed(f"{name} could not fill its queue")
    workers = [
        await _station(name, "work", {**order, "way": {**way, "index": index}, "payments": []})
        for index in range(1 if adapter.OWN_POOL else processes)
    ]
    try:
        async with asyncio.timeout(READY_SECONDS_MAX):
            for worker in workers:
                assert worker.stdout
                if not await worker.stdout.readline():
                    raise Failed(f"{name} did not start")
        async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
            await connection.execute("checkpoint")
            watched = {"workers": [worker.pid for worker in workers], "server": [find_postmaster(url)]}
            before = {who: tree_cpu_seconds(pids) for who, pids in watched.items()}
            began = time.monotonic()
            for worker in workers:
                assert worker.stdin
                worker.stdin.write(b"go\n")
            await _until_delivered(connection, name, workers, began, len(payments))
            seconds = time.monotonic() - began
            us = 1e6 / len(payments)
            cpu_us = {who: round((tree_cpu_seconds(pids) - before[who]) * us, 1) for who, pids in watched.items()}
    finally:
        for worker in workers:
            os.killpg(worker.pid, signal.SIGKILL)  # a session of its own: its children go with it
            await worker.wait()
    await check_delivered(url, len(payments))
    return Ran(len(payments) / seconds, cpu_us)


async def _station(name: str, what: str, order: dict[str, Any]) -> asyncio.subprocess.Process:
    process = await asyncio.create_subprocess_exec(
        *[sys.executable, "-m", "bench.peers.station", name, what],
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdin
    process.stdin.write(json.dumps(order).encode() + b"\n")
    await process.stdin.drain()
    return process


async def _until_delivered(
    connection: psycopg.AsyncConnection[Any],
    name: str,
    workers: Sequence[asyncio.subprocess.Process],
    began: float,
    payments: int,
) -> None:
    """Until the register is empty. Slower than 5 a second is not waited for."""
    while True:
        left = await (await connection.execute("select count(*) from undelivered")).fetchone()
        assert left
        if not left[0]:
            return
        if any(worker.returncode is not None for worker in workers):
            raise Failed(f"{name}: a process ended with {left[0]} payments left")
        if time.monotonic() > began + 30 + payments / 5:
            raise Failed(f"{name}: {left[0]} of {payments} left after {time.monotonic() - began:.0f} s")
        await asyncio.sleep(POLL_SECONDS)
