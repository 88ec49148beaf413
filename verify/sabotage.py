"""Sabotage, the test of the tests: each fault is put into the product from outside, and its harness must notice.

A fault is caught where the harness finds violations with it, and none without it, at the same scale and with the same
seed. It must have fired, and the harness must have had something to do: a run in which nothing happened catches
nothing. Each run is a process of its own, forked from a server that has imported everything.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import cast

from verify.parts import Context
from verify.processes import PROCESSES
from verify.quiet import be_quiet
from verify.report import PartResult
from verify.scratch import Databases

PRELOAD = ["verify.sabotage", "verify.sabotages", "verify.drills"]
SECONDS_MAX = 60.0
GRACE_SECONDS = 15.0
FAULTS_MIN = 25
SLOW = ("stuck",)  # these wait for leases, and begin first


@dataclass(frozen=True, slots=True)
class Job:
    """A drill, sabotaged or as it is."""

    databases: Databases
    drill: str
    fault: str | None
    seed: int

    @property
    def name(self) -> str:
        return self.fault or f"{self.drill} as it is"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the drill said. `broke`: the harness itself could not go on; `lost`: its process didn't come back;
    `hits`: how often the fault ran."""

    job: Job
    cases: int = 0
    violations: int = 0
    good: int = 0
    hits: int = 0
    said: tuple[str, ...] = ()
    broke: str | None = None
    lost: str | None = None
    seconds: float = 0.0


async def run(context: Context) -> PartResult:
    from verify.drills import DRILLS  # here, so that what can't be imported fails once, not in every process
    from verify.sabotages import BY_NAME, FAULTS

    result = context.result()
    if context.case and context.case not in BY_NAME:
        print(f"verify: there is no sabotage {context.case!r}: choose of {', '.join(BY_NAME)}", file=sys.stderr)
        raise SystemExit(2)
    faults = [BY_NAME[context.case]] if context.case else list(FAULTS)
    wanted = {fault.drill for fault in faults}
    drills = [name for name in DRILLS if name in wanted]
    made = context.server.databases
    jobs = [
        Job(made.of_process(f"drill_{at}"), drill, None, context.seed) for at, drill in enumerate(drills)
    ] + [
        Job(made.of_process(f"fault_{at}"), fault.drill, fault.name, context.seed) for at, fault in enumerate(faults)
    ]  # fmt: skip
    jobs.sort(key=lambda job: job.drill not in SLOW)
    outcomes = await _in_turn(jobs)
    clean = {outcome.job.drill: outcome for outcome in outcomes if outcome.job.fault is None}
    for outcome in clean.values():
        _judge_clean(result, outcome)
    caught = 0
    for outcome in outcomes:
        if outcome.job.fault is not None:
            caught += _judge(result, outcome, clean[outcome.job.drill])
    result.must_fire = tuple(fault.name for fault in faults)
    result.good_min = len(drills)
    result.extra |= {
        "caught": caught,
        "of": len(faults),
        "slowest_seconds": round(max(outcome.seconds for outcome in outcomes), 1),
        "faults": {
            o.job.fault: {
                "drill": o.job.drill,
                "ran": o.hits,
                "violations": o.violations,
                "seconds": round(o.seconds, 1),
            }
            for o in outcomes
            if o.job.fault
        },
    }
    if not context.case and len(faults) < FAULTS_MIN:
        result.failed.append(f"only {len(faults)} faults, at least {FAULTS_MIN} are wanted")
    if context.case:
        for outcome in outcomes:
            _tell(outcome)
    return result


def _tell(outcome: Outcome) -> None:
    print(
        f"{outcome.job.name}: {outcome.violations} violations, {outcome.good} good; the fault ran {outcome.hits} times"
    )
    for said in (*outcome.said, outcome.broke, outcome.lost):
        if said:
            print(f"    {said}")


def _judge_clean(result: PartResult, outcome: Outcome) -> None:
    result.good += outcome.good
    if outcome.lost or outcome.broke or outcome.violations:
        result.violated(f"{outcome.job.name} finds faults: {outcome.lost or outcome.broke or outcome.said[0]}")
    elif not outcome.good:
        result.violated(f"{outcome.job.name} does nothing, so it proves nothing")


def _judge(result: PartResult, outcome: Outcome, clean: Outcome) -> bool:
    """Whether the fault was caught; says so if not."""
    fault = outcome.job.fault
    assert fault is not None
    result.cases += 1
    result.fired[fault] += outcome.hits > 0
    healthy = clean.good > 0 and not (clean.violations or clean.broke or clean.lost)
    noticed = outcome.violations > 0 or outcome.broke is not None
    if not noticed:
        how = outcome.lost or f"the fault ran {outcome.hits} times"
        result.violated(f"{fault} was not caught by {outcome.job.drill}: {how}", fault)
    elif not outcome.hits:
        result.violated(f"{fault} never ran, and {outcome.job.drill} complained of something else", fault)
    return noticed and healthy and outcome.hits > 0


# ------------------------------------------------------------------ processes


async def _in_turn(jobs: Sequence[Job]) -> list[Outcome]:
    """PROCESSES at a time; the outcomes in the order of the jobs."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(PRELOAD)
    room = asyncio.Semaphore(PROCESSES)

    async def one(job: Job) -> Outcome:
        async with room:
            return await _in_a_process(job)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(job)) for job in jobs]
    return [task.result() for task in tasks]


async def _in_a_process(job: Job) -> Outcome:
    server = multiprocessing.get_context("forkserver")
    ours, theirs = server.Pipe(duplex=False)
    child = server.Process(target=_live, args=(job, theirs), name=job.name)
    child.start()
    theirs.close()
    started = time.monotonic()
    try:
        if not await asyncio.to_thread(ours.poll, SECONDS_MAX + GRACE_SECONDS):
            return Outcome(
                job, lost=f"hung for {SECONDS_MAX + GRACE_SECONDS:.0f} s", seconds=time.monotonic() - started
            )
        return cast("Outcome", ours.recv())
    except EOFError:
        return Outcome(job, lost="its process died", seconds=time.monotonic() - started)
    finally:
        child.kill()
        child.join()


def _live(job: Job, told: Connection) -> None:
    be_quiet()
    from verify.drills import run_drill
    from verify.sabotages import BY_NAME
    from verify.tamper import Ground, Tamper

    tamper = Tamper()
    if job.fault is not None:
        BY_NAME[job.fault].sabotage(tamper)
    ground = Ground(job.databases.url, job.databases.mark, job.databases.prefix, tamper)
    started = time.monotonic()
    try:
        result = asyncio.run(run_drill(job.drill, ground, job.seed, SECONDS_MAX))
    except Exception as error:
        broke = f"{type(error).__name__}: {error}"
        told.send(Outcome(job, hits=tamper.hits, broke=broke, seconds=time.monotonic() - started))
        return
    told.send(
        Outcome(
            job,
            result.cases,
            result.violations,
            result.good,
            tamper.hits,
            tuple(result.said),
            seconds=time.monotonic() - started,
        )
    )
