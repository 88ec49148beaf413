"""The part `fleet`: two relays, three of each worker, two WebSocket servers, real Kafka and Redis, all on one machine.

Captured payments are delivered by it and by the same crew on the log in PostgreSQL (with Redis too), in turns (A B A
B), each on a fresh database: every invariant holds, each client of the WebSocket servers ends with 1..n, and Kafka's
log carries at least 0.7 of what the other one does. The clock runs from the first event heard to the last payment
delivered. Kafka is warm, as PostgreSQL is: a broker's first ten thousand records cost several times as much as the
next ones.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import tempfile
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import httpx2

from bench.check import Wrong, check
from bench.cpu import find_postmaster, tree_cpu_seconds
from bench.market import add_captured_payments, build_market
from caravan.apps.services import RELAY, WORKERS
from caravan.db import Database
from caravan.people.students import link_student
from caravan.web.auth import Role, create_account, issue_token
from harness.processes import free_port
from tests import redis_server
from tests.kafka import server as kafka_server
from tests.kafka.server import KafkaServer
from tests.redis_server import RedisServer
from verify.fleet import Fleet, Slot
from verify.parts import Context
from verify.redis import Family, judge_family, listen, read_heads, until_caught_up, until_connected, until_up
from verify.report import PartResult
from verify.scratch import PREFIX, ScratchServer
from verify.waiting import until_quiet
from verify.world import SETTINGS

EMBEDDED, KAFKA = "postgres-log", "kafka"
OF_EACH_WORKER = 3
RELAYS = 2
WEBSOCKET_SERVERS = 2
PARTITIONS = 6  # of each topic: two for each of three workers
RATIO_MIN = 0.7
PAYMENTS_OF_A_TRAINER = 3  # a marketplace with room: everybody is served
READY_SECONDS_MAX = 90.0
QUIET_SECONDS_MAX = 300.0
POLL_SECONDS = 0.05
ROOMY = {"max_connections": "300"}  # every process may fill its pool
# As deploy/compose.yaml has its broker; the tests' own beats several times as often, to be soon there and soon gone.
BEATS = {
    "group_consumer_heartbeat_interval_ms": "1000",
    "broker_heartbeat_interval_ms": "2000",
    "broker_session_timeout_ms": "9000",
}


async def run(context: Context) -> PartResult:
    result = context.result()
    if lack := kafka_server.missing() or redis_server.missing():
        if os.environ.get("CI") == "true":
            result.failed.append(f"CI must have it: {lack}")
        else:
            result.skipped = lack
        return result
    payments, clients, rounds = context.pick((200, 10, 1), (3000, 100, 3))
    result.good_min = rounds * 2 * payments
    runs: dict[str, list[Run]] = {EMBEDDED: [], KAFKA: []}
    with ExitStack() as stack:
        server = stack.enter_context(ScratchServer(durable=True, settings=ROOMY))
        folder = Path(tempfile.mkdtemp(prefix=PREFIX))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        kafka, redis = KafkaServer(folder, **BEATS), stack.enter_context(RedisServer())
        stack.callback(kafka.kill)
        await asyncio.to_thread(kafka.start)
        site = Site(server, kafka, redis)
        warm_up = context.pick(0, 1)
        for turn in range(-warm_up, 2 * rounds):
            log = (EMBEDDED, KAFKA)[turn % 2]
            dice = context.dice(turn + warm_up)
            done = await _deliver(result, site, log, turn, payments, clients, dice, context.seed)
            if done is None:
                return result
            if turn >= 0:
                runs[log].append(done)
                result.cases += payments
                result.good += payments
    _judge(result, runs)
    return result


@dataclass(frozen=True, slots=True)
class Site:
    server: ScratchServer
    kafka: KafkaServer
    redis: RedisServer


@dataclass(frozen=True, slots=True)
class Run:
    """`cpu_us`: the processors' time per fulfilment of everybody: crew, PostgreSQL, Kafka, Redis."""

    per_second: float
    cpu_us: float


def _judge(result: PartResult, runs: dict[str, list[Run]]) -> None:
    """Few payments are over before a rate is one: then it is told, not judged."""
    by_log = {log: median(one.per_second for one in done) for log, done in runs.items()}
    ratio = by_log[KAFKA] / by_log[EMBEDDED]
    result.extra |= {
        "per_second": {log: [round(one.per_second) for one in done] for log, done in runs.items()},
        "cpu_us": {log: [round(one.cpu_us) for one in done] for log, done in runs.items()},
        "ratio": round(ratio, 2),
    }
    if result.scale == "full" and ratio < RATIO_MIN:
        result.violated(f"with Kafka {ratio:.2f} of the embedded log's throughput, not {RATIO_MIN}")


async def _deliver(
    result: PartResult,
    site: Site,
    log: str,
    turn: int,
    payments: int,
    clients: int,
    dice: random.Random,
    seed: int,
) -> Run | None:
    """One run on a new database and topics of its own. None where it went wrong, which is told."""
    database = site.server.create()
    await asyncio.to_thread(site.redis.flush)  # a run's students have the ids of the run before
    await build_market(database.url, trainers=max(200, payments // PAYMENTS_OF_A_TRAINER), seed=seed)
    async with AsyncExitStack() as stack:
        db = await stack.enter_async_context(database.database())
        others: list[int] = [find_postmaster(database.url)]
        slots = [Slot("websocket-server", n, port=free_port()) for n in range(WEBSOCKET_SERVERS)]
        kinds = [*(worker for worker in WORKERS for _ in range(OF_EACH_WORKER)), "reconciler"]
        others.append(site.redis.pid)
        more: dict[str, Any] = {"redis_url": site.redis.url}  # for both: what is compared is the log
        if log == KAFKA:
            more |= {
                "kafka_broker": site.kafka.address,
                "kafka_partitions": PARTITIONS,
                "kafka_prefix": f"fleet-{turn}-",
            }
            kinds += [RELAY] * RELAYS
            others.append(site.kafka.pid)
        slots += [Slot(kind, n) for n, kind in enumerate(kinds, WEBSOCKET_SERVERS)]
        assert SETTINGS.sandbox_webhook_secret
        fleet = await stack.enter_async_context(Fleet(database.url, SETTINGS.sandbox_webhook_secret, slots, more))
        doors = [slot.port for slot in slots if slot.port]
        async with httpx2.AsyncClient() as http:
            await until_up(http, doors)
        await _until_ready(db, len(kinds), log)
        pids = [slot.pid for slot in slots if slot.pid] + others
        cpu_before = tree_cpu_seconds(pids)
        bought = await add_captured_payments(database.url, payments, seed)
        families = await _open_families(db, bought, clients)
        listening = [asyncio.create_task(listen(family, doors, random.Random(dice.random()))) for family in families]
        await until_connected(families)
        _quiet, left = await until_quiet(db, QUIET_SECONDS_MAX)
        cpu = tree_cpu_seconds(pids) - cpu_before
        heads = await read_heads(db)
        await until_caught_up(families, heads)
        for task in listening:
            task.cancel()
        await asyncio.gather(*listening, return_exceptions=True)
        for said in (*fleet.troubles(), *([left] if left else [])):
            result.violated(f"{log}: {said}")
        for family in families:
            judge_family(result, family, heads.get(family.student, 0), case=None)
        try:
            await check(database.url, payments)
        except Wrong as wrong:
            result.violated(f"{log}: {wrong}")
            return None
        async with db.transaction("verify", read_only=True) as tx:
            seconds: float = await tx.value(DELIVERY_SECONDS)
        return Run(payments / seconds, cpu / payments * 1e6)


# From the first event heard to the last payment whose sessions are scheduled.
DELIVERY_SECONDS = """
select extract(epoch from max(processed_at) filter (where consumer_group = 'session-scheduling-workers')
                          - min(processed_at))::float8
from processed_events where event_type in ('PURCHASE_CONFIRMED', 'TRAINER_ALLOCATED')
"""

COUNT_ALIVE = "select count(*) from workers where expires_at > clock_timestamp() and failing_since is null"
SETTLING_SECONDS = 4.0  # for Kafka's groups to be shared out; on the log in PostgreSQL a lease is taken over in 6


async def _until_ready(db: Database, workers: int, log: str) -> None:
    """Until everybody is there, and had the time to get a share."""
    deadline = time.monotonic() + READY_SECONDS_MAX
    while time.monotonic() < deadline:
        async with db.transaction("verify", read_only=True) as tx:
            if await tx.value(COUNT_ALIVE) >= workers:
                await asyncio.sleep(SETTLING_SECONDS)
                return
        await asyncio.sleep(POLL_SECONDS)
    raise TimeoutError(f"the fleet on {log} is not complete")


LIST_STUDENTS = """
select distinct student_id from payments where id = any(%(payments)b::uuid[]) order by 1 limit %(number)s
"""


async def _open_families(db: Database, payments: Sequence[Any], number: int) -> list[Family]:
    """Some of those who bought, each with an account to listen with."""
    families: list[Family] = []
    async with db.transaction("student-service") as tx:
        for n, student in enumerate(await tx.values(LIST_STUDENTS, {"payments": list(payments), "number": number})):
            account = await create_account(
                tx,
                email=f"fleet-{n}@example.com",
                name="Rao",
                role=Role.STUDENT,
                password_hash="-",  # noqa: S106
            )
            await link_student(tx, account, student)
            families.append(Family(student, await issue_token(tx, account)))
    return families
