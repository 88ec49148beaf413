"""How much memory the processes hold: workers through loads one after another, and the web per idle WebSocket."""

from __future__ import annotations

import asyncio
import os
import resource
import secrets
import sys
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg

from bench.check import Wrong, check
from bench.fulfil import READY, prepare
from bench.market import add_captured_payments
from bench.parts import Context, Result
from bench.runs import HEARINGS, WorkerProcess, until_delivered
from bench.server import Server
from bench.worker import memory_bytes
from caravan.db import Database
from caravan.ids import new_id
from caravan.web.auth import hash_token
from harness.processes import free_port

SERVICE = "websocket-server"
FEW = 20  # sockets that warm the web up before its memory is read
OPEN_SECONDS = 180
SETTLE_SECONDS = 3.0
DESCRIPTORS_SPARE = 200
WORKER_MB_MAX = 150
SOCKET_KIB_MAX = 20


async def run(context: Context) -> Result:
    n, trainers, loads = context.pick(500, 4_000), context.pick(200, 2_000), context.pick(3, 4)
    sockets = min(context.pick(500, 5_000), resource.getrlimit(resource.RLIMIT_NOFILE)[0] - DESCRIPTORS_SPARE)
    with Server() as server:
        await prepare(server, READY, n, trainers, context.seed)
        peaks = await _load_worker(server.create("run", READY), context, n, loads)
        web = await _hold_sockets(server.create("sockets"), context, sockets)
    megabytes = [round(peak / 1e6, 1) for peak in peaks]
    kib = round(web["bytes_per_socket"] / 1024, 1)
    result = Result(
        {
            "worker_peak_mb": megabytes[-1],
            "worker_peak_mb_by_load": megabytes,
            "payments_per_load": n,
            "worker_goal_mb": WORKER_MB_MAX,
            "sockets": sockets,
            **web,
            "socket_kib": kib,
            "socket_goal_kib": SOCKET_KIB_MAX,
        },
        {"worker_flat": round(megabytes[-1] / megabytes[0], 3)},
    )
    result.lines = [
        f"a worker's peak after each of {loads} loads of {n:,} payments: {', '.join(map(str, megabytes))} MB"
        f" (goal: at most {WORKER_MB_MAX}, flat)",
        f"the web process: {web['web_rss_mb_idle']} MB with {FEW} sockets, {web['web_rss_mb_full']} with {sockets:,},"
        f" {kib} KiB each (goal: at most {SOCKET_KIB_MAX})",
    ]
    return result


async def _load_worker(url: str, context: Context, n: int, loads: int) -> list[int]:
    """Its peak in bytes after each load of n payments."""
    peaks: list[int] = []
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="caravan-bench-")))
        process = await WorkerProcess.start(url, "bench", folder)
        stack.callback(process.kill)
        connection = await stack.enter_async_context(await psycopg.AsyncConnection.connect(url, autocommit=True))
        process.order("go")
        for load in range(loads):
            if load:
                await add_captured_payments(url, n, context.seed + load)
            await until_delivered(connection, [process], HEARINGS * n * (load + 1))
            peaks.append(memory_bytes(process.pid, "VmHWM"))
            context.say(f"load {load + 1}: {peaks[-1] / 1e6:.1f} MB")
        await process.stop()
    await check(url, n * loads)
    return peaks


# ------------------------------------------------------------------ sockets

INSERT_LISTENERS = (
    """insert into accounts (id, email, name, role, password_hash)
       select a, a::text || '@example.com', 'A listener', 'student', 'x' from unnest(%(accounts)b::uuid[]) a""",
    "insert into students (id, name) select s, 'A student' from unnest(%(students)b::uuid[]) s",
    """insert into account_students (account_id, student_id)
       select * from unnest(%(accounts)b::uuid[], %(students)b::uuid[])""",
    """insert into auth_tokens (token_hash, account_id, expires_at)
       select h, a, now() + interval '1 hour' from unnest(%(hashes)b::bytea[], %(accounts)b::uuid[]) as t(h, a)""",
)


async def _hold_sockets(url: str, context: Context, count: int) -> dict[str, Any]:
    """The web's own memory with few sockets and with `count` more, all signed in as somebody else, all idle."""
    tokens = await _sign_in(url, count + FEW)
    async with AsyncExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="caravan-bench-"))
        port = free_port()
        web = await _start(stack, ["-m", "caravan", "serve", SERVICE], url, port, folder)
        await _until_listening(web, port)
        await _crowd(stack, port, tokens[:FEW])
        idle = await _settled(web.pid)
        await _crowd(stack, port, tokens[FEW:])
        full = await _settled(web.pid)
        peak = memory_bytes(web.pid, "VmHWM")
        context.say(f"{count:,} sockets are open")
        if web.returncode is not None:
            raise Wrong("the web ended while its sockets were open")
    return {
        "bytes_per_socket": round((full - idle) / count),
        "web_rss_mb_idle": round(idle / 1e6, 1),
        "web_rss_mb_full": round(full / 1e6, 1),
        "web_peak_mb": round(peak / 1e6, 1),
    }


async def _sign_in(url: str, count: int) -> list[str]:
    tokens = [secrets.token_urlsafe(32) for _ in range(count)]
    values: dict[str, list[UUID] | list[bytes]] = {
        "accounts": [new_id() for _ in tokens],
        "students": [new_id() for _ in tokens],
        "hashes": [hash_token(token) for token in tokens],
    }
    async with Database(url) as db, db.transaction() as tx:
        for statement in INSERT_LISTENERS:
            await tx.execute(statement, values)
    return tokens


async def _start(
    stack: AsyncExitStack, arguments: list[str], url: str, port: int, folder: str
) -> asyncio.subprocess.Process:
    environment = {"POSTGRES_URL": url, "CARAVAN_PORT": str(port), "CARAVAN_DATA_DIR": folder, "CARAVAN_LOG_JSON": "1"}
    with (Path(folder) / "web.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable, *arguments, env=_plain_environment() | environment, stdout=log, stderr=log
        )
    stack.push_async_callback(_end, process)
    return process


def _plain_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("CARAVAN_")}


async def _crowd(stack: AsyncExitStack, port: int, tokens: list[str]) -> None:
    """Listeners in a process of their own; returns when every one has had its first frame."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "bench.sockets", str(port),
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    stack.push_async_callback(_end, process)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("".join(f"{token}\n" for token in [*tokens, ""]).encode())
    await process.stdin.drain()
    async with asyncio.timeout(OPEN_SECONDS):
        if await process.stdout.readline() != b"open\n":
            raise Wrong("the listeners could not all connect")


async def _settled(pid: int) -> int:
    """What a process holds once nothing happens any more."""
    await asyncio.sleep(SETTLE_SECONDS)
    return memory_bytes(pid, "VmRSS")


async def _until_listening(web: asyncio.subprocess.Process, port: int) -> None:
    async with asyncio.timeout(30):
        while True:
            if web.returncode is not None:
                raise Wrong("the web did not start")
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                await asyncio.sleep(0.05)
            else:
                writer.close()
                return


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.terminate()
        try:
            async with asyncio.timeout(10):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()
