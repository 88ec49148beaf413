"""What is missing: the effect that a stage still lacks after its leeway, though nothing says why it should wait.

Each gap is one query over the register of undelivered money (small, indexed by age) plus the step that closes it.
Shared by diagnose (which names the cause), the reconciler (which closes it) and the admin's overview.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import LiteralString
from uuid import UUID

from caravan.db import Tx
from caravan.deliveries import Stage


class Step(StrEnum):
    """What repair can do next, each through the worker's own operation."""

    APPLY_WEBHOOK = "apply_webhook"
    REGISTER = "register"
    CREATE_PURCHASE = "create_purchase"
    ALLOCATE_TRAINER = "allocate_trainer"
    SCHEDULE_SESSIONS = "schedule_sessions"
    MAKE_UP = "make_up"
    CLOSE = "close"


@dataclass(frozen=True, slots=True)
class Hop:
    """Who takes a payment out of a stage: the event that tells them, the group that hears it, its service."""

    stage: Stage
    event_type: str
    group: str
    service: str
    missing: str


HOPS: tuple[Hop, ...] = (
    Hop(Stage.PAID, "PURCHASE_CONFIRMED", "purchase-creation-workers", "purchase-worker", "the purchase"),
    Hop(Stage.PURCHASED, "PURCHASE_CREATED", "trainer-allocation-workers", "allocation-worker", "the trainer"),
    Hop(Stage.ALLOCATED, "TRAINER_ALLOCATED", "session-scheduling-workers", "session-worker", "the sessions"),
    # Some sessions came to be owed again: the allocation group books another trainer's time for them.
    Hop(Stage.SCHEDULED, "BOOKING_RELEASED", "trainer-allocation-workers", "allocation-worker", "the owed sessions"),
)
HOP_OF_STAGE: dict[Stage, Hop] = {hop.stage: hop for hop in HOPS}


@dataclass(frozen=True, slots=True)
class Gap:
    """An effect that is missing without a stored reason. `sql` yields payment_id and since, the nearest start first."""

    name: str
    stage: Stage
    leeway: timedelta
    step: Step
    sql: LiteralString


# Captured, registered, no purchase. All that waits is looked up in one walk along the purchases' index, and what has
# one, most of a backlog, is struck out by a hash (`not in`), whatever the planner believes of their numbers.
FIND_PURCHASE_MISSING = """
with waiting as materialized (
  select payment_id, since from undelivered where reason is null and since <= %(before)s
), begun as materialized (
  select payment_id from student_course_purchases where payment_id = any(array(select payment_id from waiting))
), missing as materialized (
  select payment_id, since from waiting where payment_id not in (select payment_id from begun)
)
select m.payment_id, m.since
from missing m join payments p on p.id = m.payment_id join checkouts c on c.id = p.checkout_id
order by c.start_date, m.since limit %(limit)s
"""

# Purchased, but no trainer's time is taken for it.
FIND_ALLOCATION_MISSING = """
select u.payment_id, greatest(u.since, pu.created_at) as since
from undelivered u join student_course_purchases pu on pu.payment_id = u.payment_id
where u.reason is null and u.since <= %(before)s and pu.created_at <= %(before)s and pu.is_active
  and not exists (select from trainer_allocations a
                  where a.purchase_id = pu.id and a.status in ('approved', 'completed'))
order by pu.start_date, u.since limit %(limit)s
"""

# A trainer is allocated, but not one session stands in the calendar.
FIND_SESSIONS_MISSING = """
select u.payment_id, greatest(u.since, a.updated_at) as since
from undelivered u
join student_course_purchases pu on pu.payment_id = u.payment_id and pu.is_active
join trainer_allocations a on a.purchase_id = pu.id and a.status = 'approved'
where u.reason is null and u.since <= %(before)s and a.updated_at <= %(before)s
  and not exists (select from tutoring_sessions t where t.purchase_id = pu.id)
order by pu.start_date, u.since limit %(limit)s
"""

# Scheduled once, but sessions are owed. (Most of what waits has none yet: one look tells.)
FIND_SESSIONS_OWED = """
with scheduled as materialized (
  select pu.payment_id from student_course_purchases pu
  cross join lateral (select from tutoring_sessions t where t.purchase_id = pu.id limit 1) numbered
  where pu.payment_id = any(array(select payment_id from undelivered where reason is null and since <= %(before)s))
)
select u.payment_id, u.since
from scheduled s join undelivered u on u.payment_id = s.payment_id join fulfilments f on f.payment_id = s.payment_id
where f.stage = 'scheduled' and f.owed > 0
order by u.since limit %(limit)s
"""

GAPS: tuple[Gap, ...] = (
    Gap("PurchaseMissing", Stage.PAID, timedelta(seconds=10), Step.CREATE_PURCHASE, FIND_PURCHASE_MISSING),
    Gap("AllocationMissing", Stage.PURCHASED, timedelta(seconds=10), Step.ALLOCATE_TRAINER, FIND_ALLOCATION_MISSING),
    Gap("SessionsMissing", Stage.ALLOCATED, timedelta(seconds=10), Step.SCHEDULE_SESSIONS, FIND_SESSIONS_MISSING),
    Gap("SessionsOwed", Stage.SCHEDULED, timedelta(seconds=10), Step.MAKE_UP, FIND_SESSIONS_OWED),
)


async def list_gap(tx: Tx, gap: Gap, *, limit: int, leeway: timedelta | None = None) -> list[UUID]:
    """Payments in this gap for longer than its leeway (or the given one): the nearest start first, then the oldest."""
    before = tx.now - (gap.leeway if leeway is None else leeway)
    return [payment_id for payment_id, _since in await tx.tuples(gap.sql, {"before": before, "limit": limit})]


@dataclass(frozen=True, slots=True)
class RegisterDifference:
    """The register of undelivered money and the tables disagree about one payment."""

    payment_id: UUID
    registered: bool
    stage: str
    owed: int
    captured_at: datetime


# Compare the register with what the tables say, for one page of payments in the order of their ids.
COMPARE_REGISTER = """
with page as (
  select id from payments where id > %(after)s order by id limit %(limit)s
), compared as (
  select f.payment_id, f.stage, f.owed, f.captured_at, u.payment_id is not null as registered,
         f.stage = 'paid' or f.owed > 0 as undelivered
  from page join fulfilments f on f.payment_id = page.id
  left join undelivered u on u.payment_id = page.id
)
select (select max(id::text) from page) as last_id, (select count(*) from page)::int as read,
       payment_id, registered, stage, owed, captured_at
from (values (true)) as always(here) left join compared on registered <> undelivered
"""


async def compare_register(tx: Tx, *, after: UUID, limit: int) -> tuple[list[RegisterDifference], UUID | None]:
    """Differences within the next `limit` payments behind `after`; and where to go on, None at the end.

    The register is what makes gaps cheap to find, so it is itself checked, page by page, by the reconciler.
    """
    rows = await tx.all(COMPARE_REGISTER, {"after": after, "limit": limit})
    differences = [
        RegisterDifference(row["payment_id"], row["registered"], row["stage"], row["owed"], row["captured_at"])
        for row in rows
        if row["payment_id"] is not None
    ]
    at_the_end = rows[0]["read"] < limit
    return differences, None if at_the_end else UUID(rows[0]["last_id"])
