"""A member of a group that hears the events from Kafka: claim, effect and outgoing events in one transaction per batch;
the offsets follow the commit, and `processed_events` judges duplicates.

It works from the outbox instead, from the group's trail on, where somebody has failed over (see carrier) and where
Kafka no longer has what comes next. Claims make going back and forth harmless.
"""

from __future__ import annotations

import asyncio
from collections import deque
from concurrent.futures import Future

import structlog

from caravan.db import Database, Tx
from caravan.db.wake import Wake
from caravan.errors import is_transient
from caravan.eventlog import kafka_records, postgres_log, workers
from caravan.eventlog.carrier import Carrier, get_carrier
from caravan.eventlog.codec import Envelope
from caravan.eventlog.consumer import FEW_EVENTS_MAX, Consumer
from caravan.eventlog.kafka_client import Kafka, KafkaUnavailable
from caravan.eventlog.kafka_dead_letters import park_unreadable
from caravan.eventlog.kafka_reader import CLOSE_SECONDS, OffsetGone, Place, Reader
from caravan.eventlog.kafka_records import Record
from caravan.eventlog.lag import list_lag
from caravan.eventlog.member import PAGE_EVENTS_MAX, Hopeless, Member
from caravan.eventlog.subscription import Subscription
from caravan.eventlog.trail import Trail
from caravan.eventlog.workers import HEARTBEAT_SECONDS, Worker
from caravan.events import BY_TYPE

TAKE_SECONDS = 0.5  # how long one turn waits for the first record
LOOK_SECONDS = 2.0  # and for a broker to show itself
TRAIL_SECONDS = 20.0
WATCH_SECONDS = 10.0
HANGING_MAX = 3  # clients that never came back from being closed
STUCK_SECONDS = 30.0  # records wait, none comes: the process ends, and a new one may do better
SHARE = "kafka"  # all our partitions together, in the order of arrival

log: structlog.stdlib.BoundLogger = structlog.get_logger()


class Stuck(Hopeless):
    """Kafka holds events for this worker and hands out none: this process must end."""


class KafkaConsumer(Member):
    def __init__(
        self,
        db: Database,
        subscription: Subscription,
        worker: Worker,
        kafka: Kafka,
        *,
        wake: Wake | None = None,
        page_events_max: int = PAGE_EVENTS_MAX,
    ) -> None:
        super().__init__(db, subscription, worker, page_events_max=page_events_max)
        self._kafka = kafka
        self._topics = sorted({event.topic for event in subscription.handlers})
        self._heard = frozenset(subscription.types)
        self._reader: Reader | None = None
        self._closing: list[Future[object]] = []
        self._taken: deque[Record] = deque()
        self._hints = wake  # of the outbox: on Kafka nobody needs them
        self._outbox = Consumer(db, subscription, worker, page_events_max=page_events_max)
        self._trail = Trail(db, subscription.group, subscription.types)
        self._carrier = Carrier.KAFKA
        self._gone: list[Place] = []  # partitions whose next records Kafka has no more
        self._on_outbox = False
        self._look_at = self._trail_at = self._watch_at = self._came_at = 0.0

    async def run(self, stop: asyncio.Event) -> None:
        try:
            await super().run(stop)
        finally:
            self._hear_hints(False)
            self._let_go()  # also where leaving took too long, or was never come to

    async def enter(self) -> None:
        async with self.db.transaction(self.worker.service) as tx:
            await workers.enter(tx, self.worker)
            await self._trail.create(tx)
        self._came_at = asyncio.get_running_loop().time()
        await self._look()

    async def run_once(self) -> int:
        """One turn: a page from Kafka, or from the outbox where that carries the events now."""
        self._turned_at = asyncio.get_running_loop().time()
        if self._turned_at >= self._look_at:
            await self._look()
        done = await (self._turn_on_outbox() if self._from_outbox() else self._turn())
        self._came_round()
        return done

    async def leave(self) -> None:
        await self._close()
        async with self.db.transaction(self.worker.service) as tx:
            await postgres_log.leave_group(tx, self.worker.name, self.worker.incarnation)
            await workers.leave(tx, self.worker)

    async def _wait_for_work(self, stopped: asyncio.Task[object]) -> None:
        if self._from_outbox():  # a turn on Kafka has waited already
            await super()._wait_for_work(stopped)

    def _from_outbox(self) -> bool:
        return self._carrier is Carrier.POSTGRES_LOG or bool(self._gone)

    # -------------------------------------------------------------- which carrier

    async def _look(self) -> None:
        """Every few seconds: has somebody switched? And now and then: keep the group's place in the outbox close."""
        self._look_at = self._turned_at + HEARTBEAT_SECONDS
        async with self.db.transaction(read_only=True) as tx:
            carrier = (await get_carrier(tx)).carrier
        if carrier is not self._carrier:
            log.warning(f"[{self.subscription.label}] events come from {carrier} now", was=str(self._carrier))
            self._carrier = carrier
            self._gone.clear()
        if self._carrier is Carrier.POSTGRES_LOG:
            await self._close()
        elif self._on_outbox and not self._gone:
            await self._leave_outbox()
        if not self._from_outbox() and self._turned_at >= self._trail_at:
            await self._trail.step()
            self._trail_at = self._turned_at + TRAIL_SECONDS

    async def _turn_on_outbox(self) -> int:
        self._hear_hints(True)
        done = await self._outbox.run_once()
        if not done and self._gone and self._reader is not None:
            await self._reader.thread.call(self._reader.begin_anew, self._gone)
            log.warning(f"[{self.subscription.label}] caught up from the outbox; back to Kafka")
            self._gone.clear()
            await self._leave_outbox()
        return done

    async def _leave_outbox(self) -> None:
        async with self.db.transaction(self.worker.service) as tx:
            await postgres_log.leave_group(tx, self.worker.name, self.worker.incarnation)
        self._outbox = Consumer(self.db, self.subscription, self.worker, page_events_max=self._page_max)
        self._hear_hints(False)

    def _hear_hints(self, on_outbox: bool) -> None:
        if self._hints is not None and on_outbox is not self._on_outbox:
            (self._hints.subscribe if on_outbox else self._hints.unsubscribe)(self._stir)
        self._on_outbox = on_outbox

    # -------------------------------------------------------------- one page

    async def _turn(self) -> int:
        if not self._taken:
            await self._take()
        if not self._taken:
            await self._watch()
            return 0
        page = self._next_page(self._limit(SHARE))
        try:
            await self._page(page)
        except Exception as error:
            if is_transient(error):
                raise
            await self._isolate(page, error)
        return len(page)

    async def _take(self) -> None:
        try:
            if self._reader is None:
                self._reader = Reader(
                    self._kafka, self.subscription.group, self._topics, self.subscription.types, self.worker.name
                )
                await self._reader.thread.call(self._reader.open, LOOK_SECONDS)
            self._taken.extend(await self._reader.thread.call(self._reader.take, self._page_max, TAKE_SECONDS))
        except OffsetGone as gone:
            log.error(
                f"[{self.subscription.label}] Kafka no longer has what comes next in {gone}:"
                " taking what is missing from the outbox",
                group=self.subscription.group,
            )
            self._gone = gone.places
        except KafkaUnavailable:
            await self._close()  # topics that are gone, a client that cannot go on: begin with a look at the topics
            raise
        if self._taken:
            self._came_at = asyncio.get_running_loop().time()

    def _next_page(self, limit: int) -> list[Record]:
        """So many records that concern us, and others' events before and between them."""
        page: list[Record] = []
        for record in self._taken:
            if not limit:
                break
            page.append(record)
            limit -= not record.others
        return page

    async def _page(self, page: list[Record]) -> None:
        """Claim, handle, commit; then tell Kafka."""
        envelopes = self._concern_us(page)
        if envelopes or any(record.wrong is not None for record in page):
            async with self.db.transaction(self.worker.service, few=len(page) <= FEW_EVENTS_MAX) as tx:
                await self._park_unreadable(tx, page)
                await self._handle(tx, envelopes)
            self._tell_unread(page)
        limit = self._limit(SHARE)
        await self._past(page)
        self._flowed(SHARE, limit, len(envelopes))

    def _concern_us(self, page: list[Record]) -> list[Envelope]:
        """What the group hears, each event once; and what nobody knows, to be parked."""
        found: dict[object, Envelope] = {}
        for record in page:
            envelope = record.envelope
            if envelope is not None and (envelope.type in self._heard or envelope.type not in BY_TYPE):
                found.setdefault(envelope.id, envelope)
        return list(found.values())

    async def _past(self, page: list[Record]) -> None:
        for _record in page:
            self._taken.popleft()
        if self._reader is not None:
            await self._reader.thread.call(self._reader.done, page)

    # -------------------------------------------------------------- failures

    async def _park_unreadable(self, tx: Tx, page: list[Record]) -> None:
        for record in page:
            if record.wrong is not None:
                await park_unreadable(
                    tx,
                    self.subscription.group,
                    kafka_records.event_id_of(record),
                    kafka_records.type_of(record),
                    kafka_records.correlation_id_of(record),
                    kafka_records.shown(record),
                    record.wrong,
                )

    def _tell_unread(self, page: list[Record]) -> None:
        """Once committed: the log has a line for whatever was given up."""
        for record in page:
            if record.wrong is not None:
                log.error(
                    f"[{self.subscription.label}] record parked in dead_letters",
                    topic=record.topic,
                    partition=record.partition,
                    offset=record.offset,
                    type=kafka_records.type_of(record),
                    correlation_id=kafka_records.correlation_id_of(record),
                    code="MALFORMED",
                    error=record.wrong,
                )

    async def _isolate(self, page: list[Record], error: Exception) -> None:
        envelopes = self._concern_us(page)
        if not envelopes:
            raise error
        attempts = await self._suspect(SHARE, envelopes, error)
        if attempts is None:
            return
        [envelope] = envelopes
        async with self.db.transaction(self.worker.service) as tx:
            await self._park_unreadable(tx, page)
            await self._park(tx, envelope, error, attempts)
        self._tell_unread(page)
        await self._past(page)
        self._parked(SHARE, envelope)

    async def _watch(self) -> None:
        """Nothing came. Raises KafkaUnavailable where nobody answers, and Stuck where records have waited for long; our
        own tables have the last word in that, for offsets alone may count what is no event."""
        now = asyncio.get_running_loop().time()
        if self._reader is None or (now < self._watch_at and self._reader.trouble is None):
            return
        self._watch_at = now + WATCH_SECONDS
        try:
            if not await self._reader.thread.call(self._reader.behind, LOOK_SECONDS):
                self._came_at = now
                self.worker.recovered()
        except KafkaUnavailable as error:
            if error.away:
                self._came_at = now  # it could not come
            else:  # somebody answers, but this client may never get any further
                await self._check_stuck(now)
            raise
        await self._check_stuck(now)

    async def _check_stuck(self, now: float) -> None:
        if now - self._came_at < STUCK_SECONDS:
            return
        async with self.db.transaction(read_only=True) as tx:
            lags = {lag.group: lag for lag in await list_lag(tx)}
        lag = lags.get(self.subscription.group)
        if lag is not None and lag.seconds > STUCK_SECONDS:
            raise Stuck(f"{self.worker.name}: {lag.messages} events wait in Kafka, the oldest for {lag.seconds:.0f} s")

    # -------------------------------------------------------------- leaving Kafka's group

    async def _close(self) -> None:
        """A broker that is away is not waited for. Raises Stuck where one client after the other hangs in this."""
        closing = self._let_go()
        if closing is not None:
            await asyncio.wait({asyncio.wrap_future(closing)}, timeout=CLOSE_SECONDS)
        self._closing = [each for each in self._closing if not each.done()]
        if len(self._closing) >= HANGING_MAX:
            raise Stuck(f"{self.worker.name}: {len(self._closing)} clients of Kafka hang on being closed")

    def _let_go(self) -> Future[object] | None:
        reader, self._reader = self._reader, None
        self._taken.clear()
        if reader is None:
            return None
        closing = reader.thread.end(reader.close)
        self._closing.append(closing)
        return closing
