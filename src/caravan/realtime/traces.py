"""The last span of a purchase's trace: its frame is on the way to a screen. Only where somebody wants spans."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from uuid import UUID

import msgspec

from caravan.db import Database
from caravan.telemetry import tracing

# The trace contexts of some events. They stand in the log, not in the feed, and are found there by their payments.
LIST_TRACES = """
select event_id, traceparent from outbox
where correlation_id = any(%(correlations)b::text[]) and event_id = any(%(ids)b::uuid[]) and traceparent is not null
"""


async def trace_frames(db: Database, frames: Mapping[str, int]) -> None:
    """A span per frame, in its event's trace; `frames`: how many sockets were given each."""
    said: dict[UUID, tuple[str, int]] = {}
    payments: set[str] = set()
    for frame, sockets in frames.items():
        event: dict[str, Any] = msgspec.json.decode(frame)["event"]
        said[UUID(event["id"])] = event["type"], sockets
        payments.add(str(event.get("paymentId")))
    async with db.transaction("websocket-server", read_only=True) as tx:
        found = await tx.tuples(LIST_TRACES, {"correlations": list(payments), "ids": list(said)})
    for event_id, traceparent in found:
        event_type, sockets = said[event_id]
        tracing.pushed(event_type, str(event_id), traceparent, sockets)
