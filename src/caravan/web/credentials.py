"""How a token travels: a header, or a cookie that only this site's pages can use."""

from __future__ import annotations

from urllib.parse import urlsplit

from starlette.requests import HTTPConnection
from starlette.responses import Response

from caravan.db import Database
from caravan.settings import Settings
from caravan.web.auth import TOKEN_LIFETIME, Actor, find_actor

COOKIE = "caravan_session"
SECURE_COOKIE = "__Host-caravan_session"  # the prefix makes browsers insist on Secure, the whole site and no Domain


def is_secure(connection: HTTPConnection) -> bool:
    return connection.scope.get("scheme") in ("https", "wss")


def cookie_name(connection: HTTPConnection) -> str:
    return SECURE_COOKIE if is_secure(connection) else COOKIE


def find_bearer(connection: HTTPConnection) -> str | None:
    """The token of the Authorization header; an empty text for a header that holds something else."""
    header = connection.headers.get("authorization")
    if header is None:
        return None
    scheme, _, token = header.partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def find_token(connection: HTTPConnection) -> str | None:
    """The request's token. Where there is an Authorization header the cookie counts for nothing."""
    bearer = find_bearer(connection)
    return connection.cookies.get(cookie_name(connection)) if bearer is None else bearer


async def find_connection_actor(connection: HTTPConnection, db: Database) -> Actor | None:
    """Who asks; None where nobody is signed in."""
    token = find_token(connection)
    return await find_actor(db, token) if token else None


def is_same_origin(connection: HTTPConnection, settings: Settings) -> bool:
    """True where the Origin header names this site, or one that the settings allow."""
    origin = connection.headers.get("origin", "")
    if origin in settings.origins:
        return True
    host = connection.headers.get("host", "")
    scheme = "https" if is_secure(connection) else "http"
    try:
        parts = urlsplit(origin) if origin.isascii() else urlsplit("")
    except ValueError:  # `http://[`
        return False
    return bool(host) and (parts.scheme, parts.netloc.lower()) == (scheme, host.lower())


def set_cookie(response: Response, connection: HTTPConnection, token: str) -> None:
    response.set_cookie(
        cookie_name(connection),
        token,
        max_age=int(TOKEN_LIFETIME.total_seconds()),
        path="/",
        secure=is_secure(connection),
        httponly=True,
        samesite="lax",
    )


def clear_cookie(response: Response, connection: HTTPConnection) -> None:
    response.delete_cookie(
        cookie_name(connection), path="/", secure=is_secure(connection), httponly=True, samesite="lax"
    )
