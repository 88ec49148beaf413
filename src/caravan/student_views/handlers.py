"""What the cache group does with an event."""

from __future__ import annotations

from collections.abc import Sequence

from caravan.db import Tx
from caravan.events import Event
from caravan.student_views.cache import ViewCache
from caravan.student_views.queries import list_ends


async def invalidate_views(tx: Tx, events: Sequence[Event], cache: ViewCache | None = None) -> None:
    """Raise the fences of these events' students to where their feeds end now, before the batch commits: doing it twice
    does no harm. A Redis that is away has forgotten nothing that matters, because no view is shown by its word alone.

    Without a Redis nothing is cached. The group still consumes, so that its lag and its processed_events are true.
    """
    if cache is None:
        return
    heads = await list_ends(tx, {event.student for event in events if event.student is not None})
    await cache.fence({student: head.version for student, head in heads.items()})
