"""The two ways to open a transaction, and what they promise."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from psycopg import errors as pg
from psycopg import sql

from caravan.db import Database, Tx
from caravan.db.tx import RowMissing
from caravan.errors import is_transient

COUNT = "select count(*) from things"


@pytest.fixture
async def things(db: Database) -> Database:
    async with db.transaction() as tx:
        await tx.execute("create table things (n int primary key)")
    return db


async def count(db: Database) -> int:
    async with db.transaction() as tx:
        return await tx.value(COUNT)


async def test_a_transaction_commits_on_leaving_and_rolls_back_on_any_exception(things: Database) -> None:
    async with things.transaction() as tx:
        await tx.execute("insert into things values (1)")
    with pytest.raises(ZeroDivisionError):
        async with things.transaction() as tx:
            await tx.execute("insert into things values (2)")
            raise ZeroDivisionError
    assert await count(things) == 1


async def test_now_is_one_instant_of_the_database(db: Database) -> None:
    async with db.transaction() as tx:
        assert await tx.value("select now()") == tx.now
        assert tx.now.tzinfo is not None


async def test_the_connection_that_was_used_last_is_used_next(db: Database) -> None:
    """Its server process knows our tables and plans; those of a burst are left alone until they are closed."""
    async with db.connection() as first, db.connection() as second, db.connection() as last:
        assert len({first.info.backend_pid, second.info.backend_pid, last.info.backend_pid}) == 3
    async with db.connection() as next_one:
        used = next_one.info.backend_pid
    for _ in range(3):
        async with db.transaction() as tx:
            assert await tx.value("select pg_backend_pid()") == used


async def test_transact_runs_the_whole_again_after_a_serialization_failure(things: Database) -> None:
    attempts = 0

    async def work(tx: Tx) -> int:
        nonlocal attempts
        attempts += 1
        await tx.execute("insert into things values (1)")
        if attempts < 3:
            raise pg.SerializationFailure("try again")
        return attempts

    assert await things.transact(work) == 3
    assert await count(things) == 1


async def test_transact_repeats_nothing_that_cannot_help(things: Database) -> None:
    attempts = 0

    async def work(tx: Tx) -> None:
        nonlocal attempts
        attempts += 1
        await tx.execute("insert into things values (1), (1)")

    with pytest.raises(pg.UniqueViolation):
        await things.transact(work)
    assert attempts == 1


async def test_a_cancelled_task_leaves_no_transaction_behind(things: Database) -> None:
    started = asyncio.Event()

    async def work() -> None:
        async with things.transaction() as tx:
            await tx.execute("insert into things values (1)")
            started.set()
            await tx.value("select pg_sleep(30)")

    task = asyncio.create_task(work())
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    async with asyncio.timeout(5):
        assert await count(things) == 0
        async with things.transaction() as tx:
            idle = await tx.value(
                "select count(*) from pg_stat_activity where datname = current_database()"
                " and state like 'idle in transaction%%' and pid <> pg_backend_pid()"
            )
    assert idle == 0


async def test_a_session_that_sits_in_a_transaction_is_ended(things: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    async with things.transaction() as tx:
        assert await tx.value("show idle_in_transaction_session_timeout") == "8s"
    with pytest.raises(pg.IdleInTransactionSessionTimeout) as caught:
        async with things.transaction() as tx:
            await tx.execute("set local idle_in_transaction_session_timeout = '50ms'")
            await asyncio.to_thread(_wait_until_ended, tx, things.url)
            await tx.execute("insert into things values (1)")
    assert is_transient(caught.value)
    assert await count(things) == 0


def _wait_until_ended(tx: Tx, url: str) -> None:
    pid = tx.connection.info.backend_pid
    with psycopg.connect(url, autocommit=True) as watcher:
        while watcher.execute("select 1 from pg_stat_activity where pid = %s", (pid,)).fetchone():
            pass


async def test_find_one_and_value(things: Database) -> None:
    async with things.transaction() as tx:
        assert await tx.find("select n from things") is None
        assert await tx.value("select n from things") is None
        with pytest.raises(RowMissing):
            await tx.one("select n from things")
        await tx.execute("insert into things values (1), (2)")
        with pytest.raises(psycopg.DataError):
            await tx.find("select n from things")
        assert await tx.values("select n from things order by n") == [1, 2]


async def test_a_read_only_transaction_cannot_write(things: Database) -> None:
    with pytest.raises(pg.ReadOnlySqlTransaction):
        async with things.transaction(read_only=True) as tx:
            await tx.execute("insert into things values (1)")


async def test_hints_are_sent_after_the_commit_only(things: Database) -> None:
    sent: list[str] = []
    things.on_hints = sent.extend
    with pytest.raises(ZeroDivisionError):
        async with things.transaction() as tx:
            tx.hint("lost")
            raise ZeroDivisionError
    async with things.transaction() as tx:
        tx.hint("kept")
        assert sent == []
    assert sent == ["kept"]


@pytest.mark.parametrize("done", [True, False])
async def test_a_commit_whose_answer_is_lost_happens_once(
    things: Database, monkeypatch: pytest.MonkeyPatch, done: bool
) -> None:
    """An operator's partial refund was given back twice: the lost commit had been done, and was run again."""
    async with things.transaction() as tx:
        await tx.execute("alter table things add at timestamptz default clock_timestamp()")
    told: list[object] = []
    things.on_hints = told.append
    execute = psycopg.AsyncConnection[object].execute
    lost = 0

    async def lose(connection: psycopg.AsyncConnection[object], query: object, *args: object) -> object:
        nonlocal lost
        if query == "commit" and attempts and not lost:
            lost += 1
            if done:
                await execute(connection, query, *args)  # pyright: ignore[reportCallIssue, reportArgumentType]
            connection.pgconn.finish()
            raise psycopg.OperationalError("server closed the connection unexpectedly")
        return await execute(connection, query, *args)  # pyright: ignore[reportCallIssue, reportArgumentType]

    attempts: list[int] = []

    async def work(tx: Tx) -> int:
        attempts.append(len(attempts) + 1)
        await tx.execute("insert into things select coalesce(max(n), 0) + 1 from things")
        tx.hint("somebody")
        return attempts[-1]

    monkeypatch.setattr(psycopg.AsyncConnection, "execute", lose)
    assert await things.transact(work) == (1 if done else 2)
    monkeypatch.undo()
    assert (lost, await count(things), told) == (1, 1, [{"somebody"}])


async def test_a_savepoint_that_cannot_be_undone_raises_what_failed_first(things: Database) -> None:
    with pytest.raises(ZeroDivisionError):  # not that the connection is closed
        async with things.transaction() as tx, tx.savepoint():
            await tx.execute("insert into things values (1)")
            await tx.connection.close()
            raise ZeroDivisionError
    assert await count(things) == 0


async def test_what_a_savepoint_could_not_undo_is_never_committed(things: Database) -> None:
    """The rollback to it fails though the connection lives, and its caller goes on after what failed first."""
    with pytest.raises(psycopg.OperationalError):
        async with things.transaction() as tx:
            execute = tx.connection.execute

            async def refuse(query: Any, *args: Any, **options: Any) -> Any:
                if query == "rollback to savepoint part":
                    raise psycopg.OperationalError("no answer came")
                return await execute(query, *args, **options)

            tx.connection.execute = refuse
            with suppress(ZeroDivisionError):
                async with tx.savepoint():
                    await tx.execute("insert into things values (1)")
                    raise ZeroDivisionError
    assert await count(things) == 0


async def test_hours_are_counted_right_where_the_servers_own_zone_changes_its_clocks(database_url: str) -> None:
    with psycopg.connect(database_url, autocommit=True) as connection:
        name = sql.Identifier(connection.info.dbname)
        connection.execute(sql.SQL("alter database {} set timezone = 'America/New_York'").format(name))
    async with Database(database_url) as db:
        async with db.transaction() as tx:
            assert tx.now.utcoffset() == timedelta(0)
            before, after = await tx.value("select array['2027-11-07T05:59Z', '2027-11-07T06:01Z']::timestamptz[]")
        assert before < after
        assert after - before == timedelta(minutes=2)
        [row] = await db.all("select '2027-03-14T06:59Z'::timestamptz as before")
        assert row["before"] + timedelta(hours=12) == datetime(2027, 3, 14, 18, 59, tzinfo=UTC)
