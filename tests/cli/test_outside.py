"""`caravan doctor` on what stands outside the database: a real Kafka and a real Redis, well and not."""

from __future__ import annotations

import asyncio
import json
from base64 import b64encode
from pathlib import Path
from uuid import uuid4

from caravan.db import Database
from caravan.eventlog.carrier import register_relay
from caravan.eventlog.kafka_client import Kafka
from caravan.settings import load_settings
from tests.apps.running import caravan
from tests.kafka.server import KafkaServer
from tests.redis_server import RedisServer

NOBODY = "127.0.0.1:1"


def doctor(data: Path, **env: str) -> dict[str, tuple[bool, str]]:
    """What it says of each thing; no database is there, and it looks at the others all the same."""
    done = caravan("doctor", "--json", "--data", data, **env)
    assert (done.returncode, done.stderr) == (6, "")
    return {check["name"]: (check["ok"], check["said"]) for check in json.loads(done.stdout)["checks"]}


def test_kafka_its_topics_and_groups(tmp_path: Path, kafka_server: KafkaServer) -> None:
    prefix = f"doctor-{uuid4().hex[:8]}-"
    env = {
        "KAFKA_BROKER": kafka_server.address, "CARAVAN_KAFKA_PREFIX": prefix, "CARAVAN_KAFKA_PARTITIONS": "2",
    }  # fmt: skip
    fine, said = doctor(tmp_path, **env)["Kafka"]
    assert (fine, f"no topic {prefix}purchase-confirmed, " in said) == (False, True)

    Kafka(load_settings(env)).ensure_topics(10.0)
    fine, said = doctor(tmp_path, **env)["Kafka"]
    assert fine, said
    for name in ("purchase-confirmed", "purchase-created", "trainer-allocated", "dead-letter-queue"):
        assert prefix + name in said
    assert f"never joined: {prefix}purchase-creation-workers, " in said

    fine, said = doctor(tmp_path, **env | {"CARAVAN_KAFKA_PARTITIONS": "3"})["Kafka"]
    assert (fine, said.startswith("CARAVAN_KAFKA_PARTITIONS: is 3, but the topic")) == (False, True)


def test_kafka_that_nobody_finds(tmp_path: Path) -> None:
    fine, said = doctor(tmp_path, KAFKA_BROKER=NOBODY)["Kafka"]
    assert (fine, "nobody answers at KAFKA_BROKER" in said, "\n" in said) == (False, True, False)


async def test_back_to_a_kafka_that_is_away_is_no_good_news(db: Database) -> None:
    async with db.transaction() as tx:
        await register_relay(tx)
    env = {"POSTGRES_URL": db.url, "KAFKA_BROKER": NOBODY}
    over = await asyncio.to_thread(caravan, "failover", "postgres-log", "--note", "it is away", **env)
    assert (over.returncode, over.stdout) == (
        0,
        "Within seconds the workers take their events from the outbox, without Kafka.\n",
    )
    told = await asyncio.to_thread(caravan, "doctor", **env)
    assert "event log: Failed over since" in told.stdout
    assert "caravan failover kafka --note" in told.stdout
    back = await asyncio.to_thread(caravan, "failover", "kafka", "--note", "too early", **env)
    assert (back.returncode, "But look at it: nobody answers at KAFKA_BROKER" in back.stdout) == (6, True)


def test_redis_well_refusing_and_gone(tmp_path: Path, redis_server: RedisServer) -> None:
    assert doctor(tmp_path, REDIS_URL=redis_server.url)["Redis"] == (True, "answers, and takes writes")
    redis_server.ask("REPLICAOF", "127.0.0.1", "1")
    fine, said = doctor(tmp_path, REDIS_URL=redis_server.url)["Redis"]
    assert (fine, said.startswith("REDIS_URL: it refuses writes (")) == (False, True), said
    fine, said = doctor(tmp_path, REDIS_URL=f"redis://:hunter2@{NOBODY}/0")["Redis"]
    assert (fine, said.startswith("REDIS_URL: it is away"), "hunter2" in said) == (False, True, False)


def test_without_either_nothing_is_said_of_them(tmp_path: Path) -> None:
    assert not {"Kafka", "Redis"} & doctor(tmp_path).keys()


def test_a_payment_provider_that_is_not_set_is_said(tmp_path: Path) -> None:
    fine, said = doctor(tmp_path)["payment provider"]
    assert (fine, said.startswith("none is set here (CARAVAN_SANDBOX_WEBHOOK_SECRET)")) == (True, True)
    secret = "whsec_" + b64encode(b"s" * 32).decode()
    fine, said = doctor(tmp_path, CARAVAN_SANDBOX_WEBHOOK_SECRET=secret)["payment provider"]
    assert (fine, said) == (True, "sandbox (CARAVAN_SANDBOX_WEBHOOK_SECRET)")
