"""Say something: the one way to emit an event, in the transaction of the change that it tells of.

The student's feed is written here too, so nothing has to be said twice. Appending takes the student's counter first:
its lock gives the events of one student their order, in the log and on the feed.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable

from caravan.db import Tx
from caravan.eventlog.codec import encode_data
from caravan.events import Event
from caravan.ids import child_traceparent, new_id

# How many consumers one group can have at most: a student's events are all in one partition.
PARTITIONS = 16

# Number the events of each student under the lock of the student's counter, then append them to the log and those
# that the student may see to the feed. The counters are locked in the order of the student's id.
APPEND_EVENTS = """
with said as (
  select * from unnest(%(ordinals)b::int[], %(ids)b::uuid[], %(types)b::text[], %(topics)b::text[],
    %(subjects)b::text[], %(keys)b::text[], %(partitions)b::smallint[], %(correlations)b::text[],
    %(causes)b::uuid[], %(traces)b::text[], %(versions)b::smallint[], %(data)b::text[], %(students)b::uuid[],
    %(feed_numbers)b::int[])
  as e(ordinal, event_id, type, topic, subject, partition_key, partition, correlation_id, causation_id, traceparent,
       data_version, data, student_id, feed_number)
), heads as (
  insert into student_feed_heads as head (student_id, seq)
  select student_id, coalesce(max(feed_number), 0) from said where student_id is not null
  group by student_id order by student_id
  on conflict (student_id) do update set seq = head.seq + excluded.seq
  returning student_id, seq
), numbered as materialized (
  select said.*, heads.seq - max(feed_number) over (partition by said.student_id) + feed_number as feed_seq
  from said left join heads using (student_id)
), fed as (
  insert into student_feed (student_id, seq, event_id, type, data, created_at)
  select student_id, feed_seq, event_id, type, data::jsonb, %(now)s from numbered where feed_number is not null
)
insert into outbox (event_id, type, topic, source, subject, partition_key, partition, correlation_id, causation_id,
                    traceparent, data_version, data, occurred_at)
select event_id, type, topic, %(source)s, subject, partition_key, partition, correlation_id, causation_id,
       traceparent, data_version, data::jsonb, %(now)s
from numbered order by ordinal
"""


def append(tx: Tx, events: Iterable[Event]) -> None:
    """Say `events`, in this order: on the log and on their students' feeds when `tx` commits, nowhere if it doesn't.

    They are written together just before the commit, so the students' counters are the last locks a transaction takes.
    """
    for event in events:
        tx.outgoing.append(event)
        tx.hint(_key(event))
    tx.flush = _write


async def _write(tx: Tx) -> None:
    events: list[Event] = tx.outgoing
    if not events:
        return
    feed_numbers: list[int | None] = []
    said_of: dict[str, int] = {}
    for event in events:
        if event.visible:
            said_of[_key(event)] = said_of.get(_key(event), 0) + 1
        feed_numbers.append(said_of[_key(event)] if event.visible else None)
    causes = [tx.causes.get(event.correlation_id or "") for event in events]
    traces = [cause.traceparent if cause else tx.trace for cause in causes]
    await tx.execute(
        APPEND_EVENTS,
        {
            "ordinals": list(range(len(events))),
            "ids": [new_id() for _ in events],
            "types": [event.type for event in events],
            "topics": [event.topic for event in events],
            "subjects": [event.subject for event in events],
            "keys": [_key(event) for event in events],
            "partitions": [partition_of(_key(event)) for event in events],
            "correlations": [event.correlation_id for event in events],
            "causes": [cause.event_id if cause else None for cause in causes],
            "traces": [child_traceparent(trace) if trace else None for trace in traces],
            "versions": [event.version for event in events],
            "data": [encode_data(event) for event in events],
            "students": [event.student for event in events],
            "feed_numbers": feed_numbers,
            "source": tx.source,
            "now": tx.now,
        },
    )


def _key(event: Event) -> str:
    return str(event.student or event.subject)


def partition_of(key: str) -> int:
    """Where a key's events go: stable across releases and machines."""
    return zlib.crc32(key.encode()) % PARTITIONS
