"""The worst day: pause and resume stages, agree to later starts, repair many, settle unclaimed money."""

from __future__ import annotations

from datetime import date, timedelta
from pathlib import Path
from uuid import UUID

from caravan import pauses
from caravan.admin import worst_day
from caravan.apps.subscriptions import BY_GROUP
from caravan.cli.database import actor, run
from caravan.cli.options import FINE, FOUND_PROBLEMS
from caravan.cli.output import show, table
from caravan.db import Database, Tx
from caravan.fulfilment.bulk import Chosen, Done
from caravan.fulfilment.diagnose import Finding, diagnose
from caravan.fulfilment.wording import reason_words, stage_words
from caravan.pauses import Pause, Scope
from caravan.payments.webhooks import Unclaimed
from caravan.settings import Settings
from caravan.web.formats import counted

SOURCE = "caravan-cli"


def pause(data: Path | None, scope: Scope, note: str, *, as_json: bool) -> int:
    async def work(db: Database, _settings: Settings) -> tuple[Pause, int]:
        pausing = db.transact(lambda tx: worst_day.pause(tx, actor(), scope, note), SOURCE)
        return await pauses.take_hold(db, pausing)

    paused, under_way = run(data, work)
    said = f"{paused.sentence[0].upper()}{paused.sentence[1:]} Checkouts and payments go on; what is paid for waits."
    if under_way:
        said += f" Not over yet: {counted(under_way, 'transaction')} begun before. See `caravan workers`."
    show({"pause": paused, "under_way": under_way}, as_json=as_json, text=said)
    return FOUND_PROBLEMS if under_way else FINE


def resume(data: Path | None, scope: Scope, note: str, *, as_json: bool) -> int:
    async def work(db: Database, _settings: Settings) -> Pause:
        return await db.transact(lambda tx: worst_day.resume(tx, actor(), scope, note), SOURCE)

    ended = run(data, work)
    waiting = (
        "1 payment that waited for it goes on by itself."
        if ended.waiting == 1
        else f"{ended.waiting} payments that waited for it go on by themselves, the nearest start first."
    )
    said = f"Resumed: {ended.stage}{ended.where}. {waiting if ended.waiting else 'Nothing waited for it.'}"
    show({"pause": ended}, as_json=as_json, text=said)
    return FINE


def list_pauses(data: Path | None, *, as_json: bool) -> int:
    async def work(db: Database, _settings: Settings) -> list[Pause]:
        async with db.transaction(SOURCE, read_only=True) as tx:
            return await pauses.list_pauses(tx)

    found = run(data, work)
    show({"items": found}, as_json=as_json)
    if not as_json:
        table(
            ("since", "what", "who", "why", "payments waiting"),
            [
                (f"{each.paused_at:%Y-%m-%d %H:%M:%S %Z}", each.sentence, each.paused_by, each.note, each.waiting)
                for each in found
            ],
            empty="Nothing is paused.",
        )
    return FOUND_PROBLEMS if found else FINE


def confirm_start(data: Path | None, payment_id: UUID, start: date | None, note: str, *, as_json: bool) -> int:
    async def work(db: Database, settings: Settings) -> Finding:
        async def confirm(tx: Tx) -> Finding:
            notice = timedelta(hours=settings.notice_hours)
            await worst_day.confirm_start(tx, actor(), payment_id, note, start_date=start, notice=notice)
            (finding,) = await diagnose(tx, payment_id=payment_id)
            return finding

        return await db.transact(confirm, SOURCE)

    found = run(data, work)
    said = f"Payment {payment_id}: {stage_words(found.stage)} {reason_words(found.reason)}".strip()
    show({"payment_id": payment_id, "stage": found.stage, "reason": found.reason}, as_json=as_json, text=said)
    return FOUND_PROBLEMS if found.reason else FINE


def repair_many(data: Path | None, chosen: Chosen, note: str, *, dry_run: bool, as_json: bool) -> int:
    async def work(db: Database, settings: Settings) -> Done:
        return await worst_day.repair_many(
            db,
            actor(),
            chosen,
            note,
            source=SOURCE,
            subscriptions=BY_GROUP,
            notice=timedelta(hours=settings.notice_hours),
            dry_run=dry_run,
        )

    done = run(data, work)
    document = {"dry_run": dry_run, "chosen": done.chosen, "moved": done.moved, "stopped": done.stopped}
    show(document | {"items": done.lines}, as_json=as_json)
    if not as_json:
        if done.lines:
            print("What would be done (nothing was changed):" if dry_run else "What was done:")
            table(
                ("payment", "outcome", "before", "then" if dry_run else "now", "what"),
                [
                    (
                        line.payment_id,
                        "would move" if dry_run and line.outcome == "moved" else line.outcome,
                        line.stage_before,
                        " ".join(filter(None, (line.stage, line.reason or line.code))),
                        line.said,
                    )
                    for line in done.lines
                ],
                empty="",
            )
        print(done.sentence)
    return FOUND_PROBLEMS if any(line.outcome == "unexpected" for line in done.lines) else FINE


def deal_with_unclaimed(data: Path | None, provider: str, event_id: str, note: str, *, as_json: bool) -> int:
    async def work(db: Database, _settings: Settings) -> Unclaimed:
        return await db.transact(
            lambda tx: worst_day.deal_with_unclaimed(tx, actor(), provider, event_id, note), SOURCE
        )

    item = run(data, work)
    show({"item": item}, as_json=as_json, text=f"Dealt with: {provider}'s {event_id} is listed no more.")
    return FINE
