"""Alerts and the state of the workers, as an operator reads them: on every page, in the API, in sentences."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import datetime

import httpx2
import pytest

from caravan.admin import event_log, pages, routes
from caravan.apps.subscriptions import BY_GROUP
from caravan.cli.options import FOUND_PROBLEMS
from caravan.db import Database
from caravan.eventlog import carrier, workers
from caravan.eventlog.carrier import Carrier
from caravan.eventlog.workers import Worker
from caravan.fulfilment.watch import Watch
from caravan.web.auth import Actor, Role
from tests.admin.test_pages import Console, a_console, text_of
from tests.apps.running import caravan
from tests.clients import an_account, bearer, client_of, make_app
from tests.shop import SETTINGS

EVERY_PAGE = ("", "/waiting", "/purchases", "/dead-letters", "/workers", "/alerts")
OVERDUE = "1 payment (₹3,600) without the purchase; the oldest was paid 3 min ago."


@pytest.fixture
async def client(db: Database) -> AsyncIterator[httpx2.AsyncClient]:
    app = make_app(db, routes.router, pages.router, settings=SETTINGS)
    app.state.subscriptions = BY_GROUP
    async with client_of(app) as client:
        yield client


@pytest.fixture
async def console(db: Database, client: httpx2.AsyncClient) -> Console:
    console = await a_console(db, client, Role.ADMIN)
    async with db.transaction() as tx:
        await workers.enter(tx, Worker("reconciler", None, "b", "reconciler@here"))
    return console


async def overdue(console: Console) -> None:
    await console.shop.bought()
    await console.shop.run("update undelivered set since = since - interval '3 minutes'")
    await Watch(console.shop.db, SETTINGS).look()


@pytest.mark.parametrize("path", EVERY_PAGE)
async def test_every_page_says_what_is_not_well(console: Console, path: str) -> None:
    assert "Critical:" not in text_of(await console.page(path))
    await overdue(console)
    page = await console.page(path)
    assert f"Critical: {OVERDUE}" in text_of(page)
    assert 'href="/admin/waiting">Look</a>' in page


async def test_the_purchases_page_has_the_banner_too(console: Console) -> None:
    await overdue(console)
    [row] = await console.shop.rows("select payment_id from undelivered")
    assert OVERDUE in text_of(await console.page(f"/purchases/{row['payment_id']}"))


async def test_what_is_over_stays_in_the_list_and_leaves_the_banner(console: Console) -> None:
    assert "None: all is as it should be." in text_of(await console.page("/alerts"))
    await overdue(console)
    await console.shop.work()
    await Watch(console.shop.db, SETTINGS).look()
    page = text_of(await console.page("/alerts"))
    assert "Critical:" not in page
    assert f"{OVERDUE} MONEY_OVERDUE" in page
    assert OVERDUE not in text_of(await console.page("/workers"))


async def test_that_nobody_watches_is_an_alert_itself(console: Console) -> None:
    await console.shop.run("update workers set expires_at = now() where service = 'reconciler'")
    assert "Nobody watches: no reconciler is alive" in text_of(await console.page("/purchases"))
    assert "Unknown: nobody watches." in text_of(await console.page("/alerts"))


async def test_the_api_has_them_for_staff_only(console: Console, client: httpx2.AsyncClient, db: Database) -> None:
    await overdue(console)
    staff = await bearer(db, await an_account(db, "ravi@example.com", Role.SUPPORT))
    [item] = (await client.get("/api/v1/admin/alerts", headers=staff)).json()["items"]
    assert (item["name"], item["subject"], item["severity"]) == ("MONEY_OVERDUE", "PurchaseMissing", "critical")
    assert (item["said"], item["endedAt"]) == (OVERDUE, None)
    await console.shop.work()
    await Watch(db, SETTINGS).look()
    assert (await client.get("/api/v1/admin/alerts", headers=staff)).json()["items"] == []
    [item] = (await client.get("/api/v1/admin/alerts?state=all", headers=staff)).json()["items"]
    assert item["endedAt"] is not None
    family = await bearer(db, await an_account(db, "family@example.com", Role.STUDENT))
    assert (await client.get("/api/v1/admin/alerts", headers=family)).status_code == 403


async def test_workers_and_services_without_any_are_told_in_sentences(
    console: Console, client: httpx2.AsyncClient, db: Database
) -> None:
    await console.shop.work()
    async with db.transaction() as tx:
        await workers.enter(tx, Worker("cache-worker", "cache-invalidation-workers", "b", "cache-worker@here"))
    await console.shop.bought()
    staff = await bearer(db, await an_account(db, "ravi@example.com", Role.SUPPORT))
    told = (await client.get("/api/v1/admin/workers", headers=staff)).json()
    sentences = {item["service"]: item["sentence"] for item in told["items"]}
    assert sentences["cache-worker"] == "Idle: nothing waiting."
    assert sentences["reconciler"].startswith("Idle: it last came round ")
    missing = {item["service"]: item["state"] for item in told["missing"]}
    assert missing == {"purchase-worker": "down", "allocation-worker": "unknown", "session-worker": "unknown"}
    groups = (await client.get("/api/v1/admin/lag", headers=staff)).json()["items"]
    lag = {item["group"]: item["state"] for item in groups}
    assert lag["purchase-creation-workers"] == "down"
    assert lag["cache-invalidation-workers"] == "idle"
    page = text_of(await console.page("/workers"))
    assert "cache-worker@here : Idle: nothing waiting." in page
    assert "purchase-worker : Down? 1 event waits and no purchase-worker is alive" in page
    assert "session-worker : Unknown: nothing waits, and no session-worker is alive to say so." in page


async def test_that_the_workers_do_without_kafka_is_told_until_they_are_back(
    console: Console, client: httpx2.AsyncClient, db: Database
) -> None:
    staff = await bearer(db, await an_account(db, "ravi@example.com", Role.SUPPORT))
    actor = Actor.system("ops@example.com")

    async def told() -> tuple[str | None, bool]:
        since = (await client.get("/api/v1/admin/lag", headers=staff)).json()["failedOverSince"]
        return since, "Failed over since" in text_of(await console.page("/workers"))

    async with db.transaction() as tx:
        await carrier.register_relay(tx)
    assert await told() == (None, False)
    async with db.transaction() as tx:
        now = tx.now
        assert await event_log.fail_over(tx, actor, Carrier.POSTGRES_LOG, "Kafka's disk is full")
    since, shown = await told()
    assert (datetime.fromisoformat(since or ""), shown) == (now, True)
    assert "caravan failover kafka" in text_of(await console.page("/workers"))
    async with db.transaction() as tx:
        assert await event_log.fail_over(tx, actor, Carrier.KAFKA, "it is back")
    assert await told() == (None, False)


async def test_the_doctor_lists_an_alert(console: Console, database_url: str) -> None:
    await overdue(console)
    ran = await asyncio.to_thread(caravan, "doctor", "--json", POSTGRES_URL=database_url)
    checks = {check["name"]: check for check in json.loads(ran.stdout)["checks"]}
    assert ran.returncode == FOUND_PROBLEMS
    assert (checks["alert MONEY_OVERDUE"]["ok"], checks["alert MONEY_OVERDUE"]["said"]) == (False, OVERDUE)
    assert "alerts" not in checks  # somebody watches
