"""A worker process as `caravan up` has it: the four groups and the reconciler, over a database that is there.

`python -m bench.worker URL NAME LOG [--page N]`. Says `ready` once it is connected, begins at a line on its standard
input, ends at the next (or at its end) and says in JSON what it took: seconds of processor time, peak memory in bytes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TextIO

import uvloop

from caravan import telemetry
from caravan.apps import worker
from caravan.apps.bootstrap import open_platform
from caravan.apps.process import calm_collector
from caravan.apps.services import BACKGROUND
from caravan.eventlog.consumer import Consumer
from caravan.settings import Settings


async def work(settings: Settings, orders: asyncio.StreamReader, answers: TextIO) -> None:
    async with open_platform(settings) as platform:
        answers.write("ready\n")
        answers.flush()
        if not await orders.readline():
            return
        began = time.process_time()
        stop = asyncio.Event()
        working = asyncio.create_task(worker.run_workers(platform, BACKGROUND, stop))
        ordered = asyncio.create_task(orders.readline())
        await asyncio.wait({working, ordered}, return_when=asyncio.FIRST_COMPLETED)
        stop.set()
        ordered.cancel()
        await working
    said = {"cpu_seconds": time.process_time() - began, "peak_bytes": memory_bytes("self", "VmHWM")}
    answers.write(json.dumps(said) + "\n")
    answers.flush()


def memory_bytes(pid: int | str, what: str) -> int:
    """VmRSS: what a process holds; VmHWM: the most that it has held. Linux alone says."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


async def _main(chosen: argparse.Namespace, answers: TextIO) -> None:
    orders = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)
    with tempfile.TemporaryDirectory(prefix="caravan-bench-") as folder:
        given = {"postgres_url": chosen.url, "worker_name": chosen.name, "log_json": True, "data_dir": folder}
        await work(Settings.model_validate(given), orders, answers)


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.worker")
    parser.add_argument("url")
    parser.add_argument("name")
    parser.add_argument("log")
    parser.add_argument("--page", type=int, help="how many events a batch has at most; as the product has it if absent")
    chosen = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    log = os.open(chosen.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    telemetry.configure_logging(json=True)
    if chosen.page:
        worker.Consumer = partial(Consumer, page_events_max=chosen.page)  # pyright: ignore[reportAttributeAccessIssue]
    calm_collector()
    uvloop.run(_main(chosen, answers))


if __name__ == "__main__":
    main()
