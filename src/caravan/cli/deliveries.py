"""What the seeds' scripts did to one delivery, through the workers' own operations: diagnose, repair, single steps."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

from caravan.admin import actions
from caravan.apps.subscriptions import BY_GROUP
from caravan.cli.database import actor, run
from caravan.cli.options import FINE, FOUND_PROBLEMS
from caravan.cli.output import show
from caravan.db import Database, Tx
from caravan.errors import DomainError, NotFound
from caravan.eventlog import outbox
from caravan.events import CourseAccessGranted, PurchaseCreated
from caravan.fulfilment import repair as repairs
from caravan.fulfilment.diagnose import Finding
from caravan.fulfilment.diagnose import diagnose as find_out
from caravan.fulfilment.gaps import GAPS, Step, list_gap
from caravan.fulfilment.repair import OperatorMustDecide, PaymentNotFound, Repaired, run_step
from caravan.settings import Settings
from caravan.web import audit

SOURCE = "caravan-cli"


class DryRun(Exception):
    """Undoes a transaction that was only tried."""


# ------------------------------------------------------------------ diagnose


def diagnose(
    data: Path | None, student_id: UUID | None, course_id: UUID | None, payment_id: UUID | None, *, as_json: bool
) -> int:
    async def work(db: Database, _settings: Settings) -> list[Finding]:
        async with db.transaction(SOURCE, read_only=True) as tx:
            found = await find_out(tx, student_id=student_id, course_id=course_id, payment_id=payment_id)
            if not found and payment_id is not None:
                raise PaymentNotFound
            return found

    found = run(data, work)
    show({"items": [finding_document(finding) for finding in found]}, as_json=as_json, text=_finding_text(found))
    return FOUND_PROBLEMS if any(finding.reason for finding in found) else FINE


def finding_document(finding: Finding) -> dict[str, Any]:
    """As `GET /api/v1/admin/diagnose` answers."""
    return {
        "payment_id": finding.payment_id,
        "purchase_id": finding.purchase_id,
        "stage": finding.stage,
        "reason": finding.reason,
        "evidence": finding.evidence,
        "action": None
        if finding.action is None
        else {"name": finding.action.name, "label": finding.action.label, "path": finding.action.path},
    }


def _finding_text(found: list[Finding]) -> str:
    if not found:
        return "There is no such payment: nobody has paid yet, or an id is wrong."
    parts: list[str] = []
    for finding in found:
        head = f"Payment {finding.payment_id}: {finding.stage}" + (f", {finding.reason}" if finding.reason else "")
        lines = [head, *(f"  - {said}" for said in finding.evidence)]
        if finding.action is not None:
            lines.append(f"  > {finding.action.label}: caravan repair --payment {finding.payment_id}")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


# ------------------------------------------------------------------ repair


def repair_one(data: Path | None, payment_id: UUID, note: str | None, *, dry_run: bool, as_json: bool) -> int:
    async def work(db: Database, settings: Settings) -> Repaired:
        return await _repair(db, settings, payment_id, note, dry_run=dry_run)

    done = run(data, work)
    text = ("Would do (nothing was changed): " if dry_run else "") + _repaired_text(done)
    show({"dry_run": dry_run, "items": [done]}, as_json=as_json, text=text)
    return FOUND_PROBLEMS if done.reason else FINE


def repair_all(data: Path | None, limit: int, note: str | None, *, dry_run: bool, as_json: bool) -> int:
    """Every payment in a gap, oldest first; those that an operator must decide about are named, not touched."""

    async def work(db: Database, settings: Settings) -> tuple[list[Repaired], list[dict[str, Any]]]:
        done: list[Repaired] = []
        refused: list[dict[str, Any]] = []
        for payment_id in await _list_gaps(db, limit):
            try:
                done.append(await _repair(db, settings, payment_id, note, dry_run=dry_run))
            except DomainError as error:
                refused.append({"payment_id": payment_id, "code": error.problem_code, "detail": str(error)})
        return done, refused

    done, refused = run(data, work)
    lines = [_repaired_text(each) for each in done]
    lines += [f"Payment {each['payment_id']} was left: {each['detail']} [{each['code']}]" for each in refused]
    head = "Would do (nothing was changed):\n" if dry_run and lines else ""
    show(
        {"dry_run": dry_run, "items": done, "refused": refused},
        as_json=as_json,
        text=head + ("\n".join(lines) or "Nothing is stuck: whatever was paid for is delivered or waits."),
    )
    return FOUND_PROBLEMS if refused or any(each.reason for each in done) else FINE


async def _list_gaps(db: Database, limit: int) -> list[UUID]:
    chosen: dict[UUID, None] = {}
    async with db.transaction(SOURCE, read_only=True) as tx:
        for gap in GAPS:
            chosen |= dict.fromkeys(await list_gap(tx, gap, limit=limit))
    return list(chosen)[:limit]


async def _repair(db: Database, settings: Settings, payment_id: UUID, note: str | None, *, dry_run: bool) -> Repaired:
    done: list[Repaired] = []

    async def work(tx: Tx) -> None:
        notice = timedelta(hours=settings.notice_hours)
        done[:] = [
            await actions.repair(
                tx, actor(), payment_id, note or "caravan repair", subscriptions=BY_GROUP, notice=notice
            )
        ]
        if dry_run:
            raise DryRun

    try:
        await db.transact(work, SOURCE)
    except DryRun:
        pass
    return done[0]


def _repaired_text(done: Repaired) -> str:
    now = done.stage + (f", {done.reason}" if done.reason else "")
    return f"Payment {done.payment_id}: {done.did} It is {now}."


# ------------------------------------------------------------------ single steps


def create_purchase(data: Path | None, payment_id: UUID, note: str | None, *, as_json: bool) -> int:
    async def work(db: Database, settings: Settings) -> Finding:
        async def step(tx: Tx) -> Finding:
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
            return after

        return await db.transact(step, SOURCE)

    return _stepped(run(data, work), as_json=as_json)


def trigger_allocation(
    data: Path | None, student_id: UUID, course_id: UUID, note: str | None, *, as_json: bool
) -> int:
    """A trainer for what the student bought of the course, and the sessions."""

    async def work(db: Database, settings: Settings) -> list[Finding]:
        async def assign(tx: Tx) -> list[Finding]:
            assigned = await actions.auto_assign(
                tx,
                actor(),
                student_id=student_id,
                course_id=course_id,
                note=note or "caravan trigger-allocation",
                notice=timedelta(hours=settings.notice_hours),
            )
            if assigned.allocation_id and assigned.status == "approved":
                await actions.create_sessions(tx, actor(), assigned.allocation_id, note or "caravan trigger-allocation")
            return await find_out(tx, purchase_id=assigned.purchase_id)

        return await db.transact(assign, SOURCE)

    return _stepped(*run(data, work), as_json=as_json)


async def _find_out(tx: Tx, payment_id: UUID) -> Finding:
    found = await find_out(tx, payment_id=payment_id)
    if not found:
        raise PaymentNotFound
    return found[0]


def _stepped(*found: Finding, as_json: bool) -> int:
    show({"items": [finding_document(each) for each in found]}, as_json=as_json, text=_finding_text(list(found)))
    return FOUND_PROBLEMS if any(each.reason for each in found) else FINE


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


def clear_cache(data: Path | None, student_id: UUID, *, as_json: bool) -> int:
    async def work(db: Database, _settings: Settings) -> None:
        async with db.transaction(SOURCE, read_only=True) as tx:
            if await tx.value("select id from students where id = %(id)s", {"id": student_id}) is None:
                raise StudentNotFound

    run(data, work)
    said = "There is no cache to clear (REDIS_URL is not set): home and learning come straight from the database."
    show({"student_id": student_id, "cleared": 0, "detail": said}, as_json=as_json, text=said)
    return FINE
