"""What the seeds' scripts did to one delivery, through the workers' own operations: diagnose, repair, single steps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

from caravan.admin import money, placing
from caravan.admin.purchases import Listed, list_lines, list_undelivered
from caravan.admin.worst_day import DryRun
from caravan.apps.subscriptions import BY_GROUP
from caravan.cli.database import actor, run
from caravan.cli.options import FINE, FOUND_PROBLEMS
from caravan.cli.output import show
from caravan.db import Database, Tx
from caravan.db.redis import Redis, RedisError, close_now, connect
from caravan.errors import DomainError, NotFound
from caravan.eventlog import outbox
from caravan.events import CourseAccessGranted, PurchaseCreated
from caravan.fulfilment import repair as repairs
from caravan.fulfilment.diagnose import RECENT_PAYMENTS_MAX, Finding, is_unpaid
from caravan.fulfilment.diagnose import diagnose as find_out
from caravan.fulfilment.facts import choose_payments
from caravan.fulfilment.gaps import Step
from caravan.fulfilment.repair import OperatorMustDecide, PaymentNotFound, Repaired, run_step
from caravan.fulfilment.stale_views import name_stale_views
from caravan.fulfilment.wording import reason_words, stage_words
from caravan.payments.webhooks import Unclaimed, list_unclaimed
from caravan.settings import Settings
from caravan.student_views.cache import ViewCache
from caravan.student_views.queries import list_ends
from caravan.web import audit
from caravan.web.formats import counted
from caravan.web.formats import money as amount_words

SOURCE = "caravan-cli"
REDIS_SECONDS_MAX = 2.0


# ------------------------------------------------------------------ diagnose


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
    items = [_document(line) for line in (*seen.told, *seen.delivered, *seen.unpaid)]
    document = {"items": items} | ({"unclaimed": seen.unclaimed} if seen.unclaimed else {})
    show(document, as_json=as_json, text=_survey_text(seen))
    return FOUND_PROBLEMS if seen.unclaimed or any(line.finding.reason for line in seen.told) else FINE


def _survey_text(seen: Seen) -> str:
    """Trouble first, the longest waiting first; then what is well, and last what nobody has paid."""
    parts = [_text(seen.told)] if seen.told else []
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
    amount = amount_words(item.amount_cents, item.currency)
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


def _document(line: Listed) -> dict[str, Any]:
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


def _text(lines: Sequence[Listed]) -> str:
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


# ------------------------------------------------------------------ repair


def repair_one(data: Path | None, payment_id: UUID, note: str | None, *, dry_run: bool, as_json: bool) -> int:
    async def work(db: Database, settings: Settings) -> Repaired:
        return await _repair(db, settings, payment_id, note, dry_run=dry_run)

    done = run(data, work)
    text = f"Nothing was changed. {_repaired_text(done, 'Then')}" if dry_run else _repaired_text(done, "Now")
    show({"dry_run": dry_run, "items": [done]}, as_json=as_json, text=text)
    return FOUND_PROBLEMS if done.reason else FINE


async def _repair(db: Database, settings: Settings, payment_id: UUID, note: str | None, *, dry_run: bool) -> Repaired:
    done: list[Repaired] = []

    async def work(tx: Tx) -> None:
        notice = timedelta(hours=settings.notice_hours)
        done[:] = [
            await money.repair(
                tx,
                actor(),
                payment_id,
                note or "caravan repair",
                subscriptions=BY_GROUP,
                notice=notice,
                dry_run=dry_run,
            )
        ]
        if dry_run:
            raise DryRun

    try:
        await db.transact(work, SOURCE)
    except DryRun:
        pass
    return done[0]


def _repaired_text(done: Repaired, when: str) -> str:
    said = f"Payment {done.payment_id}: {done.did}"
    if done.still_waits:
        return said
    return f"{said} {when}: {stage_words(done.stage)}" + (f" {reason_words(done.reason)}" if done.reason else "")


# ------------------------------------------------------------------ single steps


def create_purchase(data: Path | None, payment_id: UUID, note: str | None, *, as_json: bool) -> int:
    async def work(db: Database, settings: Settings) -> list[Listed]:
        async def step(tx: Tx) -> list[Listed]:
            before = await _find_out(tx, payment_id)
            if before.reason in repairs.OPERATORS_DECISION:
                raise OperatorMustDecide(str(before.reason))
            notice = timedelta(hours=settings.notice_hours)
            await run_step(tx, Step.CREATE_PURCHASE, [payment_id], notice=notice)
            after = await _find_out(tx, payment_id)
            await audit.record(
                tx,
                actor(),
                action="create purchase",
                subject_type="payment",
                subject_id=payment_id,
                note=note or "caravan create-purchase",
                before={"stage": before.stage, "reason": before.reason, "purchaseId": before.purchase_id},
                after={"stage": after.stage, "reason": after.reason, "purchaseId": after.purchase_id},
            )
            return await list_lines(tx, [payment_id])

        return await db.transact(step, SOURCE)

    return _stepped(run(data, work), as_json=as_json)


def trigger_allocation(data: Path | None, student_id: UUID, course_id: UUID, note: str | None, *, as_json: bool) -> int:
    """A trainer for what the student bought of the course, and the sessions."""

    async def work(db: Database, settings: Settings) -> list[Listed]:
        async def assign(tx: Tx) -> list[Listed]:
            assigned = await placing.auto_assign(
                tx,
                actor(),
                student_id=student_id,
                course_id=course_id,
                note=note or "caravan trigger-allocation",
                notice=timedelta(hours=settings.notice_hours),
            )
            if assigned.allocation_id and assigned.status == "approved":
                await placing.create_sessions(tx, actor(), assigned.allocation_id, note or "caravan trigger-allocation")
            return await list_lines(tx, await choose_payments(tx, purchase_id=assigned.purchase_id))

        return await db.transact(assign, SOURCE)

    return _stepped(run(data, work), as_json=as_json)


async def _find_out(tx: Tx, payment_id: UUID) -> Finding:
    found = await find_out(tx, payment_id=payment_id)
    if not found:
        raise PaymentNotFound
    return found[0]


def _stepped(found: Sequence[Listed], *, as_json: bool) -> int:
    show({"items": [_document(each) for each in found]}, as_json=as_json, text=_text(found))
    return FOUND_PROBLEMS if any(each.finding.reason for each in found) else FINE


# ------------------------------------------------------------------ the student's screens

PURCHASE = """
select id, payment_id, student_id, course_id, purchase_tier from student_course_purchases where id = %(purchase_id)s
"""


class PurchaseNotFound(NotFound):
    """There is no such purchase."""

    code = "PURCHASE_NOT_FOUND"


def emit_events(data: Path | None, purchase_id: UUID, note: str | None, *, as_json: bool) -> int:
    """Say PURCHASE_CREATED and COURSE_ACCESS_GRANTED again; who has heard them finds nothing left to do."""

    async def work(db: Database, _settings: Settings) -> list[str]:
        async def say(tx: Tx) -> list[str]:
            row = await tx.find(PURCHASE, {"purchase_id": purchase_id})
            if row is None:
                raise PurchaseNotFound
            common: dict[str, Any] = {
                "payment_id": row["payment_id"],
                "student_id": row["student_id"],
                "course_id": row["course_id"],
                "purchase_id": row["id"],
            }
            events = [
                PurchaseCreated(**common, session_count=row["purchase_tier"]),
                CourseAccessGranted(**common),
            ]
            outbox.append(tx, events)
            said = [event.type for event in events]
            await audit.record(
                tx,
                actor(),
                action="purchases:emit-events",
                subject_type="purchase",
                subject_id=purchase_id,
                note=note,
                after={"events": said},
            )
            return said

        return await db.transact(say, SOURCE)

    said = run(data, work)
    show(
        {"purchase_id": purchase_id, "emitted": said},
        as_json=as_json,
        text=f"Said again for purchase {purchase_id}: {', '.join(said)}. Open screens have them now.",
    )
    return FINE


class StudentNotFound(NotFound):
    """There is no such student."""

    code = "STUDENT_NOT_FOUND"


class RedisDidNot(DomainError):
    """Redis did not forget anything (see REDIS_URL)."""

    code = "REDIS_DID_NOT"
    status = 503


def clear_cache(data: Path | None, student_id: UUID, *, as_json: bool) -> int:
    async def work(db: Database, settings: Settings) -> int | None:
        async with db.transaction(SOURCE, read_only=True) as tx:
            if await tx.value("select id from students where id = %(id)s", {"id": student_id}) is None:
                raise StudentNotFound
            head = (await list_ends(tx, [student_id]))[student_id]
        return await _forget(settings.redis_url, student_id, head.version) if settings.redis_url else None

    cleared = run(data, work)
    if cleared is None:
        said = "There is no cache to clear (REDIS_URL is not set): home and learning come straight from the database."
    else:
        said = f"{counted(cleared, 'cached view')} forgotten: the next look comes from the database."
    show({"student_id": student_id, "cleared": cleared or 0, "detail": said}, as_json=as_json, text=said)
    return FINE


async def _forget(url: str, student_id: UUID, version: int) -> int:
    """Raises RedisDidNot."""
    try:
        close_now(await connect(url))  # says why not; what keeps a connection only logs it
        async with Redis(url) as redis:
            await redis.wait_until_up(REDIS_SECONDS_MAX)
            return await ViewCache(redis).clear(student_id, version)
    except RedisError as error:
        raise RedisDidNot(f"Redis (REDIS_URL) did not do it: {error}") from None
