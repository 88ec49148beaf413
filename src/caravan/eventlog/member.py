"""What every member of a group does, wherever its events come from: enter, take turns, beat, stop, and meet failures.

Three kinds of failure. Transient: the whole transaction runs again, for as long as it takes; an outage uses up no
attempts. Bug: the page is halved until one event stands alone; that one is parked in dead_letters and the rest flows.
Expected trouble is no failure: handlers store it as a reason.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import structlog

from caravan.db import Database, Tx
from caravan.db.wake import EVERYTHING, KIND, Wake
from caravan.errors import is_transient
from caravan.eventlog import dead_letters, inbox, workers
from caravan.eventlog.codec import Envelope, Unreadable
from caravan.eventlog.retry import POISON_ATTEMPTS, backoff_seconds
from caravan.eventlog.subscription import Subscription
from caravan.eventlog.workers import HEARTBEAT_SECONDS, HUNG_SECONDS, Worker
from caravan.events import Event
from caravan.telemetry import metrics

PAGE_EVENTS_MAX = 512
TRUST_GROWS = 8  # by how much the next page is larger than one that flowed behind a parked event
STOP_SECONDS = 2.0
POLL_SECONDS = 1.0  # the safety net under the wake-up hints
QUIET_SECONDS = 0.05  # without news, before a group that only takes notes comes round
FAILED = "HANDLER_FAILED"  # the code of a dead letter whose handler failed alone
HOPELESS_BEATS = 30  # so many heartbeats (a minute) within one turn end the process: a new one may do better

log: structlog.stdlib.BoundLogger = structlog.get_logger()


class Hopeless(Exception):
    """This process must end: a new one may do better. The message is one line for the operator."""


class Hung(Hopeless):
    """A handler has not come back: this worker must end."""


@dataclass(slots=True)
class Suspicion:
    """Take `limit` of a share's next events, not more. `within`: among so many of them one surely fails (0: perhaps
    none does); `attempts`: how often the first failed alone."""

    limit: int
    within: int = 0
    attempts: int = 0


class Member(ABC):
    """One member of one group. `run` until told to stop; `run_once` is one turn, for tests and drains.

    A share is a piece of the group's log that is in order: a cursor, or the partitions of one poll.
    """

    def __init__(
        self,
        db: Database,
        subscription: Subscription,
        worker: Worker,
        *,
        wake: Wake | None = None,
        page_events_max: int = PAGE_EVENTS_MAX,
    ) -> None:
        self.db = db
        self.subscription = subscription
        self.worker = worker
        self._page_max = page_events_max
        self._suspicions: dict[Hashable, Suspicion] = {}  # by share: one that flows says nothing of another's bug
        self._transient_attempts = 0
        self._kinds = frozenset(KIND + event_type for event_type in subscription.types)  # none: of whatever there is
        self._woken = asyncio.Event()
        self._turned_at = 0.0
        self._batch_began = 0.0
        self._hopeless = False
        self._unreadable: list[tuple[Envelope, str]] = []  # parked by the page in hand, and why: told once committed
        self._wake = wake

    @abstractmethod
    async def enter(self) -> None:
        """Make this worker known and take a share of the group's log."""

    @abstractmethod
    async def run_once(self) -> int:
        """One turn; the number of events it got past (0: nothing waits). Transient errors are raised."""

    @abstractmethod
    async def leave(self) -> None:
        """Give everything back, so that others need not wait."""

    async def run(self, stop: asyncio.Event) -> None:
        """Work until `stop`; then end the batch and give the cursors back, where that is soon done (the database may be
        away; a lease ends by itself). Raises Superseded when the name is taken over."""
        working = asyncio.create_task(self._work(stop), name=self.subscription.label)
        stopped = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait({working, stopped}, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait({working}, timeout=STOP_SECONDS)
        finally:
            stopped.cancel()
            working.cancel()
            await asyncio.wait({working})
        if not working.cancelled():
            working.result()

    async def _work(self, stop: asyncio.Event) -> None:
        label = self.subscription.label
        await self._retrying(self.enter)
        log.info(f"[{label}] Initialized", group=self.subscription.group, worker=self.worker.name)
        log.info(f"[{label}] Started", group=self.subscription.group, worker=self.worker.name)
        if self._wake:
            self._wake.subscribe(self._stir)
        self._turned_at = asyncio.get_running_loop().time()
        beating = asyncio.create_task(self._beat_forever(asyncio.current_task()), name=f"{label} heartbeat")
        stopped = asyncio.create_task(stop.wait(), name=f"{label} stop")
        try:
            while not stop.is_set():
                if beating.done():
                    beating.result()
                self._woken.clear()
                try:
                    done = await self.run_once()
                except Exception as error:
                    if not is_transient(error):
                        raise
                    await self._pause_after(error)
                    continue
                if not (done and self._behind()):
                    await self._wait_for_work(stopped)
        except asyncio.CancelledError:
            if self._hopeless:
                raise Hung(f"{self.worker.name} has not come round for {HOPELESS_BEATS} heartbeats") from None
            raise
        finally:
            if self._wake:
                self._wake.unsubscribe(self._stir)
            beating.cancel()
            stopped.cancel()
            await asyncio.gather(beating, stopped, return_exceptions=True)
        await self._retrying(self.leave)
        log.info(f"[{label}] Stopped", group=self.subscription.group, events=self.worker.events_done)

    def _behind(self) -> bool:
        """After a turn that found something: whether there may be more of which no hint will tell."""
        return True

    def _stir(self, keys: frozenset[str]) -> None:
        """News; a turn for what others hear would be for nothing."""
        if EVERYTHING in keys or not self._kinds or not self._kinds.isdisjoint(keys):
            self._woken.set()

    async def _beat_forever(self, run: asyncio.Task[object] | None) -> None:
        """Every few seconds, as long as `run` comes round; one that surely never will is cancelled."""
        beats, turned_at = 0, self._turned_at
        while True:
            # Beats are counted, not seconds: a process that was frozen for long is well again.
            beats, turned_at = (beats + 1 if turned_at == self._turned_at else 0), self._turned_at
            if run is not None and beats > HOPELESS_BEATS:
                self._hopeless = True
                run.cancel()
                return
            still_seconds = asyncio.get_running_loop().time() - turned_at
            try:
                async with self.db.transaction(self.worker.service) as tx:
                    await workers.beat(tx, self.worker, renewed=still_seconds < HUNG_SECONDS)
            except Exception as error:
                if not is_transient(error):
                    self._woken.set()
                    raise
            await asyncio.sleep(HEARTBEAT_SECONDS)

    # -------------------------------------------------------------- pages and failures

    def _limit(self, share: Hashable) -> int:
        """How many events of a share to take at once: all, or few where a bug is suspected."""
        suspicion = self._suspicions.get(share)
        return suspicion.limit if suspicion else self._page_max

    def _flowed(self, share: Hashable, limit: int, events: int) -> None:
        """A page is committed. What fails is then in the rest of those suspected, half of which is next; behind a
        parked event, of which there may be many, trust comes back step by step."""
        metrics.BATCHES.labels(self.subscription.group).observe(time.perf_counter() - self._batch_began)
        metrics.EVENTS.labels(self.subscription.group).inc(events)
        self.worker.events_done += events
        self.worker.recovered()
        self._tell_unreadable()
        suspicion = self._suspicions.pop(share, None)
        if suspicion is None:
            return
        if (left := suspicion.within - events) > 0:
            self._suspicions[share] = Suspicion(max(1, left // 2), left)
        elif not suspicion.within and limit * TRUST_GROWS < self._page_max:
            self._suspicions[share] = Suspicion(limit * TRUST_GROWS)

    async def _handle(self, tx: Tx, envelopes: Sequence[Envelope]) -> None:
        """Claim, and do what the new ones ask for."""
        await self._apply(tx, await inbox.claim(tx, self.subscription.group, envelopes))

    async def _apply(self, tx: Tx, claimed: Sequence[Envelope]) -> None:
        """Do what they ask for. One that can't be read is parked, and its claim given back: a replay takes it."""
        self._batch_began = time.perf_counter()
        self._unreadable.clear()
        readable: list[tuple[Envelope, Event]] = []
        for envelope in claimed:
            try:
                readable.append((envelope, envelope.event()))
            except Unreadable as error:
                await dead_letters.park(tx, self.subscription.group, envelope, error.code, str(error), attempts=1)
                self._unreadable.append((envelope, error.code))
        if self._unreadable:
            await inbox.give_back(tx, self.subscription.group, [envelope for envelope, _code in self._unreadable])
        await inbox.apply_events(tx, self.subscription, readable)

    async def _suspect(self, share: Hashable, page: Sequence[Envelope], error: Exception) -> int | None:
        """After a bug somewhere in `page`: read less the next time. An event that fails alone is tried again, some
        times; then its number of attempts comes back, and it is to be parked."""
        metrics.FAILURES.labels(self.subscription.group, "bug").inc()
        if len(page) > 1:
            self._suspicions[share] = Suspicion(len(page) // 2, len(page))
            return None
        [envelope] = page
        suspicion = self._suspicions.setdefault(share, Suspicion(1))
        suspicion.attempts += 1
        self.worker.failed(describe(error), datetime.now(UTC), envelope.id)
        log.error(
            f"[{self.subscription.label}] handler failed",
            event_id=str(envelope.id),
            type=envelope.type,
            correlation_id=envelope.correlationid,
            attempt=suspicion.attempts,
            exc_info=error,
        )
        if suspicion.attempts < POISON_ATTEMPTS:
            await asyncio.sleep(backoff_seconds(suspicion.attempts))
            return None
        return suspicion.attempts

    async def _park(self, tx: Tx, envelope: Envelope, error: Exception, attempts: int) -> None:
        """Give an event up, in the transaction that moves past it."""
        await dead_letters.park(tx, self.subscription.group, envelope, FAILED, describe(error), attempts=attempts)

    def _parked(self, share: Hashable, envelope: Envelope) -> None:
        """The event's place is behind us: the next one is taken alone too."""
        self._suspicions[share] = Suspicion(1)
        self.worker.recovered()
        self._tell_parked(envelope, FAILED)

    def _tell_unreadable(self) -> None:
        for envelope, code in self._unreadable:
            self._tell_parked(envelope, code)
        self._unreadable.clear()

    def _tell_parked(self, envelope: Envelope, code: str) -> None:
        log.error(
            f"[{self.subscription.label}] event parked in dead_letters",
            event_id=str(envelope.id),
            type=envelope.type,
            correlation_id=envelope.correlationid,
            code=code,
        )

    async def _pause_after(self, error: Exception) -> None:
        self._transient_attempts += 1
        metrics.FAILURES.labels(self.subscription.group, "transient").inc()
        self.worker.failed(describe(error), datetime.now(UTC))
        if self._transient_attempts.bit_count() == 1:  # the 1st, 2nd, 4th ...: an outage may last for hours
            log.warning(
                f"[{self.subscription.label}] trying again", attempt=self._transient_attempts, error=describe(error)
            )
        await asyncio.sleep(backoff_seconds(self._transient_attempts, cap=POLL_SECONDS))

    def _came_round(self) -> None:
        """A turn is done; what only had to be tried again is over, also where nothing waits."""
        self.worker.progressed = True
        if self._transient_attempts:
            self._transient_attempts = 0
            self.worker.recovered()

    async def _retrying(self, step: Callable[[], Awaitable[None]]) -> None:
        attempt = 0
        while True:
            try:
                await step()
            except Exception as error:
                if not is_transient(error):
                    raise
                attempt += 1
                await asyncio.sleep(backoff_seconds(attempt, cap=2.0))
            else:
                return

    async def _wait_for_work(self, stopped: asyncio.Task[object]) -> None:
        """For news, at most until the next poll. Who only takes notes waits on until it is quiet, in nobody's way."""
        poll_at = asyncio.get_running_loop().time() + POLL_SECONDS
        await self._wait_for_news(stopped, POLL_SECONDS)
        while self.subscription.notes_only and self._woken.is_set() and not stopped.done():
            self._woken.clear()
            left = poll_at - asyncio.get_running_loop().time()
            if left > 0:
                await self._wait_for_news(stopped, min(left, QUIET_SECONDS))

    async def _wait_for_news(self, stopped: asyncio.Task[object], seconds: float) -> None:
        woken = asyncio.create_task(self._woken.wait())
        try:
            await asyncio.wait({woken, stopped}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            woken.cancel()


def describe(error: BaseException) -> str:
    """An error in one line for an operator: its type and message, without a trace or row values."""
    message = str(error).strip().splitlines()
    return f"{type(error).__name__}: {message[0] if message else ''}"[:500]
