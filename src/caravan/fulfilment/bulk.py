"""Repair many payments, carefully: one first, then the rest, and an end at the first outcome that nobody expected.

Each is repaired by itself, through the same step and in a transaction of its own; so a bulk repair may be broken off
and begun again at any time. What a pause keeps is left alone by the step itself.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal
from uuid import UUID

from caravan.db import Tx
from caravan.deliveries import Reason
from caravan.errors import DomainError, Invalid
from caravan.fulfilment.diagnose import Technical, diagnose
from caravan.fulfilment.gaps import GAPS, list_gap
from caravan.fulfilment.repair import Repaired
from caravan.fulfilment.wording import reason_words, stage_words

GAP_PAYMENTS_MAX = 10_000
EXPLAINED_MAX = 1000  # technical reasons are computed: looked for among so many, the nearest starts first

Outcome = Literal["moved", "nothing to do", "unexpected"]


class ReasonUnknown(Invalid):
    """There is no such reason."""

    code = "REASON_UNKNOWN"


@dataclass(frozen=True, slots=True)
class Chosen:
    """Whom a bulk repair is for: whatever is stuck, or (`reason`) what waits with it; of a course, of a city."""

    reason: str | None = None
    course_id: UUID | None = None
    city: str | None = None
    limit: int = 100

    @property
    def words(self) -> str:
        course = f" of course {self.course_id}" if self.course_id else ""
        city = f" in {self.city}" if self.city else ""
        return f"{self.reason or 'everything stuck'}{course}{city}, {self.limit} at most"


@dataclass(frozen=True, slots=True)
class Line:
    """What happened to one payment. `said`: in a sentence; `code`: of a refusal."""

    payment_id: UUID
    outcome: Outcome
    said: str
    stage_before: str | None
    stage: str | None
    reason: str | None
    code: str | None = None


@dataclass(slots=True)
class Done:
    """`stopped`: why it ended before all of `chosen` were done. `dry_run`: none of it was."""

    chosen: int
    dry_run: bool = False
    lines: list[Line] = field(default_factory=list[Line])
    stopped: str | None = None

    @property
    def moved(self) -> int:
        return sum(line.outcome == "moved" for line in self.lines)

    @property
    def sentence(self) -> str:
        if not self.chosen:
            return (
                "Nothing of that has been stuck for more than seconds: what was paid for is delivered, waits with a"
                " reason, or has just moved on. Where it may not get further by itself (a worker is down), look again"
                " in half a minute."
            )
        said = f"{self.moved} of {self.chosen} {'would move on' if self.dry_run else 'moved on'}"
        return f"{said}. {self.stopped}" if self.stopped else f"{said}."


# Registered payments of a scope, the nearest start first.
CHOOSE_PAYMENTS = """
select u.payment_id
from undelivered u
join payments p on p.id = u.payment_id
join checkouts c on c.id = p.checkout_id
left join student_course_purchases pu on pu.payment_id = u.payment_id
where not u.held
  and (%(payment_ids)b::uuid[] is null or u.payment_id = any(%(payment_ids)b::uuid[]))
  and case when %(unexplained)s::boolean then u.reason is null
           else %(reason)s::text is null or u.reason = %(reason)s::text end
  and (%(course_id)s::uuid is null or coalesce(pu.course_id, c.course_id, u.course_id) = %(course_id)s)
  and (%(city)s::text is null or exists (
    select from cities k join students s on s.id = u.student_id
    where lower(k.name) = lower(%(city)s::text)
      and distance_km(s.latitude, s.longitude, k.latitude, k.longitude) <= k.radius_km))
order by coalesce(pu.start_date, c.start_date), u.since, u.payment_id limit %(limit)s
"""


async def choose(tx: Tx, chosen: Chosen) -> list[UUID]:
    """The payments that a bulk repair is for, the nearest start first. Raises ReasonUnknown."""
    named = {"payment_ids": None, "unexplained": False, "reason": chosen.reason, "limit": chosen.limit}
    named |= {"course_id": chosen.course_id, "city": chosen.city}
    if chosen.reason is None:
        stuck = [payment for gap in GAPS for payment in await list_gap(tx, gap, limit=GAP_PAYMENTS_MAX)]
        return await tx.values(CHOOSE_PAYMENTS, named | {"payment_ids": stuck}) if stuck else []
    if chosen.reason in Reason.__members__:
        return await tx.values(CHOOSE_PAYMENTS, named)
    if chosen.reason not in Technical.__members__:
        known = ", ".join([*Reason.__members__, *Technical.__members__])
        raise ReasonUnknown(f"There is no reason {chosen.reason[:60]}; there are {known}.")
    found: list[UUID] = []
    for payment_id in await tx.values(CHOOSE_PAYMENTS, named | {"unexplained": True, "limit": EXPLAINED_MAX}):
        (finding,) = await diagnose(tx, payment_id=payment_id)
        if finding.reason == chosen.reason:
            found.append(payment_id)
    return found[: chosen.limit]


async def repair_many(
    payment_ids: Sequence[UUID],
    repair_one: Callable[[UUID], Awaitable[Repaired]],
    look: Callable[[UUID], Awaitable[str]] | None,
) -> Done:
    """Repair them one after another until an outcome is not as expected: moved on, or nothing was left to do.

    `look` tells the stage as it stands after the first one's commit; it has to be the one that the repair told. None:
    nothing was committed (a dry run), so each is tried.
    """
    done = Done(len(payment_ids), dry_run=look is None)
    for payment_id in payment_ids:
        line = await _repair(payment_id, repair_one)
        done.lines.append(line)
        if line.outcome == "unexpected" and look is not None:
            done.stopped = f"Stopped at payment {payment_id}: {line.said}"
            break
        if look is not None and len(done.lines) == 1:
            stage = await look(payment_id)
            if line.outcome == "moved" and stage == line.stage_before:
                done.stopped = f"Stopped after payment {payment_id}: it is back where it was, {stage_words(stage)}"
                break
    return done


async def _repair(payment_id: UUID, repair_one: Callable[[UUID], Awaitable[Repaired]]) -> Line:
    try:
        told = await repair_one(payment_id)
    except DomainError as error:
        return Line(payment_id, "unexpected", error.detail, None, None, None, error.problem_code)
    if told.step is None:
        outcome: Outcome = "nothing to do"
    elif told.stage != told.stage_before or told.reason is None:
        outcome = "moved"
    else:
        outcome = "unexpected"
    said = told.did if told.still_waits or not told.reason else f"{told.did} {reason_words(told.reason)}"
    return Line(payment_id, outcome, said, told.stage_before, told.stage, told.reason)
