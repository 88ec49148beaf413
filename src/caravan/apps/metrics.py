"""`/metrics`: what this process counted, what its pool and sockets are at, and what the database knows of the platform.

The platform's figures are the same from every process. They cost one short read-only transaction, kept for some seconds
however often somebody asks; where the database is away they are absent, `caravan_database_up` is 0 and the rest comes.
Names and labels: docs/metrics.md, which a test compares with the tables here and in telemetry/metrics.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

import psycopg
import psycopg_pool
import structlog
from prometheus_client import REGISTRY as OF_THE_LIBRARY
from prometheus_client import generate_latest
from prometheus_client.core import Metric
from prometheus_client.samples import Sample

from caravan.db import Database, Tx
from caravan.eventlog.lag import list_lag
from caravan.eventlog.workers import list_workers
from caravan.fulfilment.alerts import list_open
from caravan.fulfilment.gaps import GAPS, list_gap
from caravan.pauses import PAUSABLE, list_pauses
from caravan.payments.webhooks import list_unclaimed
from caravan.telemetry import metrics

if TYPE_CHECKING:  # the workers' process has none, and loads no web for it
    from caravan.realtime.gateway import Gateway

KEPT_SECONDS = 5.0
ANSWER_SECONDS_MAX = 3.0
GAP_PAYMENTS_MAX = 1000  # counted so far and no further

log: structlog.stdlib.BoundLogger = structlog.get_logger()

Value = tuple[tuple[str, ...], float]  # the labels' values and the figure
Families = list[dict[str, Any]]  # as JSON: name, kind, help, samples of (name, labels, value)
Others = Callable[[], Awaitable[Families]]


@dataclass(frozen=True, slots=True)
class Figure:
    """A name that is read off when somebody asks, not counted."""

    name: str
    help: str
    labels: tuple[str, ...] = ()
    kind: Literal["gauge", "counter"] = "gauge"


PLATFORM: tuple[Figure, ...] = (
    Figure("caravan_lag_messages", "Events that a group has not got past.", ("group",)),
    Figure("caravan_lag_seconds", "Age of the oldest event that a group has not got past.", ("group",)),
    Figure("caravan_workers_alive", "Workers of a group with a live lease.", ("group",)),
    Figure(
        "caravan_workers",
        "Workers by service and state: alive, failing (alive, but stuck), gone.",
        ("service", "state"),
    ),
    Figure("caravan_worker_heartbeat_age_seconds", "Age of the youngest heartbeat of a service.", ("service",)),
    Figure(
        "caravan_worker_progress_age_seconds",
        "Age of the last completed turn of a live worker; of the slowest one.",
        ("service",),
    ),
    Figure("caravan_outbox_oldest_seconds", "Age of the oldest event in the outbox that some group has not got past."),
    Figure("caravan_log_oldest_seconds", "Age of the oldest event that the outbox still keeps."),
    Figure(
        "caravan_undelivered_payments",
        "Captured payments that are not delivered, by stored reason (none: on its way, or a technical one).",
        ("reason", "currency"),
    ),
    Figure("caravan_undelivered_cents", "Money captured and not delivered, in minor units.", ("reason", "currency")),
    Figure("caravan_undelivered_oldest_seconds", "Age of the oldest undelivered payment."),
    Figure("caravan_stage_payments", "Undelivered payments by the stage they stand at.", ("stage",)),
    Figure(
        "caravan_stage_oldest_seconds",
        "How long ago the oldest undelivered payment of a stage was captured.",
        ("stage",),
    ),
    Figure(
        "caravan_overdue_payments",
        f"Payments in a gap beyond its leeway without a reason to wait, counted up to {GAP_PAYMENTS_MAX}.",
        ("gap",),
    ),
    Figure("caravan_stages_paused", "Pauses of a stage that operators have not ended yet.", ("stage",)),
    Figure("caravan_unclaimed_payments", "Captured webhooks that matched no payment in time.", ("currency",)),
    Figure("caravan_unclaimed_cents", "Unclaimed money, in minor units.", ("currency",)),
    Figure("caravan_dead_letters", "Events that were given up and wait for an operator.", ("group",)),
    Figure("caravan_alerts", "Alerts of the product itself that are open now.", ("alert", "severity")),
)
PROCESS: tuple[Figure, ...] = (
    Figure("caravan_build_info", "1, with the build that runs in this process.", ("process", "build")),
    Figure("caravan_database_up", "1 where the database answered the platform's figures in time.", ("process",)),
    Figure(
        "caravan_pool_connections", "Connections of this process's pool, by state: idle, in_use.", ("process", "state")
    ),
    Figure("caravan_pool_connections_max", "How many connections the pool may open.", ("process",)),
    Figure("caravan_pool_requests_waiting", "Transactions that wait for a connection now.", ("process",)),
    Figure(
        "caravan_pool_timeouts_total", "Transactions that waited for a connection in vain.", ("process",), "counter"
    ),
    Figure("caravan_sockets_connected", "WebSockets open in this process.", ("process",)),
    Figure("caravan_socket_frames_total", "Frames put on their way to WebSockets.", ("process",), "counter"),
)


# ------------------------------------------------------------------ what the database knows

# The register of undelivered money by stage, reason and currency.
SUM_REGISTER = """
select case when pu.id is null then 'paid'
            when exists (select from tutoring_sessions t where t.purchase_id = pu.id) then 'scheduled'
            when exists (select from trainer_allocations a
                         where a.purchase_id = pu.id and a.status in ('approved', 'completed')) then 'allocated'
            else 'purchased' end as stage,
       coalesce(u.reason, 'none') as reason, u.currency::text as currency, count(*)::int as payments,
       sum(u.amount_cents)::float8 as cents, extract(epoch from clock_timestamp() - min(u.since))::float8 as oldest
from undelivered u left join student_course_purchases pu on pu.payment_id = u.payment_id
group by 1, 2, 3
"""

PARKED_LETTERS = "select consumer_group, count(*)::int from dead_letters where status = 'parked' group by 1"

# The ids of the log are nearly in the order of time, so the first row is as good as the oldest.
LOG_OLDEST = "select extract(epoch from clock_timestamp() - occurred_at)::float8 from outbox order by id limit 1"


async def read_platform(tx: Tx, unclaimed_after: timedelta) -> dict[str, list[Value]]:
    """Every figure of PLATFORM, by name."""
    found: dict[str, list[Value]] = {figure.name: [] for figure in PLATFORM}
    lags = await list_lag(tx)
    for lag in lags:
        found["caravan_lag_messages"].append(((lag.group,), lag.messages))
        found["caravan_lag_seconds"].append(((lag.group,), lag.seconds))
        found["caravan_workers_alive"].append(((lag.group,), lag.workers_alive))
    found["caravan_outbox_oldest_seconds"] = [((), max((lag.seconds for lag in lags), default=0.0))]
    found["caravan_log_oldest_seconds"] = [((), await tx.value(LOG_OLDEST) or 0.0)]
    await _read_workers(tx, found)
    await _read_register(tx, found)
    for gap in GAPS:
        found["caravan_overdue_payments"].append(((gap.name,), len(await list_gap(tx, gap, limit=GAP_PAYMENTS_MAX))))
    paused = Counter(each.stage for each in await list_pauses(tx))
    found["caravan_stages_paused"] = [((stage,), paused[stage]) for stage in PAUSABLE]
    unclaimed = await list_unclaimed(tx, unclaimed_after)
    found["caravan_unclaimed_payments"] = _counted(Counter(item.currency for item in unclaimed))
    cents: Counter[str] = Counter()
    for item in unclaimed:
        cents[item.currency] += item.amount_cents
    found["caravan_unclaimed_cents"] = _counted(cents)
    found["caravan_dead_letters"] = [((group,), count) for group, count in await tx.tuples(PARKED_LETTERS)]
    open_alerts = Counter((alert.name, str(alert.severity)) for alert in await list_open(tx))
    found["caravan_alerts"] = list(open_alerts.items())
    known = {labels for labels, _count in found["caravan_dead_letters"]}
    found["caravan_dead_letters"] += [((lag.group,), 0) for lag in lags if (lag.group,) not in known]
    return found


async def _read_workers(tx: Tx, found: dict[str, list[Value]]) -> None:
    workers = await list_workers(tx)
    states: Counter[tuple[str, str]] = Counter()
    for worker in workers:
        state = "gone" if not worker.alive else "failing" if worker.failing_since else "alive"
        states[worker.service, state] += 1
    found["caravan_workers"] = [(labels, count) for labels, count in states.items()]
    for service in {worker.service for worker in workers}:
        beats = [worker.heartbeat_age_seconds for worker in workers if worker.service == service]
        turns = [worker.progress_age_seconds for worker in workers if worker.service == service and worker.alive]
        found["caravan_worker_heartbeat_age_seconds"].append(((service,), min(beats)))
        if turns:
            found["caravan_worker_progress_age_seconds"].append(((service,), max(turns)))


async def _read_register(tx: Tx, found: dict[str, list[Value]]) -> None:
    payments: Counter[tuple[str, ...]] = Counter()
    cents: Counter[tuple[str, ...]] = Counter()
    stages: Counter[tuple[str, ...]] = Counter()
    oldest: dict[tuple[str, ...], float] = {}
    for row in await tx.all(SUM_REGISTER):
        why, stage = (row["reason"], row["currency"]), (row["stage"],)
        payments[why] += row["payments"]
        cents[why] += row["cents"]
        stages[stage] += row["payments"]
        oldest[stage] = max(oldest.get(stage, 0.0), row["oldest"])
    found["caravan_undelivered_payments"] = list(payments.items())
    found["caravan_undelivered_cents"] = list(cents.items())
    found["caravan_undelivered_oldest_seconds"] = [((), max(oldest.values(), default=0.0))]
    found["caravan_stage_payments"] = list(stages.items())
    found["caravan_stage_oldest_seconds"] = list(oldest.items())


def _counted(counts: Counter[str]) -> list[Value]:
    return [((name,), count) for name, count in counts.items()]


# ------------------------------------------------------------------ one answer


@dataclass(slots=True)
class Metrics:
    """The figures of one process. `others` brings those that processes without an address of their own counted."""

    db: Database
    process: str
    build: str
    unclaimed_after: timedelta = timedelta(minutes=15)
    gateway: Gateway | None = None
    others: Others | None = None
    _kept: dict[str, list[Value]] | None = None
    _kept_until: float = 0.0
    _reading: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def render(self) -> bytes:
        """The text format of Prometheus."""
        platform = await self._platform()
        families = _families(PLATFORM, platform or {}) + self.own(database_up=platform is not None)
        if self.others is not None:
            try:
                async with asyncio.timeout(ANSWER_SECONDS_MAX):
                    families += await self.others()
            except (OSError, TimeoutError, ValueError) as error:
                log.warning("another process did not tell its figures", error=f"{type(error).__name__}: {error}")
        return generate_latest(_Collected(families)) + generate_latest(OF_THE_LIBRARY)

    def own(self, *, database_up: bool | None = None) -> Families:
        """What this process counted and what its pool is at."""
        pool = self.db.stats()
        idle, size = pool.get("pool_available", 0), pool.get("pool_size", 0)
        me = (self.process,)
        read: dict[str, list[Value]] = {
            "caravan_build_info": [((self.process, self.build), 1)],
            "caravan_database_up": [] if database_up is None else [(me, database_up)],
            "caravan_pool_connections": [((*me, "idle"), idle), ((*me, "in_use"), max(0, size - idle))],
            "caravan_pool_connections_max": [(me, pool.get("pool_max", 0))],
            "caravan_pool_requests_waiting": [(me, pool.get("requests_waiting", 0))],
            "caravan_pool_timeouts_total": [(me, pool.get("requests_errors", 0))],
            "caravan_sockets_connected": [(me, self.gateway.sockets if self.gateway else 0)],
            "caravan_socket_frames_total": [(me, self.gateway.frames_sent if self.gateway else 0)],
        }
        counted = [
            {
                "name": family.name,
                "kind": family.type,
                "help": family.documentation,
                "samples": [(sample.name, sample.labels, sample.value) for sample in family.samples],
            }
            for family in metrics.REGISTRY.collect()
        ]
        return _families(PROCESS, read) + counted

    async def _platform(self) -> dict[str, list[Value]] | None:
        """What the database knows, at most some seconds old; None where it doesn't answer."""
        clock = asyncio.get_running_loop().time
        async with self._reading:
            if clock() < self._kept_until:
                return self._kept
            try:
                async with asyncio.timeout(ANSWER_SECONDS_MAX), self.db.transaction("metrics", read_only=True) as tx:
                    self._kept = await read_platform(tx, self.unclaimed_after)
            except (TimeoutError, psycopg.Error, psycopg_pool.PoolTimeout) as error:
                log.warning("the platform's figures were not read", error=f"{type(error).__name__}: {error}".strip())
                self._kept = None
            self._kept_until = clock() + KEPT_SECONDS
            return self._kept


def _families(figures: Iterable[Figure], values: dict[str, list[Value]]) -> Families:
    return [
        {
            "name": figure.name.removesuffix("_total"),
            "kind": figure.kind,
            "help": figure.help,
            "samples": [
                (figure.name, dict(zip(figure.labels, labels, strict=True)), float(value))
                for labels, value in values.get(figure.name, [])
            ],
        }
        for figure in figures
    ]


class _Collected:
    """Families of several processes as one registry: each name once, with the samples of all."""

    def __init__(self, families: Sequence[dict[str, Any]]) -> None:
        self._metrics: dict[str, Metric] = {}
        for family in families:
            metric = self._metrics.setdefault(family["name"], Metric(family["name"], family["help"], family["kind"]))
            metric.samples += [Sample(name, labels, value) for name, labels, value in family["samples"]]

    def collect(self) -> Iterable[Metric]:
        return self._metrics.values()
