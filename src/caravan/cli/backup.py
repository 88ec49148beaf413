"""Backup, restore, and refill from the providers' records."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Generator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import psycopg
import psycopg_pool

from caravan import telemetry
from caravan.cli.database import actor
from caravan.cli.database import run as on_database
from caravan.cli.options import FINE, FOUND_PROBLEMS, database_settings, fail, settings_of
from caravan.cli.output import show
from caravan.db import Database, Tx, dump
from caravan.db.embedded import EmbeddedPostgres
from caravan.db.migrate import migrate
from caravan.errors import DomainError
from caravan.eventlog.rebase import rebase_if_moved
from caravan.payments.books import Books
from caravan.payments.model import SANDBOX
from caravan.payments.providers import Provider, SandboxProvider, list_providers
from caravan.payments.refill import Refilled, refill
from caravan.settings import Settings
from caravan.web import audit

SOURCE = "caravan-cli"


def backup(data: Path | None, file: Path, *, as_json: bool) -> int:
    settings = database_settings(data)
    url = settings.postgres_direct_url or settings.postgres_url
    assert url is not None
    with _one_line():
        size = dump.backup(url, file)
    said = f"{file}: {size / 1e6:.1f} MB, the whole database as of now. It holds personal data: keep it as such."
    show({"file": file.absolute(), "bytes": size}, as_json=as_json, text=said)
    return FINE


def restore(data: Path | None, file: Path, note: str, *, replace: bool, since: datetime | None, as_json: bool) -> int:
    settings = settings_of(data)
    telemetry.configure_logging(json=settings.log_json, stream=sys.stderr, level="WARNING")
    audit.use_build(settings.build)
    if not file.is_file():
        fail(f"There is no file {file}.")
    with _one_line(), _database(settings) as url:
        dump.restore(url, file, replace=replace)
        applied, filled = asyncio.run(_bring_up_to_date(url, settings, file, note, since))
    said = f"Restored {file}. {filled.sentence}"
    if filled.unclaimed:
        said += " Look at the unclaimed money in the console's overview."
    show({"file": file.absolute(), "applied": applied, "refilled": filled}, as_json=as_json, text=said)
    return FOUND_PROBLEMS if filled.unclaimed or not filled.asked else FINE


@contextmanager
def _database(settings: Settings) -> Generator[str]:
    """POSTGRES_URL's, or the data folder's own, started for as long as this takes: nobody else may run on it."""
    if settings.postgres_url is not None:
        yield settings.postgres_direct_url or settings.postgres_url
        return
    embedded = EmbeddedPostgres(settings.data_dir)
    try:
        yield embedded.start()
    finally:
        embedded.stop()


async def _bring_up_to_date(
    url: str, settings: Settings, file: Path, note: str, since: datetime | None
) -> tuple[list[str], Refilled]:
    """This release's schema, this cluster's transaction ids, and the money that came after the backup."""
    applied = await migrate(url)
    async with Database(url, max_connections=2) as db:
        await rebase_if_moved(db)
        filled = await refill(db, _providers(settings), since)

        async def record(tx: Tx) -> None:
            after = {"captured": filled.captured, "refunded": filled.refunded, "remade": filled.remade}
            await audit.record(
                tx,
                actor(),
                action="restore",
                subject_type="database",
                subject_id=file.name,
                note=note,
                after=after | {"unclaimed": filled.unclaimed, "since": filled.since},
            )

        await db.transact(record, SOURCE)
    return applied, filled


def fill_again(data: Path | None, note: str, *, since: datetime | None, as_json: bool) -> int:
    async def work(db: Database, settings: Settings) -> Refilled:
        filled = await refill(db, _providers(settings), since)
        if filled.captured or filled.refunded or filled.unclaimed:

            async def record(tx: Tx) -> None:
                after = {"captured": filled.captured, "refunded": filled.refunded, "remade": filled.remade}
                await audit.record(
                    tx,
                    actor(),
                    action="refill",
                    subject_type="database",
                    subject_id="payments",
                    note=note,
                    after=after | {"unclaimed": filled.unclaimed, "since": filled.since},
                )

            await db.transact(record, SOURCE)
        return filled

    filled = on_database(data, work)
    show({"refilled": filled}, as_json=as_json, text=filled.sentence)
    return FOUND_PROBLEMS if filled.unclaimed or not filled.asked else FINE


def _providers(settings: Settings) -> dict[str, Provider]:
    """Those that keep records: the settings', and the sandbox of `caravan up`, with its books in the data folder."""
    found = list_providers(settings)
    books = settings.sandbox_books or settings.data_dir / "sandbox-books.jsonl"
    if books.exists():
        # Nothing is signed here: the books are the sandbox's own.
        found[SANDBOX] = SandboxProvider([settings.sandbox_webhook_secret or _UNUSED], Books(books))
    return {name: provider for name, provider in found.items() if provider.keeps_records}


_UNUSED = "whsec_" + "A" * 32


@contextmanager
def _one_line() -> Generator[None]:
    try:
        yield
    except DomainError as error:
        fail(str(error), error.problem_code)
    except (psycopg.OperationalError, psycopg_pool.PoolTimeout) as error:
        fail(f"The database does not answer: {(str(error).strip().splitlines() or [''])[0]}")
