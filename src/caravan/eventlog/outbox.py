"""Say something: the one way to emit an event, in the transaction of the change that it tells of.

The student's feed is written here too, so nothing has to be said twice. Appending takes the student's counter first:
its lock gives the events of one student their order, in the log and on the feed.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from uuid import UUID

from caravan.db import Tx
from caravan.db.wake import KIND
from caravan.eventlog.codec import encode_data
from caravan.events import Event
from caravan.ids import child_traceparent, new_ids, uuid_text
from caravan.telemetry import tracing

# How many consumers one group can have at most: a student's events are all in one partition.
PARTITIONS = 16

# Number the events of each student under the lock of the student's counter, then append them to the log and those
# that the student may see to the feed. The counters are locked in the order of the student's id. Answers with the
# transaction's own id, which saves `Database.transact` a question.
APPEND_EVENTS = """
with said as (
  select * from unnest(%(event_id)b::uuid[], %(type)b::text[], %(topic)b::text[], %(subject)b::text[],
    %(partition_key)b::text[], %(partition)b::smallint[], %(correlation_id)b::text[], %(causation_id)b::uuid[],
    %(traceparent)b::text[], %(data_version)b::smallint[], %(data)b::text[], %(student_id)b::uuid[],
    %(feed_number)b::int[]) with ordinality
  as e(event_id, type, topic, subject, partition_key, partition, correlation_id, causation_id, traceparent,
       data_version, data, student_id, feed_number, ordinal)
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
), logged as (
  insert into outbox (event_id, type, topic, source, subject, partition_key, partition, correlation_id, causation_id,
                      traceparent, data_version, data, occurred_at)
  select event_id, type, topic, %(source)s, subject, partition_key, partition, correlation_id, causation_id,
         traceparent, data_version, data::jsonb, %(now)s
  from numbered order by ordinal
)
select pg_current_xact_id()::text
"""


def append(tx: Tx, events: Iterable[Event]) -> None:
    """Say `events`, in this order: on the log and on their students' feeds when `tx` commits, nowhere if it doesn't.

    They are written together just before the commit, so the students' counters are the last locks a transaction takes.
    """
    tx.outgoing.extend(events)
    tx.flush = _write


async def _write(tx: Tx) -> None:
    events: list[Event] = tx.outgoing
    if not events:
        return
    ids = new_ids(len(events))
    subjects = [event.subject for event in events]
    students = [event.student for event in events]
    keys = [uuid_text(student) if student else subject for student, subject in zip(students, subjects, strict=True)]
    correlations = [event.correlation_id for event in events]
    causes = [tx.causes.get(correlation) if correlation else None for correlation in correlations]
    traces = [cause.traceparent if cause else tx.trace for cause in causes]
    tx.hints.update(keys, {KIND + event.type for event in events})
    tx.xid = await tx.value(
        APPEND_EVENTS,
        {
            "event_id": ids,
            "type": [event.type for event in events],
            "topic": [event.topic for event in events],
            "subject": subjects,
            "partition_key": keys,
            "partition": [partition_of(key) for key in keys],
            "correlation_id": correlations,
            "causation_id": [cause.event_id if cause else None for cause in causes],
            "traceparent": [_trace(*each) for each in zip(events, ids, traces, strict=True)],
            "data_version": [event.version for event in events],
            "data": [encode_data(event) for event in events],
            "student_id": students,
            "feed_number": _feed_numbers(events, keys),
            "source": tx.source,
            "now": tx.now,
        },
    )


def _trace(event: Event, event_id: UUID, trace: str | None) -> str | None:
    """The trace context that an event carries: a child of what made somebody say it, if that had one."""
    if trace is None:
        return None
    return tracing.said(event.type, trace) if tracing.active() else child_traceparent(trace, event_id)


def _feed_numbers(events: Sequence[Event], keys: Sequence[str]) -> list[int | None]:
    """The how manieth of its student's here each event is that the student may see."""
    seen: Counter[str] = Counter()
    numbers: list[int | None] = []
    for event, key in zip(events, keys, strict=True):
        seen[key] += event.visible
        numbers.append(seen[key] if event.visible else None)
    return numbers


def partition_of(key: str) -> int:
    """Where a key's events go: stable across releases and machines."""
    return zlib.crc32(key.encode()) % PARTITIONS
