"""What this process counts of its own work. Names are pinned in docs/metrics.md, which a test compares with this file.

Everybody counts here, in memory; apps/metrics.py adds what the database knows and answers `/metrics`. Labels are few
and closed: groups, routes as they are written, reasons; never an id, a path or anything of a person.
"""

from __future__ import annotations

from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics

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
