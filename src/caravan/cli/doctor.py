"""`caravan doctor`: is this installation well? Each check is a line: what was looked at, what was found, what to do."""

from __future__ import annotations

import asyncio
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import psycopg
import psycopg_pool

from caravan import telemetry
from caravan.apps import control
from caravan.apps.folder import DataFolder
from caravan.apps.services import background
from caravan.apps.subscriptions import SUBSCRIPTIONS
from caravan.cli.options import FINE, FOUND_PROBLEMS, settings_of, start_command
from caravan.cli.output import show
from caravan.cli.outside import look_at_kafka, look_at_redis
from caravan.cli.workers import failed_over
from caravan.db import Database, Tx
from caravan.db.embedded import EmbeddedPostgresError, embedded_url
from caravan.db.migrate import SchemaProblem, check_schema
from caravan.db.reach import why
from caravan.eventlog.carrier import get_carrier
from caravan.eventlog.dead_letters import list_dead_letters
from caravan.eventlog.lag import list_lag
from caravan.eventlog.subscription import register_groups
from caravan.eventlog.workers import list_workers
from caravan.fulfilment import alerts
from caravan.fulfilment.invariants import INVARIANTS, SHALLOW
from caravan.fulfilment.invariants import check as check_invariants
from caravan.pauses import list_pauses
from caravan.settings import Settings
from caravan.web.formats import counted

DISK_BYTES_MIN = 500_000_000
EXTENSIONS = ("btree_gist",)


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    ok: bool
    said: str


def doctor(data: Path | None, *, deep: bool, as_json: bool) -> int:
    """`deep`: also what reads the whole log and every text; takes its time on a large database."""
    settings = settings_of(data)
    telemetry.configure_logging(json=settings.log_json, stream=sys.stderr, level="ERROR")  # a check says what it found
    checks = [
        Check("settings", True, f"build {settings.build}"),
        _disk(settings),
        _provider(settings),
        *_database(data, settings, deep=deep),
        *_outside(settings),
    ]
    ok = all(check.ok for check in checks)
    text = "\n".join(f"  {'ok     ' if check.ok else 'PROBLEM'}  {check.name}: {check.said}" for check in checks)
    show({"ok": ok, "checks": checks}, as_json=as_json, text=text)
    return FINE if ok else FOUND_PROBLEMS


def _disk(settings: Settings) -> Check:
    folder = settings.data_dir.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    said = f"{free / 1e9:.1f} GB free at {folder}"
    return Check("disk", free >= DISK_BYTES_MIN, said if free >= DISK_BYTES_MIN else said + ": make room")


def _provider(settings: Settings) -> Check:
    """No fault where it is not set: the doctor may be asked on another machine than payment-service's."""
    if settings.sandbox_webhook_secret:
        return Check("payment provider", True, "sandbox (CARAVAN_SANDBOX_WEBHOOK_SECRET)")
    if DataFolder(settings.data_dir).read_demo().get("sandboxWebhookSecret"):
        return Check("payment provider", True, "sandbox, of the demo")
    said = "none is set here (CARAVAN_SANDBOX_WEBHOOK_SECRET): without one payment-service sells nothing (PROVIDER_OFF)"
    return Check("payment provider", True, said)


def _outside(settings: Settings) -> list[Check]:
    """Kafka and Redis, where this installation has them; whether the database answers or not."""
    looks = {"Kafka": look_at_kafka(settings), "Redis": asyncio.run(look_at_redis(settings))}
    return [Check(name, *look) for name, look in looks.items() if look is not None]


def _database(data: Path | None, settings: Settings, *, deep: bool) -> list[Check]:
    url = settings.postgres_url
    found: list[Check] = []
    if url is None:
        try:
            url = embedded_url(settings.data_dir)
        except EmbeddedPostgresError as error:
            return [Check("database", False, str(error))]
        if url is None:
            return [Check("database", False, f"none runs in {settings.data_dir}: start it with `caravan up`")]
        found.append(Check("embedded PostgreSQL", True, f"runs in {settings.data_dir}"))
        found.append(_supervisor(settings))
    try:
        return [*found, *asyncio.run(_ask(data, url, deep=deep))]
    except SchemaProblem as error:
        return [*found, Check("schema", False, str(error))]
    except (psycopg.OperationalError, psycopg_pool.PoolTimeout) as error:
        whose = "" if settings.postgres_url is None else "POSTGRES_URL: "
        return [*found, Check("database", False, f"{whose}it does not answer ({why(error)})")]


def _supervisor(settings: Settings) -> Check:
    try:
        said = control.ask(DataFolder(settings.data_dir).control, command="status")
    except control.NotRunning as error:
        return Check("caravan up", False, str(error))
    off = [name for name, service in said["services"].items() if service["state"] != "running"]
    return Check("caravan up", not off, f"{', '.join(off)}: not running" if off else f"runs at {said['url']}")


SERVER = "select current_setting('server_version')"
EXTENSIONS_MISSING = """
select name from unnest(%(names)b::text[]) name where name not in (select extname from pg_extension)
"""


async def _ask(data: Path | None, url: str, *, deep: bool) -> list[Check]:
    await check_schema(url)
    async with Database(url, max_connections=1) as db:
        await db.transact(lambda tx: register_groups(tx, SUBSCRIPTIONS), "caravan-cli")
        async with db.transaction("caravan-cli", read_only=True) as tx:
            missing = await tx.values(EXTENSIONS_MISSING, {"names": list(EXTENSIONS)})
            return [
                Check("database", True, f"PostgreSQL {await tx.value(SERVER)}"),
                Check("schema", True, "fits this release"),
                Check("extensions", not missing, ", ".join(missing or EXTENSIONS) + (" missing" if missing else "")),
                *await _kafka_not_asked(data, tx),
                *await _failed_over(tx),
                await _workers(data, tx),
                await _lag(data, tx),
                await _letters(tx),
                await _pauses(tx),
                *await _alerts(tx),
                *await _invariants(tx, deep=deep),
            ]


async def _kafka_not_asked(data: Path | None, tx: Tx) -> list[Check]:
    used = (await get_carrier(tx)).kafka and settings_of(data).kafka_broker is None
    said = "not asked: KAFKA_BROKER is not set here, as it is where the workers run"
    return [Check("Kafka", True, said)] if used else []


async def _failed_over(tx: Tx) -> list[Check]:
    """Somebody's decision, as a pause is: no fault, and not to be forgotten."""
    log = await get_carrier(tx)
    return [Check("event log", True, failed_over(log))] if log.failed_over_since else []


async def _workers(data: Path | None, tx: Tx) -> Check:
    """Alive is not well: who fails is named, with the error that it tries to get past."""
    rows = [row for row in await list_workers(tx) if row.alive]
    alive = {row.service for row in rows}
    expected = background(kafka=(await get_carrier(tx)).kafka)
    missing = [name for name in expected if name not in alive]
    start = start_command(data, missing[0] if len(missing) == 1 else "NAME") if missing else ""
    failing: dict[str, list[str]] = {}
    for row in rows:
        if row.failing_since:
            failing.setdefault(row.last_error or "", []).append(row.service)
    said = [f"not alive: {', '.join(missing)}: start with `{start}`"] if missing else []
    said += [f"alive and failing: {', '.join(names)} ({error})" for error, names in failing.items()]
    return Check("workers", not said, "; ".join(said) or "all alive")


async def _lag(data: Path | None, tx: Tx) -> Check:
    behind = [each for each in await list_lag(tx) if each.state in ("behind", "down")]
    said = " ".join(f"{each.group}: {each.tell(start_command(data, each.service))}" for each in behind)
    return Check("lag", not behind, said or "nobody is behind")


async def _letters(tx: Tx) -> Check:
    parked = len(await list_dead_letters(tx, limit=1000))
    said = f"{counted(parked, 'event')} given up: look with `caravan dead-letters list`" if parked else "none"
    return Check("dead letters", not parked, said)


async def _pauses(tx: Tx) -> Check:
    """Somebody's decision, so no fault; but one that must not be forgotten."""
    paused = [f"{each.sentence} ({each.note})" for each in await list_pauses(tx)]
    return Check("pauses", True, " ".join(paused) or "nothing is paused")


async def _alerts(tx: Tx) -> list[Check]:
    """What the platform itself has noticed and is so now; one problem each."""
    found = [Check(f"alert {each.name}", False, each.said) for each in await alerts.list_open(tx)]
    if not await alerts.is_watched(tx):
        found.append(Check("alerts", False, "nobody watches: no reconciler is alive"))
    return found or [Check("alerts", True, "none")]


UNHURRIED = "set local statement_timeout = '10min'"


async def _invariants(tx: Tx, *, deep: bool) -> list[Check]:
    """One problem per invariant that doesn't hold, with its first offenders."""
    chosen = INVARIANTS if deep else SHALLOW
    await tx.execute(UNHURRIED)
    broken = await check_invariants(tx, chosen)
    return [Check(each.name, False, str(each).removeprefix(f"{each.name}: ")) for each in broken] or [
        Check("invariants", True, f"all {len(chosen)} hold")
    ]
