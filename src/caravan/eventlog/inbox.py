"""Each event once per group: the claim is a row in the transaction of the effect, so neither can be without the other."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from caravan.db import Tx
from caravan.eventlog.codec import Envelope

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
