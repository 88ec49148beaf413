"""What `sabotage` breaks: each fault with the drill that must notice it. None of them is a switch in the product."""

from __future__ import annotations

import hashlib
import hmac
import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import date, datetime, time, timedelta
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import psycopg
from psycopg.conninfo import make_conninfo

from caravan import calendar
from caravan.allocations.plan import Plan
from caravan.db import Database, Tx, redis_hints
from caravan.db.redis_hints import RedisHints
from caravan.db.wake import Wake
from caravan.eventlog import inbox, outbox, postgres_log
from caravan.eventlog.codec import Envelope
from caravan.eventlog.postgres_log import SNAPSHOT, Cursor
from caravan.payments.model import Status
from caravan.realtime import gateway
from verify.tamper import NoSuchPlace, Tamper


@dataclass(frozen=True, slots=True)
class Fault:
    """`drill`: which harness, at which small scale, has to notice it; see `drills`."""

    name: str
    drill: str
    sabotage: Callable[[Tamper], None]


# ------------------------------------------------------------------ the log and its readers


def publish_outside(t: Tamper) -> None:
    """Events are written after the commit, in a transaction of their own: a crash between loses them."""

    def unflushed(append: Any) -> Any:
        def say(tx: Tx, events: Any) -> None:
            append(tx, events)
            tx.flush = None

        return say

    def afterwards(original: Any) -> Any:
        @asynccontextmanager
        async def transaction(db: Database, source: str = "caravan", **options: Any) -> AsyncGenerator[Tx]:
            async with original(db, source, **options) as tx:
                yield tx
            if tx.outgoing:
                t.hit()
                async with original(db, source) as after:
                    after.outgoing, after.causes, after.trace = tx.outgoing, tx.causes, tx.trace
                    await outbox._write(after)  # pyright: ignore[reportPrivateUsage]

        return transaction

    t.replace("eventlog.outbox:append", unflushed)
    t.replace("db.pool:Database.transaction", afterwards)


def mark_before_effect(t: Tamper) -> None:
    """The claim is committed before the handler runs."""
    t.replace("eventlog.consumer:Consumer._page", lambda _page: claim_aside(t.hit))


def claim_aside(hit: Callable[[], None]) -> Callable[[Any, Cursor], Awaitable[int]]:
    """A consumer's page whose claims are made and committed in another transaction than the effect."""

    async def page(consumer: Any, cursor: Cursor) -> int:
        async with consumer.db.transaction(consumer.worker.service) as tx:
            moved, envelopes = await _read_and_move(tx, consumer, cursor)
            if envelopes:
                hit()
                info = tx.connection.info
                address = make_conninfo("", **(info.get_parameters() | {"password": info.password}))
                async with await psycopg.AsyncConnection[Any].connect(address) as own:
                    new = await inbox.claim(Tx(own, tx.now, tx.source), consumer.subscription.group, envelopes)
                await consumer._apply(tx, new)
        consumer._cursors[cursor.id] = moved
        return len(envelopes)

    return page


async def _read_and_move(tx: Tx, consumer: Any, cursor: Cursor) -> tuple[Cursor, list[Envelope]]:
    limit = consumer._limit(cursor.id)
    cursor, events = await consumer._read(tx, cursor, limit)
    last = events[-1][0] if events else 0
    moved = cursor.finished() if len(events) < limit else replace(cursor, last_id=last)
    await postgres_log.move_cursor(tx, moved)
    return moved, [envelope for _position, envelope in events]


def position_before_effect(t: Tamper) -> None:
    """The reader moves on first (acknowledges), and then does what it has read."""

    def hasty(_page: Any) -> Any:
        async def page(consumer: Any, cursor: Cursor) -> int:
            async with consumer.db.transaction(consumer.worker.service) as tx:
                moved, envelopes = await _read_and_move(tx, consumer, cursor)
            consumer._cursors[cursor.id] = moved
            if envelopes:
                t.hit()
                async with consumer.db.transaction(consumer.worker.service) as tx:
                    await consumer._handle(tx, envelopes)
            return len(envelopes)

        return page

    t.replace("eventlog.consumer:Consumer._page", hasty)


def cursor_on_the_id(t: Tamper) -> None:
    """The reader goes on behind the highest id that it has seen."""
    seen: dict[UUID, int] = {}

    def by_id(_open: Any) -> Any:
        async def open_window(db: Database, cursor: Cursor, *_heard: object) -> Cursor:
            async with db.connection() as connection:
                row = await (await connection.execute(b"select coalesce(max(id), 0) from outbox")).fetchone()
                snapshot = await (await connection.execute(SNAPSHOT)).fetchone()
            assert row is not None
            assert snapshot is not None
            last, seen[cursor.id] = seen.get(cursor.id, 0), row[0]
            if row[0] <= last:
                return cursor
            t.hit()
            return replace(cursor, window_end=snapshot[0], last_id=last, highest_id=row[0])

        return open_window

    t.replace("eventlog.postgres_log:open_window", by_id)
    t.reword(
        "eventlog.postgres_log:TAKE_PAGE",
        ("pg_visible_in_snapshot(xid, %(end)s::pg_snapshot)", "%(end)s::text is not null"),
        ("not pg_visible_in_snapshot(xid, %(start)s::pg_snapshot)", "%(start)s::text is not null"),
    )


def lose_dead_letters(t: Tamper) -> None:
    def lost(_park: Any) -> Any:
        async def park(*_: Any, **__: Any) -> None:
            t.hit()

        return park

    t.replace("eventlog.dead_letters:park", lost)


def replay_unlocked(t: Tamper) -> None:
    t.reword("eventlog.dead_letters:LOCK_DEAD_LETTER", ("for update", ""))


def transient_is_a_bug_to_consumers(t: Tamper) -> None:
    """A deadlock uses up attempts, like a bug."""
    t.put("eventlog.consumer", "is_transient", _never(t))
    t.put("eventlog.member", "is_transient", _never(t))


def transactions_run_once(t: Tamper) -> None:
    """40001 is an error like any other: nothing is run again."""
    t.put("db.pool", "is_transient", _never(t))


def _never(t: Tamper) -> Callable[[BaseException], bool]:
    def is_transient(_error: BaseException) -> bool:
        t.hit()
        return False

    return is_transient


# ------------------------------------------------------------------ workers


def dead_worker_unseen(t: Tamper) -> None:
    """Whoever was alive once is alive."""
    for place in ("eventlog.lag:LIST_LAG", "eventlog.workers:LIST_WORKERS"):
        t.reword(place, ("expires_at > clock_timestamp()", "expires_at is not null"))
    t.reword("fulfilment.facts:GATHER_FACTS", ("expires_at > clock_timestamp()", "expires_at is not null"))


LEASE = "clock_timestamp() + make_interval(secs => %(lease)s)"


def lease_on_a_clock_ahead(t: Tamper) -> None:
    """Leases are written by the clocks of the workers' machines, which are ten minutes ahead."""
    later = (LEASE, LEASE + " + interval '10 minutes'")
    t.reword("eventlog.workers:ENTER_WORKER", later)
    t.reword("eventlog.workers:HEARTBEAT", later)
    t.patch = "verify.sabotages:be_ahead"


def be_ahead() -> None:
    lease_on_a_clock_ahead(Tamper())


# ------------------------------------------------------------------ feeds


def push_without_feed(t: Tamper) -> None:
    t.reword(
        "eventlog.outbox:APPEND_EVENTS", ("from numbered where feed_number is not null", "from numbered where false")
    )


def feed_with_gaps(t: Tamper) -> None:
    t.reword("eventlog.outbox:APPEND_EVENTS", ("head.seq + excluded.seq", "head.seq + excluded.seq + 1"))


# ------------------------------------------------------------------ money


def unique_purchase_dropped(t: Tamper) -> None:
    t.alter(
        "alter table student_course_purchases drop constraint student_course_purchases_payment_id_key",
        "alter table student_course_purchases drop constraint student_course_purchases_checkout_id_key",
    )


def second_capture_buys(t: Tamper) -> None:
    """Who paid the checkout is not looked at, and nothing forbids a second purchase of it."""

    def blind(obstacle: Any) -> Any:
        def see(payment: Any, _paid_by: UUID | None) -> Any:
            t.hit()
            return obstacle(payment, None)

        return see

    t.alter("alter table student_course_purchases drop constraint student_course_purchases_checkout_id_key")
    t.replace("payments.model:obstacle", blind)
    t.reword("purchases.store:LIST_PAID", ("  c.paid_by,", "  p.id as paid_by,"))


def late_failure_counts(t: Tamper) -> None:
    def hear(advances: Any) -> Any:
        def anything(present: Status, to: Status) -> bool:
            late = to is Status.FAILED and present is Status.SUCCEEDED
            t.hit(late)
            return late or advances(present, to)

        return anything

    t.replace("payments.model:advances", hear)
    t.alter(DROP_CHECKS)


DROP_CHECKS = """
do $$ declare name text; begin
  for name in select conname from pg_constraint where conrelid = 'payments'::regclass and contype = 'c' loop
    execute format('alter table payments drop constraint %I', name);
  end loop;
end $$
"""


def amount_ignored(t: Tamper) -> None:
    def any_amount(_as_asked: Any) -> Any:
        def as_asked(_payment: Any) -> bool:
            t.hit()
            return True

        return property(as_asked)

    def dont_stop(_paid: Any) -> None:
        t.hit()

    t.replace("payments.model:Payment.as_asked", any_amount)
    t.replace("purchases.operations:_stop", lambda _stop: dont_stop)


def tier_is_guessed(t: Tamper) -> None:
    def guessing(known_tier: Any) -> Any:
        def guess(paid: Any) -> int:
            known = known_tier(paid)
            t.hit(known is None)
            return known or 30

        return guess

    t.replace("purchases.terms:known_tier", guessing)


def refunded_twice(t: Tamper) -> None:
    """The provider's own id of a refund is not looked at."""

    def forget(_find: Any) -> Any:
        async def find(*_: Any) -> None:
            t.hit()

        return find

    t.replace("payments.refunds:_find", forget)
    t.alter("alter table refunds drop constraint refunds_provider_provider_refund_id_key")


def coins_unlocked(t: Tamper) -> None:
    t.reword("payments.coins:LOCK_STUDENT", (" for no key update", ""))


def signature_unchecked(t: Tamper) -> None:
    def equal(_one: bytes, _other: bytes) -> bool:
        t.hit()
        return True

    t.put("payments.providers", "hmac", SimpleNamespace(compare_digest=equal, new=hmac.new))


def future_accepted(t: Tamper) -> None:
    def past(seconds: float) -> float:
        t.hit(seconds > 0)
        return max(0.0, -seconds)

    t.put("payments.providers", "abs", past)


# ------------------------------------------------------------------ trainers' time, sessions


def location_swallowed(t: Tamper) -> None:
    """A home course is allocated wherever the student lives, or where nobody knows it."""
    t.reword("allocations.store:LIST_STATES", ("coalesce(s.latitude is not null, false) as located", "true as located"))
    t.reword("allocations.search:SHORTLIST", ("(n.mode <> 'home' or d.km <= t.radius_km)", "true"))
    t.reword("allocations.search:SEARCH_TRAINERS", ("(n.mode <> 'home' or d.km <= j.radius_km)", "true"))


def trainer_exclusion_dropped(t: Tamper) -> None:
    t.alter("alter table bookings drop constraint bookings_trainer_free")
    t.reword("allocations.search:SHORTLIST", ("not b.busy as free", "true as free"))
    t.reword("allocations.search:SEARCH_TRAINERS", ("v.open and not b.busy as free", "v.open as free"))


def student_exclusion_dropped(t: Tamper) -> None:
    t.alter("alter table bookings drop constraint bookings_student_free")


def live_allocation_index_dropped(t: Tamper) -> None:
    def insert(statement: str) -> str:
        head, _, rest = statement.partition("on conflict")
        return head + rest[rest.index("returning") :]

    t.alter("drop index trainer_allocations_live")
    t.replace("allocations.store:UPSERT_ALLOCATIONS", insert)


def refund_keeps_the_trainer(t: Tamper) -> None:
    def keeping(make_plan: Any) -> Any:
        def plan(state: Any, slots: Any) -> Plan:
            made = make_plan(state, slots)
            t.hit(not state.active and bool(made.give_back))
            return made if state.active else replace(made, give_back=[])

        return plan

    t.replace("allocations.plan:make_plan", keeping)


def partial_refund_ignored(t: Tamper) -> None:
    t.reword(
        "allocations.store:LIST_STATES",
        ("least(pu.purchase_tier, greatest(pu.refunded_sessions, r.sessions))::int as refunded", "0 as refunded"),
    )


def notice_ignored(t: Tamper) -> None:
    def at_once(ask: Any) -> Any:
        def hurried(case: Any, now: datetime, notice: timedelta, holidays: Any) -> None:
            t.hit()
            ask(case, now, notice - timedelta(hours=12), holidays)

        return hurried

    t.replace("allocations.case:say_when", at_once)


def days_of_24_hours(t: Tamper) -> None:
    """A series is its first instant and so many times 24 hours, across any change of the clocks."""

    def stiff(_series: Any) -> Any:
        def series(
            start: time, zone: str, weekdays: tuple[int, ...], first: date, count: int, holidays: frozenset[date]
        ) -> tuple[datetime, ...]:
            right: Sequence[datetime] = _series(start, zone, weekdays, first, count, holidays)
            begin = right[0].astimezone(calendar.zone(zone)).date()
            wrong = tuple(
                right[0] + timedelta(days=(each.astimezone(calendar.zone(zone)).date() - begin).days) for each in right
            )
            t.hit(wrong != tuple(right))
            return wrong

        return series

    t.replace("calendar:_series", stiff)


def one_session_less(t: Tamper) -> None:
    t.reword(
        "sessions.store:INSERT_SESSIONS",
        ("where s.total <= s.owed", "where s.total <= s.owed and s.place < s.total"),
    )


# ------------------------------------------------------------------ the office, the doors


def reconciler_idle(t: Tamper) -> None:
    def idle(_step: Any) -> Any:
        async def step(_reconciler: Any, _name: str, _what: Any, payment_ids: Sequence[UUID]) -> int:
            t.hit(len(payment_ids))
            return len(payment_ids)

        return step

    t.replace("fulfilment.reconciler:Reconciler._step", idle)


def audit_missing(t: Tamper) -> None:
    def silent(_record: Any) -> Any:
        async def record(*_: Any, **__: Any) -> None:
            t.hit()

        return record

    t.replace("web.audit:record", silent)


def body_hash_ignored(t: Tamper) -> None:
    def sha256(_body: bytes) -> Any:
        t.hit()
        return hashlib.sha256(b"")

    t.put("web.idempotency", "hashlib", SimpleNamespace(sha256=sha256))


def everybodys_student(t: Tamper) -> None:
    """A family may reach any student."""

    def let_in(_require: Any) -> Any:
        def require_student(_actor: Any, _student: UUID) -> None:
            t.hit()

        return require_student

    t.replace("web.auth:Actor.require_student", let_in)


# ------------------------------------------------------------------ Redis


def cache_unfenced(t: Tamper) -> None:
    """What is put is put, whatever stands there."""

    def any_version(script: str) -> str:
        _, refusal, rest = script.partition("then return 0 end")
        assert refusal
        return rest

    t.replace("student_views.cache:PUT", any_version)
    t.replace("student_views.cache:ViewCache._put", lambda put: _counted(t, put))


def cache_only_deletes(t: Tamper) -> None:
    """The cache-worker deletes, as the seeds' did; who has read the old state slowly puts it back."""

    def delete(_script: str) -> str:
        return "return redis.call('del', unpack(KEYS))"

    t.replace("student_views.cache:FENCE", delete)
    t.replace("student_views.cache:ViewCache._fence", lambda fence: _counted(t, fence))


def cache_believed(t: Tamper) -> None:
    """What Redis holds is shown, without a look at the student's version."""

    def believing(read: Any) -> Any:
        async def anything(cache: Any, db: Database, student: UUID, shown: Any, make: Any) -> bytes:
            held = await cache._get(shown, student)
            mark, _, body = (held or b"").partition(b"\n")
            if b" " in mark:
                t.hit()
                return body
            return await read(cache, db, student, shown, make)

        return anything

    t.replace("student_views.cache:ViewCache.read", believing)


def _counted(t: Tamper, call: Any) -> Any:
    async def counted(*given: Any) -> Any:
        t.hit()
        return await call(*given)

    return counted


def hints_over_redis_only(t: Tamper) -> None:
    """The WebSocket servers hear Redis and nothing else, and don't look for what it lost."""
    t.patch = "verify.sabotages:hear_redis_only"


def hear_redis_only() -> None:
    """In a process of the fleet; set by hand, because a Tamper would import all of the product first."""
    begin = RedisHints.__init__

    def deaf(hints: Any, redis: Any, tell: Any) -> None:
        begin(hints, redis, _deaf)
        hints.loud = tell

    async def listen(hints: Any, connection: Any) -> None:
        while True:
            try:
                kind, channel, *_ = await connection.read_response(timeout=math.inf, disconnect_on_error=False)
            except Exception as error:
                raise redis_hints._Broken from error  # pyright: ignore[reportPrivateUsage]
            key = channel.decode().removeprefix(redis_hints.PREFIX)
            if kind == b"subscribe":
                hints._heard.add(key)
            elif kind == b"message":
                hints.loud(frozenset((key,)))

    for owner, name, fault in (
        (gateway, "POLL_SECONDS", 3600.0),
        (RedisHints, "__init__", deaf),
        (RedisHints, "_listen", listen),
        (Wake, "_hear", _stir_the_workers),
    ):
        if not hasattr(owner, name):
            raise NoSuchPlace(name)
        setattr(owner, name, fault)


def _deaf(_keys: frozenset[str]) -> None:
    pass


def _stir_the_workers(wake: Any, _payload: str) -> None:
    wake._tell(frozenset[str]())


FAULTS: tuple[Fault, ...] = (
    # the seeds' five
    Fault("publish-outside-the-transaction", "crashpoints webhook-succeeded", publish_outside),
    Fault("mark-before-effect", "crashpoints purchases", mark_before_effect),
    Fault("dead-worker-unseen", "stuck", dead_worker_unseen),
    Fault("swallowed-missing-location", "orders places", location_swallowed),
    Fault("push-without-feed", "orders plain", push_without_feed),
    # the others
    Fault("unique-purchase-dropped", "races one purchase", unique_purchase_dropped),
    Fault("second-capture-buys", "orders twice", second_capture_buys),
    Fault("trainer-exclusion-dropped", "races one trainer", trainer_exclusion_dropped),
    Fault("student-exclusion-dropped", "races one student", student_exclusion_dropped),
    Fault("live-allocation-index-dropped", "orders trainers", live_allocation_index_dropped),
    Fault("cursor-on-the-id", "races commits reversed", cursor_on_the_id),
    Fault("position-before-effect", "crashpoints purchases", position_before_effect),
    Fault("dead-letter-lost", "crashpoints poison", lose_dead_letters),
    Fault("replay-unlocked", "races replay", replay_unlocked),
    Fault("lease-on-a-clock-ahead", "stuck", lease_on_a_clock_ahead),
    Fault("40001-not-retried", "crashpoints confirm", transactions_run_once),
    Fault("transient-uses-up-attempts", "crashpoints deadlocks", transient_is_a_bug_to_consumers),
    Fault("late-failure-overwrites", "orders plain", late_failure_counts),
    Fault("amount-mismatch-ignored", "crashpoints webhook-mismatch", amount_ignored),
    Fault("unknown-tier-becomes-30", "crashpoints mend-payment", tier_is_guessed),
    Fault("refund-keeps-the-trainer", "orders refunds", refund_keeps_the_trainer),
    Fault("partial-refund-ignored", "orders refunds", partial_refund_ignored),
    Fault("refund-id-ignored", "races one refund", refunded_twice),
    Fault("coins-unlocked", "races coins", coins_unlocked),
    Fault("signature-unchecked", "fuzz signatures", signature_unchecked),
    Fault("future-timestamp-accepted", "fuzz signatures", future_accepted),
    Fault("body-hash-ignored", "authz keys", body_hash_ignored),
    Fault("policy-removed", "authz students", everybodys_student),
    Fault("feed-with-gaps", "orders plain", feed_with_gaps),
    Fault("notice-ignored", "orders outage", notice_ignored),
    Fault("days-of-24-hours", "orders clocks", days_of_24_hours),
    Fault("one-session-less", "orders plain", one_session_less),
    Fault("reconciler-idle", "crashpoints reconcile-purchase", reconciler_idle),
    Fault("audit-row-missing", "races repair", audit_missing),
    Fault("cache-unfenced", "redis fences", cache_unfenced),
    Fault("cache-only-deletes", "redis fences", cache_only_deletes),
    Fault("cache-believed", "redis fences", cache_believed),
    Fault("hints-over-redis-only", "redis sockets", hints_over_redis_only),
)
BY_NAME = {fault.name: fault for fault in FAULTS}
