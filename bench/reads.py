"""`home` and `learning` over HTTP beside a long history: requests a second and how long they take."""

from __future__ import annotations

import asyncio
import json
import secrets
import sys
from typing import Any
from uuid import UUID

import psycopg

from bench.check import Wrong
from bench.cpu import find_postmaster, tree_cpu_seconds
from bench.history import write_history
from bench.market import build_market
from bench.parts import Context, Result
from bench.peers.race import redis_server
from bench.product import Product, product
from bench.report import spread, table
from bench.server import Server
from caravan.ids import new_id
from caravan.web.auth import hash_token

VIEWS = ("home", "learning")
CONNECTIONS = (1, 16)

# Everybody who ever bought: half of what they have is over, the rest is to come.
PICK_STUDENTS = "select id from students order by hashtext(id::text) limit %s"


async def run(context: Context) -> Result:
    sessions, trainers = context.pick((10_000, 400), (1_000_000, 2_000))
    with Server() as server:
        url = server.create("reads")
        await build_market(url, trainers=trainers, seed=context.seed)
        await asyncio.to_thread(write_history, url, sessions)
        students = await _sign_in(url, context.pick(500, 5_000))
        server.settle("reads")
        context.say("straight from PostgreSQL")
        async with product(url) as ours:
            plain = await _measure(context, url, ours, students)
        cached, why = await _with_cache(context, url, students)
    rows = [[name, view, *_row(entry)] for name, found in (("", plain), ("cached", cached)) for view, entry in found]
    return Result(
        {
            "sessions": sessions,
            "students": len(students),
            **_figures(plain),
            "cached": _figures(cached) or None,
            "cached_why": why,
        },
        lines=[
            *table(["", "view", "at a time", "requests/s", "p50 ms", "p99", "max", "web µs", "server µs"], rows),
            *([why] if why else []),
        ],
    )


Found = list[tuple[str, dict[str, Any]]]


async def _with_cache(context: Context, url: str, students: list[tuple[str, str]]) -> tuple[Found, str | None]:
    """The same with a Redis; or why not."""
    async with redis_server() as redis:
        if redis is None:
            return [], "no cache: there is no redis-server on this machine"
        context.say("with a cache")
        async with product(url, REDIS_URL=redis) as ours:
            return await _measure(context, url, ours, students), None


async def _measure(context: Context, url: str, ours: Product, students: list[tuple[str, str]]) -> Found:
    """Each view with each number of connections: one look, or several by turns."""
    seconds, runs = context.pick(2.0, 10.0), context.pick(1, 3)
    postmaster = find_postmaster(url)
    taken: dict[tuple[str, int], list[dict[str, float]]] = {}
    for number in range(runs):
        for view in VIEWS:
            for connections in CONNECTIONS:
                order = {"port": ours.port, "students": students, "view": view, "connections": connections}
                cpu = [tree_cpu_seconds([pid]) for pid in (ours.pid, postmaster)]
                one = await _look({**order, "seconds": seconds, "seed": context.seed + number})
                looks = one["per_second"] * seconds + len(students)
                one["web_us"], one["server_us"] = (
                    (tree_cpu_seconds([pid]) - before) / looks * 1e6
                    for pid, before in zip((ours.pid, postmaster), cpu, strict=True)
                )
                taken.setdefault((view, connections), []).append(one)
                context.say(f"{view}, {connections} at a time: {one['per_second']:,.0f}/s")
    return [
        (
            view,
            {
                "connections": connections,
                "per_second": spread([one["per_second"] for one in each]),
                **{p: spread([one[p] for one in each], 2) for p in ("p50", "p99", "max", "web_us", "server_us")},
                "bytes": round(each[0]["bytes"]),
            },
        )
        for (view, connections), each in taken.items()
    ]


def _row(entry: dict[str, Any]) -> list[Any]:
    return [
        entry["connections"],
        *(entry[key]["median"] for key in ("per_second", "p50", "p99", "max", "web_us", "server_us")),
    ]


def _figures(found: Found) -> dict[str, list[dict[str, Any]]]:
    return {view: [entry for name, entry in found if name == view] for view in VIEWS if found}


async def _sign_in(url: str, count: int) -> list[tuple[str, str]]:
    """So many students, each with an account of its own that is signed in; their ids and tokens."""
    async with await psycopg.AsyncConnection.connect(url) as connection:
        rows = await (await connection.execute(PICK_STUDENTS, [count])).fetchall()
        people: list[tuple[UUID, UUID, str]] = [(row[0], new_id(), secrets.token_urlsafe(24)) for row in rows]
        async with connection.cursor() as cursor:
            await cursor.executemany(
                "insert into accounts (id, email, name, role, password_hash) values (%s, %s, 'Family', 'student', '-')",
                [(account, f"family-{number}@example.com") for number, (_, account, _) in enumerate(people)],
            )
            await cursor.executemany(
                "insert into auth_tokens (token_hash, account_id, expires_at) values (%s, %s, now() + '1 day')",
                [(hash_token(token), account) for _, account, token in people],
            )
            await cursor.executemany(
                "insert into account_students (account_id, student_id) values (%s, %s)",
                [(account, student) for student, account, _ in people],
            )
    return [(str(student), token) for student, _, token in people]


async def _look(order: dict[str, Any]) -> dict[str, float]:
    client = await asyncio.create_subprocess_exec(
        *[sys.executable, "-m", "bench.reads_client"], stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    output, _ = await client.communicate(json.dumps(order).encode() + b"\n")
    if client.returncode:
        raise Wrong("the readers' process failed")
    answer = json.loads(output)
    if answer["refused"]:
        raise Wrong(f"reads were refused: {answer['refused'][0]}")
    took = sorted(answer["took"])
    return {
        "per_second": len(took) / answer["seconds"],
        "p50": took[len(took) // 2],
        "p99": took[len(took) * 99 // 100],
        "max": took[-1],
        "bytes": answer["bytes"],
    }
