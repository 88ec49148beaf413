"""What the seeds' scripts did to one delivery, through the workers' own operations: repair, single steps, screens."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

from caravan.admin import money, placing
from caravan.admin.purchases import Listed, list_lines
from caravan.admin.worst_day import DryRun
from caravan.apps.subscriptions import BY_GROUP
from caravan.cli.database import actor, run
from caravan.cli.diagnose import REDIS_SECONDS_MAX, StudentNotFound, document_of, text_of
from caravan.cli.options import FINE, FOUND_PROBLEMS
from caravan.cli.output import show
from caravan.db import Database, Tx
from caravan.db.redis import Redis, RedisError, close_now, connect
from caravan.errors import DomainError, NotFound
from caravan.eventlog import outbox
from caravan.events import CourseAccessGranted, PurchaseCreated
from caravan.fulfilment import repair as repairs
from caravan.fulfilment.diagnose import Finding
from caravan.fulfilment.diagnose import diagnose as find_out
from caravan.fulfilment.facts import choose_payments
from caravan.fulfilment.gaps import Step
from caravan.fulfilment.repair import OperatorMustDecide, PaymentNotFound, Repaired, run_step
from caravan.fulfilment.wording import reason_words, stage_words
from caravan.settings import Settings
from caravan.student_views.cache import ViewCache
from caravan.student_views.queries import list_ends
from caravan.web import audit
from caravan.web.formats import counted

SOURCE = "caravan-cli"


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
    show({"items": [document_of(each) for each in found]}, as_json=as_json, text=text_of(found))
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
        right = "Where the services can't reach it either, views come from the database and are right."
        raise RedisDidNot(f"Redis (REDIS_URL) did not do it: {error}. {right}") from None
