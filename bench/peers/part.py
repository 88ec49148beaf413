"""The part `peers`: each peer in all its ways with 1, 2 and 4 processes, then the best of them in turns with ours."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import metadata
from typing import Any
from uuid import UUID

import psycopg

from bench import fulfil, runs
from bench.check import Wrong
from bench.parts import Context, Result
from bench.peers.adapter import Adapter, Way
from bench.peers.race import Failed, Ran, find_adapter, race, redis_server
from bench.report import spread, table
from bench.server import Server

NAMES = ("dbos", "pgqueuer", "procrastinate", "celery")
WAITING = "peers_waiting"


@dataclass(slots=True)
class Tried:
    """A peer's runs: every way once, with its processes; the best again and again, with ours beside it."""

    ways: list[tuple[Ran, Way, int]] = field(default_factory=list[tuple[Ran, Way, int]])
    failed: list[str] = field(default_factory=list[str])
    theirs: list[Ran] = field(default_factory=list[Ran])
    ours: list[Ran] = field(default_factory=list[Ran])


@dataclass(slots=True)
class Track:
    """Where the races are run: copies of one database in which `payments` wait."""

    server: Server
    redis: str
    payments: list[UUID]
    workers: int = 1
    """Of ours: as many as do best."""

    async def theirs(self, name: str, way: Way, processes: int) -> Ran:
        return await race(name, self.server.create("run", WAITING), self.payments, way, processes, self.redis)

    async def ours(self, workers: int | None = None) -> Ran:
        url = self.server.create("run", WAITING)
        done = await runs.fulfil(url, len(self.payments), workers=workers or self.workers, whole=False)
        return Ran(done.per_second, done.cpu_us)


async def run(context: Context) -> Result:
    n, trainers, pairs = context.pick(500, 3_000), context.pick(200, 1_000), context.pick(1, 5)
    figures: dict[str, Any] = {"payments": n, "trainers": trainers}
    ratios: dict[str, float | None] = dict.fromkeys(NAMES)
    rows: list[list[Any]] = []
    with Server() as server:
        await fulfil.prepare(server, WAITING, n, trainers, context.seed)
        async with redis_server() as redis:
            track = Track(server, redis or "", await _payments(server.url_of(WAITING)))
            ours = {str(workers): (await track.ours(workers)).per_second for workers in (1, 2)}
            track.workers = int(max(ours, key=lambda workers: ours[workers]))
            figures["ours_by_workers"] = {workers: round(rate, 1) for workers, rate in ours.items()}
            context.say(f"ours by workers: {figures['ours_by_workers']}")
            for name in NAMES:
                adapter = find_adapter(name) if redis or name != "celery" else None
                if adapter is None:
                    figures[name] = None
                    rows.append([name, None, None, None, None, "absent: not installed"])
                    continue
                tried = await _try(context, track, name, adapter, pairs)
                figures[name] = _figures(adapter, tried)
                ratios[name] = figures[name]["ratio"]
                dearer = figures[name]["cpu_ratio"]
                found = [figures[name][key] for key in ("per_second", "ours", "ratio")]
                rows.append([name, *found, dearer and dearer["median"], _best(tried)])
    header = ["peer", "fulfilments/s", "ours beside it", "ours / peer", "its µs / ours", "its best"]
    return Result(figures, ratios, table(header, rows))


async def _payments(url: str) -> list[UUID]:
    async with await psycopg.AsyncConnection.connect(url) as connection:
        rows = await connection.execute("select payment_id from undelivered order by payment_id")
        return [row[0] for row in await rows.fetchall()]


async def _try(context: Context, track: Track, name: str, adapter: Adapter, pairs: int) -> Tried:
    tried = Tried()
    for way in context.pick(adapter.WAYS[:1], adapter.WAYS):
        for processes in context.pick((1, 2), (1, 2, 4)):
            said = f"{name} {_words(way, processes)}"
            try:
                ran = await track.theirs(name, way, processes)
            except (Failed, Wrong) as error:
                tried.failed.append(f"{said}: {error}")
                context.say(f"no figure: {tried.failed[-1]}")
                continue
            tried.ways.append((ran, way, processes))
            context.say(f"{said}: {ran.per_second:,.0f} fulfilments/s, {sum(ran.cpu_us.values()):,.0f} µs each")
    if not tried.ways:
        return tried
    tried.ways.sort(key=lambda each: -each[0].per_second)
    _, way, processes = tried.ways[0]
    for pair in range(pairs):
        order = ("theirs", "ours") if pair % 2 == 0 else ("ours", "theirs")
        for who in order:
            if who == "ours":
                tried.ours.append(await track.ours())
            else:
                tried.theirs.append(await track.theirs(name, way, processes))
        theirs, ours = tried.theirs[-1], tried.ours[-1]
        context.say(f"{name} {theirs.per_second:,.0f}, ours {ours.per_second:,.0f} fulfilments/s")
    return tried


def _figures(adapter: Adapter, tried: Tried) -> dict[str, Any]:
    said: dict[str, Any] = {
        "version": metadata.version(adapter.PACKAGE),
        "guarantee": adapter.GUARANTEE,
        "ways": [
            {**way, "processes": processes, "per_second": round(ran.per_second, 1), "cpu_us": ran.cpu_us}
            for ran, way, processes in tried.ways
        ],
        "failed": tried.failed,
        "per_second": None,
        "ours": None,
        "ratio": None,
        "cpu_ratio": None,
    }
    if tried.theirs:
        theirs, ours = (spread([ran.per_second for ran in each]) for each in (tried.theirs, tried.ours))
        pairs = list(zip(tried.ours, tried.theirs, strict=True))
        ratios = spread([a.per_second / b.per_second for a, b in pairs], 2)
        dearer = spread([sum(b.cpu_us.values()) / sum(a.cpu_us.values()) for a, b in pairs], 2)
        said |= {"per_second": theirs["median"], "ours": ours["median"], "ratio": ratios["median"]}
        said |= {"runs": theirs, "our_runs": ours, "ratios": ratios, "best": said["ways"][0], "cpu_ratio": dearer}
    return said


def _best(tried: Tried) -> str:
    return _words(*tried.ways[0][1:]) if tried.ways else "no run was right"


def _words(way: Way, processes: int) -> str:
    return ", ".join([f"{processes} process{'es' if processes > 1 else ''}", *(f"{k} {v}" for k, v in way.items())])
