"""A worker that is dead, frozen, hung, blocked, without its task, or was never there: seen, and its work taken over.

Each case has a database and processes of its own. First the stuck worker is alone in its group: how long until
diagnose or the lag say that nobody gets on with a paid payment? Then it has a colleague: how long until all that waited
for it is delivered? No reconciler runs, so nothing but the group itself delivers.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from uuid import UUID

from caravan.apps.services import WORKERS
from caravan.db import Database
from caravan.eventlog.lag import list_lag
from caravan.fulfilment.diagnose import Technical, diagnose
from verify.fleet import Fleet, Slot
from verify.parts import Context
from verify.report import PartResult
from verify.scratch import ScratchServer
from verify.world import SETTINGS, World, open_world

SEEN_SECONDS_MAX = 10.0
TAKEN_OVER_SECONDS_MAX = 15.0
GIVE_UP_SECONDS = 30.0
POLL_SECONDS = 0.1
PAYMENTS = 12  # of as many students: enough that the stuck worker's half of the log has some
TRAINERS = 3
AT_ONCE = 3  # cases at a time
ROOMY = {"max_connections": "250"}

CASES: dict[str, str | None] = {
    "dead": None,
    "frozen": None,
    "hung": "verify.fleet_faults:hang",
    "blocked": "verify.fleet_faults:block",
    "dead task": "verify.fleet_faults:end_task",
    "none": None,
}
SERVICES = ("purchase-worker", "allocation-worker", "session-worker")
GONE = ("dead", "none")
STUCK = (Technical.NO_WORKER, Technical.WORKER_BEHIND)


@dataclass(slots=True)
class Stage:
    """One case: a worker of `service` gets stuck."""

    case: str
    service: str
    db: Database
    url: str
    world: World
    result: PartResult
    seen: list[float] = field(default_factory=list[float])
    taken_over: list[float] = field(default_factory=list[float])

    @property
    def name(self) -> str:
        return f"{self.case}, {self.service}"


async def run(context: Context) -> PartResult:
    result = context.result()
    rounds = context.pick(1, 3)
    result.must_fire = tuple(CASES)
    figures: dict[str, dict[str, list[float]]] = {case: {"seen": [], "taken_over": []} for case in CASES}
    gate = asyncio.Semaphore(AT_ONCE)
    with ScratchServer(settings=ROOMY) as server:

        async def one(number: int, round_: int, case: str) -> None:
            async with gate:
                service = SERVICES[(number + round_) % len(SERVICES)]
                database = server.create()
                async with database.database() as db:
                    world = await open_world(db, trainers=TRAINERS)
                    stage = Stage(case, service, db, database.url, world, result)
                    await _alone(stage)
                    await _with_a_colleague(stage)
                    broken = await world.violations()
                for said in broken:
                    result.violated(f"{stage.name}: {said}", case)
                result.cases += 1
                figures[case]["seen"] += stage.seen
                figures[case]["taken_over"] += stage.taken_over

        async with asyncio.TaskGroup() as group:
            for round_ in range(rounds):
                for number, case in enumerate(CASES):
                    if context.case in (None, case):
                        group.create_task(one(number, round_, case))
    result.good_min = result.cases * PAYMENTS
    result.extra["seen_seconds"] = {case: _worst(figures[case]["seen"]) for case in CASES}
    result.extra["taken_over_seconds"] = {case: _worst(figures[case]["taken_over"]) for case in CASES}
    return result


def _worst(seconds: list[float]) -> float | None:
    return round(max(seconds), 1) if seconds else None


# ------------------------------------------------------------------ the two questions


async def _alone(stage: Stage) -> None:
    """Nobody else is in the group: who looks must be told."""
    async with _fleet(stage, colleague=False) as fleet:
        await _until_up(stage, _alive_wanted(stage, 1))
        await _break(stage, fleet)
        [payment] = await _pay(stage, 1)
        started = time.monotonic()
        seconds = await _until(lambda: _is_seen(stage, payment), started)
        if seconds is None or stage.result.too_long(seconds, SEEN_SECONDS_MAX):
            stage.result.violated(f"{stage.name}: not seen within {SEEN_SECONDS_MAX:.0f} s", stage.case)
        stage.seen.append(seconds if seconds is not None else GIVE_UP_SECONDS)


async def _with_a_colleague(stage: Stage) -> None:
    """Another worker of the group takes over what the stuck one had; where there is none, one is started then."""
    async with _fleet(stage, colleague=stage.case != "none") as fleet:
        await _until_up(stage, _alive_wanted(stage, 2))
        await _break(stage, fleet)
        payments = await _pay(stage, PAYMENTS)
        started = time.monotonic()
        if stage.case == "none":
            fleet.add(Slot(stage.service, 90))
        seconds = await _until(lambda: _are_delivered(stage, payments), started)
        if seconds is None or stage.result.too_long(seconds, TAKEN_OVER_SECONDS_MAX):
            stage.result.violated(
                f"{stage.name}: its work was not taken over within {TAKEN_OVER_SECONDS_MAX:.0f} s", stage.case
            )
        if seconds is not None:
            stage.result.good += len(payments)
        stage.taken_over.append(seconds if seconds is not None else GIVE_UP_SECONDS)


def _fleet(stage: Stage, *, colleague: bool) -> Fleet:
    """One worker of each other service, and of the one in question the victim and perhaps a colleague."""
    slots = [Slot(service, number) for number, service in enumerate(WORKERS) if service != stage.service]
    if stage.case != "none":
        slots.append(Slot(stage.service, 50, patch=CASES[stage.case]))
    if colleague:
        slots.append(Slot(stage.service, 60))
    assert SETTINGS.sandbox_webhook_secret
    return Fleet(stage.url, SETTINGS.sandbox_webhook_secret, slots)


def _alive_wanted(stage: Stage, of_service: int) -> dict[str, int]:
    wanted = dict.fromkeys(WORKERS, 1)
    wanted[stage.service] = 0 if stage.case == "none" else of_service
    return wanted


async def _break(stage: Stage, fleet: Fleet) -> None:
    victim = next((slot for slot in fleet.slots if slot.number == 50), None)
    if victim is not None:
        pid = victim.pid
        assert pid is not None, f"the victim is up: {fleet.surprises}"
        if stage.case == "dead":
            victim.rests = True
            fleet.kill(victim)
        elif stage.case == "frozen":
            fleet.freeze(victim)
        else:
            os.kill(pid, signal.SIGUSR1)
    stage.result.fired[stage.case] += 1


async def _pay(stage: Stage, number: int) -> list[UUID]:
    """So many new students each buy something at an hour of their own."""
    students = await stage.world.students(number)
    payments = [await stage.world.buy(student, hour=hour) for hour, student in enumerate(students)]
    await stage.world.pay(payments)
    return payments


# ------------------------------------------------------------------ looking

COUNT_DELIVERED = """
select count(*) from fulfilments where payment_id = any(%(payments)b::uuid[]) and stage = 'scheduled' and owed = 0
"""

# Workers alive, and how many of them own a part of the log: a newcomer takes its share at its next turn.
COUNT_WORKERS = """
select w.service, count(distinct w.name) from workers w join log_cursors c on c.owner = w.name
where w.expires_at > clock_timestamp() and c.owner_incarnation = w.incarnation group by w.service
"""


async def _is_seen(stage: Stage, payment: UUID) -> bool:
    async with stage.db.transaction("verify", read_only=True) as tx:
        [finding] = await diagnose(tx, payment_id=payment)
        lag = next(lag for lag in await list_lag(tx) if lag.service == stage.service)
    if stage.case in GONE:  # to be called by its name: a group without anybody is not merely behind
        return finding.reason == Technical.NO_WORKER and lag.state == "down"
    return finding.reason in STUCK or lag.state in ("down", "behind")


async def _are_delivered(stage: Stage, payments: list[UUID]) -> bool:
    async with stage.db.transaction("verify", read_only=True) as tx:
        return await tx.value(COUNT_DELIVERED, {"payments": payments}) == len(payments)


async def _until_up(stage: Stage, wanted: dict[str, int]) -> None:
    """Until every worker is alive and has its share; the leases of an earlier fleet may have to run out first."""

    async def up() -> bool:
        async with stage.db.transaction("verify", read_only=True) as tx:
            rows = dict(await tx.tuples(COUNT_WORKERS))
        return all(rows.get(service, 0) == number for service, number in wanted.items())

    if await _until(up, time.monotonic()) is None:
        stage.result.violated(f"{stage.name}: the workers did not come up", stage.case)


async def _until(condition: Callable[[], Awaitable[bool]], started: float) -> float | None:
    """Seconds since `started` when it became true; None: not in time."""
    while time.monotonic() - started < GIVE_UP_SECONDS:
        if await condition():
            return time.monotonic() - started
        await asyncio.sleep(POLL_SECONDS)
    return None
