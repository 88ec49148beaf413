"""What a route asks for: the database, the settings, the request's trace context."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends
from starlette.requests import HTTPConnection

from caravan.db import Database
from caravan.ids import new_traceparent
from caravan.settings import Settings


def get_db(connection: HTTPConnection) -> Database:
    db = connection.app.state.db
    assert isinstance(db, Database)
    return db


def get_settings(connection: HTTPConnection) -> Settings:
    settings = connection.app.state.settings
    assert isinstance(settings, Settings)
    return settings


def get_trace(connection: HTTPConnection) -> str:
    """The W3C trace context that the middleware took from the request or made."""
    return connection.scope.get("caravan.trace") or new_traceparent()


Db = Annotated[Database, Depends(get_db)]
SettingsDep = Annotated[Settings, Depends(get_settings)]
Trace = Annotated[str, Depends(get_trace)]
