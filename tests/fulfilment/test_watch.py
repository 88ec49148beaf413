"""Alerts: that each rule sees its trouble, begins and ends once, and that whoever is outside is told, signed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pytest
from standardwebhooks import Webhook

from caravan.apps.subscriptions import SUBSCRIPTIONS
from caravan.db import Database
from caravan.eventlog import workers
from caravan.eventlog.subscription import register_groups
from caravan.eventlog.workers import Worker
from caravan.fulfilment import alerts, watch
from caravan.fulfilment.watch import Watch
from caravan.ids import new_id
from caravan.settings import BadSettings, Settings, load_settings
from tests.shop import SETTINGS, Shop, open_shop

SECRET = "whsec_MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIzNDU2Nzg5MDE="
HOSTS = {"purchase-worker", "allocation-worker", "session-worker", "cache-worker"}


@pytest.fixture
async def shop(db: Database) -> Shop:
    """A marketplace whose workers are all alive."""
    shop = await open_shop(db)
    async with db.transaction() as tx:
        await register_groups(tx, SUBSCRIPTIONS)
        for each in SUBSCRIPTIONS:
            await workers.enter(tx, Worker(each.service, each.group, "b", f"{each.service}@here"))
        await workers.enter(tx, Worker("reconciler", None, "b", "reconciler@here"))
    return shop


def settings(**more: Any) -> Settings:
    return SETTINGS.model_copy(update=more)


async def seen(shop: Shop) -> set[tuple[str, str]]:
    await Watch(shop.db, settings()).look()
    async with shop.db.transaction(read_only=True) as tx:
        return {(alert.name, alert.subject) for alert in await alerts.list_open(tx)}


async def older(shop: Shop, seconds: int) -> None:
    """Time goes by for what is being watched."""
    await shop.run("update alerts set began_at = began_at - make_interval(secs => %(s)s)", s=seconds)


# ------------------------------------------------------------------ the rules


async def test_where_all_is_well_nothing_is_said(shop: Shop) -> None:
    await shop.bought()
    await shop.work()
    await enter_workers(shop)
    assert await seen(shop) == set()


async def enter_workers(shop: Shop) -> None:
    async with shop.db.transaction() as tx:
        for each in SUBSCRIPTIONS:
            await workers.enter(tx, Worker(each.service, each.group, "b", f"{each.service}@here"))


async def test_money_beyond_its_leeway(shop: Shop) -> None:
    await shop.bought(sessions=30)
    assert await seen(shop) == set()  # a worker may be at it
    await shop.run("update undelivered set since = since - interval '3 minutes'")
    assert ("MONEY_OVERDUE", "PurchaseMissing") in await seen(shop)

    async with shop.db.transaction(read_only=True) as tx:
        [alert] = [each for each in await alerts.list_open(tx) if each.name == "MONEY_OVERDUE"]
    assert alert.said == "1 payment (₹3,600) without the purchase; the oldest was paid 3 min ago."
    assert (alert.facts["payments"], alert.facts["amountCents"]) == (1, {"INR": 360000})

    await shop.work()
    await enter_workers(shop)
    assert await seen(shop) == set()


async def test_money_that_waits_for_days(shop: Shop) -> None:
    await shop.run("update trainers set active = false")
    await shop.bought()
    await shop.work()
    await enter_workers(shop)
    assert await seen(shop) == set()
    await shop.run("update undelivered set reason_since = reason_since - interval '25 hours'")
    assert await seen(shop) == {("MONEY_WAITING", "NO_TRAINER_AVAILABLE")}


async def test_money_that_nobody_knows(shop: Shop) -> None:
    await shop.webhook(new_id(), cents=4200)
    assert await seen(shop) == set()
    await shop.run("update webhook_events set received_at = received_at - interval '16 minutes'")
    assert await seen(shop) == {("MONEY_UNCLAIMED", "")}


async def test_a_silent_group_is_told_of_once_it_has_been_silent_for_a_while(shop: Shop) -> None:
    await shop.run("update workers set expires_at = now() where service = 'session-worker'")
    assert await seen(shop) == set()  # it may be restarting
    await older(shop, 31)
    assert await seen(shop) == {("GROUP_SILENT", "session-scheduling-workers")}


async def test_a_group_that_restarts_is_no_alert_and_leaves_no_trace(shop: Shop) -> None:
    await shop.run("update workers set expires_at = now() where service = 'session-worker'")
    await seen(shop)
    await enter_workers(shop)
    assert await seen(shop) == set()
    assert await shop.rows("select * from alerts") == []


async def test_a_growing_lag(shop: Shop) -> None:
    await shop.bought()
    assert await seen(shop) == set()
    await shop.run("update outbox set occurred_at = occurred_at - interval '2 minutes'")
    assert await seen(shop) == {("LAG_GROWING", "purchase-creation-workers")}


async def test_a_failing_handler_is_told_of_without_its_error(shop: Shop) -> None:
    await shop.run(
        "update workers set failing_since = now() - interval '2 minutes', last_error = 'asha@example.com'"
        " where service = 'purchase-worker'"
    )
    assert await seen(shop) == {("HANDLER_FAILING", "purchase-worker")}
    [row] = await shop.rows("select said || facts::text as told from alerts")
    assert "asha" not in row["told"]


async def test_a_growing_lag_says_whose(shop: Shop) -> None:
    await shop.bought()
    await shop.run("update outbox set occurred_at = occurred_at - interval '2 minutes'")
    await seen(shop)
    [row] = await shop.rows("select said from alerts")
    assert row["said"].startswith("purchase-worker: Behind: ")


async def test_kafka_that_is_away_is_told_once_by_its_name(shop: Shop) -> None:
    """Not by each of those who wait for it: six messages at night, and none that says Kafka."""
    await shop.run(
        "update workers set failing_since = now() - interval '2 minutes', last_error = %(error)s"
        " where service in ('purchase-worker', 'session-worker')",
        error="KafkaUnavailable: Kafka: nobody answers at KAFKA_BROKER",
    )
    await shop.run(
        "update workers set failing_since = now() - interval '2 minutes', last_error = 'ValueError: x'"
        " where service = 'cache-worker'"
    )
    assert await seen(shop) == {("HANDLER_FAILING", "kafka"), ("HANDLER_FAILING", "cache-worker")}
    [row] = await shop.rows("select said from alerts where subject = 'kafka'")
    assert row["said"].startswith("Kafka has not been reached for 2 min by purchase-worker, session-worker.")
    assert row["said"].endswith('caravan failover postgres-log --note "..."')  # as one can type it


async def test_dead_letters(shop: Shop) -> None:
    await shop.run(
        """insert into dead_letters (id, consumer_group, event_id, event_type, envelope, code, error, attempts)
           values (%(id)s, 'purchase-creation-workers', %(id)s, 'PURCHASE_CONFIRMED', '{}', 'X', 'x', 3)""",
        id=new_id(),
    )
    assert await seen(shop) == {("DEAD_LETTERS", "purchase-creation-workers")}
    await shop.run("update dead_letters set status = 'discarded', resolved_at = now()")
    assert await seen(shop) == set()


async def test_an_alert_begins_once_ends_once_and_may_come_again(shop: Shop) -> None:
    watching = Watch(shop.db, settings())
    await shop.run("update workers set expires_at = now() where service = 'cache-worker'")
    assert await watching.look() == []
    await older(shop, 31)
    assert [alert.ended_at for alert in await watching.look()] == [None]
    assert await watching.look() == []  # it goes on, and has been told
    await enter_workers(shop)
    [ended] = await watching.look()
    assert ended.ended_at is not None
    assert ended.ended_at > ended.raised_at
    assert await watching.look() == []
    await shop.run("update workers set expires_at = now() where service = 'cache-worker'")
    await watching.look()
    assert len(await shop.rows("select * from alerts")) == 2


async def test_several_that_watch_tell_of_a_thing_once(shop: Shop) -> None:
    await shop.run("update workers set expires_at = now() where service = 'cache-worker'")
    await Watch(shop.db, settings()).look()
    await older(shop, 31)
    both = Watch(shop.db, settings()), Watch(shop.db, settings())
    told = await asyncio.gather(*(each.look() for each in both))
    assert sum(map(len, told)) == 1


# ------------------------------------------------------------------ telling


@dataclass(slots=True)
class Receiver:
    """A real HTTP server that keeps what it hears and answers `status`; silent where `status` is 0."""

    status: int = 204
    url: str = ""
    heard: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list[Any])
    came: asyncio.Event = field(default_factory=asyncio.Event)
    writers: list[asyncio.StreamWriter] = field(default_factory=list[Any])

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.append(writer)
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        first, *lines = head.strip().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        self.heard.append((first, headers, body))
        self.came.set()
        if self.status:
            moved = "location: http://127.0.0.1:1/\r\n" if self.status == 302 else ""
            writer.write(f"HTTP/1.1 {self.status} X\r\n{moved}content-length: 0\r\nconnection: close\r\n\r\n".encode())
            await writer.drain()
            writer.close()
            await writer.wait_closed()


@asynccontextmanager
async def receiving(status: int = 204) -> AsyncGenerator[Receiver]:
    receiver = Receiver(status)
    server = await asyncio.start_server(receiver.answer, "127.0.0.1", 0)
    receiver.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/hook?key=hunter2"
    yield receiver
    server.close()
    for writer in receiver.writers:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


def told(receiver: Receiver) -> list[dict[str, Any]]:
    """The documents, each with a good signature."""
    return [Webhook(SECRET).verify(body, headers) for _first, headers, body in receiver.heard]


def telling(shop: Shop, receiver: Receiver) -> Watch:
    return Watch(shop.db, settings(alert_webhook_url=receiver.url, alert_webhook_secret=SECRET))


async def test_begin_and_end_are_posted_signed_once_each(shop: Shop) -> None:
    async with receiving() as receiver:
        watching = telling(shop, receiver)
        await shop.run("update workers set expires_at = now() where service = 'cache-worker'")
        await watching.look()
        await older(shop, 31)
        await watching.look()
        assert await watching.send() == 1
        await enter_workers(shop)
        await watching.look()
        assert await watching.send() == 1
        assert await watching.send() == 0
    began, ended = told(receiver)
    assert (began["type"], ended["type"]) == ("alert.began", "alert.ended")
    assert began["data"]["id"] == ended["data"]["id"]
    assert (began["data"]["name"], began["data"]["subject"]) == ("GROUP_SILENT", "cache-invalidation-workers")
    assert began["data"]["endedAt"] is None
    assert ended["data"]["endedAt"] > began["data"]["beganAt"]


@pytest.mark.parametrize("status", [500, 302, 404])
async def test_what_fails_is_told_again_the_same_later_and_later(shop: Shop, status: int) -> None:
    async with receiving(status) as receiver:
        watching = telling(shop, receiver)
        await shop.bought()
        await shop.run("update undelivered set since = since - interval '3 minutes'")
        await watching.look()
        assert await watching.send() == 0
        assert await watching.send() == 0  # not due yet
        assert len(receiver.heard) == 1
        [row] = await shop.rows(
            "select attempts, last_error, due_at > now() + interval '4 s' as later from alert_notices"
        )
        assert (row["attempts"], row["last_error"], row["later"]) == (1, f"the receiver answered {status}", True)
        await shop.run("update alert_notices set due_at = now()")
        receiver.status = 200
        assert await watching.send() == 1
    first, again = told(receiver)
    assert first == again
    assert receiver.heard[0][1]["webhook-id"] == receiver.heard[1][1]["webhook-id"]


async def test_a_receiver_that_says_nothing_holds_nothing_up(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "ANSWER_SECONDS_MAX", 0.2)
    async with receiving(status=0) as receiver:
        watching = telling(shop, receiver)
        await shop.bought()
        await shop.run("update undelivered set since = since - interval '3 minutes'")
        await watching.look()
        assert await watching.send() == 0
        assert await watching.look() == []


async def test_nothing_of_a_person_leaves_the_house(shop: Shop) -> None:
    async with receiving() as receiver:
        watching = telling(shop, receiver)
        payment = await shop.bought()
        await shop.run("update undelivered set since = since - interval '3 minutes'")
        await shop.run(
            "update workers set failing_since = now() - interval '5 minutes', last_error = 'Asha 9876543210'"
            " where service = 'purchase-worker'"
        )
        await watching.look()
        assert await watching.send() == 2
    for document in told(receiver):
        text = json.dumps(document)
        for secret in ("Asha", "9876543210", str(payment), str(shop.student)):
            assert secret not in text


async def test_without_an_address_no_message_is_kept(shop: Shop) -> None:
    await shop.bought()
    await shop.run("update undelivered set since = since - interval '3 minutes'")
    assert await Watch(shop.db, settings()).look()
    assert await shop.rows("select * from alert_notices") == []


# ------------------------------------------------------------------ living


async def test_the_dead_mans_signal_goes_out_while_watching_works(shop: Shop) -> None:
    async with receiving(200) as receiver:
        watching = Watch(shop.db, settings(heartbeat_url=receiver.url))
        assert await watching.beat() == "the alerts could not be looked at"
        assert receiver.heard == []
        await watching.look()
        assert await watching.beat() is None
        assert receiver.heard[0][0].startswith("GET /hook?key=hunter2 ")


async def test_it_goes_out_from_the_first_look_on(shop: Shop) -> None:
    async with receiving(200) as receiver:
        stop = asyncio.Event()
        running = asyncio.create_task(Watch(shop.db, settings(heartbeat_url=receiver.url)).run(stop))
        async with asyncio.timeout(10):
            await receiver.came.wait()
        stop.set()
        await running


async def test_it_is_withheld_where_the_reconciler_hangs(shop: Shop) -> None:
    async with receiving(200) as receiver:
        watching = Watch(shop.db, settings(heartbeat_url=receiver.url))
        await shop.run("update workers set progress_at = now() - interval '10 minutes' where service = 'reconciler'")
        await watching.look()
        assert await watching.beat() == "the reconciler does not turn"
        assert receiver.heard == []


async def test_it_is_withheld_where_alerts_cannot_be_told(shop: Shop) -> None:
    async with receiving(500) as receiver:
        watching = Watch(
            shop.db,
            settings(heartbeat_url=receiver.url, alert_webhook_url=receiver.url, alert_webhook_secret=SECRET),
        )
        await shop.bought()
        await shop.run("update undelivered set since = since - interval '3 minutes'")
        await watching.look()
        await watching.send()
        await shop.run("update alert_notices set created_at = created_at - interval '11 minutes'")
        assert await watching.beat() == "1 alert messages could not be delivered"


async def test_it_runs_until_told_to_stop_and_stops_in_the_middle_of_a_call(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "SEND_SECONDS", 0.02)
    async with receiving(status=0) as receiver:
        stop = asyncio.Event()
        await shop.bought()
        await shop.run("update undelivered set since = since - interval '3 minutes'")
        running = asyncio.create_task(telling(shop, receiver).run(stop))
        async with asyncio.timeout(10):
            await receiver.came.wait()
            stop.set()
            started = datetime.now(UTC)
            await running
    assert (datetime.now(UTC) - started).total_seconds() < 2


# ------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"CARAVAN_ALERT_WEBHOOK_URL": "https://a.example"}, "CARAVAN_ALERT_WEBHOOK_SECRET: set both"),
        ({"CARAVAN_ALERT_WEBHOOK_SECRET": SECRET}, "CARAVAN_ALERT_WEBHOOK_URL: set both"),
        ({"CARAVAN_ALERT_WEBHOOK_URL": "ftp://hunter2"}, "CARAVAN_ALERT_WEBHOOK_URL: must be an address"),
        ({"CARAVAN_HEARTBEAT_URL": "https://[hunter2"}, "CARAVAN_HEARTBEAT_URL: must be an address"),
        ({"CARAVAN_ALERT_WEBHOOK_SECRET": "hunter2"}, "CARAVAN_ALERT_WEBHOOK_SECRET: must be whsec_"),
    ],
)
def test_bad_settings_are_one_line_without_the_secret(environ: dict[str, str], said: str) -> None:
    with pytest.raises(BadSettings) as refused:
        load_settings(environ)
    assert said in str(refused.value)
    assert "hunter2" not in str(refused.value)
    assert SECRET not in str(refused.value)
