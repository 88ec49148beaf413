"""One transaction: typed verbs over one connection. Opened and committed by `Database`, at the edge only."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any, LiteralString, TypeVar, overload
from uuid import UUID

import msgspec
import psycopg
from psycopg import sql
from psycopg.rows import AsyncRowFactory, args_row, class_row, dict_row, scalar_row
from psycopg.types.json import set_json_loads

from caravan.errors import DomainError

T = TypeVar("T")
Query = LiteralString | sql.Composed
Params = Mapping[str, Any]
Row = dict[str, Any]


def _load_json(document: str | bytes) -> Any:
    try:
        return msgspec.json.decode(document)  # several times faster; refuses numbers that are no 64-bit floats
    except msgspec.DecodeError:
        return json.loads(document)


set_json_loads(_load_json)


class RowMissing(DomainError):
    """A row that must exist does not."""

    code = "ROW_MISSING"
    status = 500


@dataclass(frozen=True, slots=True)
class Cause:
    """The event that made this transaction say something about a correlation id."""

    event_id: UUID
    traceparent: str | None


class Tx:
    """A transaction. `now` is its one instant, `source` the service that speaks.

    Placeholders are named. Batches bind their arrays in binary: write `unnest(%(ids)b::uuid[])`, six times cheaper
    than text. Rows come back in binary always: as dicts, or as `into=` a dataclass with the columns' names.
    """

    __slots__ = ("causes", "connection", "flush", "hints", "now", "outgoing", "source", "trace", "xid")

    def __init__(self, connection: psycopg.AsyncConnection[Any], now: datetime, source: str) -> None:
        self.connection = connection
        self.now = now
        self.source = source
        self.causes: dict[str, Cause] = {}  # by correlation id, set by the consumer for its batch
        self.trace: str | None = None  # the request's trace context, where the edge is a request
        self.hints: set[str] = set()  # keys that changed, sent to whoever listens after the commit
        self.outgoing: list[Any] = []  # events said so far, see eventlog.outbox
        self.xid: str | None = None  # its id, once the commit is being asked for; see Database.transact
        self.flush: Callable[[Tx], Awaitable[None]] | None = None  # run once, just before the commit

    async def execute(self, query: Query, params: Params | None = None) -> int:
        """Run a statement; the number of rows it touched."""
        cursor = await self.connection.cursor(binary=True).execute(query, params)
        return cursor.rowcount

    @overload
    async def all(self, query: Query, params: Params | None = None) -> list[Row]: ...
    @overload
    async def all(self, query: Query, params: Params | None = None, *, into: type[T]) -> list[T]: ...
    async def all(self, query: Query, params: Params | None = None, *, into: type[Any] | None = None) -> list[Any]:
        """Every row."""
        return await self._fetch(query, params, class_row(into) if into else dict_row)

    @overload
    async def find(self, query: Query, params: Params | None = None) -> Row | None: ...
    @overload
    async def find(self, query: Query, params: Params | None = None, *, into: type[T]) -> T | None: ...
    async def find(self, query: Query, params: Params | None = None, *, into: type[Any] | None = None) -> Any:
        """The only row, or None; more than one is a bug."""
        rows = await self._fetch(query, params, class_row(into) if into else dict_row)
        if len(rows) > 1:
            raise psycopg.DataError(f"expected at most one row, got {len(rows)}")
        return rows[0] if rows else None

    @overload
    async def one(self, query: Query, params: Params | None = None) -> Row: ...
    @overload
    async def one(self, query: Query, params: Params | None = None, *, into: type[T]) -> T: ...
    async def one(self, query: Query, params: Params | None = None, *, into: type[Any] | None = None) -> Any:
        """The only row; raises RowMissing where there is none."""
        row = await self.find(query, params, into=into) if into else await self.find(query, params)
        if row is None:
            raise RowMissing(f"no row for: {_head(query)}")
        return row

    async def value(self, query: Query, params: Params | None = None) -> Any:
        """The first column of the first row, or None where there is no row."""
        rows = await self._fetch(query, params, scalar_row)
        return rows[0] if rows else None

    async def values(self, query: Query, params: Params | None = None) -> list[Any]:
        """The first column of every row."""
        return await self._fetch(query, params, scalar_row)

    async def tuples(self, query: Query, params: Params | None = None) -> list[tuple[Any, ...]]:
        """Every row as a plain tuple: for batches, where a dict per row costs."""
        return await self._fetch(query, params, args_row(lambda *columns: columns))

    async def _fetch(self, query: Query, params: Params | None, factory: AsyncRowFactory[Any]) -> list[Any]:
        cursor = await self.connection.cursor(binary=True, row_factory=factory).execute(query, params)
        return await cursor.fetchall()

    @asynccontextmanager
    async def savepoint(self) -> AsyncGenerator[None]:
        """A part that may fail alone: an exception undoes its writes and the events it said, and is raised."""
        said = len(self.outgoing)
        await self.connection.execute("savepoint part")
        try:
            yield
        except BaseException:
            del self.outgoing[said:]
            undone = False
            try:
                with suppress(Exception):  # what failed first decides what happens next
                    await self.connection.execute("rollback to savepoint part")
                    undone = True
            finally:
                if not undone:  # whoever goes on after that error must not commit half of the part
                    await self.connection.close()
            raise
        finally:
            if self.connection.pgconn.transaction_status == psycopg.pq.TransactionStatus.INTRANS:
                await self.connection.execute("release savepoint part")

    def hint(self, key: str) -> None:
        """Tell listeners after the commit that something about `key` changed; losing it costs time, never truth."""
        self.hints.add(key)


def _head(query: Query) -> str:
    return " ".join(query.split())[:80] if isinstance(query, str) else "composed query"
