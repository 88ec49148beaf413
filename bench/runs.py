"""One run: captured payments wait, workers begin, the clock stops when all is delivered, heard and committed."""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg

from bench.check import Wrong, check
from bench.counting import Counted, count_since, read_counters, server_cpu_seconds

LOOK_SECONDS = 0.02
LOOK_RARELY_SECONDS = 0.25  # where pages are counted: looking touches some too
STUCK_SECONDS = 60.0
SETTLED_SECONDS = 10.0  # the same where nothing waits that could move
HEARINGS = 7  # per fulfilment, by all groups: confirmed 1, created 2, granted 1, allocated 2, scheduled 1

STILL_WAITING = "select count(*) from undelivered where reason is null"
ANY_WAITING = "select exists (select from undelivered where reason is null)"
REASONS = "select coalesce(string_agg(distinct reason, ', '), 'none') from undelivered"
HEARD = "select count(*) from processed_events"


@dataclass(frozen=True, slots=True)
class Run:
    """Verified, or there would be none. `cpu_seconds`: of the workers; `peaks`: the most bytes that each held;
    `counted`: what the run asked of the server, without our verifying it."""

    payments: int
    sessions: int
    seconds: float
    cpu_seconds: float
    server_cpu_seconds: float
    peaks: list[int]
    counted: Counted

    @property
    def per_second(self) -> float:
        return self.payments / self.seconds

    @property
    def cpu_us(self) -> dict[str, float]:
        """The processors' time per fulfilment, in microseconds: moves less with the machine's mood than a rate."""
        us = 1e6 / self.payments
        return {"workers": round(self.cpu_seconds * us, 1), "server": round(self.server_cpu_seconds * us, 1)}


async def fulfil(
    url: str,
    n: int,
    *,
    workers: int = 1,
    page: int | None = None,
    whole: bool = True,
    look: float = LOOK_SECONDS,
) -> Run:
    """Let `workers` processes deliver the n payments that wait in a database. Raises Wrong.

    `page`: how many events a batch has at most, as the product has it if None. `whole`: hold it against every
    invariant. `look`: how often we ask whether it is done.
    """
    server_before, before = server_cpu_seconds(url), read_counters(url)
    async with AsyncExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="caravan-bench-"))
        processes = [await WorkerProcess.start(url, f"bench-{k}", Path(folder), page) for k in range(workers)]
        for process in processes:
            stack.callback(process.kill)
        connection = await stack.enter_async_context(
            await psycopg.AsyncConnection.connect(url, autocommit=True, prepare_threshold=0)
        )
        heard_before = await _value(connection, HEARD)
        began = time.monotonic()
        for process in processes:
            process.order("go")
        await until_delivered(connection, processes, heard_before + HEARINGS * n, look)
        seconds = time.monotonic() - began
        ends = await asyncio.gather(*(process.stop() for process in processes))
    # The check comes after: it reads whole tables, so it would be counted as what the past costs.
    server_cpu, counted = server_cpu_seconds(url) - server_before, count_since(url, before)
    sessions = await check(url, n, whole=whole)
    client_cpu = sum(end["cpu_seconds"] for end in ends)
    return Run(n, sessions, seconds, client_cpu, server_cpu, [end["peak_bytes"] for end in ends], counted)


async def until_delivered(
    connection: psycopg.AsyncConnection[Any],
    processes: list[WorkerProcess],
    hearings: int,
    look: float = LOOK_SECONDS,
) -> None:
    """Delivered (nothing waits without a reason), and every event heard by every group. The second is asked only once
    the first is so: the question is dearer."""
    progress, moved_at = (0, 0), time.monotonic()
    counted_at = moved_at
    while True:
        if not await _value(connection, ANY_WAITING) and await _value(connection, HEARD) >= hearings:
            return
        for process in processes:
            process.check()
        now = time.monotonic()
        if now > counted_at + 5:
            counted_at = now
            seen = (await _value(connection, STILL_WAITING), await _value(connection, HEARD))
            if seen != progress:
                progress, moved_at = seen, now
            elif now > moved_at + (STUCK_SECONDS if seen[0] else SETTLED_SECONDS):
                reasons = await _value(connection, REASONS)
                raise Wrong(f"nothing moves: {seen[0]} wait, {seen[1]} of {hearings} heard; with reasons: {reasons}")
        await asyncio.sleep(look)


class WorkerProcess:
    """bench.worker in a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self._process = process
        self._log = log

    @classmethod
    async def start(cls, url: str, name: str, folder: Path, page: int | None = None) -> WorkerProcess:
        """Returns once it is connected and waits for its order."""
        log = folder / f"{name}.log"
        more = ["--page", str(page)] if page else []
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "bench.worker", url, name, str(log), *more,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        worker = cls(process, log)
        assert process.stdout is not None
        if await process.stdout.readline() != b"ready\n":
            raise Wrong(f"a worker did not start: {worker.log_tail()}")
        return worker

    @property
    def pid(self) -> int:
        return self._process.pid

    def order(self, word: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{word}\n".encode())

    def check(self) -> None:
        if self._process.returncode is not None:
            raise Wrong(f"a worker ended by itself: {self.log_tail()}")

    async def stop(self) -> dict[str, Any]:
        """What it took; see bench.worker."""
        self.order("stop")
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        await self._process.wait()
        if not line:
            raise Wrong(f"a worker did not end well: {self.log_tail()}")
        return json.loads(line)

    def kill(self) -> None:
        if self._process.returncode is None:
            self._process.kill()

    def log_tail(self) -> str:
        return self._log.read_bytes()[-1500:].decode(errors="replace") if self._log.exists() else "it said nothing"


async def _value(connection: psycopg.AsyncConnection[Any], query: str) -> Any:
    row = await (await connection.execute(query.encode())).fetchone()
    assert row is not None
    return row[0]
