"""Apply the numbered SQL files, in order, once, under an advisory lock; refuse what this release cannot stand on.

While a new release rolls out, processes of the one before run on its schema, are ready, and may be started again. So a
migration only adds; one that takes something away says which releases it does for, in a line of its own:
`-- needs: 0012` (those that know 0012 or later). Without that line any release that can read it may stay.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from typing import Any

import psycopg
from psycopg import errors as pg
from psycopg.rows import scalar_row

from caravan.errors import DomainError

LOCK_KEY = 7_225_071_001  # any constant: one migration at a time per database
SERVER_VERSION_MIN = 150000

CREATE_SCHEMA_MIGRATIONS = """
create table if not exists schema_migrations (
  number int primary key, name text not null, sha256 text not null, applied_at timestamptz not null default now(),
  needs int)
"""
# Written by releases since 0009; null: nobody has said that a release which doesn't know the file can stand on it.
HAS_NEEDS = """
select exists (
  select from pg_attribute where attrelid = 'schema_migrations'::regclass and attname = 'needs' and not attisdropped)
"""
ADD_NEEDS = "alter table schema_migrations add column if not exists needs int"
NEEDS = re.compile(r"^-- needs: (\d{4})$", re.MULTILINE)
# `needs` may not be there yet.
APPLIED = "select number, name, sha256, (to_jsonb(m) ->> 'needs')::int as needs from schema_migrations m"


class SchemaProblem(DomainError):
    """The database's schema and this release do not fit."""

    code = "SCHEMA_PROBLEM"
    status = 503


@dataclass(frozen=True, slots=True)
class Migration:
    number: int
    name: str
    text: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def needs(self) -> int:
        """The newest file that a release must know at least, to run on a schema with this one; 0: any does."""
        said = NEEDS.search(self.text)
        return int(said[1]) if said else 0


def migrations() -> list[Migration]:
    """The files of this release, by number."""
    found = [
        Migration(int(entry.name.split("_", 1)[0]), entry.name, entry.read_text())
        for entry in resources.files("caravan.db").joinpath("migrations").iterdir()
        if entry.name.endswith(".sql")
    ]
    return sorted(found, key=lambda migration: migration.number)


def newer_than_we_know(applied: Iterable[tuple[int, str, int | None]]) -> str | None:
    """Of (number, name, needs) the first that this release neither knows nor may stand on."""
    known = {migration.number for migration in migrations()}
    newest = max(known)
    for number, name, needs in applied:
        if number not in known and (needs is None or needs > newest):
            return name
    return None


async def migrate(url: str) -> list[str]:
    """Bring the database to this release's schema; the names of the files applied now.

    Raises SchemaProblem, in one line that says what to do, for a server that is too old, a missing extension, a newer
    schema or an applied file that was changed since.
    """
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
        await _check_server(connection)
        await connection.execute("select pg_advisory_lock(%s)", (LOCK_KEY,))
        try:
            return await _apply(connection)
        finally:
            await connection.execute("select pg_advisory_unlock(%s)", (LOCK_KEY,))


async def check_schema(url: str) -> None:
    """Refuse to serve on a schema that is older than this release needs, or newer than it knows."""
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
        await _check_server(connection)
        applied = await _applied(connection)
        missing = [m.name for m in migrations() if m.number not in applied]
        if missing:
            raise SchemaProblem(f"The database lacks {', '.join(missing)}: run `caravan migrate`.")


async def _apply(connection: psycopg.AsyncConnection[Any]) -> list[str]:
    await connection.execute(CREATE_SCHEMA_MIGRATIONS)
    async with connection.cursor(row_factory=scalar_row) as cursor:
        if not await (await cursor.execute(HAS_NEEDS)).fetchone():
            await connection.execute(ADD_NEEDS)
    applied = await _applied(connection)
    done: list[str] = []
    for migration in migrations():
        if migration.number in applied:
            continue
        try:
            async with connection.transaction():
                await connection.execute("set local lock_timeout = '5s'")
                await connection.execute(migration.text.encode())
                await connection.execute(
                    "insert into schema_migrations (number, name, sha256, needs) values (%s, %s, %s, %s)",
                    (migration.number, migration.name, migration.sha256, migration.needs),
                )
        except (pg.UndefinedFile, pg.FeatureNotSupported) as error:
            raise SchemaProblem(
                f"PostgreSQL lacks an extension ({str(error).splitlines()[0]}): install its contrib package"
                " (Debian: postgresql-contrib) and run `caravan migrate` again."
            ) from error
        except pg.InsufficientPrivilege as error:
            raise SchemaProblem(
                f"The database user may not migrate ({str(error).splitlines()[0]}): grant it CREATE on the database."
            ) from error
        done.append(migration.name)
    return done


async def _check_server(connection: psycopg.AsyncConnection[Any]) -> None:
    version = connection.info.server_version
    if version < SERVER_VERSION_MIN:
        raise SchemaProblem(
            f"PostgreSQL {version // 10000} is too old: Caravan needs 15 or newer. Upgrade the server, or leave"
            " POSTGRES_URL unset to use the embedded one."
        )


async def _applied(connection: psycopg.AsyncConnection[Any]) -> set[int]:
    known = {migration.number: migration for migration in migrations()}
    async with connection.cursor(row_factory=scalar_row) as cursor:
        await cursor.execute("select to_regclass('schema_migrations') is not null")
        if not await cursor.fetchone():
            return set()
    rows = await (await connection.execute(APPLIED)).fetchall()
    if newer := newer_than_we_know((number, name, needs) for number, name, _sha, needs in rows):
        raise SchemaProblem(f"The database is of a newer release ({newer}): run that release or newer on it.")
    for number, name, sha256, _needs in rows:
        if number in known and known[number].sha256 != sha256:
            raise SchemaProblem(f"The applied migration {name} differs from this release's file: restore the file.")
    return {number for number, _name, _sha, _needs in rows}
