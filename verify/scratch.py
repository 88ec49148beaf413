"""A PostgreSQL for the proof alone, in a temporary folder, gone afterwards.

The harness breaks what it touches, so it touches only databases that it made itself: each carries a mark (a comment on
the database with this run's secret), and nothing here opens a database without having seen it.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from itertools import count
from typing import Any, Self

import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from caravan.db import Database
from harness.postgres import PrivatePostgres, make_folder, memory_disk, migrate_now

PREFIX = "caravan-verify-"
TEMPLATE = "verify_template"
MEMORY_DISK_BYTES_MIN = 2 << 30

# What is proved here is logic; parts that crash PostgreSQL itself ask for a durable server.
FAST = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}
SMALL = {"max_connections": "100", "max_wal_size": "96MB", "min_wal_size": "32MB", "shared_buffers": "96MB"}


class NotScratch(Exception):
    """This database is not one that the harness made: it is left alone."""


@dataclass(frozen=True, slots=True)
class ScratchDatabase:
    """A database of this run; picklable, so that other processes of the run can open it too."""

    url: str
    mark: str

    @property
    def name(self) -> str:
        return str(conninfo_to_dict(self.url)["dbname"])

    def check(self) -> None:
        """Raises NotScratch where the database does not carry this run's mark."""
        try:
            with psycopg.connect(self.url, connect_timeout=10) as connection:
                row = connection.execute(READ_MARK).fetchone()
        except psycopg.OperationalError as error:
            raise NotScratch(f"This database can't be looked at: {str(error).strip()}") from None
        if not self.mark or row is None or row[0] != self.mark:
            raise NotScratch("This database was not made by this run of the harness: it is left alone.")

    def database(self, *, max_connections: int = 8, on_hints: Any = None) -> Database:
        """A pool on it, still to be opened (`async with`)."""
        self.check()
        return Database(self.url, max_connections=max_connections, on_hints=on_hints)


READ_MARK = """
select shobj_description(oid, 'pg_database') from pg_database where datname = current_database()
"""


@dataclass(frozen=True, slots=True)
class Databases:
    """Makes and drops databases of one scratch server. Picklable: give each process one with a `prefix` of its own."""

    url: str
    mark: str
    prefix: str = "verify"

    def of_process(self, name: object) -> Databases:
        """The same server's, for another process of this run; its names don't clash with ours."""
        self.migrated()  # made here once, not by two processes at a time
        return Databases(self.url, self.mark, f"{self.prefix}_{name}")

    def create(self, template: str | None = None) -> ScratchDatabase:
        """A new database: a migrated empty one, or a copy of `template` (see `freeze`)."""
        template = template or self.migrated()
        name = f"{self.prefix}_{next(_numbers)}"
        create = sql.SQL("create database {} template {} strategy file_copy")
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(create.format(sql.Identifier(name), sql.Identifier(template)))
        return self._marked(name)

    def create_empty(self) -> ScratchDatabase:
        """A new database without any of our tables."""
        name = f"{self.prefix}_{next(_numbers)}"
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(sql.SQL("create database {}").format(sql.Identifier(name)))
        return self._marked(name)

    def drop(self, database: ScratchDatabase) -> None:
        database.check()
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(database.name)))

    def freeze(self, database: ScratchDatabase) -> str:
        """Make a database into a template for `create`; nobody may be connected to it, now or later."""
        database.check()
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(
                sql.SQL("alter database {} allow_connections false").format(sql.Identifier(database.name))
            )
        return database.name

    def migrated(self) -> str:
        """The template of an empty migrated database."""
        with psycopg.connect(self.url, autocommit=True) as connection:
            there = connection.execute("select from pg_database where datname = %s", [TEMPLATE]).rowcount
            if not there:
                connection.execute(sql.SQL("create database {}").format(sql.Identifier(TEMPLATE)))
        if not there:
            template = self._marked(TEMPLATE)
            migrate_now(template.url)
            self.freeze(template)
        return TEMPLATE

    def _marked(self, name: str) -> ScratchDatabase:
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(
                sql.SQL("comment on database {} is {}").format(sql.Identifier(name), sql.Literal(self.mark))
            )
        return ScratchDatabase(make_conninfo(self.url, dbname=name), self.mark)


_numbers = count(1)


class ScratchServer(PrivatePostgres):
    """`durable`: it keeps what it committed when it is killed, as in production. `postgres` is there for parts that
    stop and start it."""

    def __init__(self, *, durable: bool = False, settings: dict[str, str] | None = None) -> None:
        self.durable = durable
        # On the memory disk where there is room; not where PostgreSQL is to fsync, which means nothing there.
        folder = make_folder(PREFIX, None if durable else memory_disk(MEMORY_DISK_BYTES_MIN))
        super().__init__(folder, SMALL | ({} if durable else FAST) | (settings or {}))
        self.databases = Databases("", f"caravan verify scratch {secrets.token_hex(12)}")

    def __enter__(self) -> Self:
        super().__enter__()
        self.databases = Databases(self.url, self.databases.mark)
        return self

    def create(self, template: str | None = None) -> ScratchDatabase:
        return self.databases.create(template)

    def drop(self, database: ScratchDatabase) -> None:
        self.databases.drop(database)
