"""N captured payments wait → all delivered, by the product's own workers: in 1, 2, 4 processes; event by event."""

from __future__ import annotations

from bench.market import add_captured_payments, build_market
from bench.parts import Context, Result
from bench.report import spread, table
from bench.runs import LOOK_RARELY_SECONDS, Run, fulfil
from bench.server import Server
from caravan.apps.subscriptions import SUBSCRIPTIONS
from caravan.db import Database
from caravan.eventlog.retention import maintain
from caravan.eventlog.subscription import register_groups

READY = "bench_waiting"


async def run(context: Context) -> Result:
    n, trainers = context.pick(1_000, 10_000), context.pick(200, 2_000)
    ones, runs = context.pick(50, 500), context.pick(2, 5)
    with Server() as server:
        await prepare(server, READY, n, trainers, context.seed)
        tried = {workers: [await _one(server, context, n, workers)] for workers in (1, 2, 4)}
        best = max(tried, key=lambda workers: tried[workers][0].per_second)
        for _ in range(runs - 1):
            tried[best].append(await _one(server, context, n, best))
        await prepare(server, "bench_ones", ones, trainers, context.seed)
        singly: list[Run] = []
        for _ in range(context.pick(1, 3)):
            singly.append(await fulfil(server.create("run", "bench_ones"), ones, workers=best, page=1))
    counted = await _count(context, n, trainers)
    timed = tried[best]
    per_second = spread([one.per_second for one in timed])
    rows_per_second = spread([one.sessions / one.seconds for one in timed], 0)
    alone = spread([one.per_second for one in singly])
    result = Result(
        {
            "payments": n,
            "sessions": timed[0].sessions,
            "trainers": trainers,
            "workers": best,
            "per_second": per_second["median"],
            "rows_per_second": rows_per_second["median"],
            "runs": per_second,
            "by_workers": {str(w): round(runs[0].per_second, 1) for w, runs in tried.items()},
            "cpu_us": timed[0].cpu_us,
            "per_fulfilment": counted,
            "batch_of_one": {"per_second": alone["median"], "runs": alone},
            "peak_bytes": [max(one.peaks) for one in timed],
        },
        {"batch_of_one": round(per_second["median"] / alone["median"], 2)},
    )
    result.lines = [
        *table(["workers", "fulfilments/s"], [[str(w), r[0].per_second] for w, r in tried.items()]),
        f"best with {best}: {per_second['median']:,.0f} fulfilments/s ({per_second['min']:,.0f} to"
        f" {per_second['max']:,.0f} in {len(timed)} runs), {rows_per_second['median']:,.0f} session rows/s",
        f"one event at a time: {alone['median']:,.0f} fulfilments/s",
        "the processors' µs per fulfilment: " + ", ".join(f"{v:,.0f} {k}" for k, v in timed[0].cpu_us.items()),
        "per fulfilment: " + ", ".join(f"{value:,} {name}" for name, value in counted.items()),
    ]
    return result


async def prepare(server: Server, name: str, n: int, trainers: int, seed: int) -> None:
    """A template database with a marketplace and n payments that wait."""
    url = server.create(name)
    await build_market(url, trainers=trainers, seed=seed)
    await add_captured_payments(url, n, seed)
    async with Database(url) as db, db.transaction() as tx:
        await register_groups(tx, SUBSCRIPTIONS)
        await maintain(tx)  # the log's next partitions: made once in a million events, not in a run
    server.settle(name)


async def _one(server: Server, context: Context, n: int, workers: int) -> Run:
    done = await fulfil(server.create("run", READY), n, workers=workers)
    context.say(f"{workers} workers: {done.per_second:,.0f} fulfilments/s")
    return done


async def _count(context: Context, n: int, trainers: int) -> dict[str, float | None]:
    """What one fulfilment asks of the server, by one worker process; on a server that counts and isn't timed."""
    with Server(counting=True) as server:
        await prepare(server, READY, n, trainers, context.seed)
        url = server.create("run", READY)
        return (await fulfil(url, n, workers=1, whole=False, look=LOOK_RARELY_SECONDS)).counted.per(n)
