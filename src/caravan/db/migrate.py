"""Apply the numbered SQL files, in order, once, under an advisory lock; refuse what this release does not know."""

from __future__ import annotations

import hashlib
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
  number int primary key, name text not null, sha256 text not null, applied_at timestamptz not null default now())
"""


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


def migrations() -> list[Migration]:
    """The files of this release, by number."""
    found = [
        Migration(int(entry.name.split("_", 1)[0]), entry.name, entry.read_text())
        for entry in resources.files("caravan.db").joinpath("migrations").iterdir()
        if entry.name.endswith(".sql")
    ]
    return sorted(found, key=lambda migration: migration.number)


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
                    "insert into schema_migrations (number, name, sha256) values (%s, %s, %s)",
                    (migration.number, migration.name, migration.sha256),
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
    rows = await (await connection.execute("select number, name, sha256 from schema_migrations")).fetchall()
    for number, name, sha256 in rows:
        if number not in known:
            raise SchemaProblem(f"The database is of a newer release ({name}): run that release or newer on it.")
        if known[number].sha256 != sha256:
            raise SchemaProblem(f"The applied migration {name} differs from this release's file: restore the file.")
    return {number for number, _name, _sha in rows}
