"""Migrations: once, in order, and a clear line for what can't be."""

from __future__ import annotations

import asyncio

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from caravan.apps.health import check_ready
from caravan.db import Database
from caravan.db.migrate import Migration, SchemaProblem, check_schema, migrate, migrations


@pytest.fixture
def empty_url(postgres_url: str) -> str:
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute("drop database if exists empty with (force)")
        connection.execute(sql.SQL("create database empty"))
    return make_conninfo(postgres_url, dbname="empty")


async def test_two_processes_migrate_at_once_and_each_file_is_applied_once(empty_url: str) -> None:
    with pytest.raises(SchemaProblem, match="run `caravan migrate`"):
        await check_schema(empty_url)
    applied = await asyncio.gather(migrate(empty_url), migrate(empty_url))
    assert sorted(map(len, applied)) == [0, len(migrations())]
    await check_schema(empty_url)


FUTURE = "insert into schema_migrations (number, name, sha256, needs) values (9999, '9999_future.sql', '', %s)"


@pytest.mark.parametrize("needs", [None, 9998])
async def test_a_newer_schema_that_takes_away_is_refused_in_one_line(database_url: str, needs: int | None) -> None:
    with psycopg.connect(database_url) as connection:
        connection.execute(FUTURE, (needs,))
    for refused in (migrate, check_schema):
        with pytest.raises(SchemaProblem, match=r"newer release \(9999_future.sql\)"):
            await refused(database_url)
    async with Database(database_url) as db:
        assert "9999_future.sql" in (await check_ready(db, [])).problems[0]


@pytest.mark.parametrize("needs", [0, migrations()[-1].number])
async def test_a_release_stands_on_the_next_ones_schema(database_url: str, needs: int) -> None:
    """Its processes are ready, may be started again, and its `migrate` leaves the schema as it is."""
    with psycopg.connect(database_url) as connection:
        connection.execute(FUTURE, (needs,))
    assert await migrate(database_url) == []
    await check_schema(database_url)
    async with Database(database_url) as db:
        assert (await check_ready(db, [])).ready


async def test_a_schema_of_before_is_told_what_each_file_needs(database_url: str) -> None:
    with psycopg.connect(database_url) as connection:
        connection.execute("alter table schema_migrations drop column needs")
    await check_schema(database_url)
    async with Database(database_url) as db:
        assert (await check_ready(db, [])).ready
    assert await migrate(database_url) == []
    with psycopg.connect(database_url) as connection:
        connection.execute(FUTURE, (0,))
    await check_schema(database_url)


def test_a_file_says_whom_it_does_for() -> None:
    assert Migration(12, "0012_x.sql", "-- Drop it.\n-- needs: 0011\ndrop table x;").needs == 11
    assert Migration(12, "0012_x.sql", "-- what it needs: 0011\n").needs == 0


async def test_an_applied_file_that_changed_is_refused(database_url: str) -> None:
    with psycopg.connect(database_url) as connection:
        connection.execute("update schema_migrations set sha256 = 'other' where number = 1")
    with pytest.raises(SchemaProblem, match="differs"):
        await migrate(database_url)


async def test_ids_made_by_the_server_are_time_ordered_uuids_in_every_version(database_url: str) -> None:
    with psycopg.connect(database_url) as connection:
        made = connection.execute("select new_id() from generate_series(1, 50)").fetchall()
    ids = [row[0] for row in made]
    assert len(set(ids)) == 50
    assert all(i.version == 7 for i in ids)
