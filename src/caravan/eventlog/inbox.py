"""Each event once per group: the claim is a row in the transaction of the effect, so neither can be alone."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from caravan.db import Tx
from caravan.db.tx import Cause
from caravan.eventlog.codec import Envelope
from caravan.eventlog.subscription import Handler, Subscription
from caravan.events import Event
from caravan.telemetry import correlate, tracing

# Claim events for a group; those that it has done before are not returned.
CLAIM_EVENTS = """
insert into processed_events (consumer_group, event_id, event_type, correlation_id, source, processed_at)
select %(group)s, event_id, event_type, correlation_id, source, %(now)s
from unnest(%(ids)b::uuid[], %(types)b::text[], %(correlations)b::text[], %(sources)b::text[])
  as e(event_id, event_type, correlation_id, source)
on conflict (consumer_group, event_id) do nothing
returning event_id
"""


async def claim(tx: Tx, group: str, envelopes: Sequence[Envelope]) -> list[Envelope]:
    """Those of `envelopes` that are new to the group, in their order."""
    new: set[UUID] = set(
        await tx.values(
            CLAIM_EVENTS,
            {
                "group": group,
                "ids": [envelope.id for envelope in envelopes],
                "types": [envelope.type for envelope in envelopes],
                "correlations": [envelope.correlationid for envelope in envelopes],
                "sources": [envelope.source for envelope in envelopes],
                "now": tx.now,
            },
        )
    )
    return [envelope for envelope in envelopes if envelope.id in new]


GIVE_BACK = "delete from processed_events where consumer_group = %(group)s and event_id = any(%(ids)b::uuid[])"


async def give_back(tx: Tx, group: str, envelopes: Sequence[Envelope]) -> None:
    """Let go of claims whose effect will not be here."""
    await tx.execute(GIVE_BACK, {"group": group, "ids": [envelope.id for envelope in envelopes]})


async def apply_events(tx: Tx, subscription: Subscription, claimed: Sequence[tuple[Envelope, Event]]) -> None:
    """Run the group's handlers over events that are claimed.

    Handlers look at the present state by id, so events of one type are handled together, in order of first appearance.
    """
    told = [(envelope.id, envelope.type, envelope.correlationid, envelope.traceparent) for envelope, _event in claimed]
    by_handler: dict[Handler, list[Event]] = {}
    with tracing.handling(subscription.group, told) as traces, correlate(*(each[2] for each in told)):
        for envelope, event in claimed:
            if envelope.correlationid:
                tx.causes[envelope.correlationid] = Cause(envelope.id, traces[envelope.id])
            by_handler.setdefault(subscription.handlers[type(event)], []).append(event)
        for handler, group_events in by_handler.items():
            await handler(tx, group_events)
