"""What the operator's routes and pages are given: the wiring, the notice, and the door to the database."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from datetime import timedelta
from typing import Annotated, TypeVar

from fastapi import Depends, Request

from caravan.db import Database, Tx
from caravan.eventlog.subscription import Subscription
from caravan.web.deps import Db, SettingsDep, Trace

SOURCE = "admin-service"
MANY_MAX = 100  # repairs within one request; the command line has no such limit

T = TypeVar("T")


def get_subscriptions(request: Request) -> Mapping[str, Subscription]:
    """The wiring, by group, as the application was given it: dead letters are replayed through it."""
    return request.app.state.subscriptions


def get_notice(settings: SettingsDep) -> timedelta:
    return timedelta(hours=settings.notice_hours)


Subscriptions = Annotated[Mapping[str, Subscription], Depends(get_subscriptions)]
Notice = Annotated[timedelta, Depends(get_notice)]


class Writer:
    """Runs a change in a transaction of this service, under the request's trace."""

    def __init__(self, db: Db, trace: Trace) -> None:
        self._db: Database = db
        self._trace: str = trace

    async def __call__(self, work: Callable[[Tx], Awaitable[T]]) -> T:
        async def traced(tx: Tx) -> T:
            tx.trace = self._trace
            return await work(tx)

        return await self._db.transact(traced, source=SOURCE)


Write = Annotated[Writer, Depends()]
