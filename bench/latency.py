"""From the payment's commit to the frame on the family's screen: idle, and under load; beside a hand-written floor.

Open loop: buyers come at random times of a given rate and don't wait for one another. The product is `caravan up`, its
web and worker processes, over a PostgreSQL of the benchmark's; buyers and sockets are in a process of their own. The
server notes when each transaction committed, so each hop of the road can be told apart.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import psycopg

from bench.check import Wrong
from bench.cpu import tree_cpu_seconds
from bench.latency_data import Purchase, build
from bench.parts import Context, Result
from bench.product import READY_SECONDS_MAX, product, start, stop
from bench.report import spread, table
from bench.server import Server
from harness.processes import free_port

TEMPLATE = "latency"
# Idle is when no two payments meet: they come at random, after the time in which the one before has surely arrived.
IDLE_APART_SECONDS = 0.1
IDLE_RATE = 25
WARM = 0.25  # the share of the first payments that is not counted: connections open, statements get prepared
FLOW = 32

# When each step of each payment began and was committed: its row on the feed tells, which nobody changes later.
READ_STEPS = """
select data ->> 'paymentId', type, extract(epoch from created_at)::float8,
  extract(epoch from pg_xact_commit_timestamp(xmin))::float8
from student_feed where type in ('PURCHASE_CONFIRMED', 'PURCHASE_CREATED', 'TRAINER_ALLOCATED', 'SESSIONS_SCHEDULED')
"""
STEPS = ("PURCHASE_CONFIRMED", "PURCHASE_CREATED", "TRAINER_ALLOCATED", "SESSIONS_SCHEDULED")
HOPS = ("request", "capture", "wake 1", "purchase", "wake 2", "allocation", "wake 3", "sessions", "push")


@dataclass(slots=True)
class Trip:
    """One payment's way, in seconds of this machine's clock. `marks`: what HOPS lie between.

    `cpu_ms`: of the processors, of the system's own processes (not the server's), per payment of its run.
    """

    meant: float
    answered: float
    told: float
    marks: list[float]
    cpu_ms: float

    @property
    def committed(self) -> float:
        return self.marks[2]

    @property
    def hops(self) -> list[float]:
        return [(b - a) * 1000 for a, b in zip(self.marks, self.marks[1:], strict=False)]


async def run(context: Context) -> Result:
    idle, seconds, fast = context.pick(60, 400), context.pick(4.0, 20.0), context.pick(400, 3_000)
    pairs, rates = context.pick(2, 5), context.pick((20,), (5, 20, 50, 100))
    trainers, budget = context.pick(400, 2_000), fast + int(seconds * sum(rates)) + fast
    with Server({"track_commit_timestamp": "on"}) as server:
        bench = Bench(context, server, await _build(server, idle, trainers, context.seed))
        idles: dict[str, list[list[Trip]]] = {"ours": [], "floor": []}
        for _ in range(pairs):
            for who in ("ours", "floor"):
                idles[who].append(await bench.idle(who))
        server.drop(TEMPLATE)
        bench.purchases = await _build(server, budget, trainers, context.seed)
        loaded, rate_max = await bench.loaded(rates, seconds, fast)
    return _result(idles, loaded, rate_max)


async def _build(server: Server, purchases: int, trainers: int, seed: int) -> list[Purchase]:
    """A template with so many payments; the floor plans for all that there are."""
    server.create(TEMPLATE)
    built = await build(server.url_of(TEMPLATE), purchases, trainers, seed)
    server.settle(TEMPLATE)
    return built


@dataclass(slots=True)
class Bench:
    """Runs, each on a copy of the same database."""

    context: Context
    server: Server
    purchases: list[Purchase]

    async def idle(self, who: str) -> list[Trip]:
        """All of them, one by one."""
        url = self.server.create("run", TEMPLATE)
        async with (whole if who == "ours" else floor)(url, self.server) as road:
            pace = {"rate": IDLE_RATE, "apart": IDLE_APART_SECONDS, "seed": self.context.seed}
            trips = await drive(road, url, self.purchases, **pace)
        trips = trips[int(WARM * len(trips)) :]
        self.context.say(f"{who} idle: {_words(_figures(trips))}")
        return trips

    async def loaded(self, rates: Sequence[int], seconds: float, fast: int) -> tuple[dict[str, list[Trip]], float]:
        """At these rates, at the most that goes, and at half and four fifths of it."""
        url = self.server.create("run", TEMPLATE)
        left = iter(self.purchases)
        found: dict[str, list[Trip]] = {}

        def take(n: int) -> list[Purchase]:
            return [each for _, each in zip(range(n), left, strict=False)]

        async with whole(url, self.server) as road:
            for rate in rates:
                await self._at(found, f"{rate}/s", road, url, take(int(rate * seconds)), rate)
            trips = await drive(road, url, take(fast), flow=FLOW)
            rate_max = _rate(trips)
            self.context.say(f"as fast as it goes: {rate_max:,.0f}/s")
            for share in (0.5, 0.8):
                n = min(int(rate_max * share * seconds), fast // 2)
                await self._at(found, f"{share:.0%} of max", road, url, take(n), rate_max * share)
        return found, rate_max

    async def _at(
        self,
        found: dict[str, list[Trip]],
        name: str,
        road: Road,
        url: str,
        bought: list[Purchase],
        rate: float,
    ) -> None:
        trips = await drive(road, url, bought, rate=rate, seed=self.context.seed)
        found[name] = trips[int(WARM * len(trips)) :]
        self.context.say(f"{name}: {_words(_figures(found[name]))}")


# ------------------------------------------------------------------ the two systems


@dataclass(frozen=True, slots=True)
class Road:
    """A running system: where it takes payments and sockets, and its processes."""

    http_port: int
    ws_port: int
    pids: list[int]


@asynccontextmanager
async def whole(url: str, _server: Server) -> AsyncGenerator[Road]:
    """The product."""
    async with product(url) as ours:
        yield Road(ours.port, ours.port, [ours.pid])


@asynccontextmanager
async def floor(url: str, server: Server) -> AsyncGenerator[Road]:
    """The hand-written chain."""
    plan_url = server.create("plan", TEMPLATE)
    http_port, ws_port = free_port(), free_port()
    parts = [
        await start("-m", "bench.latency_floor", "gate", url, plan_url, str(http_port), str(ws_port), pipe=True),
        await start("-m", "bench.latency_floor", "worker", url, plan_url, pipe=True),
    ]
    try:
        for part in parts:
            assert part.stdout
            if await asyncio.wait_for(part.stdout.readline(), READY_SECONDS_MAX) != b"ready\n":
                raise Wrong("the floor's chain did not start")
        yield Road(http_port, ws_port, [part.pid for part in parts])
    finally:
        for part in parts:
            await stop(part)


# ------------------------------------------------------------------ a run


async def drive(road: Road, url: str, purchases: Sequence[Purchase], **pace: float) -> list[Trip]:
    """Let these be bought; their trips in the order in which they were meant. Raises Wrong unless all arrived."""
    order = {
        "http_port": road.http_port,
        "ws_port": road.ws_port,
        "purchases": [asdict(each) for each in purchases],
        **pace,
    }
    client = await asyncio.create_subprocess_exec(
        *[sys.executable, "-m", "bench.latency_client"], stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    cpu = tree_cpu_seconds(road.pids)
    output, _ = await client.communicate(json.dumps(order).encode() + b"\n")
    cpu_ms = (tree_cpu_seconds(road.pids) - cpu) / len(purchases) * 1000
    if client.returncode:
        raise Wrong("the buyers' process failed")
    answer = json.loads(output)
    if answer["refused"]:
        raise Wrong(f"payments were refused: {answer['refused'][0]}")
    seen: dict[str, dict[str, float]] = answer["seen"]
    missing = [payment for payment, times in seen.items() if "told" not in times]
    if missing:
        raise Wrong(f"{len(missing)} of {len(seen)} families were not told, {missing[0]} among them")
    steps = await _read_steps(url)
    trips = [_trip(times, steps[payment], cpu_ms) for payment, times in seen.items()]
    return sorted(trips, key=lambda trip: trip.meant)


async def _read_steps(url: str) -> dict[str, dict[str, tuple[float, float]]]:
    found: dict[str, dict[str, tuple[float, float]]] = {}
    async with await psycopg.AsyncConnection.connect(url) as connection:
        for payment, kind, began, committed in await (await connection.execute(READ_STEPS)).fetchall():
            found.setdefault(payment, {})[kind] = began, committed
    return found


def _trip(times: dict[str, float], steps: dict[str, tuple[float, float]], cpu_ms: float) -> Trip:
    between = [moment for kind in STEPS for moment in steps[kind]]
    return Trip(times["meant"], times["answered"], times["told"], [times["meant"], *between, times["told"]], cpu_ms)


# ------------------------------------------------------------------ figures


def _percentile(values: Sequence[float], percent: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def _spread_of(milliseconds: Sequence[float]) -> dict[str, float]:
    return {
        "p50": round(_percentile(milliseconds, 50), 2),
        "p99": round(_percentile(milliseconds, 99), 2),
        "max": round(max(milliseconds), 2),
    }


def _figures(trips: Sequence[Trip]) -> dict[str, Any]:
    """Milliseconds until the frame was read: from the commit, from the answer, from when it was meant to be paid."""
    return {
        "payments": len(trips),
        "cpu_ms": round(median(trip.cpu_ms for trip in trips), 2),
        "from_commit": _spread_of([(trip.told - trip.committed) * 1000 for trip in trips]),
        "from_answer": _spread_of([(trip.told - trip.answered) * 1000 for trip in trips]),
        "from_intent": _spread_of([(trip.told - trip.meant) * 1000 for trip in trips]),
        "hops_p50": {name: round(median(trip.hops[number] for trip in trips), 2) for number, name in enumerate(HOPS)},
    }


def _rate(trips: Sequence[Trip]) -> float:
    """Of the middle four fifths."""
    told = sorted(trip.told for trip in trips)
    first, last = len(told) // 10, len(told) * 9 // 10
    return (last - first) / (told[last] - told[first])


def _words(figures: dict[str, Any]) -> str:
    return "from the commit " + ", ".join(f"{k} {v:,.1f} ms" for k, v in figures["from_commit"].items())


def _result(idles: dict[str, list[list[Trip]]], loaded: dict[str, list[Trip]], rate_max: float) -> Result:
    runs = {who: [_figures(trips) for trips in each] for who, each in idles.items()}
    whole = {who: _figures([trip for trips in each for trip in trips]) for who, each in idles.items()}
    ratios: dict[str, Any] = {
        p: spread(
            [a["from_commit"][p] / b["from_commit"][p] for a, b in zip(runs["ours"], runs["floor"], strict=True)], 2
        )
        for p in ("p50", "p99")
    }
    at = {name: _figures(trips) for name, trips in loaded.items()}
    half = at["50% of max"]["from_commit"]["p99"] / whole["ours"]["from_commit"]["p50"]
    rows: list[list[Any]] = []
    for name, each in {"idle": whole["ours"], "idle, floor": whole["floor"], **at}.items():
        rows.append([name, *each["from_commit"].values(), *each["from_intent"].values(), each["cpu_ms"]])
    hops = [[name, whole["ours"]["hops_p50"][name], whole["floor"]["hops_p50"][name]] for name in HOPS]
    names = ["rate", "p50", "p99", "max", "p50 from intent", "p99", "max", "CPU ms"]
    return Result(
        {
            "idle_apart_seconds": IDLE_APART_SECONDS,
            "idle": whole["ours"],
            "floor": whole["floor"],
            "runs": runs,
            "ratios": ratios,
            "rate_max": round(rate_max, 1),
            "loaded": at,
        },
        {
            "latency_p50": ratios["p50"]["median"],
            "latency_p99": ratios["p99"]["median"],
            "latency_loaded_p99": round(half, 2),
        },
        [*table(names, rows), f"max: {rate_max:,.0f} payments/s", *table(["hop, p50 ms", "ours", "floor"], hops)],
    )
