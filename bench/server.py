"""A PostgreSQL for measuring alone: in a temporary folder on the disk, durable, the same settings for everybody.

fsync, synchronous_commit, full_page_writes and autovacuum stay on. Databases are copies of templates that are made
once, so that every run begins with the same pages.
"""

from __future__ import annotations

from itertools import count

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from harness.postgres import PrivatePostgres, make_folder, migrate_now

PREFIX = "caravan-bench-server-"
EMPTY = "bench_empty"

# Room for memory and for WAL, so that no run is about a checkpoint; everything that makes a commit durable is on.
SETTINGS = {
    "fsync": "on",
    "synchronous_commit": "on",
    "full_page_writes": "on",
    "autovacuum": "on",
    "shared_buffers": "1GB",
    "max_wal_size": "8GB",
    "min_wal_size": "1GB",
    "checkpoint_timeout": "15min",
    "maintenance_work_mem": "512MB",
    "max_connections": "200",
}
# For a run that counts and is not timed.
COUNTING = {
    "shared_preload_libraries": "pg_stat_statements",
    "pg_stat_statements.max": "10000",
    "pg_stat_statements.track": "top",
    "pg_stat_statements.track_utility": "off",
    "pg_stat_statements.track_planning": "on",
    "compute_query_id": "on",
}


class Server(PrivatePostgres):
    """`settings` are added to ours; `counting` loads pg_stat_statements."""

    def __init__(self, settings: dict[str, str] | None = None, *, counting: bool = False) -> None:
        self.settings = SETTINGS | (COUNTING if counting else {}) | (settings or {})
        self.counting = counting
        super().__init__(make_folder(PREFIX), self.settings)
        self._numbers = count(1)

    def url_of(self, name: str) -> str:
        return make_conninfo(self.url, dbname=name)

    def create(self, name: str | None = None, template: str | None = None) -> str:
        """A new database's URL: a copy of `template`, or migrated and empty. Replaces one of the same name."""
        name = name or f"bench_{next(self._numbers)}"
        template = template or self._empty()
        self.drop(name)
        copy = sql.SQL("create database {} template {} strategy file_copy")
        self._run(copy.format(sql.Identifier(name), sql.Identifier(template)))
        url = self.url_of(name)
        if self.counting:
            with psycopg.connect(url, autocommit=True) as connection:
                connection.execute("create extension if not exists pg_stat_statements")
        return url

    def drop(self, name: str) -> None:
        self._run(sql.SQL("drop database if exists {} with (force)").format(sql.Identifier(name)))

    def settle(self, name: str) -> None:
        """Freeze, analyse and flush a database before it is copied or measured."""
        with psycopg.connect(self.url_of(name), autocommit=True) as connection:
            connection.execute("vacuum (freeze, analyze)")
            connection.execute("checkpoint")

    def _empty(self) -> str:
        with psycopg.connect(self.url, autocommit=True) as connection:
            there = connection.execute("select from pg_database where datname = %s", [EMPTY]).rowcount
        if not there:
            self._run(sql.SQL("create database {}").format(sql.Identifier(EMPTY)))
            migrate_now(self.url_of(EMPTY))
        return EMPTY

    def _run(self, statement: sql.Composed) -> None:
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(statement)
