"""Who works, how far behind they are, and what was given up."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from uuid import UUID

from caravan.admin import event_log
from caravan.apps.services import background
from caravan.apps.subscriptions import BY_GROUP, SUBSCRIPTIONS
from caravan.cli.database import actor, run
from caravan.cli.options import FINE, FOUND_PROBLEMS, settings_of, start_command
from caravan.cli.output import duration, show, table
from caravan.cli.outside import look_at_kafka
from caravan.db import Database, Tx
from caravan.eventlog import dead_letters
from caravan.eventlog.carrier import Carrier, CarrierState, get_carrier
from caravan.eventlog.dead_letters import DeadLetter
from caravan.eventlog.lag import GroupLag, list_lag
from caravan.eventlog.standing import stand
from caravan.eventlog.subscription import register_groups
from caravan.eventlog.workers import WorkerRow, list_workers
from caravan.settings import Settings

SOURCE = "caravan-cli"
LISTED_MAX = 200
FAIL_OVER = 'caravan failover postgres-log --note "..."'
FAIL_BACK = 'caravan failover kafka --note "..."'


def workers(data: Path | None, *, as_json: bool) -> int:
    async def work(db: Database, _settings: Settings) -> tuple[list[WorkerRow], list[GroupLag], CarrierState]:
        async with db.transaction(SOURCE, read_only=True) as tx:
            return await list_workers(tx), await list_lag(tx), await get_carrier(tx)

    found, lags, log = run(data, work)
    known = [(each.worker, each) for each in stand(found, lags) if each.worker is not None]
    alive = {row.service for row in found if row.alive}
    missing = [name for name in background(kafka=log.kafka) if name not in alive]
    items = [asdict(row) | {"state": each.state, "sentence": each.sentence} for row, each in known]
    show({"items": items, "missing": missing}, as_json=as_json)
    if not as_json:
        table(
            ("service", "last turn", "events", "since", "name", "what it means"),
            [
                (
                    row.service,
                    f"{duration(row.progress_age_seconds)} ago",
                    row.events_done,
                    f"{row.started_at:%Y-%m-%d %H:%M:%S %Z}",
                    row.name,
                    each.sentence,
                )
                for row, each in known
                if each.state != "gone"
            ],
            empty="No worker runs: none was started, or all were stopped.",
        )
        if gone := sum(each.state == "gone" for _row, each in known):
            print(f"Not shown: {gone} that are gone and replaced (--json lists them).")
        for name in missing:
            print(f"No {name} is alive. Start it: {start_command(data, name)}")
    return FOUND_PROBLEMS if missing or any(row.alive and row.failing_since for row in found) else FINE


def lag(data: Path | None, *, as_json: bool) -> int:
    async def work(db: Database, _settings: Settings) -> tuple[list[GroupLag], CarrierState]:
        async def look(tx: Tx) -> tuple[list[GroupLag], CarrierState]:
            await register_groups(tx, SUBSCRIPTIONS)
            return await list_lag(tx), await get_carrier(tx)

        return await db.transact(look, SOURCE)

    found, log = run(data, work)
    show({"items": [_lag_document(data, group) for group in found]}, as_json=as_json)
    if not as_json:
        table(
            ("group", "waiting", "oldest", "workers", "what it means"),
            [
                (each.group, each.messages, duration(each.seconds), each.workers_alive, _sentence(data, each))
                for each in found
            ],
            empty="There are no groups.",
        )
        if log.kafka and log.carrier is Carrier.POSTGRES_LOG:
            print(failed_over(log))
    return FOUND_PROBLEMS if any(each.state not in ("idle", "working") for each in found) else FINE


def failed_over(log: CarrierState) -> str:
    since = f"Failed over since {log.since:%Y-%m-%d %H:%M:%S %Z}: events come from the outbox, not from Kafka."
    return f"{since} When Kafka is well: {FAIL_BACK}"


def failover(data: Path | None, carrier: Carrier, note: str, *, as_json: bool) -> int:
    async def work(db: Database, _settings: Settings) -> bool:
        return await db.transact(lambda tx: event_log.fail_over(tx, actor(), carrier, note), SOURCE)

    switched = run(data, work)
    place = "the outbox, without Kafka" if carrier is Carrier.POSTGRES_LOG else "Kafka"
    said = f"Within seconds the workers take their events from {place}."
    if not switched:
        said = f"The workers take their events from {place} already."
    looked = look_at_kafka(settings_of(data)) if carrier is Carrier.KAFKA else None
    trouble = None if looked is None or looked[0] else looked[1]
    if trouble:
        said += f"\nBut look at it: {trouble}. Until it is well: {FAIL_OVER}"
    show({"carrier": carrier, "switched": switched, "trouble": trouble}, as_json=as_json, text=said)
    return FOUND_PROBLEMS if trouble else FINE


def _sentence(data: Path | None, group: GroupLag) -> str:
    return group.tell(start_command(data, group.service))


def _lag_document(data: Path | None, group: GroupLag) -> dict[str, object]:
    return {
        "group": group.group,
        "service": group.service,
        "messages": group.messages,
        "seconds": round(group.seconds, 3),
        "workers_alive": group.workers_alive,
        "state": group.state,
        "sentence": _sentence(data, group),
    }


# ------------------------------------------------------------------ dead letters


def list_letters(data: Path | None, *, everything: bool, as_json: bool) -> int:
    async def work(db: Database, _settings: Settings) -> list[DeadLetter]:
        async with db.transaction(SOURCE, read_only=True) as tx:
            status = None if everything else "parked"
            return await dead_letters.list_dead_letters(tx, status=status, limit=LISTED_MAX)

    found = run(data, work)
    show({"items": [_letter_document(letter) for letter in found]}, as_json=as_json)
    if not as_json:
        table(
            ("id", "group", "event", "payment", "given up", "status", "why"),
            [
                (
                    letter.id,
                    letter.consumer_group,
                    letter.event_type,
                    letter.correlation_id,
                    f"{letter.created_at:%Y-%m-%d %H:%M}",
                    letter.status,
                    f"{letter.code}: {letter.error}",
                )
                for letter in found
            ],
            empty="No event was given up.",
        )
    return FINE


def show_letter(data: Path | None, letter_id: UUID) -> int:
    async def work(db: Database, _settings: Settings) -> DeadLetter:
        async with db.transaction(SOURCE, read_only=True) as tx:
            return await dead_letters.get_dead_letter(tx, letter_id)

    letter = run(data, work)
    # The envelope keeps the names it had on the wire.
    show(_letter_document(letter), as_json=True, as_it_is={"envelope": letter.envelope})
    return FINE


def replay(data: Path | None, letter_id: UUID, note: str | None, *, as_json: bool) -> int:
    async def work(db: Database, _settings: Settings) -> DeadLetter:
        async def again(tx: Tx) -> DeadLetter:
            given = note or "caravan dead-letters replay"
            return await event_log.replay(tx, actor(), letter_id, given, subscriptions=BY_GROUP)

        return await db.transact(again, SOURCE)

    letter = run(data, work)
    said = f"Replayed {letter.event_type} for {letter.consumer_group}."
    show({"id": letter.id, "status": "replayed"}, as_json=as_json, text=said)
    return FINE


def discard(data: Path | None, letter_id: UUID, note: str, *, as_json: bool) -> int:
    async def work(db: Database, _settings: Settings) -> DeadLetter:
        async def give_up(tx: Tx) -> DeadLetter:
            return await event_log.discard(tx, actor(), letter_id, note)

        return await db.transact(give_up, SOURCE)

    letter = run(data, work)
    said = f"Discarded {letter.event_type} for {letter.consumer_group}; the row stays."
    show({"id": letter.id, "status": "discarded"}, as_json=as_json, text=said)
    return FINE


def _letter_document(letter: DeadLetter) -> dict[str, object]:
    return {
        "id": letter.id,
        "consumer_group": letter.consumer_group,
        "event_id": letter.event_id,
        "event_type": letter.event_type,
        "correlation_id": letter.correlation_id,
        "code": letter.code,
        "error": letter.error,
        "attempts": letter.attempts,
        "status": letter.status,
        "created_at": letter.created_at,
        "resolved_at": letter.resolved_at,
        "resolved_by": letter.resolved_by,
        "note": letter.note,
    }
