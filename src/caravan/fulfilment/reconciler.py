"""The safety net under the workers: looks for what should have happened and has not, and does it, a little at a time.

Everything here happens by events as well; the reconciler is for what an event could not do (lost code, a manual change,
a worker that was off for days) and for what only time brings (expiry, housekeeping). Each task is small, bounded and in
transactions of its own; one that fails does not stop the others, and shows in the log and in the workers' list.
"""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import Any
from uuid import UUID

import psycopg
import structlog

from caravan import deliveries, pauses
from caravan.db import Database, Tx
from caravan.deliveries import Reason, Stage
from caravan.errors import is_transient
from caravan.eventlog import retention, workers
from caravan.eventlog.consumer import describe
from caravan.eventlog.workers import HEARTBEAT_SECONDS, Superseded, Worker
from caravan.fulfilment.gaps import GAPS, Gap, Step, compare_register, list_gap
from caravan.fulfilment.repair import run_step
from caravan.payments import coins, webhooks
from caravan.people.trainers import roll_time
from caravan.settings import Settings
from caravan.telemetry import correlate
from caravan.web import auth, idempotency, login

SERVICE = "reconciler"
TURN_SECONDS = 5.0
STOP_SECONDS = 2.0
GAP_PAYMENTS_MAX = 100
REGISTER_PAGE = 500
RECHECK_PAYMENTS_MAX = 100
RESUMED_PAYMENTS_MAX, RESUMED_PAGES_MAX = 200, 10
WEBHOOK_PAYMENTS_MAX = 100
FAILED_AGAIN_SECONDS = 60.0  # a payment whose step failed is let be for that long, so that others have their turn
BEGINNING = UUID(int=0)
RECHECK = "waiting"  # the task that mostly finds nothing changed

log: structlog.stdlib.BoundLogger = structlog.get_logger()

# One installation's reconcilers take turns: whoever gets the lock acts, the others skip the task.
TRY_LOCK = "select pg_try_advisory_xact_lock(hashtextextended(%(task)s::text, 20260109))"


@dataclass(slots=True)
class Task:
    """Something done every so often. `work` returns how many things it did."""

    name: str
    every: timedelta
    work: Callable[[], Awaitable[int]]
    due: float = 0.0
    error: str | None = None


@dataclass(slots=True)
class _Place:
    """Where a slow walk goes on."""

    register: UUID = BEGINNING
    waiting: tuple[datetime, UUID] = field(default=(datetime.min.replace(tzinfo=UTC), BEGINNING))


class Skipped(Exception):
    """Another reconciler is at this task."""


class Reconciler:
    """The same face as every long-running part: config, `run` until told to stop, `run_once` that returns counts."""

    def __init__(self, db: Database, settings: Settings, *, turn_seconds: float = TURN_SECONDS) -> None:
        self.db = db
        self.turn_seconds = turn_seconds
        self.notice = timedelta(hours=settings.notice_hours)
        self.worker = Worker(service=SERVICE, group=None, build=settings.build, name=_name(settings))
        self._place = _Place()
        self._later: dict[UUID, float] = {}
        each_turn, minute, hour = timedelta(0), timedelta(minutes=1), timedelta(hours=1)
        self.tasks: tuple[Task, ...] = (
            *(Task(gap.name, each_turn, lambda gap=gap: self._close_gap(gap)) for gap in GAPS),
            Task("resumed", each_turn, self._go_on_after_pauses),
            Task("register", each_turn, self._compare_register),
            Task("webhooks", each_turn, self._in_transaction("webhooks", _apply_webhooks)),
            Task(RECHECK, minute, self._recheck_waiting),
            Task("coins", minute, self._in_transaction("coins", coins.release_expired)),
            Task("trainers' time", minute, self._in_transaction("trainers' time", roll_time)),
            Task("log", timedelta(minutes=10), self._in_transaction("log", _maintain_log)),
            Task("answers", hour, self._in_transaction("answers", idempotency.purge)),
            Task("sign-ins", hour, self._in_transaction("sign-ins", auth.purge)),
            Task("login attempts", hour, self._in_transaction("login attempts", login.purge)),
        )

    async def run(self, stop: asyncio.Event) -> None:
        """Turn every few seconds until `stop`; ends after the task it is in. Raises Superseded."""
        while not await self._enter():
            with suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), 1.0)
            if stop.is_set():
                return
        log.info("[Reconciler] Started", worker=self.worker.name)
        beating = asyncio.create_task(self._beat_forever(), name="reconciler heartbeat")
        try:
            while not stop.is_set():
                await self._turn(stop)
                pause = self.turn_seconds * random.uniform(0.8, 1.2)  # noqa: S311 - jitter
                with suppress(TimeoutError):
                    await asyncio.wait_for(_first(stop, beating), pause)
                if beating.done():
                    beating.result()
        finally:
            beating.cancel()
            await asyncio.gather(beating, return_exceptions=True)
        with suppress(Exception):  # a lease that is not given back ends by itself
            async with self.db.transaction(SERVICE) as tx:
                await workers.leave(tx, self.worker)
        log.info("[Reconciler] Stopped", worker=self.worker.name)

    async def _turn(self, stop: asyncio.Event) -> None:
        """One turn, which a stop lets end by itself, but not for long: the database may be away."""
        turn = asyncio.create_task(self.run_once(stop))
        await _first(stop, turn)
        await asyncio.wait({turn}, timeout=STOP_SECONDS if stop.is_set() else None)
        if not turn.done():
            turn.cancel()
            await asyncio.wait({turn})
        if not turn.cancelled():
            turn.result()

    async def run_once(self, stop: asyncio.Event | None = None) -> dict[str, int]:
        """One turn: the tasks that are due, and how many things each did. One that failed counts 0 and is told of."""
        counts: dict[str, int] = {}
        clock = asyncio.get_running_loop().time
        self._later = {payment_id: due for payment_id, due in self._later.items() if due > clock()}
        for task in self.tasks:
            if clock() < task.due or (stop is not None and stop.is_set()):
                continue
            try:
                counts[task.name] = await task.work()
                task.error = task.error if self._later else None
            except Skipped:
                counts[task.name] = 0
            except Exception as error:
                counts[task.name] = 0
                self._failed(task, error)
                if isinstance(error, psycopg.OperationalError) and error.sqlstate is None:
                    break  # the database is away: the other tasks would only wait for it in turn
            task.due = clock() + task.every.total_seconds()
        failing = next((task.error for task in self.tasks if task.error), None)
        if failing is None:
            self.worker.recovered()
        else:
            self.worker.failed(failing, datetime.now(UTC))
        self.worker.progressed = True
        self.worker.events_done += sum(counts.values())
        done = {name: count for name, count in counts.items() if count}
        if done:
            log.info("[Reconciler] did what was missing", **{"done": done})
        return counts

    def _failed(self, task: Task, error: Exception) -> None:
        task.error = f"{task.name}: {describe(error)}"
        if is_transient(error):
            log.warning("[Reconciler] task not done, trying again", task=task.name, error=describe(error))
        else:
            log.error("[Reconciler] task failed", task=task.name, exc_info=error)

    # -------------------------------------------------------------- the tasks

    async def _close_gap(self, gap: Gap) -> int:
        async def find(tx: Tx) -> list[UUID]:
            return await list_gap(tx, gap, limit=GAP_PAYMENTS_MAX + len(self._later))

        return await self._step(gap.name, gap.step, await self._locked(gap.name, find))

    async def _go_on_after_pauses(self) -> int:
        """What waited for a pause that is over, the nearest start first."""

        async def find(tx: Tx) -> list[tuple[UUID, Stage]]:
            return await pauses.list_resumed(tx, RESUMED_PAYMENTS_MAX + len(self._later))

        done = 0
        for _page in range(RESUMED_PAGES_MAX):
            found = await self._locked("resumed", find)
            for stage, step in STEP_AFTER_PAUSE.items():
                done += await self._step("resumed", step, [payment for payment, at in found if at is stage])
            if len(found) < RESUMED_PAYMENTS_MAX:
                break
        return done

    async def _compare_register(self) -> int:
        """One page further along all payments: what the register forgot, and what it kept for nothing."""

        async def compare(tx: Tx) -> Any:
            return await compare_register(tx, after=self._place.register, limit=REGISTER_PAGE)

        differences, last = await self._locked("register", compare)
        forgotten = [each.payment_id for each in differences if not each.registered]
        kept = [each.payment_id for each in differences if each.registered]
        done = await self._step("register", Step.REGISTER, forgotten) + await self._step("register", Step.CLOSE, kept)
        self._place.register = last or BEGINNING
        return done

    async def _recheck_waiting(self) -> int:
        """Those that wait longest first, then on from there: has their reason gone without an event?"""

        async def find(tx: Tx) -> list[dict[str, Any]]:
            since, payment_id = self._place.waiting
            named = {"after_since": since, "after_id": payment_id, "limit": RECHECK_PAYMENTS_MAX}
            return await tx.all(LIST_RECHECKABLE, named | {"reasons": [str(reason) for reason in RECHECKED]})

        rows = await self._locked(RECHECK, find)
        before = [row["payment_id"] for row in rows]
        for step in (Step.CREATE_PURCHASE, Step.ALLOCATE_TRAINER):
            chosen = [row["payment_id"] for row in rows if row["purchased"] == (step is Step.ALLOCATE_TRAINER)]
            await self._step(RECHECK, step, chosen)
        full = len(rows) == RECHECK_PAYMENTS_MAX
        self._place.waiting = (rows[-1]["since"], rows[-1]["payment_id"]) if full else _Place().waiting
        async with self.db.transaction(SERVICE) as tx:
            still = await deliveries.list_waiting(tx, RECHECKED, limit=10_000)
        return len(set(before) - set(still))

    async def _step(self, name: str, step: Step, payment_ids: Sequence[UUID]) -> int:
        """Run a step over many at once; where that fails, over each alone, so that one does not hold up the others."""
        payment_ids = [payment_id for payment_id in payment_ids if payment_id not in self._later]
        if not payment_ids:
            return 0
        try:
            await self.db.transact(lambda tx: self._guarded(tx, name, step, payment_ids), SERVICE)
        except Exception as error:
            if is_transient(error) or isinstance(error, Skipped):
                raise
            log.warning("[Reconciler] step failed for some, trying each alone", task=name, error=describe(error))
            return await self._step_alone(name, step, payment_ids)
        return len(payment_ids)

    async def _step_alone(self, name: str, step: Step, payment_ids: Sequence[UUID]) -> int:
        done = 0
        failed: Exception | None = None
        for payment_id in payment_ids:
            try:
                await self.db.transact(lambda tx, one=payment_id: self._guarded(tx, name, step, [one]), SERVICE)
                done += 1
            except Exception as error:
                if is_transient(error) or isinstance(error, Skipped):
                    raise
                failed = error
                self._later[payment_id] = asyncio.get_running_loop().time() + FAILED_AGAIN_SECONDS
                log.error("[Reconciler] step failed", task=name, correlation_id=str(payment_id), exc_info=error)
        if failed is not None:
            raise failed
        return done

    async def _guarded(self, tx: Tx, name: str, step: Step, payment_ids: Sequence[UUID]) -> None:
        await _lock(tx, name)
        with correlate(*map(str, payment_ids)):
            await run_step(tx, step, payment_ids, notice=self.notice)
            count = len(payment_ids) if name != RECHECK else _moved(tx, payment_ids)
            if count:
                log.info("[Reconciler] step taken", task=name, step=step, count=count)
            if count < len(payment_ids):
                log.debug("[Reconciler] still waiting", task=name, step=step, count=len(payment_ids) - count)

    def _in_transaction(self, name: str, work: Callable[[Tx], Awaitable[int | None]]) -> Callable[[], Awaitable[int]]:
        async def run() -> int:
            return await self._locked(name, work) or 0

        return run

    async def _locked(self, name: str, work: Callable[[Tx], Awaitable[Any]]) -> Any:
        async def locked(tx: Tx) -> Any:
            await _lock(tx, name)
            return await work(tx)

        return await self.db.transact(locked, SERVICE)

    # -------------------------------------------------------------- being known

    async def _enter(self) -> bool:
        try:
            async with self.db.transaction(SERVICE) as tx:
                await workers.enter(tx, self.worker)
        except Exception as error:
            if not is_transient(error):
                raise
            log.warning("[Reconciler] not started yet", error=describe(error))
            return False
        return True

    async def _beat_forever(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_SECONDS)
            try:
                async with self.db.transaction(SERVICE) as tx:
                    await workers.beat(tx, self.worker)
            except Superseded:
                raise
            except Exception as error:
                if not is_transient(error):
                    raise


# What happens first to a payment that a pause of its stage has kept.
STEP_AFTER_PAUSE: dict[Stage, Step] = {
    Stage.PAID: Step.CREATE_PURCHASE,
    Stage.PURCHASED: Step.ALLOCATE_TRAINER,
    Stage.ALLOCATED: Step.SCHEDULE_SESSIONS,
}

# Reasons that may go away without an event that we heard. The others are an operator's decision; so is another start,
# but the day that we propose for it must be one that is still to come.
RECHECKED: tuple[Reason, ...] = (
    Reason.STUDENT_NOT_FOUND,
    Reason.COURSE_NOT_FOUND,
    Reason.TIER_UNKNOWN,
    Reason.INVALID_SCHEDULE,
    Reason.STUDENT_LOCATION_MISSING,
    Reason.STUDENT_CONFLICT,
    Reason.NO_TRAINER_AVAILABLE,
    Reason.TRAINER_CONFLICT,
    Reason.TRAINER_LEFT,
    Reason.START_PASSED,
)

# Waiting payments behind a place, oldest first.
LIST_RECHECKABLE = """
select u.payment_id, u.since,
       exists (select from student_course_purchases pu where pu.payment_id = u.payment_id) as purchased
from undelivered u
where u.reason = any(%(reasons)b::text[]) and not u.held
  and (u.since, u.payment_id) > (%(after_since)s::timestamptz, %(after_id)s::uuid)
order by u.since, u.payment_id limit %(limit)s
"""


def _moved(tx: Tx, payment_ids: Sequence[UUID]) -> int:
    """Of how many payments this transaction has something to say: no change is silent."""
    return len({event.correlation_id for event in tx.outgoing} & {str(payment_id) for payment_id in payment_ids})


async def _lock(tx: Tx, task: str) -> None:
    if not await tx.value(TRY_LOCK, {"task": task}):
        raise Skipped


async def _apply_webhooks(tx: Tx) -> int:
    return await webhooks.apply_pending_webhooks(tx, WEBHOOK_PAYMENTS_MAX)


async def _maintain_log(tx: Tx) -> int:
    return sum((await retention.maintain(tx)).values())


async def _first(stop: asyncio.Event, other: asyncio.Task[Any]) -> None:
    waiting = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({waiting, other}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiting.cancel()


def _name(settings: Settings) -> str:
    """One per installation's folder, or as the settings say; a restart takes its place over."""
    place = (
        settings.worker_name
        or f"{socket.gethostname()}-{sha256(str(settings.data_dir.absolute()).encode()).hexdigest()[:6]}"
    )
    return f"{SERVICE}@{place}"
