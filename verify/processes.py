"""A part's work on both cores: shards in processes of their own, each with databases of its own on one server."""

from __future__ import annotations

import asyncio
import multiprocessing
import signal
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any, TypeVar

from verify.quiet import be_quiet

PROCESSES = 2

Job = TypeVar("Job")
Found = TypeVar("Found")


async def in_processes(work: Callable[[Job], Awaitable[Found]], jobs: Sequence[Job]) -> list[Found]:
    """What `work` (a module's own function) found for each of `jobs`, in their order; both must be picklable.

    Two processes, started anew: they inherit no loop and no connection.
    """
    loop = asyncio.get_running_loop()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(PROCESSES, mp_context=context, initializer=_begin) as pool:
        tasks = [loop.run_in_executor(pool, partial(_run, work, job)) for job in jobs]
        try:
            return list(await asyncio.gather(*tasks))
        except BaseException:
            # Nobody waits for what the others are at; an executor that is only shut down would.
            for child in multiprocessing.active_children():
                child.kill()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    be_quiet()


def _run(work: Callable[[Any], Awaitable[Found]], job: Any) -> Found:
    async def run() -> Found:
        return await work(job)

    return asyncio.run(run())
