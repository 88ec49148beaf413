"""Orders, what each client was told about them, and whether the database bears it out.

An answer is `ok` (the promise now binds), `failed` (surely nothing happened) or `unknown` (the line was cut: either,
but consistently). At the end `judge` holds every order against the tables.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date, timedelta
from enum import StrEnum
from typing import Any
from uuid import UUID

from caravan.catalog.courses import Tier, create_course
from caravan.db import Database, Tx
from caravan.ids import new_id
from caravan.people.students import create_student, link_student
from caravan.web.auth import Role, create_account, issue_token
from verify.world import add_trainer

COURSES = 20
HOURS = 24
BLOCKS = 8  # start dates, ten days apart: a package of up to ten daily sessions per block
BLOCK_DAYS = 10
FIRST_START_DAYS = 3
ORDERS_PER_STUDENT_MAX = 20
PRICES = {5: 60_000, 10: 120_000}
SPARE_TRAINERS = 1
STEP = 7  # has no factor in common with HOURS * BLOCKS: a student's cells are all different


class Told(StrEnum):
    NOTHING = "nothing"
    OK = "ok"
    FAILED = "failed"
    UNKNOWN = "unknown"


@dataclass(slots=True)
class Order:
    """One thing that a family wants to buy. `mark` is in what is kept of the request, so that twins are found."""

    mark: str
    student: UUID
    token: str
    course: UUID
    sessions: int
    slot: str
    start: date
    by_webhook: bool
    pays: bool
    created: Told = Told.NOTHING
    paid: Told = Told.NOTHING
    payment: UUID | None = None
    payments_told: set[UUID] = field(default_factory=set[UUID])

    @property
    def cents(self) -> int:
        return PRICES[self.sessions]

    def body(self) -> dict[str, Any]:
        return {
            "studentId": str(self.student),
            "courseId": str(self.course),
            "sessionCount": self.sessions,
            "learningMode": "online",
            "groupSize": 1,
            "timeSlot": self.slot,
            "startDate": self.start.isoformat(),
            "again": True,
            "mark": self.mark,
        }


async def plan_orders(db: Database, number: int, dice: random.Random, *, unpaid: float = 0.02) -> list[Order]:
    """Families, courses, and trainers enough for every order; and the orders in a random sequence.

    No two orders of a student clash, and no more want the same course at the same time than it has trainers: whatever
    is not delivered at the end is a fault.
    """
    students = await _open_accounts(db, max(10, number // ORDERS_PER_STUDENT_MAX))
    cells: list[tuple[int, int, int]] = []  # course, hour, block
    for n in range(number):
        cell = (n // len(students) * STEP + n % len(students)) % (HOURS * BLOCKS)
        cells.append((dice.randrange(COURSES), cell % HOURS, cell // HOURS))
    needed: dict[int, int] = {}
    for (course, _hour, _block), wanted in Counter(cells).items():
        needed[course] = max(needed.get(course, 0), wanted)
    courses, today = await _open_courses(db, needed)
    orders: list[Order] = []
    for n, (course, hour, block) in enumerate(cells):
        student, token = students[n % len(students)]
        orders.append(
            Order(
                mark=f"order-{n}",
                student=student,
                token=token,
                course=courses[course],
                sessions=dice.choice(list(PRICES)),
                slot=f"{hour:02d}:00",
                start=today + timedelta(days=FIRST_START_DAYS + block * BLOCK_DAYS),
                by_webhook=dice.random() < 0.5,
                pays=dice.random() >= unpaid,
            )
        )
    dice.shuffle(orders)
    return orders


async def _open_accounts(db: Database, number: int) -> list[tuple[UUID, str]]:
    """Students and the token of the account that each belongs to."""
    made: list[tuple[UUID, str]] = []
    async with db.transaction("student-service") as tx:
        for n in range(number):
            email = f"family-{n}-{new_id()}@example.com"
            account = await create_account(tx, email=email, name="Rao", role=Role.STUDENT, password_hash="-")  # noqa: S106
            student = await create_student(tx, name=f"Student {n}")
            await link_student(tx, account, student)
            made.append((student, await issue_token(tx, account)))
    return made


async def _open_courses(db: Database, trainers: dict[int, int]) -> tuple[list[UUID], date]:
    async with db.transaction("admin-service") as tx:
        tiers = [Tier(sessions, cents) for sessions, cents in PRICES.items()]
        courses = [
            await create_course(tx, title=f"Course {n}", category="STEM", session_minutes=60, tiers=tiers)
            for n in range(COURSES)
        ]
        for n, course in enumerate(courses):
            for _ in range(trainers.get(n, 0) + SPARE_TRAINERS):
                await add_trainer(tx, [course])
        return courses, tx.now.date()


# ------------------------------------------------------------------ the judgement

# All that orders came to, one row per checkout: an order that made two has two rows.
LIST_OUTCOMES = """
select c.raw->>'mark' as mark, p.id as payment_id, p.status, c.sessions,
       (select count(*) from student_course_purchases pu where pu.payment_id = p.id) as purchases,
       (select count(*) from trainer_allocations a where a.purchase_id = f.purchase_id and a.status <> 'cancelled')
         as allocations,
       (select count(*) from tutoring_sessions t where t.purchase_id = f.purchase_id) as numbered,
       f.stage, coalesce(f.scheduled, 0) as scheduled, coalesce(f.owed, 0) as owed,
       u.payment_id is not null as registered, u.reason,
       said.confirmed, said.purchased, said.allocated, said.scheduled as scheduled_said
from checkouts c
join payments p on p.checkout_id = c.id
left join fulfilments f on f.payment_id = p.id
left join undelivered u on u.payment_id = p.id
cross join lateral (
  select count(*) filter (where o.type = 'PURCHASE_CONFIRMED') as confirmed,
         count(*) filter (where o.type = 'PURCHASE_CREATED') as purchased,
         count(*) filter (where o.type = 'TRAINER_ALLOCATED') as allocated,
         count(*) filter (where o.type = 'SESSIONS_SCHEDULED') as scheduled
  from outbox o where o.correlation_id = p.id::text
) said
where c.raw ? 'mark'
"""

# Events that a group hears and never marked: they went past it. Repaired or not, that is a loss.
LIST_UNHEARD = """
select g.name, o.type, count(*) as events, min(o.id) as first_id
from consumer_groups g join outbox o on o.type = any(g.types)
where not exists (select from processed_events e where e.consumer_group = g.name and e.event_id = o.event_id)
group by g.name, o.type
"""

COUNT_DEAD_LETTERS = "select count(*) from dead_letters"
LIST_DEAD_LETTERS = "select consumer_group, event_type, code, error from dead_letters limit 3"


@dataclass(slots=True)
class Judgement:
    delivered: int = 0
    told: Counter[str] = field(default_factory=Counter[str])
    wrong: list[str] = field(default_factory=list[str])


async def judge(tx: Tx, orders: Sequence[Order]) -> Judgement:
    """Every order against what is there; call it when the system is quiet."""
    found = Judgement()
    outcomes: dict[str, list[dict[str, Any]]] = {}
    for row in await tx.all(LIST_OUTCOMES):
        outcomes.setdefault(row["mark"], []).append(row)
    for order in orders:
        found.told[f"created {order.created}"] += 1
        found.told[f"paid {order.paid}"] += 1
        rows = outcomes.pop(order.mark, [])
        wrong = _contradictions(order, rows)
        found.wrong += [f"{order.mark} (told: created {order.created}, paid {order.paid}): {each}" for each in wrong]
        found.delivered += not wrong and bool(rows) and rows[0]["status"] == "succeeded"
    found.wrong += [f"{mark}: nobody ordered it" for mark in outcomes]
    for group, type_, events, first in await tx.tuples(LIST_UNHEARD):
        found.wrong.append(f"{events} {type_} never reached {group}, the first at {first}")
    for row in await tx.all(LIST_DEAD_LETTERS):
        found.wrong.append(f"{row['consumer_group']} gave up a {row['event_type']}: {row['code']} {row['error']}")
    return found


def _contradictions(order: Order, rows: list[dict[str, Any]]) -> list[str]:
    wrong: list[str] = []
    if len(rows) > 1:
        return [f"became {len(rows)} payments"]
    if not rows:
        return [] if order.created is not Told.OK else ["is lost"]
    [row] = rows
    if order.payments_told - {row["payment_id"]}:
        wrong.append(f"was told of payments {order.payments_told}, there is {row['payment_id']}")
    if order.created is Told.FAILED:
        wrong.append("was refused, but is there")
    if row["status"] != "succeeded":
        if order.paid is Told.OK:
            wrong.append(f"its money is lost: {row['status']}")
        if row["purchases"] or row["confirmed"]:
            wrong.append("was delivered without money")
        return wrong
    if order.paid in (Told.NOTHING, Told.FAILED):
        wrong.append("is paid, though nobody paid")
    counts = {name: row[name] for name in ("purchases", "allocations", "confirmed", "purchased", "allocated")}
    if set(counts.values()) != {1} or row["scheduled_said"] != 1:
        wrong.append(f"is not delivered exactly once: {counts}, scheduled {row['scheduled_said']}")
    sessions = (row["sessions"], row["scheduled"], row["numbered"])
    if set(sessions) != {order.sessions} or row["owed"] or row["stage"] != "scheduled" or row["registered"]:
        wrong.append(f"has {sessions} of {order.sessions} sessions, is {row['stage']}, waits with {row['reason']}")
    return wrong
