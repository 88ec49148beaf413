"""Dead letters where there is a Kafka: records that are no events, and the mirror in the topic `dead-letter-queue`.

The table is the truth; the topic is for those who watch topics. It gets each dead letter at least once, behind its row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from uuid import UUID

from caravan.db import Tx
from caravan.ids import new_id

# Give up a record that is no event, in the transaction that moves past it; once, however often it comes.
PARK_UNREADABLE = """
insert into dead_letters (id, consumer_group, event_id, event_type, correlation_id, envelope, code, error, attempts,
                          created_at)
select %(id)s, %(group)s, %(event_id)s, %(event_type)s, %(correlation_id)s, %(document)s::text::jsonb, 'MALFORMED',
       %(error)s, 1, %(now)s
where not exists (select from dead_letters where consumer_group = %(group)s and event_id = %(event_id)s)
on conflict (consumer_group, event_id) where status = 'parked' do nothing
"""


async def park_unreadable(
    tx: Tx, group: str, event_id: UUID, event_type: str, correlation_id: str | None, document: str, error: str
) -> None:
    """`correlation_id`: its payment, where it still says so. `document`: the record, see kafka_records.shown."""
    await tx.execute(
        PARK_UNREADABLE,
        {
            "id": new_id(),
            "group": group,
            "event_id": event_id,
            "event_type": event_type,
            "correlation_id": correlation_id,
            "document": document,
            "error": error,
            "now": tx.now,
        },
    )


LIST_UNMIRRORED = """
select id, consumer_group, event_id, event_type, correlation_id, envelope, code, error, attempts, created_at
from dead_letters where mirrored_at is null order by id limit %(limit)s
"""


async def list_unmirrored(tx: Tx, limit: int) -> list[dict[str, Any]]:
    """The oldest first."""
    return await tx.all(LIST_UNMIRRORED, {"limit": limit})


MARK_MIRRORED = """
update dead_letters set mirrored_at = %(now)s where id = any(%(ids)b::uuid[])
"""


async def mark_mirrored(tx: Tx, ids: Sequence[UUID]) -> None:
    await tx.execute(MARK_MIRRORED, {"ids": list(ids), "now": tx.now})
