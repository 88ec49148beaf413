"""Say something: the one way to emit an event, in the transaction of the change that it tells of.

The student's feed is written here too, so nothing has to be said twice. Appending takes the student's counter first:
its lock gives the events of one student their order, in the log and on the feed.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple
from uuid import UUID

from caravan.db import Tx
from caravan.db.wake import KIND
from caravan.eventlog.codec import encode_data
from caravan.events import Event
from caravan.ids import child_traceparent, new_ids
from caravan.telemetry import tracing

# How many consumers one group can have at most: a student's events are all in one partition.
PARTITIONS = 16

# Number the events of each student under the lock of the student's counter, then append them to the log and those
# that the student may see to the feed. The counters are locked in the order of the student's id. Answers with the
# transaction's own id, which saves `Database.transact` a question.
APPEND_EVENTS = """
with said as (
  select * from unnest(%(ordinal)b::int[], %(event_id)b::uuid[], %(type)b::text[], %(topic)b::text[],
    %(subject)b::text[], %(partition_key)b::text[], %(partition)b::smallint[], %(correlation_id)b::text[],
    %(causation_id)b::uuid[], %(traceparent)b::text[], %(data_version)b::smallint[], %(data)b::text[],
    %(student_id)b::uuid[], %(feed_number)b::int[])
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


class _Said(NamedTuple):
    """An event as APPEND_EVENTS takes it: field by field, a list of each."""

    ordinal: int
    event_id: UUID
    type: str
    topic: str
    subject: str
    partition_key: str
    partition: int
    correlation_id: str | None
    causation_id: UUID | None
    traceparent: str | None
    data_version: int
    data: str
    student_id: UUID | None
    feed_number: int | None


def _trace(event: Event, trace: str) -> str:
    return tracing.said(event.type, trace) if tracing.active() else child_traceparent(trace)


async def _write(tx: Tx) -> None:
    events: list[Event] = tx.outgoing
    if not events:
        return
    feed_numbers: Counter[str] = Counter()
    rows: list[_Said] = []
    for ordinal, (event_id, event) in enumerate(zip(new_ids(len(events)), events, strict=True)):
        student, subject, correlation = event.student, event.subject, event.correlation_id
        key = str(student or subject)
        cause = tx.causes.get(correlation) if correlation else None
        trace = cause.traceparent if cause else tx.trace
        feed_numbers[key] += event.visible
        rows.append(
            _Said(
                ordinal,
                event_id,
                event.type,
                event.topic,
                subject,
                key,
                partition_of(key),
                correlation,
                cause.event_id if cause else None,
                _trace(event, trace) if trace else None,
                event.version,
                encode_data(event),
                student,
                feed_numbers[key] if event.visible else None,
            )
        )
        tx.hint(key)
        tx.hint(KIND + event.type)
    columns = dict(zip(_Said._fields, map(list, zip(*rows, strict=True)), strict=True))
    tx.xid = await tx.value(APPEND_EVENTS, {**columns, "source": tx.source, "now": tx.now})


def partition_of(key: str) -> int:
    """Where a key's events go: stable across releases and machines."""
    return zlib.crc32(key.encode()) % PARTITIONS
