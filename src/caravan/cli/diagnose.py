"""Why isn't it delivered? `caravan diagnose`, and how its findings are told."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

from caravan.admin.purchases import Listed, list_lines, list_undelivered
from caravan.cli.database import run
from caravan.cli.options import FINE, FOUND_PROBLEMS
from caravan.cli.output import show
from caravan.db import Database, Tx
from caravan.db.redis import Redis, RedisError, close_now, connect
from caravan.errors import NotFound
from caravan.fulfilment.diagnose import RECENT_PAYMENTS_MAX, is_unpaid
from caravan.fulfilment.facts import choose_payments
from caravan.fulfilment.repair import PaymentNotFound
from caravan.fulfilment.stale_views import name_stale_views
from caravan.fulfilment.wording import reason_words, stage_words
from caravan.payments.webhooks import Unclaimed, list_unclaimed
from caravan.settings import Settings
from caravan.student_views.cache import ViewCache
from caravan.web.formats import money

SOURCE = "caravan-cli"
REDIS_SECONDS_MAX = 2.0


@dataclass(frozen=True, slots=True)
class Seen:
    """What `diagnose` tells in full, then in one line each; `more` wait beyond those. `nothing`: why it tells none."""

    told: list[Listed]
    delivered: list[Listed] = field(default_factory=list[Listed])
    unpaid: list[Listed] = field(default_factory=list[Listed])
    unclaimed: list[Unclaimed] = field(default_factory=list[Unclaimed])
    more: bool = False
    nothing: str = "Nobody has paid yet."


def diagnose(
    data: Path | None, student_id: UUID | None, course_id: UUID | None, payment_id: UUID | None, *, as_json: bool
) -> int:
    async def work(db: Database, settings: Settings) -> Seen:
        async with db.transaction(SOURCE, read_only=True) as tx:
            if student_id is None and course_id is None and payment_id is None:
                return await _survey(tx, timedelta(minutes=settings.unclaimed_minutes))
            chosen = await choose_payments(tx, student_id=student_id, course_id=course_id, payment_id=payment_id)
            found = await list_lines(tx, chosen)
            if not found:
                return Seen([], nothing=await _why_nothing(tx, student_id, course_id, payment_id))
            return Seen(await _look_at_screens(tx, settings.redis_url, found))

    seen = run(data, work)
    items = [document_of(line) for line in (*seen.told, *seen.delivered, *seen.unpaid)]
    document = {"items": items} | ({"unclaimed": seen.unclaimed} if seen.unclaimed else {})
    show(document, as_json=as_json, text=_survey_text(seen))
    return FOUND_PROBLEMS if seen.unclaimed or any(line.finding.reason for line in seen.told) else FINE


def _survey_text(seen: Seen) -> str:
    """Trouble first, the longest waiting first; then what is well, and last what nobody has paid."""
    parts = [text_of(seen.told)] if seen.told else []
    if seen.more:
        parts.append("More of them wait: the console's page Waiting has them all.")
    if seen.unclaimed:
        parts.append(_listed("Unclaimed money: paid, and known to nobody here.", map(_unclaimed_line, seen.unclaimed)))
    well = "The most recent others:" if parts else "Nothing waits and nothing is stuck. The most recent ones:"
    if seen.delivered:
        parts.append(_listed(well, map(_line, seen.delivered)))
    if seen.unpaid:
        parts.append(_listed("Not paid, so nothing to deliver:", map(_line, seen.unpaid)))
    return "\n\n".join(parts) or seen.nothing


def _listed(head: str, lines: Iterable[str]) -> str:
    return "\n".join([head, *(f"  {line}" for line in lines)])


def _unclaimed_line(item: Unclaimed) -> str:
    amount = money(item.amount_cents, item.currency)
    return f"{amount} at {item.received_at:%Y-%m-%d %H:%M:%S %Z}: {item.provider}'s {item.event_id}"


async def _look_at_screens(tx: Tx, redis_url: str | None, lines: list[Listed]) -> list[Listed]:
    """What Redis shows of them; one that is away shows nothing."""
    if redis_url is None:
        return lines
    try:
        close_now(await connect(redis_url))
    except RedisError:
        return lines
    async with Redis(redis_url) as redis:
        await redis.wait_until_up(REDIS_SECONDS_MAX)
        found = await name_stale_views(tx, ViewCache(redis), [line.finding for line in lines])
    return [replace(line, finding=finding) for line, finding in zip(lines, found, strict=True)]


# What an id is the id of, of the things that somebody may have copied it from; and the payment that it leads to.
WHOSE_ID = """
select 'student' as what, name, null::uuid as payment_id from students where id = %(id)s
union all select 'course', title, null from courses where id = %(id)s
union all select 'trainer', name, null from trainers where id = %(id)s
union all select 'payment', null, id from payments where id = %(id)s
union all select 'purchase', null, payment_id from student_course_purchases where id = %(id)s
union all select 'allocation', null, pu.payment_id
  from trainer_allocations a join student_course_purchases pu on pu.id = a.purchase_id where a.id = %(id)s
"""


class StudentNotFound(NotFound):
    """There is no such student."""

    code = "STUDENT_NOT_FOUND"


class CourseNotFound(NotFound):
    """There is no such course."""

    code = "COURSE_NOT_FOUND"


async def _why_nothing(tx: Tx, student_id: UUID | None, course_id: UUID | None, payment_id: UUID | None) -> str:
    """In a sentence: the ids are right, and nobody has paid. Raises for an id that isn't what it is given as."""
    if payment_id is not None:
        await _check_id(tx, payment_id, "payment", PaymentNotFound)
    name = await _check_id(tx, student_id, "student", StudentNotFound) if student_id else None
    title = await _check_id(tx, course_id, "course", CourseNotFound) if course_id else None
    return f"{name or 'This student'} has no payments{f' for {title}' if title else ''}: nothing was bought yet."


async def _check_id(tx: Tx, given: UUID, wanted: str, error: type[NotFound]) -> str | None:
    """The name of what is `wanted`. Raises `error`, with what the id is instead and how to ask for that."""
    found = await tx.all(WHOSE_ID, {"id": given})
    if not found:
        raise error(f"There is no {wanted} {given}, and nothing else has this id.")
    for row in found:
        if row["what"] == wanted:
            return row["name"]
    what, leads_to = found[0]["what"], found[0]["payment_id"]
    said = f"{given} is the id of {'an' if what == 'allocation' else 'a'} {what}, not of a {wanted}."
    if what == "student":
        raise error(f"{said} Ask: caravan diagnose {given}")
    if leads_to:
        raise error(f"{said} Ask: caravan diagnose --payment {leads_to}")
    raise error(said)


async def _survey(tx: Tx, unclaimed_after: timedelta) -> Seen:
    """What waits, the longest first; what is stuck without being in the register; then the most recent others.

    A payment that was only asked for is no trouble: most are baskets that somebody left. Asked for by its id it is told
    in full.
    """
    waiting = await list_undelivered(tx, reason=None, cursor=None, limit=RECENT_PAYMENTS_MAX)
    known = {line.finding.payment_id for line in waiting.items}
    recent = [line for line in await list_lines(tx, await choose_payments(tx)) if line.finding.payment_id not in known]
    unpaid = [line for line in recent if is_unpaid(line.finding)]
    others = [line for line in recent if not is_unpaid(line.finding)]
    return Seen(
        [*waiting.items, *(line for line in others if line.finding.reason)],
        [line for line in others if not line.finding.reason],
        unpaid,
        await list_unclaimed(tx, unclaimed_after),
        more=bool(waiting.next_cursor),
    )


def document_of(line: Listed) -> dict[str, Any]:
    """As `GET /api/v1/admin/diagnose` answers, with the names."""
    finding, action = line.finding, line.finding.action
    return {
        "payment_id": finding.payment_id,
        "purchase_id": finding.purchase_id,
        "student_name": line.student_name,
        "course_title": line.title,
        "stage": finding.stage,
        "reason": finding.reason,
        "evidence": finding.evidence,
        "action": None
        if action is None
        else {
            "name": action.name,
            "label": action.label,
            "method": action.method,
            "path": action.path,
            "needs": action.needs,
            "hint": action.hint,
        },
    }


def text_of(lines: Sequence[Listed]) -> str:
    return "\n\n".join(_paragraph(line) for line in lines)


def _paragraph(line: Listed) -> str:
    finding, action = line.finding, line.finding.action
    said = [f"{_who(line)}: {finding.stage}{f', {finding.reason}' if finding.reason else ''}"]
    if finding.reason:
        said.append(f"  {reason_words(finding.reason)}")
    said += [f"  - {each}" for each in finding.evidence]
    if action is not None:
        by_command = action.name in ("repair", "replay")
        where = f"caravan repair --payment {finding.payment_id}"
        said.append(f"  > {action.label}: " + (where if by_command else f"on /admin/purchases/{finding.payment_id}"))
        said += [f"    {action.hint}"] if action.hint else []
    return "\n".join(said)


def _line(line: Listed) -> str:
    return f"{_who(line)}: {stage_words(line.finding.stage)}"


def _who(line: Listed) -> str:
    what = f"{line.title or 'unknown course'} for {line.student_name or 'an unknown student'}"
    return f"{what}, payment {line.finding.payment_id}"
