"""What this process counts of its own work. Names are pinned in docs/metrics.md, which a test compares with this file.

Everybody counts here, in memory; apps/metrics.py adds what the database knows and answers `/metrics`. Labels are few
and closed: groups, routes as they are written, reasons; never an id, a path or anything of a person.
"""

from __future__ import annotations

from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics

disable_created_metrics()

REGISTRY: Final = CollectorRegistry()
# From a page that is there at once to a statement that ran into its time limit.
SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)

REQUESTS = Histogram(
    "caravan_http_request_duration_seconds",
    "HTTP requests by route and status: how many, and how long until the answer was out.",
    ["method", "route", "status"],
    buckets=SECONDS,
    registry=REGISTRY,
)
BATCHES = Histogram(
    "caravan_handler_batch_duration_seconds",
    "Batches that a group's handlers have done and committed: how many, and how long each took.",
    ["group"],
    buckets=SECONDS,
    registry=REGISTRY,
)
EVENTS = Counter(
    "caravan_handler_events_total", "Events that a group has got past, committed.", ["group"], registry=REGISTRY
)
FAILURES = Counter(
    "caravan_handler_failures_total",
    "Batches that failed. transient: run again, nothing is used up; bug: isolated to one event.",
    ["group", "kind"],
    registry=REGISTRY,
)

# Redis, where there is one.
REDIS_UP = Gauge(
    "caravan_redis_up",
    "1 while this process has a connection to its Redis, 0 while it goes on without (or has none).",
    registry=REGISTRY,
)
REDIS_OUTAGES = Counter("caravan_redis_outages_total", "How often this process lost its Redis.", registry=REGISTRY)
REDIS_ERRORS = Counter(
    "caravan_redis_errors_total",
    "Calls of Redis that were no use. away: no connection or no answer in time; refused: answered with an error.",
    ["kind"],
    registry=REGISTRY,
)
REDIS_HINTS = Counter(
    "caravan_redis_hints_total",
    "Hints over Redis Pub/Sub: published, failed (PostgreSQL carried them), heard.",
    ["what"],
    registry=REGISTRY,
)
REDIS_CHANNELS = Gauge("caravan_redis_channels", "Students whose channel this process hears now.", registry=REGISTRY)
VIEW_READS = Counter(
    "caravan_view_cache_reads_total",
    "Views looked up in Redis: hit, miss, stale (of another version than the present one: refused), error.",
    ["view", "result"],
    registry=REGISTRY,
)
VIEW_WRITES = Counter(
    "caravan_view_cache_writes_total",
    "Views put into Redis: stored, refused (something newer is there), error.",
    ["view", "result"],
    registry=REGISTRY,
)
VIEW_FENCES = Counter(
    "caravan_view_cache_fences_total",
    "Students whose cached views the cache-worker fenced: done, error.",
    ["result"],
    registry=REGISTRY,
)
