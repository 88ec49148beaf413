"""What operators are told where there is a Kafka, and where there should be one."""

from __future__ import annotations

import pytest

from caravan.db import Database
from caravan.eventlog import carrier
from caravan.eventlog.lag import list_lag
from tests.apps.running import caravan
from tests.conformance.conftest import kafka
from tests.fulfilment import world
from tests.fulfilment.test_diagnose import says, the_finding

__all__ = ["kafka"]

PASS = """
update log_cursors set window_start = pg_current_snapshot() where consumer_group = 'outbox-relay'
"""


async def test_an_event_that_is_not_in_kafka_yet(db: Database) -> None:
    road = await world.a_payment(db)
    await world.said(db, road, "PURCHASE_CONFIRMED")
    await world.a_worker(db, "PURCHASE_CONFIRMED")
    assert (await the_finding(db, road)).reason == "WORKER_BEHIND"
    async with db.transaction() as tx:
        await carrier.register_relay(tx)
        lag = {each.group: each for each in await list_lag(tx)}["outbox-relay"]
    assert (lag.messages, lag.state) == (1, "down")
    finding = await the_finding(db, road)
    assert finding.reason == "EVENT_NOT_RELAYED"
    assert says(finding, "not in Kafka yet", "caravan serve outbox-relay")
    assert finding.action
    assert "caravan failover postgres-log" in (finding.action.hint or "")
    async with db.transaction() as tx:
        await tx.execute(PASS)
    assert (await the_finding(db, road)).reason == "WORKER_BEHIND"


async def test_failed_over_nobody_waits_for_the_relay(db: Database) -> None:
    road = await world.a_payment(db)
    await world.said(db, road, "PURCHASE_CONFIRMED")
    await world.a_worker(db, "PURCHASE_CONFIRMED")
    async with db.transaction() as tx:
        await carrier.register_relay(tx)
        await carrier.switch_carrier(tx, carrier.Carrier.POSTGRES_LOG)
    assert (await the_finding(db, road)).reason == "WORKER_BEHIND"


async def test_without_kafka_the_relays_place_is_forgotten(db: Database) -> None:
    async with db.transaction() as tx:
        await carrier.register_relay(tx)
        await carrier.forget_relay(tx)
        assert [each.group for each in await list_lag(tx)] == []
        assert await tx.value("select count(*) from log_cursors") == 0


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({}, "KAFKA_BROKER: is not set"),
        ({"KAFKA_BROKER": "kafka"}, "KAFKA_BROKER: must be host:port"),
        ({"KAFKA_BROKER": "kafka:9092", "CARAVAN_KAFKA_SECURITY": "ssh"}, "CARAVAN_KAFKA_SECURITY: "),
    ],
)
def test_a_relay_that_cannot_start_says_so_in_one_line(database_url: str, environ: dict[str, str], said: str) -> None:
    refused = caravan("serve", "outbox-relay", POSTGRES_URL=database_url, **environ)
    assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (1, "", 1)
    assert said in refused.stderr


def test_failing_over_is_kept_and_audited(database_url: str) -> None:
    refused = caravan("failover", "postgres-log", "--note", "try", POSTGRES_URL=database_url)
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert "no Kafka" in refused.stderr
    assert caravan("failover", "rabbit", "--note", "x", POSTGRES_URL=database_url).returncode == 2
