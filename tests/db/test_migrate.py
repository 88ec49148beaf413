"""Migrations: once, in order, and a clear line for what can't be."""

from __future__ import annotations

import asyncio

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from caravan.db.migrate import SchemaProblem, check_schema, migrate, migrations


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


async def test_a_newer_schema_is_refused_in_one_line(database_url: str) -> None:
    with psycopg.connect(database_url) as connection:
        connection.execute("insert into schema_migrations (number, name, sha256) values (9999, '9999_future.sql', '')")
    for refused in (migrate, check_schema):
        with pytest.raises(SchemaProblem, match=r"newer release \(9999_future.sql\)"):
            await refused(database_url)


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
