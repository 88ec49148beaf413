"""What tests need to stand on: short, with defaults, through the product's own operations where there are any.

Append only; a builder takes `tx` first and returns what it made.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Sequence
from datetime import date, datetime, time, timedelta
from typing import Any
from uuid import UUID

from caravan import deliveries
from caravan.db import Database, Tx
from caravan.events import PurchaseRefunded
from caravan.ids import new_id
from caravan.payments.model import Order, Payment, Rules
from caravan.payments.operations import capture, create_payment
from caravan.payments.providers import SandboxProvider
from caravan.payments.refunds import refund_payment
from caravan.purchases.operations import create_purchases

RULES = Rules(
    notice=timedelta(hours=12), start_horizon_days=90, checkout_lifetime=timedelta(minutes=30), coin_value_cents=100
)
SANDBOX_SECRET = "whsec_" + base64.b64encode(b"a secret of tests, 24 bytes at least").decode()
SANDBOX = SandboxProvider([SANDBOX_SECRET])
PROVIDERS = {"sandbox": SANDBOX}


DELHI = (28.6139, 77.2090)


async def a_student(
    tx: Tx,
    name: str = "Asha",
    *,
    timezone: str = "Asia/Kolkata",
    location: tuple[float, float] | None = DELHI,
    student_id: UUID | None = None,
) -> UUID:
    student_id = student_id or new_id()
    latitude, longitude = location or (None, None)
    await tx.execute(
        "insert into students (id, name, timezone, latitude, longitude)"
        " values (%(id)s, %(name)s, %(timezone)s, %(latitude)s, %(longitude)s)",
        {"id": student_id, "name": name, "timezone": timezone, "latitude": latitude, "longitude": longitude},
    )
    return student_id


async def a_course(
    tx: Tx,
    title: str = "Robotics",
    *,
    minutes: int = 60,
    tiers: dict[int, int] | None = None,
    currency: str = "INR",
    weekdays: Sequence[int] = (1, 2, 3, 4, 5, 6, 7),
    modes: Sequence[str] = ("online", "home"),
    course_id: UUID | None = None,
) -> UUID:
    """`tiers`: sessions to price in cents, for one student; 30 sessions for 3,600 by default."""
    course_id = course_id or new_id()
    await tx.execute(
        "insert into courses (id, title, category, session_minutes, group_sizes, weekdays, learning_modes)"
        " values (%(id)s, %(title)s, 'STEM', %(minutes)s, '{1,3}', %(weekdays)s::smallint[], %(modes)s::text[])",
        {"id": course_id, "title": title, "minutes": minutes, "weekdays": list(weekdays), "modes": list(modes)},
    )
    for sessions, cents in (tiers or {30: 360_000}).items():
        await tx.execute(
            "insert into course_tiers (course_id, sessions, amount_cents, currency)"
            " values (%(id)s, %(sessions)s, %(cents)s, %(currency)s)",
            {"id": course_id, "sessions": sessions, "cents": cents, "currency": currency},
        )
    return course_id


def an_order(tx: Tx, student_id: UUID, course_id: UUID, **changes: Any) -> Order:
    """30 sessions at 6:00 AM online, from four days after `tx.now`."""
    order: dict[str, Any] = {
        "student_id": student_id,
        "course_id": course_id,
        "session_count": 30,
        "learning_mode": "online",
        "group_size": 1,
        "time_slot": "6:00 AM",
        "start_date": tx.now.date() + timedelta(days=4),
        "raw": {"from": "a test"},
    }
    return Order(**(order | changes))


async def a_payment(
    tx: Tx,
    student_id: UUID | None = None,
    course_id: UUID | None = None,
    *,
    payment_id: UUID | None = None,
    **order: Any,
) -> Payment:
    """An attempt to pay a new checkout, not paid yet; with a student and a course of its own unless given."""
    student_id = student_id or await a_student(tx)
    course_id = course_id or await a_course(tx)
    wanted = an_order(tx, student_id, course_id, **order)
    return (await create_payment(tx, wanted, RULES, PROVIDERS, account_id=None, payment_id=payment_id)).payment


async def a_paid_checkout(
    tx: Tx, student_id: UUID | None = None, course_id: UUID | None = None, **order: Any
) -> Payment:
    """A payment that succeeded as asked: PURCHASE_CONFIRMED is said, nothing is delivered yet."""
    payment = await a_payment(tx, student_id, course_id, **order)
    await capture(tx, payment.id, payment.amount_cents, payment.currency)
    return payment


async def a_trainer(
    tx: Tx,
    *courses: UUID,
    modes: Sequence[str] = ("online", "home"),
    location: tuple[float, float] | None = DELHI,
    radius_km: float = 10,
    open_days: int | None = 400,
    active: bool = True,
    trainer_id: UUID | None = None,
) -> UUID:
    """A trainer who is free around the clock for the next `open_days`; None: has not said when."""
    trainer_id = trainer_id or new_id()
    latitude, longitude = location or (None, None)
    await tx.execute(
        "insert into trainers (id, name, active, latitude, longitude, radius_km, modes)"
        " values (%(id)s, 'Ravi', %(active)s, %(lat)s, %(lon)s, %(radius)s, %(modes)s::text[])",
        {
            "id": trainer_id,
            "active": active,
            "lat": latitude,
            "lon": longitude,
            "radius": radius_km,
            "modes": list(modes),
        },
    )
    for course in courses:
        await tx.execute(
            "insert into trainer_courses (trainer_id, course_id) values (%(trainer)s, %(course)s)",
            {"trainer": trainer_id, "course": course},
        )
    if open_days is not None:
        await open_time(tx, trainer_id, tx.now - timedelta(days=1), tx.now + timedelta(days=open_days))
    return trainer_id


async def open_time(tx: Tx, trainer_id: UUID, start: datetime, end: datetime) -> None:
    """The trainer works from `start` to `end` and at no other time."""
    await tx.execute(
        "insert into trainer_time (trainer_id, open, computed_at)"
        " values (%(id)s, tstzmultirange(tstzrange(%(start)s, %(end)s)), now())"
        " on conflict (trainer_id) do update set open = excluded.open",
        {"id": trainer_id, "start": start, "end": end},
    )


async def a_captured_payment(
    tx: Tx,
    student_id: UUID,
    course_id: UUID | None,
    *,
    sessions: int | None = 10,
    minutes: int | None = 60,
    weekdays: Sequence[int] | None = (1, 2, 3, 4, 5, 6, 7),
    mode: str | None = "online",
    zone: str | None = "Asia/Kolkata",
    slot: time | None = time(6),
    start: date | None = None,
    starts_in_days: int | None = 3,
    metadata: Any = None,
    captured_cents: int = 120_000,
    checkout_id: UUID | None = None,
    payment_id: UUID | None = None,
) -> UUID:
    """Money as it may come from elsewhere: captured, with whatever terms are known; the one that paid its checkout.

    `checkout_id`: another payment under that checkout, which it did not pay. The start is a date or in so many days.
    """
    payment_id = payment_id or new_id()
    if start is None and starts_in_days is not None:
        start = (tx.now + timedelta(days=starts_in_days)).date()
    row = {
        "payment": payment_id,
        "checkout": checkout_id or new_id(),
        "student": student_id,
        "course": course_id,
        "sessions": sessions,
        "minutes": minutes,
        "weekdays": list(weekdays) if weekdays is not None else None,
        "mode": mode,
        "zone": zone,
        "slot": slot,
        "start": start,
        "metadata": json.dumps(metadata or {}),
        "captured": captured_cents,
        "now": tx.now,
    }
    if checkout_id is None:
        await tx.execute(
            "insert into checkouts (id, student_id, course_id, sessions, price_cents, currency, session_minutes,"
            " weekdays, learning_mode, timezone, slot_start, start_date, raw, expires_at, paid_by)"
            " values (%(checkout)s, %(student)s, %(course)s, %(sessions)s, 120000, 'INR', %(minutes)s,"
            " %(weekdays)s::smallint[], %(mode)s, %(zone)s, %(slot)s, %(start)s, '{}', %(now)s, %(payment)s)",
            row,
        )
    await tx.execute(
        "insert into payments (id, checkout_id, student_id, provider, status, amount_cents, currency,"
        " captured_cents, captured_currency, captured_at, metadata) values (%(payment)s, %(checkout)s, %(student)s,"
        " 'sandbox', 'succeeded', 120000, 'INR', %(captured)s, 'INR', %(now)s, %(metadata)s::jsonb)",
        row,
    )
    await deliveries.open_deliveries(tx, [payment_id])
    return payment_id


async def a_refund(
    tx: Tx, payment_id: UUID, *, sessions: int | None = None, seqs: Sequence[int] = ()
) -> PurchaseRefunded:
    """Money goes back; the event that says so. All of it, unless `sessions` (how many) or `seqs` (which) are taken."""
    taken = list(seqs) or sessions
    cents = None if taken is None else 100
    await refund_payment(tx, payment_id, amount_cents=cents, sessions=taken, note="a test", source="admin")
    event = tx.outgoing[-1]
    assert isinstance(event, PurchaseRefunded)
    return event


async def somebody_waiting_for_a_lock(db: Database) -> None:
    """Returns once a session of this test's database waits for a lock that another one holds."""
    query = "select from pg_stat_activity where wait_event_type = 'Lock' and datname = current_database()"
    async with asyncio.timeout(10), db.connection() as connection:
        while (await connection.execute(query)).rowcount == 0:
            pass


async def a_purchase(tx: Tx, student_id: UUID, course_id: UUID, **terms: Any) -> UUID:
    """A purchase that nobody has looked for a trainer for yet; `terms` as for a_captured_payment."""
    payment_id = await a_captured_payment(tx, student_id, course_id, **terms)
    return (await create_purchases(tx, [payment_id])).created[payment_id]
