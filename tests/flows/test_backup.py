"""The drill: a backup, more is paid, the database is lost; restored and refilled, everything that was paid is delivered
exactly once."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

import tests.shop
from caravan.db import Database, dump
from caravan.db.dump import BackupFailed, DatabaseInUse, DatabaseNotEmpty, RestoreFailed
from caravan.db.embedded import EmbeddedPostgres
from caravan.payments.providers import Provider, ProviderRecord, SandboxProvider
from caravan.payments.refill import refill
from caravan.payments.refunds import refund_by_operator
from caravan.realtime.feed import Ask, read_feeds
from caravan.settings import Settings
from tests.apps.running import caravan
from tests.shop import SETTINGS, Shop, list_providers, open_shop

SINCE_EVER = datetime(2020, 1, 1, tzinfo=UTC)
HOURS = ("6:00 AM", "8:00 AM", "10:00 AM", "12:00 PM", "2:00 PM", "4:00 PM", "6:00 PM", "8:00 PM")


@pytest.fixture
def books(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The sandbox remembers, outside of every database."""
    path = tmp_path / "books.jsonl"
    settings: Settings = SETTINGS.model_copy(update={"sandbox_books": path})
    monkeypatch.setattr(tests.shop, "PROVIDERS", list_providers(settings))
    monkeypatch.setattr(tests.shop, "SANDBOX_PROVIDER", list_providers(settings)["sandbox"])
    return path


@pytest.fixture
async def shop(db: Database, books: Path) -> Shop:
    return await open_shop(db, trainers=3)


@pytest.fixture
async def folder(data_dir: Path) -> AsyncIterator[Path]:
    yield data_dir
    await asyncio.to_thread(EmbeddedPostgres(data_dir).stop)


async def command(*words: object, **environ: object) -> dict[str, Any]:
    env = {name: str(value) for name, value in environ.items()}
    done = await asyncio.to_thread(caravan, *words, "--json", **env)
    assert done.returncode == 0, f"{done.returncode}: {done.stdout} {done.stderr}"
    return json.loads(done.stdout)


@asynccontextmanager
async def opened(folder: Path) -> AsyncGenerator[Database]:
    """The database of a data folder, as long as this lasts."""
    embedded = EmbeddedPostgres(folder)
    url = await asyncio.to_thread(embedded.start)
    try:
        async with Database(url) as db:
            yield db
    finally:
        await asyncio.to_thread(embedded.stop)


async def test_five_before_the_backup_three_after_it_all_eight_are_delivered(
    shop: Shop, books: Path, folder: Path, tmp_path: Path
) -> None:
    paid = [await shop.bought(slot=hour, sessions=10) for hour in HOURS[:5]]
    asked = await shop.buy(slot=HOURS[5], sessions=10)  # its checkout is in the backup, its money is not
    await shop.work()
    file = tmp_path / "caravan.backup"
    made = await command("backup", file, POSTGRES_URL=shop.db.url)
    assert (made["bytes"] == file.stat().st_size, file.stat().st_mode & 0o777) == (True, 0o600)
    await shop.pay(asked)
    paid += [asked, *[await shop.bought(slot=hour, sessions=10) for hour in HOURS[6:]]]
    refunded = paid.pop()
    async with shop.db.transaction("payment-service") as tx:
        await refund_by_operator(
            tx, tests.shop.PROVIDERS, refunded, amount_cents=None, sessions=None, note="after the backup"
        )
    paid.append(await shop.bought(slot="10:00 PM", sessions=10))
    await shop.work()
    seen = len(await shop.feed())

    # The database is lost: what there is is another cluster, the backup, and the provider's own books.
    told = await command("restore", file, "--note", "the disk is gone", "--data", folder, CARAVAN_SANDBOX_BOOKS=books)
    filled = told["refilled"]
    assert (filled["captured"], filled["remade"], filled["refunded"], filled["unclaimed"]) == (4, 3, 1, 0)
    async with opened(folder) as db:
        again = Shop(db, shop.student, shop.course, shop.trainers)
        await again.work()
        for payment in paid:
            assert (await again.why(payment)).stage == "scheduled"
        assert (await again.why(refunded)).stage == "refunded"
        delivered = "select payment_id from student_course_purchases where is_active"
        assert len(await again.rows(delivered)) == 8
        assert await again.violations() == []
        [row] = await again.rows("select action, note from audit_log")
        assert (row["action"], row["note"]) == ("restore", "the disk is gone")
        # Once more changes nothing.
        filled_again = await refill(db, tests.shop.PROVIDERS)
        assert (filled_again.captured, filled_again.remade, filled_again.refunded) == (0, 0, 0)
        await again.work()
        assert await again.violations() == []
        # A screen that has heard more than there is now is told to look anew.
        [answer] = await read_feeds(db, [Ask(shop.student, seen + 100, 10)])
        assert answer.resync
        assert answer.head == len(await again.feed())


async def test_what_nobody_knows_is_unclaimed_money(shop: Shop) -> None:
    """A webhook of a payment that we never asked for: there are no terms to make it again from."""
    await shop.webhook(UUID(int=7))
    await shop.run("delete from webhook_events")  # as after the restore
    filled = await refill(shop.db, tests.shop.PROVIDERS)
    assert (filled.captured, filled.unclaimed) == (0, 1)


async def test_money_that_was_chosen_in_time_is_asked_for_its_start(shop: Shop) -> None:
    """It came in time, and we hear of it so late that its start has passed: nobody moves it in silence."""
    payment = await shop.bought(sessions=10)
    await shop.run("delete from outbox")
    await shop.run("delete from student_feed")
    await shop.run("delete from undelivered")
    await shop.run("delete from webhook_events")
    await shop.run("update checkouts set paid_by = null, start_date = current_date - 1")
    await shop.run(
        """update payments set status = 'created', captured_at = null, captured_cents = null, captured_currency = null,
             created_at = created_at - interval '9 days'"""
    )
    [provider] = tests.shop.PROVIDERS.values()
    filled = await refill(shop.db, {"sandbox": _Earlier(provider)}, SINCE_EVER)
    assert filled.captured == 1
    await shop.work()
    finding = await shop.why(payment)
    assert (finding.stage, finding.reason) == ("purchased", "START_PASSED")


class _Earlier(SandboxProvider):
    """A provider that says of everything that it was eight days earlier."""

    def __init__(self, provider: Provider) -> None:
        self._provider = provider

    def list_records(self, since: datetime) -> Iterator[ProviderRecord]:
        for record in self._provider.list_records(since):
            event = dataclasses.replace(record.event, sent_at=record.event.sent_at - timedelta(days=8))
            yield dataclasses.replace(record, event=event)


async def test_a_restore_where_no_provider_can_be_asked_does_not_end_well(
    shop: Shop, folder: Path, tmp_path: Path
) -> None:
    """Nothing was brought, for nobody was asked: that is no `0 captured payments` with exit code 0."""
    file = tmp_path / "caravan.backup"
    await asyncio.to_thread(dump.backup, shop.db.url, file)
    secret = "whsec_" + "A" * 32
    done = await asyncio.to_thread(
        caravan, "restore", file, "--note", "x", "--data", folder, CARAVAN_SANDBOX_WEBHOOK_SECRET=secret
    )
    assert done.returncode == 6, done.stderr
    assert "No payment provider was asked" in done.stdout
    assert "CARAVAN_SANDBOX_BOOKS" in done.stdout
    assert "caravan refill" in done.stdout


async def test_a_restore_is_all_or_nothing(shop: Shop, tmp_path: Path) -> None:
    payment = await shop.bought(sessions=10)
    file = tmp_path / "caravan.backup"
    await asyncio.to_thread(dump.backup, shop.db.url, file)
    with pytest.raises(BackupFailed, match="a file"):
        await asyncio.to_thread(dump.backup, shop.db.url, file)
    with pytest.raises(DatabaseInUse):
        await asyncio.to_thread(dump.restore, shop.db.url, file, replace=True)
    await shop.run("update students set name = 'after the backup'")
    await shop.db.close()
    with pytest.raises(DatabaseNotEmpty):
        await asyncio.to_thread(dump.restore, shop.db.url, file, replace=False)
    torn = tmp_path / "torn.backup"
    torn.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(RestoreFailed, match="cut off"):
        await asyncio.to_thread(dump.restore, shop.db.url, torn, replace=True)
    with pytest.raises(RestoreFailed, match="no whole backup"):
        await asyncio.to_thread(dump.restore, shop.db.url, Path(__file__), replace=True)
    async with Database(shop.db.url) as db, db.transaction(read_only=True) as tx:  # as it was
        assert await tx.value("select name from students") == "after the backup"
    await asyncio.to_thread(dump.restore, shop.db.url, file, replace=True)
    async with Database(shop.db.url) as db:
        again = Shop(db, shop.student, shop.course, shop.trainers)
        assert [row["name"] for row in await again.rows("select name from students")] == ["Asha"]
        await again.work()
        assert (await again.why(payment)).stage == "scheduled"
        assert await again.violations() == []
