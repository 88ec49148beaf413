"""A process that stands still ends; somebody else starts it again."""

from __future__ import annotations

import subprocess
import sys

FREEZE = """
import asyncio, ctypes, sys
from caravan.apps import process

process.FROZEN_SECONDS, process.AWAKE_SECONDS = 0.5, 0.1

async def main(seconds):
    async with process.ended_if_frozen():
        await asyncio.sleep(1.0)  # it comes round: nothing happens
        print("awake", flush=True)
        if seconds:
            ctypes.PyDLL(None).sleep(seconds)  # as a library does that forgets to let the interpreter go
    await asyncio.sleep(1.0)  # over: nobody watches any more

asyncio.run(main(int(sys.argv[1])))
"""


def run(freeze_seconds: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", FREEZE, str(freeze_seconds)]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


def test_a_process_that_stands_still_ends_and_says_where() -> None:
    ended = run(100)
    assert (ended.returncode, ended.stdout) == (1, "awake\n")
    assert "Timeout" in ended.stderr
    assert "in main" in ended.stderr


def test_one_that_comes_round_is_left_alone() -> None:
    ended = run(0)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "awake\n", "")
