"""PostgreSQL crashes under a consumer that stays."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg

from caravan.db import Database, Tx
from caravan.db.embedded import EmbeddedPostgres
from caravan.db.migrate import migrate
from caravan.errors import is_transient
from caravan.eventlog import outbox
from caravan.eventlog.consumer import Consumer
from caravan.eventlog.subscription import Subscription
from caravan.eventlog.workers import Worker
from caravan.events import CourseUpdated
from caravan.ids import new_id

FORGOTTEN = 30  # transactions that roll back: their ids leave no durable trace
# A rollback is not flushed; the WAL writer, which would do it within 0.2 s, sleeps.
SETTINGS = {"wal_writer_delay": "10s", "wal_writer_flush_after": "1GB"}


def crash(server: EmbeddedPostgres) -> None:
    """As `pg_ctl restart -m immediate`."""
    pid = int((server.home / "data" / "postmaster.pid").read_text().splitlines()[0])
    os.kill(pid, signal.SIGQUIT)
    server.stop()
    server.start()


async def turn_until(heard: list[Any], consumer: Consumer) -> None:
    """Turn until something is heard, or surely would have been. The connections of before the crash are dead."""
    turns = 0
    async with asyncio.timeout(10):
        while not heard and turns < 3:
            try:
                await consumer.run_once()
                turns += 1
            except psycopg.Error as error:
                if not is_transient(error):
                    raise


async def say(db: Database) -> tuple[UUID, int]:
    """An event, and the id of the transaction that said it."""
    course = new_id()

    async def work(tx: Tx) -> int:
        outbox.append(tx, [CourseUpdated(course_id=course, changed=("title",))])
        return await tx.value("select pg_current_xact_id()::text::bigint")

    return course, await db.transact(work)


async def test_an_event_whose_transaction_id_was_used_before_the_crash_is_heard(data_dir: Path) -> None:
    """After a crash PostgreSQL gives ids again that left no trace; a snapshot of before takes them for seen."""
    server = EmbeddedPostgres(data_dir, extra_settings=SETTINGS)
    heard: list[Any] = []

    async def hear(tx: Tx, events: Sequence[Any]) -> None:
        heard.extend(event.course_id for event in events)

    subscription = Subscription(service="listener", group="listeners", label="Listener", handlers={CourseUpdated: hear})
    url = server.start()
    try:
        await migrate(url)
        worker = Worker(service="listener", group="listeners", build="test", name="listener")
        async with Database(url) as db:
            consumer = Consumer(db, subscription, worker)
            await consumer.enter()
            await consumer.run_once()
            last = 0
            async with await psycopg.AsyncConnection.connect(url) as connection:
                for _ in range(FORGOTTEN):
                    row = await (await connection.execute("select pg_current_xact_id()::text::bigint")).fetchone()
                    assert row
                    last = row[0]
                    await connection.rollback()
            await consumer.run_once()  # nothing for it; its place moves on, in its memory
            crash(server)
            course, said_by = await say(db)
            assert said_by <= last, "the id was not used twice: this proves nothing"
            await turn_until(heard, consumer)
    finally:
        server.stop()
    assert heard == [course]
