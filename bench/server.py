"""A PostgreSQL for measuring alone: in a temporary folder on the disk, durable, the same settings for everybody.

fsync, synchronous_commit, full_page_writes and autovacuum stay on. Databases are copies of templates that are made
once, so that every run begins with the same pages.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from types import TracebackType

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from caravan.db.embedded import EmbeddedPostgres, EmbeddedPostgresError
from caravan.db.migrate import migrate

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


class Server:
    """A context manager. `settings` are added to ours; `counting` loads pg_stat_statements."""

    def __init__(self, settings: dict[str, str] | None = None, *, counting: bool = False) -> None:
        self.settings = SETTINGS | (COUNTING if counting else {}) | (settings or {})
        self.counting = counting
        self.folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-"))
        self.folder.chmod(0o711)  # PostgreSQL's own user must get in when root runs this
        self.postgres = EmbeddedPostgres(self.folder, extra_settings=self.settings)
        self.url = ""
        self._numbers = count(1)

    def __enter__(self) -> Server:
        try:
            self.url = self.postgres.start()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._remove()

    def _remove(self) -> None:
        try:
            self.postgres.stop()
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

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
            with ThreadPoolExecutor(1) as thread:  # from synchronous code, whether or not a loop runs here
                thread.submit(lambda: asyncio.run(migrate(self.url_of(EMPTY)))).result()
        return EMPTY

    def _run(self, statement: sql.Composed) -> None:
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(statement)


def sweep() -> None:
    """Runs that were killed left a server and a folder each: end those whose process is gone."""
    if not Path("/proc/self").exists():
        return  # only where we can tell who lives
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*-*"):
        owner = folder.name.removeprefix(PREFIX).split("-")[0]
        try:
            if folder.stat().st_uid != os.geteuid() or not owner.isdigit() or Path(f"/proc/{owner}").exists():
                continue
            left = EmbeddedPostgres(folder)
            if left.is_running():
                left.start()  # takes it over
                left.stop()
        except (FileNotFoundError, EmbeddedPostgresError):
            continue  # another run sweeps too
        shutil.rmtree(folder, ignore_errors=True)
