"""Run one group's handlers over the log: claim, effect, outgoing events and position in one transaction per batch."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from uuid import UUID

from caravan.db import Database, Tx
from caravan.db.wake import Wake
from caravan.errors import is_transient
from caravan.eventlog import postgres_log, workers
from caravan.eventlog.codec import Envelope
from caravan.eventlog.member import PAGE_EVENTS_MAX, Hung, Member, describe
from caravan.eventlog.postgres_log import Cursor, Fenced
from caravan.eventlog.subscription import Subscription
from caravan.eventlog.workers import HEARTBEAT_SECONDS, Worker
from caravan.events import BY_TYPE

__all__ = ["KNOWN_TYPES", "PAGE_EVENTS_MAX", "Consumer", "Hung", "describe"]

SAVE_SECONDS = 30.0  # how old a stored position may grow while only others' events go by
FEW_EVENTS_MAX = 64  # ids of a window, others' events among them: it is not worth a plan of its own
NOTED_EVENTS_MAX = 4096  # in one page of a group that does nothing with them
KNOWN_TYPES = list(BY_TYPE)


class Consumer(Member):
    """A member of a group that reads the log in PostgreSQL."""

    def __init__(
        self,
        db: Database,
        subscription: Subscription,
        worker: Worker,
        *,
        wake: Wake | None = None,
        page_events_max: int | None = None,
    ) -> None:
        page_events_max = page_events_max or (NOTED_EVENTS_MAX if subscription.notes_only else PAGE_EVENTS_MAX)
        super().__init__(db, subscription, worker, wake=wake, page_events_max=page_events_max)
        self._types = subscription.types
        self._cursors: dict[UUID, Cursor] = {}
        self._join_at = 0.0
        self._save_at = 0.0

    async def run_once(self) -> int:
        """One turn over the cursors this worker owns; the number of events it got past (0: nothing waits)."""
        self._turned_at = asyncio.get_running_loop().time()
        if not self._cursors:
            await self._join_if_due()
        done = 0
        for cursor in list(self._cursors.values()):
            try:
                done += await self._turn(cursor)
            except Fenced:
                self._cursors.pop(cursor.id, None)
                self._join_at = 0.0  # what is stored may be ours still
                self._woken.set()
        if self._cursors:
            await self._join_if_due()  # after the turn: no payment waits for it
        self._came_round()
        return done

    def _behind(self) -> bool:
        """A window holds all that was said before it was opened; who said something since has stirred us."""
        return self._wake is None or any(cursor.window_end is not None for cursor in self._cursors.values())

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
        if cursors.keys() - self._cursors.keys():
            self._woken.set()  # something may wait there
        self._cursors = cursors
        self._join_at = now + HEARTBEAT_SECONDS
        self._save_at = now + SAVE_SECONDS if now >= self._save_at else self._save_at

    # -------------------------------------------------------------- one page

    async def _turn(self, cursor: Cursor) -> int:
        """The next page that concerns this group; 0 where nothing had been said for it when the turn began."""
        for _window in ("the open one", "the next one"):
            if cursor.window_end is None:
                cursor = await postgres_log.open_window(self.db, cursor, self._types, KNOWN_TYPES)
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
        """Read, claim, move on and handle, in one transaction; the number of events got past."""
        few = cursor.highest_id - cursor.last_id <= FEW_EVENTS_MAX
        name, incarnation, limit = self.worker.name, self.worker.incarnation, self._limit(cursor.id)
        async with self.db.transaction(self.worker.service, few=few) as tx:
            taken = await postgres_log.take_page(
                tx,
                self.subscription.group,
                cursor,
                name,
                incarnation,
                self._types,
                KNOWN_TYPES,
                limit,
                noted=self.subscription.notes_only,
            )
            await self._apply(tx, taken.new)
        self._cursors[cursor.id] = taken.cursor
        if taken.events:
            self._flowed(cursor.id, limit, taken.events)
        return taken.events

    async def _read(self, tx: Tx, cursor: Cursor, limit: int) -> tuple[Cursor, list[tuple[int, Envelope]]]:
        """The cursor, locked, and its next events with their positions."""
        name, incarnation = self.worker.name, self.worker.incarnation
        return await postgres_log.read_page(tx, cursor, name, incarnation, self._types, KNOWN_TYPES, limit)

    # -------------------------------------------------------------- failures

    async def _isolate(self, cursor: Cursor, error: Exception) -> int:
        """After a bug: read less the next time; an event that fails alone, again and again, is parked."""
        async with self.db.transaction(self.worker.service) as tx:
            cursor, page = await self._read(tx, cursor, self._limit(cursor.id))
        if not page:
            raise error
        attempts = await self._suspect(cursor.id, [envelope for _position, envelope in page], error)
        if attempts is None:
            return len(page)  # not idle: turn again at once
        [(position, envelope)] = page
        async with self.db.transaction(self.worker.service) as tx:
            cursor = await postgres_log.lock_cursor(tx, cursor, self.worker.name, self.worker.incarnation)
            await self._park(tx, envelope, error, attempts)
            moved = replace(cursor, last_id=position)
            await postgres_log.move_cursor(tx, moved)
        self._cursors[cursor.id] = moved
        self._parked(cursor.id, envelope)
        return 1
