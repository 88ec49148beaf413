"""Read students' feeds: what came after a number, and where each feed ends."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from uuid import UUID

from caravan.db import Database, Tx


@dataclass(frozen=True, slots=True)
class Ask:
    """What came on the feed of `student` after `after`, at most `room` frames."""

    student: UUID
    after: int
    room: int


@dataclass(slots=True)
class Answer:
    """`frames` follow `after` without a gap, ready to send. `resync`: they can't, that past is trimmed or never was."""

    head: int
    frames: list[tuple[int, str]]
    resync: bool


# Heads and frames of one snapshot. A feed has no gaps: its numbers are given under a lock that lasts until the commit,
# so whoever sees n sees everything before n. The frame is made once, here, however many sockets hear it.
READ_FEEDS = """
select asked.ordinal, coalesce(h.seq, 0) as head, f.seq, f.frame
from unnest((select %(ordinals)b::int[]), (select %(students)b::uuid[]), (select %(afters)b::bigint[]),
            (select %(rooms)b::int[]))
  as asked(ordinal, student_id, after, room)
left join student_feed_heads h on h.student_id = asked.student_id
left join lateral (
  select seq, jsonb_build_object('type', 'business-event', 'studentId', student_id, 'seq', seq,
           'event', data || jsonb_build_object('type', type, 'id', event_id, 'time', created_at))::text as frame
  from student_feed where student_id = asked.student_id and seq > asked.after order by seq limit asked.room
) f on asked.after < coalesce(h.seq, 0)
order by asked.ordinal, f.seq
"""


async def read_feeds(db: Database, asks: Iterable[Ask]) -> list[Answer]:
    """One answer per ask, in their order; one statement for all, in one round trip: a screen waits for it."""
    asks = list(asks)
    rows = await db.all(
        READ_FEEDS,
        {
            "ordinals": list(range(len(asks))),
            "students": [ask.student for ask in asks],
            "afters": [ask.after for ask in asks],
            "rooms": [ask.room for ask in asks],
        },
    )
    answers: dict[int, Answer] = {}
    for row in rows:
        answer = answers.setdefault(row["ordinal"], Answer(row["head"], [], resync=False))
        if row["seq"] is not None:
            answer.frames.append((row["seq"], row["frame"]))
    for ordinal, answer in answers.items():
        after = asks[ordinal].after
        first = answer.frames[0][0] if answer.frames else None
        answer.resync = after > answer.head or (after < answer.head and first != after + 1)
    return [answers[ordinal] for ordinal in range(len(asks))]


# Where the feeds of some students end: the poll that finds what no hint told of.
LIST_HEADS = """
select student_id, seq from student_feed_heads where student_id = any(%(students)b::uuid[])
"""


async def list_heads(tx: Tx, students: Collection[UUID]) -> dict[UUID, int]:
    """The last seq of each student; a student of whom nothing was said yet is at 0."""
    said = dict(await tx.tuples(LIST_HEADS, {"students": list(students)}))
    return {student: said.get(student, 0) for student in students}
