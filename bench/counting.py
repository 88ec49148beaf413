"""What work asked of the server: commits, statements, WAL and pages, which do not move with the machine's mood."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg

QUIET_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class Counted:
    """`statements` None where pg_stat_statements is not loaded; transaction control is not among them."""

    commits: int
    statements: int | None
    wal_bytes: int
    buffers: int

    def per(self, n: int) -> dict[str, float | None]:
        """Of one of n fulfilments, by the contract's names."""
        return {
            "commits": round(self.commits / n, 4),
            "statements": None if self.statements is None else round(self.statements / n, 4),
            "wal_bytes": round(self.wal_bytes / n, 1),
            "buffers": round(self.buffers / n, 1),
        }


# Sessions report what they did when they end: look when all have.
OTHERS = "select count(*) from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()"
READ_COUNTERS = """
select d.xact_commit, d.blks_hit + d.blks_read, (pg_current_wal_lsn() - '0/0'::pg_lsn)::bigint
from pg_stat_database d where d.datname = current_database()
"""
HAS_STATEMENTS = "select exists (select from pg_extension where extname = 'pg_stat_statements')"
# Without our own looking.
COUNT_STATEMENTS = """
select coalesce(sum(calls), 0)::bigint from pg_stat_statements s join pg_database d on d.oid = s.dbid
where d.datname = current_database() and query !~ 'pg_stat_(activity|statements|database)|pg_extension'
"""


def read_counters(url: str) -> Counted:
    """As of now, once nobody else is connected; forgets the statements counted so far."""
    counted = _read(url)
    with psycopg.connect(url, autocommit=True) as connection:
        if _scalar(connection, HAS_STATEMENTS):
            connection.execute("select pg_stat_statements_reset()")
    return counted


def count_since(url: str, before: Counted) -> Counted:
    """What came since `before`; our own looking is not in it but for a commit or two."""
    now = _read(url)
    return Counted(
        now.commits - before.commits, now.statements, now.wal_bytes - before.wal_bytes, now.buffers - before.buffers
    )


def _read(url: str) -> Counted:
    with psycopg.connect(url, autocommit=True) as connection:
        _wait_alone(connection)
        statements = _scalar(connection, COUNT_STATEMENTS) if _scalar(connection, HAS_STATEMENTS) else None
        row = connection.execute(READ_COUNTERS).fetchone()
    assert row is not None
    commits, buffers, wal = row
    return Counted(commits, statements, wal, buffers)


TOP_STATEMENTS = """
select s.total_exec_time + s.total_plan_time, s.total_plan_time, s.calls, s.rows,
  s.shared_blks_hit + s.shared_blks_read, s.wal_bytes, left(regexp_replace(s.query, '\\s+', ' ', 'g'), 110)
from pg_stat_statements s join pg_database d on d.oid = s.dbid
where d.datname = current_database() order by 1 desc limit %s
"""


def top_statements(url: str, most: int) -> list[tuple[Any, ...]]:
    """The dearest since they were last forgotten: (ms, of that planning, calls, rows, buffers, WAL bytes, text)."""
    with psycopg.connect(url, autocommit=True) as connection:
        return connection.execute(TOP_STATEMENTS, [most]).fetchall()


def backend_cpu_seconds(pid: int) -> float:
    """The processors' time of a live process; 0 where the system doesn't say."""
    fields = _process_fields(pid)
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") if fields else 0.0


def server_cpu_seconds(url: str) -> float:
    """The processors' time of all sessions of the server that have ended (its own helpers' is not in it).

    Waits until nobody else is connected to this database: a session's time is told when it has ended.
    """
    with psycopg.connect(url, autocommit=True) as connection:
        _wait_alone(connection)
        backend = _process_fields(connection.info.backend_pid)
    fields = _process_fields(int(backend[1])) if backend else None  # the postmaster, who counts his dead
    return (int(fields[13]) + int(fields[14])) / os.sysconf("SC_CLK_TCK") if fields else 0.0


def _process_fields(pid: int) -> list[str] | None:
    """/proc/PID/stat from the state on."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def _wait_alone(connection: psycopg.Connection[Any]) -> None:
    deadline = time.monotonic() + QUIET_SECONDS
    while _scalar(connection, OTHERS):
        if time.monotonic() > deadline:
            raise TimeoutError("somebody is still connected: the counts would not be whole")
        time.sleep(0.02)


def _scalar(connection: psycopg.Connection[Any], query: str) -> Any:
    row = connection.execute(query.encode()).fetchone()
    assert row is not None
    return row[0]
