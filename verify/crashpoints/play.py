"""One batch: many cases of one step on a fresh database, each struck in its own way, then all carried on and compared.

A struck entry is run again as its caller would (the client sends again, the worker's loop turns again, a dead process
has a successor) until it is done; then all workers work, and every case must have come to what the clean cases of the
same batch came to, with no invariant broken.
"""

from __future__ import annotations

import asyncio
import gc
import os
import re
import signal
import types
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from caravan.db import pool, wake
from caravan.errors import is_transient
from caravan.eventlog import consumer, member
from caravan.payments.webhooks import apply_pending_webhooks
from caravan.realtime import gateway
from verify.crashpoints.every import list_steps
from verify.crashpoints.points import AFTER, BEFORE, Fault, Place, Point, Strike, points
from verify.crashpoints.stage import Case, Stage, Template
from verify.crashpoints.steps import Step
from verify.scratch import Databases
from verify.world import difference, hash_of

CLEAN = 2  # cases of each batch that nothing happens to
HANG_SECONDS = 40
SAID_MAX = 600  # characters of a difference


@dataclass(frozen=True, slots=True)
class Batch:
    """What a process is asked to do. `number` is how often this step was asked for before; `plans` one per case."""

    databases: Databases
    template: Template
    step: str
    number: int
    plans: tuple[tuple[Strike, ...], ...]


@dataclass(slots=True)
class Found:
    """What came of it. `points`: those of a clean case; `struck`: the places where a fault did fire."""

    step: str
    points: list[Point] = field(default_factory=list[Point])
    clean: str = ""
    cases: int = 0
    fired: Counter[str] = field(default_factory=Counter[str])
    second: int = 0
    struck: set[Place] = field(default_factory=set[Place])
    silent: int = 0
    good: int = 0
    violations: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])


def name_of(step: str, plan: Sequence[Strike]) -> str:
    """How a failure names its case, and --case repeats it."""
    return "/".join([step, *map(str, plan)])


STRIKE = re.compile(r"(?:(?P<label>.+)#)?(?P<at>\d+)(?P<sign>[+-])(?P<fault>[\w-]+)")


def parse_case(text: str) -> tuple[str, tuple[Strike, ...]]:
    """Raises ValueError."""
    step, *strikes = text.split("/")
    parsed: list[Strike] = []
    for strike in strikes:
        match = STRIKE.fullmatch(strike)
        if not match:
            raise ValueError(f"{strike!r} is no strike, such as 12+killed or payments.store.LOCK#0-40P01")
        when = AFTER if match["sign"] == "+" else BEFORE
        parsed.append(Strike(int(match["at"]), when, Fault(match["fault"]), match["label"] or ""))
    return step, tuple(parsed)


def hurry() -> None:
    """The product's pauses between attempts are jitter, which nothing here depends on; its heartbeats would come in
    between and be counted as points of whatever runs."""
    member.backoff_seconds = _at_once
    consumer.HEARTBEAT_SECONDS = member.HEARTBEAT_SECONDS = 3600.0
    gateway.RETRY_SECONDS, gateway.POLL_SECONDS = 0.0, 0.25
    wake.RETRY_SECONDS = 0.01
    pool.random = types.SimpleNamespace(uniform=lambda _low, _high: 0.0)  # type: ignore[assignment]  # pyright: ignore


def _at_once(*_args: object, **_options: object) -> float:
    return 0.0


async def play(batch: Batch) -> Found:
    """For a process of its own: replaces what the product calls."""
    hurry()
    points.install()
    [step] = [each for each in list_steps() if each.name == batch.step]
    scratch = batch.databases.create(batch.template.name)
    try:
        async with Stage(scratch, batch.template) as stage:
            return await _play(stage, step, batch)
    finally:
        points.uninstall()
        batch.databases.drop(scratch)


async def _play(stage: Stage, step: Step, batch: Batch) -> Found:
    found = Found(step.name)
    cases = await step.prepare(stage, CLEAN + len(batch.plans))
    for case in cases[:CLEAN]:
        await step.before(stage, case)
        with points.watching():
            if not await _persist(stage, step, case):
                raise AssertionError(f"{step.name} doesn't work without any fault: {case.know.get('trouble')}")
        found.points = list(points.seen)
    for case, plan in zip(cases[CLEAN:], batch.plans, strict=True):
        await _strike(stage, step, case, plan, found)
    await step.end(stage)
    if step.finish:
        await step.finish(stage, cases)
    await stage.world.work()
    await _take_up_webhooks(stage)
    await _compare(stage, step, cases, batch.plans, found)
    return found


async def _strike(stage: Stage, step: Step, case: Case, plan: Sequence[Strike], found: Found) -> None:
    await step.before(stage, case)
    found.cases += 1
    fired: list[Fault] = []
    pending, done, died = list(plan), False, False
    while any(strike.fault is Fault.KILLED for strike in pending):
        status = _in_child(stage, step, case, pending, died)
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            at = next(at for at, strike in enumerate(pending) if strike.fault is Fault.KILLED)
            fired += [strike.fault for strike in pending[: at + 1]]
            pending, died = pending[at + 1 :], True
            await stage.alone()
        else:
            done = os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0
            break
    if not done:
        with points.watching(pending):
            done = await _persist(stage, step, case, died=died)
        fired += points.fired
    if not done:
        found.violations.append((name_of(step.name, plan), f"never done: {case.know.get('trouble')}"))
    if "wrong" in case.know:
        found.violations.append((name_of(step.name, plan), case.know["wrong"]))
    found.fired.update(str(fault) for fault in fired)
    found.second += len(fired) > 1
    if fired:
        found.struck.add((plan[0].label, plan[0].at))
        await stage.alone()
        await stage.heal()
        await step.restart(stage)  # the next case meets a worker that knows nothing of this one
    else:
        found.silent += 1


async def _persist(stage: Stage, step: Step, case: Case, *, died: bool = False) -> bool:
    """Act until it is done, as callers and supervisors do; False where it never is."""
    for attempt in range(step.tries):
        fired = len(points.fired)

        async def live(begins: bool = died, again: bool = died or attempt > 0) -> bool:
            if begins:
                await step.restart(stage)
            if again and await step.is_done(stage, case):
                return True
            return await step.act(stage, case)

        points.task = asyncio.create_task(live())
        try:
            async with asyncio.timeout(HANG_SECONDS):
                done = await points.task
            died = False
        except asyncio.CancelledError as error:
            done, died = False, True
            case.know["trouble"] = repr(error)
        except Exception as error:
            done, died = False, not is_transient(error)
            case.know["trouble"] = repr(error)
        if done:
            return True
        if len(points.fired) > fired:
            await stage.alone()
    return False


def _in_child(stage: Stage, step: Step, case: Case, plan: Sequence[Strike], died: bool) -> int:
    """The same in a forked process, which can be killed; how it ended, as waitpid tells."""
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    try:
        gc.disable()  # nothing of the parent's is to be tidied up here
        signal.alarm(HANG_SECONDS)
        done = asyncio.run(_live_and_die(stage, step, case, plan, died))
        os._exit(0 if done else 1)
    except BaseException:
        os._exit(70)


async def _live_and_die(stage: Stage, step: Step, case: Case, plan: Sequence[Strike], died: bool) -> bool:
    await stage.reopen()
    with points.watching(plan):
        return await _persist(stage, step, case, died=died)


async def _take_up_webhooks(stage: Stage) -> None:
    """A bug while a webhook is applied leaves it stored and without effect: it is the reconciler that goes on."""
    async with stage.world.db.transaction("reconciler") as tx:
        applied = await apply_pending_webhooks(tx)
    if applied:
        await stage.world.work()


# ------------------------------------------------------------------ what it came to

PAYMENTS_OF = """
select id, student_id from payments where student_id = any(%(students)s) order by created_at, id
"""


def _had_effect(webhooks: list[list[Any]] | None) -> list[list[Any]]:
    """What is applied a second time says so (`already`, `stale`); what failed once says so until it is tried again."""
    same = {"already": "applied", "stale": "applied", "failing: Bug": None}
    return [[same.get(said, said) for said in webhook] for webhook in webhooks or []]


async def _compare(
    stage: Stage, step: Step, cases: Sequence[Case], plans: Sequence[Sequence[Strike]], found: Found
) -> None:
    students = [student for case in cases for student in case.students]
    rows = await stage.world.rows(PAYMENTS_OF, students=students)
    finals = await stage.world.finals([row["id"] for row in rows])
    payments: dict[Any, list[Any]] = {}
    for row in rows:
        payments.setdefault(row["student_id"], []).append(row["id"])

    def came_to(case: Case) -> dict[str, Any]:
        """By student and attempt, and within by subject."""
        return {
            f"{at}.{number} {name}": _had_effect(value) if name == "webhooks" else value
            for at, student in enumerate(case.students)
            for number, payment in enumerate(payments.get(student, []))
            for name, value in finals[payment].items()
            if name not in step.loose
        }

    clean = came_to(cases[0])
    found.clean = hash_of(clean)
    for case, plan in zip(cases, [(), *([()] * (CLEAN - 1)), *plans], strict=True):
        if came_to(case) == clean:
            found.good += 1
        else:
            found.violations.append((name_of(step.name, plan), difference(came_to(case), clean)[:SAID_MAX]))
    for said in await stage.world.violations():
        found.violations.append((name_of(step.name, ()), f"after the batch: {said}"))
