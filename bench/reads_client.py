"""Families who look at their pages, in a process of their own, on kept-alive connections, one request after the other.

`python -m bench.reads_client`, its order on standard input as one JSON line: port, students with their tokens, which
view, how many connections, for how many seconds. Everybody looks once before the clock starts. Answers in JSON: the
seconds it was, and milliseconds of each request.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from typing import Any

import uvloop

from bench.http import Connection, head


async def run(order: dict[str, Any]) -> dict[str, Any]:
    dice = random.Random(order["seed"])
    students = [
        head("GET", f"/api/v1/students/{student}/{order['view']}", token) for student, token in order["students"]
    ]
    took: list[float] = []
    sizes: list[int] = []
    refused: list[str] = []
    connections = [await Connection.open(order["port"]) for _ in range(order["connections"])]
    first = iter(students)

    async def look_once(connection: Connection) -> None:
        for student in first:
            await connection.request(student)

    async def look(connection: Connection) -> None:
        while (now := time.perf_counter()) < until:
            status, body = await connection.request(dice.choice(students))
            took.append((time.perf_counter() - now) * 1000)
            sizes.append(len(body))
            if status != 200:
                refused.append(f"{status} {body[:200].decode(errors='replace')}")

    await asyncio.gather(*map(look_once, connections))
    began = time.perf_counter()
    until = began + order["seconds"]
    await asyncio.gather(*map(look, connections))
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "took": took, "bytes": sum(sizes) / max(1, len(sizes)), "refused": refused[:3]}


if __name__ == "__main__":
    json.dump(uvloop.run(run(json.loads(sys.stdin.readline()))), sys.stdout)
