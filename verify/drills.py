"""Each harness at the smallest scale that still notices what it is there to notice; for `sabotage`.

A drill runs the harness's own code in this process, on databases from its ground, and returns what that found.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from random import Random
from zoneinfo import ZoneInfo

from caravan.errors import DomainError
from tests.redis_server import RedisServer
from verify import authz_edges, commits, lives, orders, parsers, races, redis, stuck
from verify.authz import Stage as Door
from verify.authz import _permissions, _refusals  # pyright: ignore[reportPrivateUsage]
from verify.authz_matrix import list_matrix
from verify.crashpoints.every import list_steps
from verify.crashpoints.play import Batch, Found, play
from verify.crashpoints.points import AFTER, BEFORE, Fault, Point, Strike, strikes_at
from verify.crashpoints.stage import make_template
from verify.crew import Share
from verify.fleet import Fleet
from verify.parts import Context
from verify.redis_fences import play_fences
from verify.report import PartResult
from verify.site import gather_cast, serve
from verify.tamper import Ground
from verify.world import open_world

Drill = Callable[[Ground, int], Awaitable[PartResult]]
SMALL = "small"
BATCH_CASES = 38
SIGNATURES = 4_000
COMMIT_SECONDS = 4.0  # until an event that didn't come is lost
GROUND_TRAINERS = 4
PLAYS = 20
ROUNDS, FAMILIES = 3, 16


def context_of(part: str, seed: int, ground: Ground) -> Context:
    return Context(part, SMALL, seed, ground)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


# ------------------------------------------------------------------ orders


def of_orders(*names: str, lanes: Sequence[int] = (0,), prepare: Callable[[], None] | None = None) -> Drill:
    """Lanes of these lives only, with workers that mostly turn at once."""

    async def drill(ground: Ground, seed: int) -> PartResult:
        orders.LIVES = tuple(life for life in lives.LIVES if life.name in names)
        assert len(orders.LIVES) == len(names)
        orders.list_orders.cache_clear()
        orders.TURNS = (0.8,)
        if prepare:
            prepare()
        return await orders.live_lanes(Share("orders", SMALL, seed, 0, tuple(lanes), ground.create()))

    return drill


def soon() -> None:
    """A time of day that comes within the notice period, whenever this is run."""
    orders.SLOT = (datetime.now(ZoneInfo("Asia/Kolkata")) + timedelta(hours=3)).strftime("%H:00")


# ------------------------------------------------------------------ races


def of_races(kind: str, times: int = 1) -> Drill:
    """So many rounds of a kind; during the first the connections are still being made, and little happens at once."""

    async def drill(ground: Ground, seed: int) -> PartResult:
        commits.SECONDS_MAX = COMMIT_SECONDS
        first = races.TURNS.index(kind)
        numbers = tuple(first + len(races.TURNS) * time for time in range(times))
        return await races.race(Share("races", SMALL, seed, 0, numbers, ground.create()))

    return drill


# ------------------------------------------------------------------ crash points

Plan = tuple[Strike, ...]


def of_crashpoints(name: str, plans: Callable[[Sequence[Point]], Sequence[Plan]] | None = None) -> Drill:
    """One step: cleanly, then struck as `plans` says, given the points that were found."""

    async def drill(ground: Ground, seed: int) -> PartResult:
        result = context_of("crashpoints", seed, ground).result()
        [step] = [each for each in list_steps() if each.name == name]
        template = await make_template(ground, min(step.trainers, GROUND_TRAINERS))
        found = await play(Batch(ground, template, name, 0, ()))
        note(result, found)
        wanted = list(plans(found.points)) if plans else []
        for at in range(0, len(wanted), BATCH_CASES // step.size):
            some = tuple(wanted[at : at + BATCH_CASES // step.size])
            note(result, await play(Batch(ground, template, name, 1, some)))
        return result

    return drill


def note(result: PartResult, found: Found) -> None:
    result.cases += found.cases
    result.good += found.good
    for case, said in found.violations:
        result.violated(f"{case}: {said}", case)


def each_point(when: str, fault: Fault) -> Callable[[Sequence[Point]], Sequence[Plan]]:
    """The same fault at each statement."""
    return lambda points: [
        (Strike(at, when, fault),) for at, point in enumerate(points) if (when, fault) in strikes_at(point)
    ]


def again_and_again(points: Sequence[Point]) -> Sequence[Plan]:
    """A deadlock at the same place of every attempt, more often than a bug may happen."""
    return [(Strike(at, BEFORE, Fault.DEADLOCK), *[Strike(len(points), BEFORE, Fault.DEADLOCK)] * 4)
            for at in range(len(points))]  # fmt: skip


# ------------------------------------------------------------------ stuck

# Leases that no worker can have been given by the database's clock.
COUNT_ODD_LEASES = "select count(*) from workers where expires_at > clock_timestamp() + interval '1 minute'"


async def a_dead_worker(ground: Ground, seed: int) -> PartResult:
    """The only worker of its group is killed: who looks must be told."""
    stuck.GIVE_UP_SECONDS = stuck.SEEN_SECONDS_MAX + 4
    open_fleet = stuck._fleet  # pyright: ignore[reportPrivateUsage]

    def patched(stage: stuck.Stage, *, colleague: bool) -> Fleet:
        fleet = open_fleet(stage, colleague=colleague)
        for slot in fleet.slots:
            slot.patch = slot.patch or ground.tamper.patch
        return fleet

    stuck._fleet = patched  # pyright: ignore[reportPrivateUsage]
    result = context_of("stuck", seed, ground).result()
    made = ground.create()
    async with made.database() as db:
        world = await open_world(db, trainers=stuck.TRAINERS)
        stage = stuck.Stage("dead", "purchase-worker", db, made.url, world, result)
        await stuck._alone(stage)  # pyright: ignore[reportPrivateUsage]
        [odd] = await world.rows(COUNT_ODD_LEASES)
    ground.tamper.hit(odd["count"])
    result.cases += 1
    result.good += not result.violations
    return result


# ------------------------------------------------------------------ fuzz, authz


async def signatures(ground: Ground, seed: int) -> PartResult:
    result = context_of("fuzz", seed, ground).result()
    for number in range(SIGNATURES):
        dice = Random(repr((seed, number)))
        signed = parsers.make_signature(dice)
        result.cases += 1
        try:
            result.good += parsers.read_signature(signed)
        except DomainError:
            result.good += 1
        except parsers.Wrong as wrong:
            result.violated(str(wrong))
    return result


@asynccontextmanager
async def a_door(part: str, ground: Ground, seed: int) -> AsyncGenerator[Door]:
    context = context_of(part, seed, ground)
    made = ground.create()
    async with made.database() as db:
        cast = await gather_cast(db)
    yield Door(context, context.result(), cast, ground.freeze(made))


async def students(ground: Ground, seed: int) -> PartResult:
    """The routes that name a student, by everybody on everybody's."""
    async with a_door("authz", ground, seed) as door, door.site() as site:
        routes = [route for route in list_matrix(site.app) if "{student_id}" in route.path]
        await _refusals(door, site, routes)
        await _permissions(door, site, routes, door.cast.people["student"])
        return door.result


async def keys(ground: Ground, seed: int) -> PartResult:
    async with a_door("authz", ground, seed) as door, serve(ground.create(door.template)) as site:
        await authz_edges._idempotency_keys(door.result, site, door.cast)  # pyright: ignore[reportPrivateUsage]
        door.result.good += door.result.cases
        return door.result


# ------------------------------------------------------------------ Redis


async def fences(ground: Ground, seed: int) -> PartResult:
    result = context_of("redis", seed, ground).result()
    with RedisServer() as server:
        async with ground.create().database() as db:
            await play_fences(result, db, server, Random(seed), PLAYS)
    return result


async def sockets(ground: Ground, seed: int) -> PartResult:
    """Everybody's one course is paid and delivered while Redis comes and goes."""
    result = context_of("redis", seed, ground).result()
    redis.CATCH_UP_SECONDS_MAX = 6.0
    made = ground.create()
    with RedisServer() as server:
        async with made.database() as db:
            await redis.run_sockets(
                result, db, made.url, server, Random(seed), ROUNDS, FAMILIES, FAMILIES, patch=ground.tamper.patch
            )
        ground.tamper.hit((server.starts - 1) * (ground.tamper.patch is not None))
    return result


DRILLS: dict[str, Drill] = {
    "orders plain": of_orders("paid", "late success"),
    "orders twice": of_orders("paid twice", "paid twice, one refunded"),
    "orders places": of_orders("no place yet", "never a place"),
    "orders trainers": of_orders("trainer booked", "trainer away"),
    "orders refunds": of_orders("refunded by an operator", "one session less", lanes=(0, 2, 3, 4)),
    "orders outage": of_orders("outage", lanes=(7,), prepare=soon),
    "orders clocks": of_orders("paid", "late success", lanes=(1,)),
    "races one purchase": of_races("one purchase", times=4),
    "races one trainer": of_races("one trainer", times=2),
    "races one student": of_races("one student", times=4),
    "races replay": of_races("replay", times=2),
    "races one refund": of_races("one refund"),
    "races coins": of_races("coins", times=3),
    "races repair": of_races("repair"),
    "races commits reversed": of_races(races.REVERSED, times=2),
    "crashpoints webhook-succeeded": of_crashpoints("webhook-succeeded", each_point(AFTER, Fault.DROPPED)),
    "crashpoints purchases": of_crashpoints("purchases", each_point(AFTER, Fault.DROPPED)),
    "crashpoints confirm": of_crashpoints("confirm", each_point(BEFORE, Fault.SERIALIZATION)),
    "crashpoints deadlocks": of_crashpoints("purchases", again_and_again),
    "crashpoints poison": of_crashpoints("poison"),
    "crashpoints webhook-mismatch": of_crashpoints("webhook-mismatch"),
    "crashpoints mend-payment": of_crashpoints("mend-payment"),
    "crashpoints reconcile-purchase": of_crashpoints("reconcile-purchase"),
    "stuck": a_dead_worker,
    "fuzz signatures": signatures,
    "authz students": students,
    "authz keys": keys,
    "redis fences": fences,
    "redis sockets": sockets,
}


async def run_drill(name: str, ground: Ground, seed: int, seconds_max: float) -> PartResult:
    """Raises what the harness itself breaks off with, TimeoutError too."""
    async with asyncio.timeout(seconds_max):
        return await DRILLS[name](ground, seed)
