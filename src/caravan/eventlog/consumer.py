"""Run one group's handlers over the log: claim, effect, outgoing events and position in one transaction per batch.

Three kinds of failure. Transient: the whole transaction runs again, for as long as it takes; an outage uses up no
attempts. Bug: the page is halved until one event stands alone; that one is parked in dead_letters and the rest flows.
Expected trouble is no failure: handlers store it as a reason.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from uuid import UUID

import structlog

from caravan.db import Database, Tx
from caravan.db.wake import Wake
from caravan.errors import is_transient
from caravan.eventlog import dead_letters, inbox, postgres_log, workers
from caravan.eventlog.codec import Envelope, Unreadable
from caravan.eventlog.postgres_log import Cursor, Fenced
from caravan.eventlog.retry import POISON_ATTEMPTS, backoff_seconds
from caravan.eventlog.subscription import Subscription
from caravan.eventlog.workers import HEARTBEAT_SECONDS, HUNG_SECONDS, Worker
from caravan.events import BY_TYPE, Event

PAGE_EVENTS_MAX = 256
SAVE_SECONDS = 30.0  # how old a stored position may grow while only others' events go by
STOP_SECONDS = 2.0
POLL_SECONDS = 1.0  # the safety net under the wake-up hints
HOPELESS_BEATS = 30  # so many heartbeats (a minute) within one turn end the process: a new one may do better
KNOWN_TYPES = list(BY_TYPE)

log: structlog.stdlib.BoundLogger = structlog.get_logger()


class Hung(Exception):
    """A handler has not come back: this worker must end."""


@dataclass(slots=True)
class Suspicion:
    """Somewhere in a cursor's next `limit` events is a bug; `attempts`: how often the first failed alone."""

    limit: int
    attempts: int = 0


class Consumer:
    """One member of one group. `run` until told to stop; `run_once` is one turn, for tests and drains."""

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
        self._types = subscription.types
        self._cursors: dict[UUID, Cursor] = {}
        self._page_max = page_events_max
        self._suspicions: dict[UUID, Suspicion] = {}  # by cursor: one that flows says nothing of another's bug
        self._transient_attempts = 0
        self._woken = asyncio.Event()
        self._join_at = 0.0
        self._save_at = 0.0
        self._turned_at = 0.0
        self._hopeless = False
        self._wake = wake

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
                if not done:
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

    def _stir(self, _keys: frozenset[str]) -> None:
        self._woken.set()

    async def run_once(self) -> int:
        """One turn over the cursors this worker owns; the number of events it got past (0: nothing waits)."""
        self._turned_at = asyncio.get_running_loop().time()
        await self._join_if_due()
        done = 0
        for cursor in list(self._cursors.values()):
            try:
                done += await self._turn(cursor)
            except Fenced:
                self._cursors.pop(cursor.id, None)
                self._join_at = 0.0  # what is stored may be ours still
                self._woken.set()
        self.worker.progressed = True
        self._transient_attempts = 0
        return done

    async def enter(self) -> None:
        """Make this worker known and take a share of the group's cursors."""
        async with self.db.transaction(self.worker.service) as tx:
            await workers.enter(tx, self.worker)
        await self._join()

    async def leave(self) -> None:
        async with self.db.transaction(self.worker.service) as tx:
            await postgres_log.leave_group(tx, self.worker.name, self.worker.incarnation)
            await workers.leave(tx, self.worker)
        self._cursors.clear()

    # -------------------------------------------------------------- membership

    async def _join_if_due(self) -> None:
        if asyncio.get_running_loop().time() >= self._join_at:
            await self._join()

    async def _join(self) -> None:
        """Take what is free. A known cursor keeps its place in memory, which may be beyond the stored one, while the
        server lives."""
        now = asyncio.get_running_loop().time()
        async with self.db.transaction(self.worker.service) as tx:
            owned = await postgres_log.join_group(
                tx, self.subscription.group, self.worker.name, self.worker.incarnation
            )
            cursors: dict[UUID, Cursor] = {}
            for stored in owned:
                known = self._cursors.get(stored.id)
                alike = known and (known.partitions, known.life) == (stored.partitions, stored.life)
                cursors[stored.id] = known if known and alike else stored
                if now >= self._save_at and cursors[stored.id] != stored:
                    await postgres_log.move_cursor(tx, cursors[stored.id])
        self._cursors = cursors
        self._join_at = now + HEARTBEAT_SECONDS
        self._save_at = now + SAVE_SECONDS if now >= self._save_at else self._save_at

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

    # -------------------------------------------------------------- one page

    async def _turn(self, cursor: Cursor) -> int:
        """The next page that concerns this group; 0 where nothing had been said for it when the turn began."""
        for _window in ("the open one", "the next one"):
            if cursor.window_end is None:
                cursor = await postgres_log.open_window(self.db, cursor)
                self._cursors[cursor.id] = cursor
                if cursor.window_end is None:
                    return 0
            try:
                done = await self._page(cursor)
            except Fenced:
                raise
            except Exception as error:
                if is_transient(error):
                    raise
                return await self._isolate(cursor, error)
            if done:
                return done
            cursor = self._cursors[cursor.id]  # the rest of the window was others'; what came since is in the next
        return 0

    async def _page(self, cursor: Cursor) -> int:
        """Read, claim, handle and move on, in one transaction; the number of events got past."""
        async with self.db.transaction(self.worker.service) as tx:
            cursor = await postgres_log.lock_cursor(tx, cursor, self.worker.name, self.worker.incarnation)
            limit = self._limit(cursor)
            page = await postgres_log.read_page(tx, cursor, self._types, KNOWN_TYPES, limit)
            last = page[-1][0] if page else 0
            moved = cursor.finished() if len(page) < limit else replace(cursor, last_id=last)
            if page:
                await self._handle(tx, [envelope for _position, envelope in page])
                await postgres_log.move_cursor(tx, moved)
        self._cursors[cursor.id] = moved
        if page:
            self.worker.events_done += len(page)
            self.worker.recovered()
            self._suspicions.pop(cursor.id, None)
            if limit * 2 < self._page_max:
                self._suspicions[cursor.id] = Suspicion(limit * 2)
        return len(page)

    def _limit(self, cursor: Cursor) -> int:
        suspicion = self._suspicions.get(cursor.id)
        return suspicion.limit if suspicion else self._page_max

    async def _handle(self, tx: Tx, envelopes: Sequence[Envelope]) -> None:
        readable: list[tuple[Envelope, Event]] = []
        for envelope in envelopes:
            try:
                readable.append((envelope, envelope.event()))
            except Unreadable as error:
                await dead_letters.park(tx, self.subscription.group, envelope, error.code, str(error), attempts=1)
        await inbox.apply_events(tx, self.subscription, readable)

    # -------------------------------------------------------------- failures

    async def _isolate(self, cursor: Cursor, error: Exception) -> int:
        """After a bug: read less the next time; an event that fails alone, again and again, is parked."""
        async with self.db.transaction(self.worker.service) as tx:
            cursor = await postgres_log.lock_cursor(tx, cursor, self.worker.name, self.worker.incarnation)
            page = await postgres_log.read_page(tx, cursor, self._types, KNOWN_TYPES, self._limit(cursor))
        if len(page) > 1:
            self._suspicions[cursor.id] = Suspicion(len(page) // 2)
            return len(page)  # not idle: turn again at once
        if not page:
            raise error
        position, envelope = page[0]
        suspicion = self._suspicions.setdefault(cursor.id, Suspicion(1))
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
            return 1
        await self._park(cursor, position, envelope, error, suspicion.attempts)
        return 1

    async def _park(self, cursor: Cursor, position: int, envelope: Envelope, error: Exception, attempts: int) -> None:
        async with self.db.transaction(self.worker.service) as tx:
            cursor = await postgres_log.lock_cursor(tx, cursor, self.worker.name, self.worker.incarnation)
            await dead_letters.park(
                tx,
                self.subscription.group,
                envelope,
                "HANDLER_FAILED",
                describe(error),
                attempts=attempts,
            )
            moved = replace(cursor, last_id=position)
            await postgres_log.move_cursor(tx, moved)
        self._cursors[cursor.id] = moved
        self._suspicions[cursor.id] = Suspicion(1)
        self.worker.recovered()
        log.error(f"[{self.subscription.label}] event parked in dead_letters", event_id=str(envelope.id))

    async def _pause_after(self, error: Exception) -> None:
        self._transient_attempts += 1
        self.worker.failed(describe(error), datetime.now(UTC))
        log.warning(
            f"[{self.subscription.label}] trying again", attempt=self._transient_attempts, error=describe(error)
        )
        await asyncio.sleep(backoff_seconds(self._transient_attempts, cap=POLL_SECONDS))

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
        woken = asyncio.create_task(self._woken.wait())
        try:
            await asyncio.wait({woken, stopped}, timeout=POLL_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        finally:
            woken.cancel()


def describe(error: BaseException) -> str:
    """An error in one line for an operator: its type and message, without a trace or row values."""
    message = str(error).strip().splitlines()
    return f"{type(error).__name__}: {message[0] if message else ''}"[:500]
