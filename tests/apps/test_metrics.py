"""The figures: that they are true, that their names are those of docs/metrics.md, and that asking costs nobody."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from caravan.apps import metrics as platform_metrics
from caravan.apps.subscriptions import SUBSCRIPTIONS
from caravan.apps.web import create_app
from caravan.db import Database
from caravan.db.wake import Wake
from caravan.eventlog.subscription import register_groups
from caravan.fulfilment.watch import Watch
from caravan.ids import new_id
from caravan.settings import load_settings
from caravan.telemetry import metrics as counted
from tests.clients import client_of
from tests.shop import SETTINGS, Shop, open_shop

DOCUMENT = Path(__file__).parents[2] / "docs" / "metrics.md"


@dataclass(slots=True)
class Watched:
    shop: Shop
    client: httpx2.AsyncClient
    metrics: platform_metrics.Metrics

    async def scrape(self, *, fresh: bool = True) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        """Every sample by name and sorted labels."""
        if fresh:
            self.metrics._kept_until = 0.0
        answer = await self.client.get("/metrics")
        assert answer.status_code == 200
        return {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(answer.text)
            for sample in family.samples
        }


@pytest.fixture
async def watched(db: Database, database_url: str) -> AsyncIterator[Watched]:
    app = create_app(SETTINGS, db, Wake(database_url))
    await db.transact(lambda tx: register_groups(tx, SUBSCRIPTIONS))
    async with client_of(app) as client:
        yield Watched(await open_shop(db), client, app.state.metrics)


def value(samples: dict[Any, float], name: str, **labels: str) -> float:
    return samples[name, tuple(sorted(labels.items()))]


# ------------------------------------------------------------------ names


def documented() -> dict[str, tuple[str, ...]]:
    """Names and labels of the document's table."""
    rows = re.findall(r"^\| `(caravan_\w+)` \| (\w+) \| ([^|]*) \|", DOCUMENT.read_text(), re.MULTILINE)
    assert len(rows) == len({name for name, _kind, _labels in rows})
    return {name: (kind, *sorted(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}


def exported() -> dict[str, tuple[str, ...]]:
    """What the code can export; a counter by the name that queries use."""
    found = {
        figure.name: (figure.kind, *sorted(figure.labels))
        for figure in (*platform_metrics.PLATFORM, *platform_metrics.PROCESS)
    }
    collectors: list[Any] = list(counted.REGISTRY._collector_to_names)
    for collector in collectors:
        [family] = list(collector.describe())
        name = family.name + ("_total" if family.type == "counter" else "")
        found[name] = (family.type, *sorted(getattr(collector, "_labelnames", ())))
    return found


def test_the_document_names_exactly_what_is_exported() -> None:
    assert documented() == exported()


def test_names_follow_the_conventions_of_prometheus() -> None:
    for name, (kind, *labels) in exported().items():
        assert re.fullmatch(r"caravan(_[a-z]+)+", name)
        assert (kind == "counter") == name.endswith("_total")
        assert not {"id", "student", "payment", "path", "email"} & set(labels)


# ------------------------------------------------------------------ values


async def test_undelivered_money_by_stage_reason_and_currency(watched: Watched) -> None:
    await watched.shop.bought(sessions=30)
    samples = await watched.scrape()
    assert value(samples, "caravan_undelivered_payments", reason="none", currency="INR") == 1
    assert value(samples, "caravan_undelivered_cents", reason="none", currency="INR") == 360000
    assert value(samples, "caravan_stage_payments", stage="paid") == 1
    assert value(samples, "caravan_lag_messages", group="purchase-creation-workers") == 1
    assert value(samples, "caravan_workers_alive", group="purchase-creation-workers") == 0
    assert value(samples, "caravan_outbox_oldest_seconds") > 0

    await watched.shop.run("update trainers set active = false")
    await watched.shop.work()
    samples = await watched.scrape()
    assert value(samples, "caravan_undelivered_payments", reason="NO_TRAINER_AVAILABLE", currency="INR") == 1
    assert value(samples, "caravan_stage_payments", stage="purchased") == 1
    assert value(samples, "caravan_stage_oldest_seconds", stage="purchased") > 0
    assert value(samples, "caravan_lag_messages", group="purchase-creation-workers") == 0
    assert value(samples, "caravan_outbox_oldest_seconds") == 0
    assert value(samples, "caravan_log_oldest_seconds") > 0


async def test_overdue_and_unclaimed_money_and_dead_letters(watched: Watched) -> None:
    payment = await watched.shop.bought()
    await watched.shop.run("update undelivered set since = since - interval '1 minute'")
    await watched.shop.webhook(new_id(), cents=4200)
    await watched.shop.run("update webhook_events set received_at = received_at - interval '1 hour'")
    await watched.shop.run(
        """insert into dead_letters (id, consumer_group, event_id, event_type, envelope, code, error, attempts)
           values (%(id)s, 'purchase-creation-workers', %(id)s, 'PURCHASE_CONFIRMED', '{}', 'X', 'x', 3)""",
        id=payment,
    )
    await Watch(watched.shop.db, SETTINGS).look()
    samples = await watched.scrape()
    assert value(samples, "caravan_alerts", alert="DEAD_LETTERS", severity="critical") == 1
    assert value(samples, "caravan_overdue_payments", gap="PurchaseMissing") == 1
    assert value(samples, "caravan_overdue_payments", gap="SessionsMissing") == 0
    assert value(samples, "caravan_unclaimed_payments", currency="INR") == 1
    assert value(samples, "caravan_unclaimed_cents", currency="INR") == 4200
    assert value(samples, "caravan_dead_letters", group="purchase-creation-workers") == 1
    assert value(samples, "caravan_dead_letters", group="trainer-allocation-workers") == 0


async def test_what_the_handlers_did_and_where_they_failed(watched: Watched) -> None:
    before = await watched.scrape()
    group = {"group": "purchase-creation-workers"}
    await watched.shop.bought()
    await watched.shop.work()
    after = await watched.scrape()

    def grown(name: str, **labels: str) -> float:
        return value(after, name, **labels) - before.get((name, tuple(sorted(labels.items()))), 0)

    assert grown("caravan_handler_events_total", **group) == 1
    assert grown("caravan_handler_batch_duration_seconds_count", **group) == 1


async def test_requests_are_counted_by_route_never_by_address(watched: Watched) -> None:
    secret = new_id()
    await watched.client.get(f"/api/v1/payments/{secret}")
    await watched.client.get(f"/nowhere/{secret}")
    await watched.client.request("BREW", "/login")
    samples = await watched.scrape()
    name = "caravan_http_request_duration_seconds_count"
    assert value(samples, name, method="GET", route="/api/v1/payments/{payment_id}", status="401") >= 1
    assert value(samples, name, method="GET", route="unmatched", status="404") >= 1
    assert any(("method", "OTHER") in labels for _name, labels in samples)
    assert not any(str(secret) in text for _name, labels in samples for pair in labels for text in pair)


async def test_the_pool_and_the_build(watched: Watched) -> None:
    samples = await watched.scrape()
    assert value(samples, "caravan_pool_connections_max", process="web") == 8
    assert value(samples, "caravan_pool_connections", process="web", state="idle") >= 1
    assert value(samples, "caravan_build_info", process="web", build=SETTINGS.build) == 1
    assert value(samples, "caravan_sockets_connected", process="web") == 0


# ------------------------------------------------------------------ asking is cheap, and survives


async def test_the_database_is_asked_once_however_often_somebody_scrapes(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    real = platform_metrics.read_platform

    async def counting(*given: Any) -> Any:
        asked.append(given)
        return await real(*given)

    monkeypatch.setattr(platform_metrics, "read_platform", counting)
    for _ in range(5):
        await watched.scrape(fresh=False)
    assert len(asked) == 1


async def test_without_the_database_a_process_still_tells_its_own_figures() -> None:
    away = Database("postgresql://nobody@127.0.0.1:1/none", max_connections=1)
    async with away:
        app = create_app(load_settings({}), away, Wake(away.url))
        async with client_of(app) as client:
            answer = await client.get("/metrics")
    assert answer.status_code == 200
    assert 'caravan_database_up{process="web"} 0.0' in answer.text
    assert "caravan_lag_messages{" not in answer.text
    assert 'caravan_pool_connections_max{process="web"} 1.0' in answer.text


async def test_figures_of_other_processes_stand_beside_the_own(watched: Watched) -> None:
    async def others() -> platform_metrics.Families:
        return [
            {
                "name": "caravan_handler_events",
                "kind": "counter",
                "help": "h",
                "samples": [["caravan_handler_events_total", {"group": "g"}, 7]],
            }
        ]

    watched.metrics.others = others
    samples = await watched.scrape()
    assert value(samples, "caravan_handler_events_total", group="g") == 7
