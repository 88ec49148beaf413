"""What processes took of the processors: steadier than the clock on a machine that has other work."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import psycopg

TICKS = os.sysconf("SC_CLK_TCK")


def tree_cpu_seconds(pids: Iterable[int]) -> float:
    """Of these processes and all below them, with their children that have ended."""
    fields = {int(each.name): _fields(each) for each in Path("/proc").iterdir() if each.name.isdecimal()}
    below: dict[int, list[int]] = {}
    for pid, each in fields.items():
        if each:
            below.setdefault(int(each[1]), []).append(pid)
    ticks, waiting = 0, list(pids)
    while waiting:
        pid = waiting.pop()
        ticks += sum(int(number) for number in (fields.get(pid) or ())[11:15])
        waiting += below.get(pid, [])
    return ticks / TICKS


def find_postmaster(url: str) -> int:
    """The process above the server's sessions."""
    with psycopg.connect(url) as connection:
        fields = _fields(Path(f"/proc/{connection.info.backend_pid}"))
    assert fields
    return int(fields[1])


def _fields(process: Path) -> list[str] | None:
    """/proc/PID/stat from the state on; None where it has ended."""
    try:
        return (process / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
