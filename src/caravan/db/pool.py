"""The pool, and the only two ways to open a transaction: `transaction`, a block; `transact`, a function, retried.

`all` asks one statement without one.
"""

from __future__ import annotations

import asyncio
import os
import random
import select
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from datetime import datetime
from typing import Any, Self, TypeVar

import psycopg
from psycopg import errors as pg
from psycopg import sql
from psycopg.rows import dict_row, scalar_row
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from caravan.db.tx import Params, Query, Row, Tx
from caravan.errors import is_transient

T = TypeVar("T")

# libpq's word for the zone of its sessions, which poolers know too. In the server's own zone Python would reckon by the
# wall clock, and be an hour wrong in the nights in which that changes.
os.environ["PGTZ"] = "UTC"

# A frozen process must not hold its locks: PostgreSQL ends a session that sits inside a transaction.
IDLE_IN_TRANSACTION_SECONDS = 8
STATEMENT_TIMEOUT_SECONDS = 30
LOCK_TIMEOUT_SECONDS = 10
TRANSACT_ATTEMPTS = 8
OUTCOME_ATTEMPTS = 12
POOL_TIMEOUT_SECONDS = 5.0  # then the answer is 503 TRY_AGAIN
CONNECT_SECONDS = 5  # of one attempt to connect; libpq's own patience is minutes
# Connections at the bottom of the stack rest for minutes, which firewalls take for the end of them.
KEEPALIVES = {"keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3}
KNOCK_SECONDS_MAX = 300.0  # how long attempts go on; as long as the pool itself would
KNOCK_PAUSE_SECONDS_MAX = 0.25
PREPARED_MAX = 500  # statements of one connection; all that we have, some of them for more than one set of types

# One round trip opens the transaction, bounds it and tells its instant. SET LOCAL only: safe behind a pooler. No
# parallel workers: to start them takes 10 ms, more than any of our statements should.
BOUNDS_AND_INSTANT = sql.SQL(
    "set local idle_in_transaction_session_timeout = {idle}; set local statement_timeout = {statement};"
    " set local lock_timeout = {lock}; set local jit = off; set local max_parallel_workers_per_gather = 0; select now()"
).format(
    idle=f"{IDLE_IN_TRANSACTION_SECONDS}s", statement=f"{STATEMENT_TIMEOUT_SECONDS}s", lock=f"{LOCK_TIMEOUT_SECONDS}s"
)
BEGIN = (sql.SQL("begin; ") + BOUNDS_AND_INSTANT).as_bytes()
# Where batches are arrays, PostgreSQL estimates ten elements for a plan of no parameters in particular and one for a
# batch of one, finds the second cheaper, and plans anew each time: a quarter of what an event alone asks of it.
BEGIN_FEW = (sql.SQL("begin; set local plan_cache_mode = force_generic_plan; ") + BOUNDS_AND_INSTANT).as_bytes()
BEGIN_READ_ONLY = (sql.SQL("begin isolation level repeatable read read only; ") + BOUNDS_AND_INSTANT).as_bytes()


class _Connection(psycopg.AsyncConnection[Any]):
    """Knocks again soon where nobody opens: the pool alone would wait 1, 2, 4 ... seconds, long after a restart."""

    @classmethod
    async def connect(cls, conninfo: str = "", *, knocking: asyncio.Lock, **kwargs: Any) -> Self:  # pyright: ignore[reportIncompatibleMethodOverride]
        """`knocking`: one of a pool is enough, and a server that recovers has other things to do."""
        loop = asyncio.get_running_loop()
        until = loop.time() + KNOCK_SECONDS_MAX
        pause = 0.05
        with suppress(psycopg.OperationalError):
            return await cls._connect(conninfo, **kwargs)
        async with knocking:
            while True:
                try:
                    return await cls._connect(conninfo, **kwargs)
                except psycopg.OperationalError as error:
                    if loop.time() > until or not is_transient(error):
                        raise
                await asyncio.sleep(random.uniform(0.5, 1) * pause)  # noqa: S311 - jitter
                pause = min(KNOCK_PAUSE_SECONDS_MAX, pause * 1.5)

    @classmethod
    async def _connect(cls, conninfo: str, **kwargs: Any) -> Self:
        connection = await super().connect(conninfo, **kwargs)
        connection.prepared_max = PREPARED_MAX
        return connection


class _Stack(deque[psycopg.AsyncConnection[Any]]):
    """Idle connections. The pool takes them from the left, and this puts them back there too."""

    def append(self, connection: psycopg.AsyncConnection[Any], /) -> None:
        self.appendleft(connection)


class _Pool(AsyncConnectionPool[psycopg.AsyncConnection[Any]]):
    """Gives out the connection that was used last. The library's pool takes turns, so that a quiet process asks through
    one after another whose server process has long forgotten tables and plans: a third more work (decision 0020)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._pool = _Stack()


# A transaction's own id, where it has written anything; and what became of one: committed, aborted or in progress.
# After a crash an id that left no durable trace is given out again (decision 0005), so it matters whether the server
# still lives that the transaction began in.
OWN_ID = "select pg_current_xact_id_if_assigned()::text"
OUTCOME = """
select pg_xact_status(%(xid)s::text::xid8), coalesce(stats_reset < %(began)s, false) from pg_stat_bgwriter
"""


class Database:
    """A pool of connections to one PostgreSQL.

    `on_hints` receives the keys that a committed transaction hinted at; it must not block or raise. `pooled`: the url
    is a pooler's in transaction mode, so that nothing of a session may outlive a transaction.
    """

    def __init__(
        self,
        url: str,
        *,
        max_connections: int = 8,
        on_hints: Callable[[Iterable[str]], None] | None = None,
        pooled: bool = False,
    ) -> None:
        self.url = url
        self.on_hints = on_hints
        self._pool = _Pool(
            url,
            connection_class=_Connection,
            reconnect_timeout=KNOCK_SECONDS_MAX,
            min_size=0,
            max_size=max_connections,
            max_idle=60,
            open=False,
            timeout=POOL_TIMEOUT_SECONDS,
            # A statement that comes a second time is prepared on the server. Few poolers hand prepared ones on
            # (pgbouncer 1.21 and newer, where it is told to), so behind one nothing is prepared.
            kwargs={
                "autocommit": True,
                "application_name": "caravan",
                "connect_timeout": CONNECT_SECONDS,
                **KEEPALIVES,
                "knocking": asyncio.Lock(),
                "prepare_threshold": None if pooled else 1,
            },
        )

    async def open(self) -> Database:
        await self._pool.open()
        return self

    async def close(self) -> None:
        await self._pool.close(timeout=2)

    async def __aenter__(self) -> Database:
        return await self.open()

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @asynccontextmanager
    async def transaction(
        self, source: str = "caravan", *, read_only: bool = False, named: bool = False, few: bool = False
    ) -> AsyncGenerator[Tx]:
        """Open a transaction; commit on leaving, roll back on any exception (also when the task is cancelled).

        `named`: learn its id before the commit (`tx.xid`), to be able to ask what became of it. `few`: its batches are
        small, so plans made once do; not for statements that leave out what a parameter says is not asked for.
        """
        async with self.connection() as connection:
            now = await _begin(connection, BEGIN_READ_ONLY if read_only else BEGIN_FEW if few else BEGIN)
            tx = Tx(connection, now, source)
            try:
                yield tx
                if tx.flush:
                    await tx.flush(tx)
                if named and tx.xid is None:
                    tx.xid = await tx.value(OWN_ID)
                await connection.execute("commit")
            except BaseException:
                # A cancelled task may leave the connection busy; then it is closed, which rolls back too.
                with suppress(psycopg.Error):
                    if connection.pgconn.transaction_status == psycopg.pq.TransactionStatus.ACTIVE:
                        await connection.close()
                    else:
                        await connection.execute("rollback")
                raise
        self._tell(tx)

    def _tell(self, tx: Tx) -> None:
        if tx.hints and self.on_hints:
            self.on_hints(tx.hints)

    async def transact(self, work: Callable[[Tx], Awaitable[T]], source: str = "caravan", *, few: bool = False) -> T:
        """Run `work` in a transaction (see there for `few`); run the whole again where the database says that may help.

        A commit whose answer is lost is asked for, never repeated blindly: `work` need not be safe to run twice.
        """
        for attempt in range(1, TRANSACT_ATTEMPTS + 1):
            tx: Tx | None = None
            result: list[T] = []
            try:
                async with self.transaction(source, named=True, few=few) as tx:
                    result.append(await work(tx))
                return result[0]
            except Exception as error:
                if tx is not None and tx.xid and is_transient(error) and await self._committed(tx, error):
                    self._tell(tx)
                    return result[0]
                await _before_again(attempt, error)
        raise AssertionError("unreachable")

    async def all(self, query: Query, params: Params | None = None) -> list[Row]:
        """Every row of one statement that stands by itself: one round trip, autocommitted.

        Asked again where that may help, so it must bear being run twice. For what is asked with every request; the
        bounds of a transaction (statement_timeout and the others) are not around it.
        """
        for attempt in range(1, TRANSACT_ATTEMPTS + 1):
            try:
                async with (
                    self.connection() as connection,
                    connection.cursor(binary=True, row_factory=dict_row) as cursor,
                ):
                    await cursor.execute(query, params)
                    return await cursor.fetchall()
            except Exception as error:
                await _before_again(attempt, error)
        raise AssertionError("unreachable")

    async def _committed(self, tx: Tx, error: Exception) -> bool:
        """What became of a transaction whose commit failed; raises `error` where the database can't tell."""
        for attempt in range(1, OUTCOME_ATTEMPTS + 1):
            outcome, same_life = "in progress", True
            try:
                async with self.connection() as connection:
                    found = await connection.execute(OUTCOME, {"xid": tx.xid, "began": tx.now})
                    outcome, same_life = await found.fetchone() or (None, True)
            except pg.InvalidParameterValue:  # "is in the future": the server crashed, and nobody has had this id since
                return False
            except PoolTimeout:
                break
            except psycopg.OperationalError:
                pass  # not to be reached: as good as not finished
            if outcome is None or (outcome == "committed" and not same_life):
                break  # forgotten; or committed by whoever got the id after a crash, perhaps
            if outcome != "in progress" or not same_life:
                return outcome == "committed"
            await asyncio.sleep(random.uniform(0, min(1.0, 0.01 * 2**attempt)))  # noqa: S311 - jitter
        raise error

    @asynccontextmanager
    async def connection(self) -> AsyncGenerator[psycopg.AsyncConnection[Any]]:
        """A bare autocommit connection: for statements that must stand outside a transaction (NOTIFY, a snapshot).

        It was alive a moment ago: after a crash all that the pool holds are dead, and each use would find one.
        """
        while True:
            async with self._pool.connection() as connection:
                if not has_ended(connection):
                    yield connection
                    return
                await connection.close()  # the pool opens another

    def stats(self) -> dict[str, int]:
        """The pool's counters, for metrics."""
        return dict(self._pool.get_stats())


def has_ended(connection: psycopg.AsyncConnection[Any]) -> bool:
    """Whether an idle connection is good for nothing any more: the server has hung up, or said something unasked (that
    it shuts down). Looks at our end only, which takes a microsecond."""
    if connection.closed:
        return True
    waiting = select.poll()
    waiting.register(connection.fileno(), select.POLLIN)
    return bool(waiting.poll(0))


async def _before_again(attempt: int, error: Exception) -> None:
    """Wait a little; or raise `error`, where another attempt can't help."""
    # Who waited in vain for a connection has waited long enough.
    if attempt == TRANSACT_ATTEMPTS or isinstance(error, PoolTimeout) or not is_transient(error):
        raise error
    await asyncio.sleep(random.uniform(0, min(1.0, 0.01 * 2**attempt)))  # noqa: S311 - jitter


async def _begin(connection: psycopg.AsyncConnection[Any], opening: bytes) -> datetime:
    async with connection.cursor(row_factory=scalar_row) as cursor:
        await cursor.execute(opening, prepare=False)
        while cursor.nextset():
            pass
        now = await cursor.fetchone()
    assert isinstance(now, datetime)
    return now
