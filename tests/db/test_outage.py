"""The pool after an outage: back as soon as the server is, and never deceived by what has happened to it."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import psycopg
import pytest
from psycopg_pool import PoolTimeout
from structlog.testing import capture_logs

from caravan.db import Database, Tx
from caravan.db.embedded import EmbeddedPostgres
from caravan.db.pool import OWN_ID
from caravan.db.wake import EVERYTHING, RETRY_SECONDS, Wake
from caravan.errors import is_transient

DOWN_SECONDS = 4.0  # the pool alone would try at 0, 1, 3 and 7 seconds
BACK_SECONDS_MAX = 1.5
IDLE = 8  # connections that the pool holds when the server crashes
# What is not committed is not flushed; the WAL writer, which would do it within 0.2 s, sleeps.
SETTINGS = {"wal_writer_delay": "10s", "wal_writer_flush_after": "1GB"}


@pytest.fixture
def server(data_dir: Path) -> Iterator[EmbeddedPostgres]:
    server = EmbeddedPostgres(data_dir, extra_settings=SETTINGS)
    server.start()
    yield server
    server.stop()


def kill(server: EmbeddedPostgres) -> None:
    """As `pg_ctl stop -m immediate`."""
    pid = int((server.home / "data" / "postmaster.pid").read_text().splitlines()[0])
    os.kill(pid, signal.SIGQUIT)
    server.stop()


async def test_a_transaction_goes_through_soon_after_the_server_is_back(server: EmbeddedPostgres) -> None:
    async with Database(server.url) as db:
        async with db.transaction() as tx:
            await tx.value("select 1")
        kill(server)
        asking = asyncio.create_task(_ask(db))
        await asyncio.wait({asking}, timeout=DOWN_SECONDS)
        assert not asking.done()
        server.start()
        async with asyncio.timeout(BACK_SECONDS_MAX):
            await asking


async def _ask(db: Database) -> None:
    while True:
        try:
            async with db.transaction() as tx:
                await tx.value("select 1")
            return
        except (psycopg.Error, PoolTimeout) as error:
            if not is_transient(error):
                raise


async def test_no_dead_connection_is_lent_after_a_crash(server: EmbeddedPostgres) -> None:
    """Each costs an attempt and a pause: with a pool full of them a worker was seconds late, and a request refused."""
    async with Database(server.url, max_connections=IDLE) as db:
        async with AsyncExitStack() as held:
            for _ in range(IDLE):
                await held.enter_async_context(db.connection())
        kill(server)
        server.start()
        async with asyncio.timeout(BACK_SECONDS_MAX), db.transaction() as tx:
            assert await tx.value("select 1") == 1


COUNT_LISTENING = """
select count(*) from pg_stat_activity where application_name = 'caravan wake' and query like 'listen%'
"""


async def test_nobody_listens_for_nobody(server: EmbeddedPostgres) -> None:
    """Each that listens is woken by every hint there is."""
    speaker, listener = Wake(server.url), Wake(server.url)
    heard: asyncio.Queue[frozenset[str]] = asyncio.Queue()
    await speaker.start(listen=False)
    await listener.start()
    try:
        async with Database(server.url) as db, asyncio.timeout(DOWN_SECONDS):
            listener.subscribe(heard.put_nowait)
            assert await heard.get() == {EVERYTHING}
            speaker.send(["news"])
            assert await heard.get() == {"news"}
            assert await db.all(COUNT_LISTENING) == [{"count": 1}]
            listener.unsubscribe(heard.put_nowait)
            while await db.all(COUNT_LISTENING) != [{"count": 0}]:
                speaker.send(["more"])
            listener.subscribe(heard.put_nowait)
            assert await heard.get() == {EVERYTHING}
    finally:
        await listener.stop()
        await speaker.stop()


async def test_the_first_hint_after_a_crash_is_heard(server: EmbeddedPostgres) -> None:
    heard = asyncio.Event()
    listening = asyncio.Event()
    speaker, listener = Wake(server.url), Wake(server.url)
    listener.subscribe(lambda keys: heard.set() if "news" in keys else listening.set())
    await speaker.start(listen=False)
    await listener.start()
    try:
        async with asyncio.timeout(DOWN_SECONDS):
            while not heard.is_set():  # until both are there
                speaker.send(["news"])
                await asyncio.wait({asyncio.create_task(heard.wait())}, timeout=0.1)
        kill(server)
        listening.clear()
        server.start()
        async with asyncio.timeout(DOWN_SECONDS):
            await listening.wait()  # it listens again
            heard.clear()
            speaker.send(["news"])
            await heard.wait()
    finally:
        await speaker.stop()
        await listener.stop()


async def test_hints_that_are_lost_and_found_are_a_line_each(server: EmbeddedPostgres) -> None:
    """Each process wrote five a second for as long as the server was away."""
    back = asyncio.Event()
    wake = Wake(server.url)
    wake.subscribe(lambda keys: back.set())
    with capture_logs() as lines:
        await wake.start()
        try:
            async with asyncio.timeout(DOWN_SECONDS):
                await back.wait()
                back.clear()
                wake.send(["news"])
                while wake._own_pid == 0:  # noqa: ASYNC110 # pyright: ignore[reportPrivateUsage] - the other way stands too
                    await asyncio.sleep(0.01)
            kill(server)
            wake.send(["news"])
            await asyncio.sleep(RETRY_SECONDS * 5)
            assert sorted(line["event"] for line in lines) == LOST
            back.clear()
            server.start()
            async with asyncio.timeout(DOWN_SECONDS):
                while len(lines) < 4:  # noqa: ASYNC110 - a log has no signal
                    await asyncio.sleep(0.01)
        finally:
            await wake.stop()
    assert sorted(line["event"] for line in lines[2:]) == FOUND
    assert all(line["log_level"] == "warning" and line["error"] for line in lines[:2])
    assert all(line["log_level"] == "info" and line["seconds"] >= RETRY_SECONDS for line in lines[2:])


LOST = ["wake-up hints not heard, polling meanwhile", "wake-up hints not sent, pollers will find what waits"]
FOUND = ["wake-up hints are heard again", "wake-up hints are sent again"]


# ------------------------------------------------------------------ a commit that a crash cut off


async def crash_within(server: EmbeddedPostgres, then: Callable[[int], Awaitable[None]]) -> list[int]:
    """Insert a number in a transaction whose first attempt meets a crash between its last statement and its commit;
    the numbers that are there at last. `then` is given the id of the lost transaction."""
    attempts = 0

    async def work(tx: Tx) -> None:
        nonlocal attempts
        attempts += 1
        await tx.execute("insert into things values (1)")
        if attempts == 1:
            tx.xid = await tx.value(OWN_ID)  # as the outbox does, with its last statement
            kill(server)
            server.start()
            await then(int(str(tx.xid)))

    async with Database(server.url) as db:
        async with db.transaction() as tx:
            await tx.execute("create table things (n int)")
        try:
            await db.transact(work)
        finally:
            async with db.transaction() as tx:
                things = await tx.values("select n from things order by n")
    return things


async def test_a_commit_that_a_crash_cut_off_is_made_again(server: EmbeddedPostgres) -> None:
    """PostgreSQL has forgotten the id and calls it one of the future: that was answered as a bug (500)."""

    async def nothing(_id: int) -> None:
        return None

    assert await crash_within(server, nothing) == [1]


async def test_a_commit_that_a_crash_cut_off_is_not_taken_for_whoever_got_its_id(server: EmbeddedPostgres) -> None:
    """It was told as done, and was lost."""

    async def take(id: int) -> None:
        async with await psycopg.AsyncConnection.connect(server.url) as connection:
            row = (0,)
            while row[0] < id:
                found = await connection.execute("select pg_current_xact_id()::text::bigint")
                row = await found.fetchone() or row
                await connection.execute("insert into things values (2)")
                await connection.commit()
        assert row[0] == id, "the id was not given again: this proves nothing"

    with pytest.raises(psycopg.OperationalError) as caught:
        assert await crash_within(server, take) == [1, 2]
    assert is_transient(caught.value)
