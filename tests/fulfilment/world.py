"""States put together by hand, row by row: what diagnose must name is often what the product itself never does."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from uuid import UUID

from psycopg.types.json import Jsonb

from caravan.db import Database, Tx
from caravan.fulfilment.invariants import INVARIANTS
from caravan.ids import new_id

# States put together by hand have no events, so that what must be said was not.
BY_HAND = tuple(invariant for invariant in INVARIANTS if invariant.name != "ChangesAreSaid")

GROUPS = {
    "PURCHASE_CONFIRMED": ("purchase-creation-workers", "purchase-worker"),
    "PURCHASE_CREATED": ("trainer-allocation-workers", "allocation-worker"),
    "TRAINER_ALLOCATED": ("session-scheduling-workers", "session-worker"),
}


@dataclass(frozen=True)
class Road:
    """The ids of one payment on its road."""

    student_id: UUID
    course_id: UUID
    checkout_id: UUID
    payment_id: UUID
    purchase_id: UUID
    trainer_id: UUID
    allocation_id: UUID
    booking_id: UUID


async def a_payment(
    db: Database,
    *,
    status: str = "succeeded",
    registered: bool = True,
    ago: timedelta = timedelta(minutes=5),
    reason: str | None = None,
    sessions: int = 3,
) -> Road:
    """A payment with student, course and trainer; by default captured, registered as undelivered, and nothing else."""
    road = Road(*(new_id() for _ in range(8)))
    async with db.transaction() as tx:
        ids = road.__dict__ | {"at": tx.now - ago, "status": status, "sessions": sessions}
        await tx.execute("insert into students (id, name) values (%(student_id)s, 'Asha')", ids)
        await tx.execute(
            "insert into courses (id, title, category, session_minutes) values (%(course_id)s, 'Robotics', 'stem', 60)",
            ids,
        )
        await tx.execute("insert into trainers (id, name) values (%(trainer_id)s, 'Ravi')", ids)
        await tx.execute(
            """insert into checkouts (id, student_id, course_id, sessions, price_cents, currency, session_minutes,
                 weekdays, learning_mode, timezone, slot_start, start_date, raw, created_at, expires_at)
               values (%(checkout_id)s, %(student_id)s, %(course_id)s, %(sessions)s, 360000, 'INR', 60,
                 '{1,2,3,4,5,6,7}', 'online', 'Asia/Kolkata', '06:00', %(at)s::date + 3, '{}', %(at)s,
                 %(at)s + interval '30 minutes')""",
            ids,
        )
        captured = status in ("succeeded", "refunded", "partially_refunded")
        await tx.execute(
            """insert into payments (id, checkout_id, student_id, provider, status, amount_cents, currency,
                 captured_cents, captured_at, refunded_cents, metadata, created_at)
               values (%(payment_id)s, %(checkout_id)s, %(student_id)s, 'sandbox', %(status)s, 360000, 'INR',
                 %(captured)s, %(captured_at)s, %(refunded)s, '{}', %(at)s)""",
            ids
            | {
                "captured": 360000 if captured else None,
                "captured_at": ids["at"] if captured else None,
                "refunded": 360000 if status == "refunded" else 0,
            },
        )
        if captured:
            await tx.execute("update checkouts set paid_by = %(payment_id)s where id = %(checkout_id)s", ids)
        if captured and registered:
            await tx.execute(
                """insert into undelivered (payment_id, student_id, course_id, amount_cents, currency, since, reason,
                     reason_since, held)
                   values (%(payment_id)s, %(student_id)s, %(course_id)s, 360000, 'INR', %(at)s, %(reason)s, %(since)s,
                     %(held)s)""",
                ids | {"reason": reason, "since": ids["at"] if reason else None, "held": reason == "OPERATOR_HOLD"},
            )
    return road


async def purchased(db: Database, road: Road, *, ago: timedelta = timedelta(minutes=4)) -> None:
    async with db.transaction() as tx:
        await tx.execute(
            """insert into student_course_purchases (id, checkout_id, payment_id, student_id, course_id, purchase_tier,
                 session_minutes, weekdays, learning_mode, group_size, timezone, slot_start, start_date,
                 metadata, created_at)
               select %(purchase_id)s, c.id, %(payment_id)s, c.student_id, c.course_id, c.sessions, c.session_minutes,
                 c.weekdays, c.learning_mode, c.group_size, c.timezone, c.slot_start, c.start_date, '{}', %(at)s
               from checkouts c where c.id = %(checkout_id)s""",
            road.__dict__ | {"at": tx.now - ago},
        )


async def allocated(db: Database, road: Road, *, ago: timedelta = timedelta(minutes=3), sessions: int = 3) -> None:
    async with db.transaction() as tx:
        await tx.execute(
            """with slots as (
                 select array_agg(date_trunc('hour', now()) + make_interval(days => n) order by n) as starts
                 from generate_series(1, %(sessions)s) n)
               insert into bookings (id, kind, purchase_id, trainer_id, student_id, starts, minutes, during)
               select %(booking_id)s, 'package', %(purchase_id)s, %(trainer_id)s, %(student_id)s, starts, 60,
                 (select range_agg(tstzrange(s, s + interval '1 hour')) from unnest(starts) s)
               from slots""",
            road.__dict__ | {"sessions": sessions},
        )
        await tx.execute(
            """insert into trainer_allocations (id, purchase_id, student_id, course_id, trainer_id, booking_id, status,
                 metadata, created_at, updated_at)
               values (%(allocation_id)s, %(purchase_id)s, %(student_id)s, %(course_id)s, %(trainer_id)s,
                 %(booking_id)s, 'approved', '{"sessionCount": 3}', %(at)s, %(at)s)""",
            road.__dict__ | {"at": tx.now - ago},
        )


async def scheduled(db: Database, road: Road, *, close: bool = True) -> None:
    async with db.transaction() as tx:
        await tx.execute(
            """insert into tutoring_sessions (purchase_id, seq, allocation_id, booking_id, student_id, course_id,
                 trainer_id, starts_at, ends_at, status)
               select %(purchase_id)s, n, %(allocation_id)s, b.id, %(student_id)s, %(course_id)s, b.trainer_id, s,
                 s + interval '1 hour', 'scheduled'
               from bookings b, unnest(b.starts) with ordinality as slot(s, n) where b.id = %(booking_id)s""",
            road.__dict__,
        )
        if close:
            await tx.execute("delete from undelivered where payment_id = %(payment_id)s", road.__dict__)


async def said(db: Database, road: Road, event_type: str, *, ago: timedelta = timedelta(minutes=5)) -> UUID:
    """An event of the payment in the log."""
    event_id = new_id()
    async with db.transaction() as tx:
        await tx.execute(
            """insert into outbox (event_id, type, topic, source, subject, partition_key, partition, correlation_id,
                 data_version, data, occurred_at)
               values (%(event_id)s, %(type)s, 'topic', 'payment-service', 'subject', 'key', 0, %(payment_id)s::text, 1,
                 '{}', %(at)s)""",
            road.__dict__ | {"event_id": event_id, "type": event_type, "at": tx.now - ago},
        )
    return event_id


async def processed(db: Database, road: Road, event_type: str, event_id: UUID | None = None) -> None:
    async with db.transaction() as tx:
        await tx.execute(
            """insert into processed_events (consumer_group, event_id, event_type, correlation_id, source, processed_at)
               values (%(group)s, %(event_id)s, %(type)s, %(payment_id)s::text, 'payment-service', %(now)s)""",
            road.__dict__
            | {"event_id": event_id or new_id(), "type": event_type, "group": GROUPS[event_type][0], "now": tx.now},
        )


async def parked(db: Database, road: Road, event_type: str, event_id: UUID, *, code: str = "HANDLER_FAILED") -> UUID:
    dead_letter_id = new_id()
    async with db.transaction() as tx:
        await tx.execute(
            """insert into dead_letters (id, consumer_group, event_id, event_type, correlation_id, envelope, code,
                 error, attempts, created_at)
               values (%(id)s, %(group)s, %(event_id)s, %(type)s, %(payment_id)s::text, %(envelope)s, %(code)s,
                 'KeyError: x', 3, %(now)s)""",
            road.__dict__
            | {
                "id": dead_letter_id,
                "event_id": event_id,
                "type": event_type,
                "group": GROUPS[event_type][0],
                "now": tx.now,
                "envelope": Jsonb({}),
                "code": code,
            },
        )
    return dead_letter_id


async def a_worker(db: Database, event_type: str, *, alive: bool = True, failing: UUID | None = None) -> str:
    """A worker of the group that hears `event_type`, alive by its lease or dead; perhaps failing on an event."""
    group, service = GROUPS[event_type]
    async with db.transaction() as tx:
        await insert_worker(tx, service, group, alive=alive, failing=failing)
    return f"{service}/1"


async def insert_worker(tx: Tx, service: str, group: str, *, alive: bool, failing: UUID | None) -> None:
    expires = tx.now + timedelta(minutes=5 if alive else -1)
    await tx.execute(
        """insert into workers (name, incarnation, service, consumer_group, host, pid, build, started_at, heartbeat_at,
             expires_at, progress_at, failing_event_id, failing_since, last_error)
           values (%(name)s, %(incarnation)s, %(service)s, %(group)s, 'here', 1, 'test', %(now)s, %(now)s, %(expires)s,
             %(now)s, %(failing)s, %(failing_since)s, %(error)s)""",
        {
            "name": f"{service}/1",
            "incarnation": new_id(),
            "service": service,
            "group": group,
            "now": tx.now,
            "expires": expires,
            "failing": failing,
            "failing_since": datetime.now(UTC) if failing else None,
            "error": "KeyError: x" if failing else None,
        },
    )
