"""Undelivered money: one row per captured payment until its sessions are booked, and the reason why it waits.

Owns: undelivered. Says: PURCHASE_BLOCKED, PURCHASE_UNBLOCKED. The contexts stand on it; none of them writes the
table itself. Money that is neither here, delivered nor refunded is a broken invariant (fulfilment/invariants).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any
from uuid import UUID

import msgspec
import structlog

from caravan.db import Tx
from caravan.eventlog import outbox
from caravan.events import PurchaseBlocked, PurchaseUnblocked

log: structlog.stdlib.BoundLogger = structlog.get_logger()


class Stage(StrEnum):
    PAID = "paid"
    PURCHASED = "purchased"
    ALLOCATED = "allocated"
    SCHEDULED = "scheduled"
    COMPLETED = "completed"
    REFUNDED = "refunded"


class Reason(StrEnum):
    """Why money waits, as stored and announced. Technical reasons are computed, see fulfilment/diagnose."""

    AMOUNT_MISMATCH = "AMOUNT_MISMATCH"
    PAID_TWICE = "PAID_TWICE"
    STUDENT_NOT_FOUND = "STUDENT_NOT_FOUND"
    COURSE_NOT_FOUND = "COURSE_NOT_FOUND"
    TIER_UNKNOWN = "TIER_UNKNOWN"
    INVALID_SCHEDULE = "INVALID_SCHEDULE"
    STUDENT_LOCATION_MISSING = "STUDENT_LOCATION_MISSING"
    STUDENT_CONFLICT = "STUDENT_CONFLICT"
    NO_TRAINER_AVAILABLE = "NO_TRAINER_AVAILABLE"
    TRAINER_CONFLICT = "TRAINER_CONFLICT"
    TRAINER_LEFT = "TRAINER_LEFT"
    OPERATOR_HOLD = "OPERATOR_HOLD"
    STAGE_PAUSED = "STAGE_PAUSED"
    START_PASSED = "START_PASSED"


@dataclass(frozen=True, slots=True)
class Block:
    """A payment must wait: at which stage, why, and what a screen may say beside it (no coordinates, no secrets)."""

    payment_id: UUID
    stage: Stage
    reason: Reason
    detail: Mapping[str, object] | None = None


# Captured money enters the register once; a second call changes nothing.
OPEN_DELIVERIES = """
insert into undelivered (payment_id, student_id, course_id, amount_cents, currency, since)
select p.id, p.student_id, c.course_id, p.captured_cents, coalesce(p.captured_currency, p.currency), %(now)s
from payments p join checkouts c on c.id = p.checkout_id
where p.id = any(%(payment_ids)b::uuid[]) and p.captured_at is not null and p.status <> 'refunded'
order by p.id
on conflict (payment_id) do nothing
"""


async def open_deliveries(tx: Tx, payment_ids: Sequence[UUID]) -> None:
    """Enter captured payments; also again, when sessions come to be owed."""
    if payment_ids:
        await tx.execute(OPEN_DELIVERIES, {"payment_ids": list(payment_ids), "now": tx.now})


# A course that the checkout does not know is known from the purchase on; what waits for its trainers is found by it.
NAME_COURSES = """
update undelivered u set course_id = pu.course_id from student_course_purchases pu
where u.payment_id = any(%(payment_ids)b::uuid[]) and pu.payment_id = u.payment_id and u.course_id is null
"""


async def name_courses(tx: Tx, payment_ids: Sequence[UUID]) -> None:
    """Purchases of imported money were made: the register learns their courses."""
    if payment_ids:
        await tx.execute(NAME_COURSES, {"payment_ids": list(payment_ids)})


# Delivered or refunded money leaves the register, together with the reason why it waited.
CLOSE_DELIVERIES = """
delete from undelivered where payment_id = any(%(payment_ids)b::uuid[])
"""


async def close_deliveries(tx: Tx, payment_ids: Sequence[UUID]) -> None:
    if payment_ids:
        await tx.execute(CLOSE_DELIVERIES, {"payment_ids": list(payment_ids)})


# Store a reason where it differs from the stored one; a hold is never overwritten. Returns the changed rows.
STORE_REASONS = """
with given as (
  select * from unnest(%(payment_ids)b::uuid[], %(reasons)b::text[], %(details)b::text[])
    as g(payment_id, reason, detail)
)
update undelivered u set reason = g.reason, detail = g.detail::jsonb,
  reason_since = case when u.reason is not distinct from g.reason then u.reason_since else %(now)s end
from given g, (select u2.payment_id, u2.reason from undelivered u2 join given using (payment_id)
               order by u2.payment_id for update of u2) old
where u.payment_id = g.payment_id and old.payment_id = g.payment_id and not u.held
  and (u.reason is distinct from g.reason or u.detail is distinct from g.detail::jsonb)
returning u.payment_id, u.student_id, u.course_id, old.reason as old_reason
"""

PURCHASES_OF_PAYMENTS = """
select payment_id, id from student_course_purchases where payment_id = any(%(payment_ids)b::uuid[])
"""


async def block(tx: Tx, blocks: Sequence[Block]) -> None:
    """Let payments wait with a reason: stored, and announced once per change of the reason.

    A payment that is not in the register (delivered, refunded) is left alone; a held one keeps OPERATOR_HOLD.
    """
    by_payment = {item.payment_id: item for item in blocks}
    if not by_payment:
        return
    changed = await tx.all(
        STORE_REASONS,
        {
            "payment_ids": list(by_payment),
            "reasons": [str(item.reason) for item in by_payment.values()],
            "details": [_json(item.detail) for item in by_payment.values()],
            "now": tx.now,
        },
    )
    news = [row for row in changed if row["old_reason"] != by_payment[row["payment_id"]].reason]
    purchases = await find_purchases(tx, [row["payment_id"] for row in news])
    outbox.append(
        tx,
        [
            PurchaseBlocked(
                payment_id=row["payment_id"],
                student_id=row["student_id"],
                course_id=row["course_id"],
                purchase_id=purchases.get(row["payment_id"]),
                stage=str(by_payment[row["payment_id"]].stage),
                reason=str(by_payment[row["payment_id"]].reason),
            )
            for row in news
        ],
    )
    if news:
        reasons = Counter(str(by_payment[row["payment_id"]].reason) for row in news)
        log.info("Purchases wait", count=len(news), reasons=dict(reasons))


# Take the stored reason away (never a hold's); returns what it was.
CLEAR_REASONS = """
with old as (
  select payment_id, reason from undelivered
  where payment_id = any(%(payment_ids)b::uuid[]) and reason is not null and not held order by payment_id for update
)
update undelivered u set reason = null, reason_since = null, detail = null
from old where u.payment_id = old.payment_id
returning u.payment_id, u.student_id, u.course_id, old.reason
"""


async def unblock(tx: Tx, payment_ids: Sequence[UUID], stage: Stage) -> None:
    """The reason is gone and the payment goes on: announced for those that had one."""
    if payment_ids:
        await _announce_unblocked(tx, await tx.all(CLEAR_REASONS, {"payment_ids": list(payment_ids)}), stage)


HOLD = """
update undelivered set held = true, reason = 'OPERATOR_HOLD', reason_since = %(now)s,
  detail = jsonb_build_object('note', %(note)s::text)
where payment_id = %(payment_id)s and not held returning payment_id, student_id, course_id
"""


async def hold(tx: Tx, payment_id: UUID, stage: Stage, note: str) -> bool:
    """An operator says stop: no worker, reconciler or repair moves it. False: not in the register, or held already."""
    row = await tx.find(HOLD, {"payment_id": payment_id, "now": tx.now, "note": note})
    if row is None:
        return False
    purchases = await find_purchases(tx, [payment_id])
    outbox.append(
        tx,
        [
            PurchaseBlocked(
                payment_id=payment_id,
                student_id=row["student_id"],
                course_id=row["course_id"],
                purchase_id=purchases.get(payment_id),
                stage=str(stage),
                reason=str(Reason.OPERATOR_HOLD),
            )
        ],
    )
    return True


RELEASE_HOLD = """
update undelivered set held = false, reason = null, reason_since = null, detail = null
where payment_id = %(payment_id)s and held returning payment_id, student_id, course_id, 'OPERATOR_HOLD' as reason
"""


async def release_hold(tx: Tx, payment_id: UUID, stage: Stage) -> bool:
    """The hold ends; whoever calls runs the next step, which finds the business reason again if there is one."""
    rows = await tx.all(RELEASE_HOLD, {"payment_id": payment_id})
    await _announce_unblocked(tx, rows, stage)
    return bool(rows)


async def _announce_unblocked(tx: Tx, rows: list[dict[str, Any]], stage: Stage) -> None:
    purchases = await find_purchases(tx, [row["payment_id"] for row in rows])
    outbox.append(
        tx,
        [
            PurchaseUnblocked(
                payment_id=row["payment_id"],
                student_id=row["student_id"],
                course_id=row["course_id"],
                purchase_id=purchases.get(row["payment_id"]),
                stage=str(stage),
                reason=row["reason"],
            )
            for row in rows
        ],
    )


async def find_purchases(tx: Tx, payment_ids: Sequence[UUID]) -> dict[UUID, UUID]:
    """The purchases that payments have made, by payment."""
    if not payment_ids:
        return {}
    return dict(await tx.tuples(PURCHASES_OF_PAYMENTS, {"payment_ids": list(payment_ids)}))


# The payments that wait for one of some reasons, oldest first.
LIST_WAITING = """
select payment_id from undelivered
where reason = any(%(reasons)b::text[]) and not held
  and (%(course_ids)b::uuid[] is null or course_id = any(%(course_ids)b::uuid[]))
  and (%(student_ids)b::uuid[] is null or student_id = any(%(student_ids)b::uuid[]))
order by since limit %(limit)s
"""


async def list_waiting(
    tx: Tx,
    reasons: Sequence[Reason],
    *,
    course_ids: Sequence[UUID] | None = None,
    student_ids: Sequence[UUID] | None = None,
    limit: int = 500,
) -> list[UUID]:
    """Payments (ids) that wait for any of `reasons`, of these courses or students if given."""
    return await tx.values(
        LIST_WAITING,
        {
            "reasons": [str(reason) for reason in reasons],
            "course_ids": list(course_ids) if course_ids is not None else None,
            "student_ids": list(student_ids) if student_ids is not None else None,
            "limit": limit,
        },
    )


def _json(detail: Mapping[str, object] | None) -> str | None:
    return None if detail is None else msgspec.json.encode(detail).decode()
