"""A database in a file, and back: PostgreSQL's own programs, from the wheel or from CARAVAN_POSTGRES_BIN.

A file is whole or not there: pg_dump's own format with a seal behind it, for pg_restore doesn't notice a file whose end
was cut off. A database is restored in one transaction, or not at all; what it held before goes in the same one.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
from pathlib import Path

import psycopg

from caravan.db.embedded_binaries import find_binaries, run_as
from caravan.errors import DomainError

PROBLEM_LETTERS_MAX = 300
SEAL = b"caravan backup sha256 "
SEAL_BYTES = len(SEAL) + 32
CHUNK_BYTES = 1 << 20


class BackupFailed(DomainError):
    """The backup was not made."""

    code = "BACKUP_FAILED"
    status = 500


class RestoreFailed(DomainError):
    """Nothing was restored: the database is as it was."""

    code = "RESTORE_FAILED"
    status = 500


class DatabaseNotEmpty(DomainError):
    """The database holds something: say --replace to lose that, or restore into an empty one."""

    code = "DATABASE_NOT_EMPTY"
    status = 409


class DatabaseInUse(DomainError):
    """Services are connected to this database: stop them first (`caravan up`, `caravan serve`)."""

    code = "DATABASE_IN_USE"
    status = 409


def backup(url: str, file: Path) -> int:
    """Write the whole database to `file` (new, mode 0600), as of one moment; its size in bytes. Raises BackupFailed."""
    file = file.absolute()
    if file.exists():
        raise BackupFailed(f"There is a file {file} already: choose another name.")
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
    except OSError as error:
        raise BackupFailed(f"{file.parent}: {error.strerror}.") from None
    scratch = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as into:
            command = [_program("pg_dump"), "--format=custom", "--no-owner", "--no-privileges"]
            done = subprocess.run(command, stdout=into, stderr=subprocess.PIPE, env=_environment(url), check=False)
            if done.returncode:
                raise BackupFailed(f"pg_dump: {_said(done.stderr)}")
            into.seek(0, os.SEEK_END)
            into.write(SEAL + _digest(scratch, into.tell()))
            into.flush()
            os.fsync(into.fileno())
        os.link(scratch, file)  # never over a file that came meanwhile
    except OSError as error:
        raise BackupFailed(f"{file}: {error.strerror}.") from None
    finally:
        scratch.unlink(missing_ok=True)
    return file.stat().st_size


def _digest(file: Path, size: int) -> bytes:
    """Of the first `size` bytes."""
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while size > 0 and (chunk := content.read(min(size, CHUNK_BYTES))):
            digest.update(chunk)
            size -= len(chunk)
    return digest.digest()


def _check_seal(file: Path) -> None:
    """Raises RestoreFailed."""
    try:
        size = file.stat().st_size - SEAL_BYTES
        with file.open("rb") as content:
            content.seek(max(0, size))
            seal = content.read()
        whole = size > 0 and seal == SEAL + _digest(file, size)
    except OSError as error:
        raise RestoreFailed(f"{file}: {error.strerror}.") from None
    if not whole:
        raise RestoreFailed(f"{file} is no whole backup of ours: it was cut off or changed, or is something else.")


COUNT_TABLES = "select count(*) from pg_class where relnamespace = 'public'::regnamespace and relkind in ('r', 'p')"
COUNT_OTHERS = """
select count(*) from pg_stat_activity
where datname = current_database() and pid <> pg_backend_pid() and backend_type = 'client backend'
"""
EMPTY_IT = "drop schema if exists public cascade; create schema public;"


def restore(url: str, file: Path, *, replace: bool) -> None:
    """Make the database what the file says, in one transaction.

    Raises RestoreFailed, DatabaseNotEmpty (without `replace`) and DatabaseInUse; then nothing was changed.
    """
    _check_seal(file)
    with psycopg.connect(url, autocommit=True) as connection:
        if _count(connection, COUNT_OTHERS):
            raise DatabaseInUse
        if _count(connection, COUNT_TABLES) and not replace:
            raise DatabaseNotEmpty
    _pour(url, file)


def _count(connection: psycopg.Connection[tuple[int]], query: str) -> int:
    row = connection.execute(query.encode()).fetchone()
    return row[0] if row else 0


def _pour(url: str, file: Path) -> None:
    """What pg_restore writes is what psql runs. A reader that broke off must not look like the end of the script, so
    psql is ended, which rolls back, before it can see one."""
    reading = [_program("pg_restore"), "--no-owner", "--no-privileges", "--file=-", str(file)]
    running = [_program("psql"), "--no-psqlrc", "--quiet", "--set=ON_ERROR_STOP=1", "--single-transaction"]
    running += [f"--command={EMPTY_IT}", "--file=-"]
    with (
        tempfile.TemporaryFile() as problems,
        tempfile.TemporaryFile() as said,
        subprocess.Popen(reading, stdout=subprocess.PIPE, stderr=problems) as reader,
        subprocess.Popen(
            running, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=said, env=_environment(url)
        ) as runner,
    ):
        assert reader.stdout is not None
        assert runner.stdin is not None
        try:
            while chunk := reader.stdout.read(CHUNK_BYTES):
                runner.stdin.write(chunk)
            if reader.wait():
                runner.kill()
                problems.seek(0)
                raise RestoreFailed(f"{file} can't be read to its end ({_said(problems.read())}); nothing was changed.")
            runner.stdin.close()
        except BrokenPipeError:
            pass  # psql has said why
        finally:
            reader.kill()
            reader.wait()
            code = runner.wait()
        if code:
            said.seek(0)
            raise RestoreFailed(f"psql: {_said(said.read())}; nothing was changed.")


def _program(name: str) -> str:
    path = Path(find_binaries(run_as(None)).program(name))
    if not path.exists():
        raise BackupFailed(f"There is no {name} in {path.parent}: CARAVAN_POSTGRES_BIN names a folder without it.")
    return str(path)


def _environment(url: str) -> dict[str, str]:
    """The address for libpq's programs: not on their command lines, where everybody on the machine could read it."""
    options = psycopg.pq.Conninfo.parse(url.encode())
    given = {each.envvar.decode(): each.val.decode() for each in options if each.envvar and each.val is not None}
    return {"PATH": os.defpath, "LC_ALL": "C"} | given


def _said(output: bytes) -> str:
    """The first line of what a program complained of."""
    lines = [line for line in output.decode(errors="replace").splitlines() if line.strip()]
    return (lines[0] if lines else "no word")[:PROBLEM_LETTERS_MAX].rstrip(".")
