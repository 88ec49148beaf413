"""Lay the web floor under an application: errors, files, and the middleware around it all."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from caravan.errors import DomainError
from caravan.settings import Settings
from caravan.web.assets import Assets
from caravan.web.middleware import Edge
from caravan.web.pages import answer_error


def set_up(app: FastAPI, settings: Settings) -> None:
    """Call once, after the other middlewares are added (the last added is the outermost) and before serving."""
    for kind in (DomainError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, answer_error)
    app.mount("/static", Assets(), name="static")
    app.add_middleware(Edge, settings=settings)
