"""What the cache group does with an event."""

from __future__ import annotations

from collections.abc import Sequence

from caravan.db import Tx
from caravan.events import Event


async def invalidate_views(tx: Tx, events: Sequence[Event]) -> None:
    """Nothing is cached without Redis: views are one statement on the truth, and the screens were told by the outbox's
    hint. The group still consumes, so that its lag and its processed_events are true, and a cache can join later."""
