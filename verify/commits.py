"""A round of `races`: transactions that spoke in one order commit in another, while several consumers read the log.

Every event reaches the group once, and a student's events in their order, whoever reads them: consumers share the
group's partitions, and one of them leaves in the middle and comes back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any
from uuid import UUID

from caravan.db import Database, Tx
from caravan.eventlog import outbox
from caravan.eventlog.consumer import Consumer
from caravan.eventlog.subscription import Subscription
from caravan.eventlog.workers import Worker
from caravan.events import StudentUpdated
from caravan.ids import new_id
from verify.rounds import THIRTY_TWO, Ring

GROUP = "verify-readers"
READERS = 3
SECONDS_MAX = 20.0
# A transaction that is held open on purpose, on a machine that may be slow.
PATIENT = """
select set_config(name, '0', true)
from unnest(array['lock_timeout', 'statement_timeout', 'idle_in_transaction_session_timeout']) as name
"""
PAUSES = 0.25  # of the commits: all that is said is heard before the next one

CREATE_HEARD = """
create table if not exists verify_heard (
  place bigint generated always as identity, reader text not null, student_id uuid not null, said text not null)
"""
INSERT_HEARD = """
insert into verify_heard (reader, student_id, said)
select %(reader)s, student, said
from unnest(%(students)b::uuid[], %(said)b::text[]) with ordinality as u(student, said, n) order by n
"""
HEARD = "select said from verify_heard where student_id = %(student)s order by place"
COUNT_HEARD = "select count(*) from verify_heard where student_id = any(%(students)b::uuid[])"
SAID = """
select data -> 'changed' ->> 0 from outbox
where type = 'STUDENT_UPDATED' and subject = %(student)s order by id
"""


class Readers:
    """Consumers of one group of our own, who write down what they hear."""

    def __init__(self, db: Database) -> None:
        self.consumers = [self._reader(db, f"reader-{number}") for number in range(READERS)]

    @staticmethod
    def _reader(db: Database, name: str) -> Consumer:
        async def hear(tx: Tx, events: Sequence[Any]) -> None:
            students = [event.student_id for event in events]
            said = [event.changed[0] for event in events]
            await tx.execute(INSERT_HEARD, {"reader": name, "students": students, "said": said})

        subscription = Subscription(service=name, group=GROUP, label="Reader", handlers={StudentUpdated: hear})
        return Consumer(db, subscription, Worker(service=name, group=GROUP, build="verify", name=name))

    async def enter(self) -> None:
        for consumer in self.consumers:
            await consumer.enter()


async def reversed_commits(ring: Ring, readers: Readers) -> None:
    students = [new_id() for _ in range(THIRTY_TWO // 2)]
    gates = [asyncio.Event() for _ in range(THIRTY_TWO)]
    spoken: asyncio.Queue[int] = asyncio.Queue()
    done, left = asyncio.Event(), asyncio.Event()
    turned = asyncio.Semaphore(0)
    await readers.enter()
    leaver = ring.dice.randrange(READERS)

    async def speak(place: int) -> None:
        """Say something; commit when told to. The second of a student waits until the first has committed."""
        student = students[place % len(students)]
        async with ring.db.transaction("verify") as tx:
            await tx.execute(PATIENT)
            outbox.append(tx, [StudentUpdated(student_id=student, changed=(str(place),))])
            assert tx.flush
            await tx.flush(tx)
            tx.flush = None
            spoken.put_nowait(place)
            await gates[place].wait()

    async def read(number: int, consumer: Consumer) -> None:
        async with asyncio.timeout(SECONDS_MAX):
            while not done.is_set():
                await consumer.run_once()
                turned.release()
                heard = await _count(ring, students)
                if number == leaver and not left.is_set() and heard > THIRTY_TWO // 4:
                    left.set()
                    await consumer.leave()
                    await consumer.enter()
                if heard >= THIRTY_TWO:
                    done.set()

    async def commit() -> None:
        """In an order that has nothing to do with the order of the ids."""
        waiting: list[int] = []
        # Let some gather, so that there is an order to turn around.
        while len(waiting) < len(students):
            waiting.append(await spoken.get())
        for committed in range(1, THIRTY_TWO + 1):
            while not waiting or not spoken.empty():
                waiting.append(await spoken.get())
            gates[waiting.pop(ring.dice.randrange(len(waiting)))].set()
            if ring.dice.random() < PAUSES:  # what comes later may have lower ids than what is heard by then
                while await _count(ring, students) < committed:
                    await turned.acquire()

    await _within(ring, students, speak, read, commit, readers)
    async with ring.db.transaction("verify", read_only=True) as tx:
        for student in students:
            said = await tx.values(SAID, {"student": str(student)})
            heard = await tx.values(HEARD, {"student": student})
            ring.must("heard", heard, said)


async def _within(
    ring: Ring,
    students: Sequence[UUID],
    speak: Callable[[int], Coroutine[Any, Any, None]],
    read: Callable[[int, Consumer], Coroutine[Any, Any, None]],
    commit: Callable[[], Coroutine[Any, Any, None]],
    readers: Readers,
) -> None:
    """All of them, until everything is heard or it takes too long."""
    try:
        async with asyncio.timeout(SECONDS_MAX), asyncio.TaskGroup() as tasks:
            for place in range(THIRTY_TWO):
                tasks.create_task(speak(place))
            for number, consumer in enumerate(readers.consumers):
                tasks.create_task(read(number, consumer))
            tasks.create_task(commit())
    except* TimeoutError:
        ring.wrong(f"{await _count(ring, students)} of {THIRTY_TWO} events were heard in {SECONDS_MAX:.0f} s")


async def _count(ring: Ring, students: Sequence[UUID]) -> int:
    return await ring.value(COUNT_HEARD, students=list(students))
