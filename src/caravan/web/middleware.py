"""What every request passes through: trace, body limit, CSRF, headers, one log line, and the net under all errors.

Pure ASGI, one class, outermost: so that a refusal and a bug's 500 carry the same headers as an answer.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any, Final

import structlog
from fastapi import Request
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from caravan.errors import DomainError, Invalid
from caravan.ids import new_traceparent
from caravan.settings import Settings
from caravan.telemetry import metrics, tracing
from caravan.web.credentials import cookie_name, find_bearer, is_same_origin
from caravan.web.pages import answer_error

log: structlog.stdlib.BoundLogger = structlog.get_logger()

BODY_BYTES_MAX: Final = 256 * 1024
SAFE_METHODS: Final = frozenset({"GET", "HEAD", "OPTIONS"})
METHODS: Final = SAFE_METHODS | {"POST", "PUT", "PATCH", "DELETE"}
WEBHOOKS: Final = "/api/v1/webhooks/"  # judged by their signature
COOKIE_COUNTS_NOTHING: Final = frozenset({"/api/v1/auth/login", "/api/v1/auth/register"})
CLIENT_GONE: Final = 499  # as nginx has it: whoever asked hung up before saying all of it
QUIET_PATHS: Final = ("/healthz", "/readyz", "/metrics", "/static/")

CONTENT_SECURITY_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self';"
    " form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)
SECURITY_HEADERS: Final = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "x-content-type-options": "nosniff",
    # Not no-referrer: that makes browsers send `Origin: null` with our own forms.
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(self), microphone=(), payment=()",
}


class BodyTooLarge(DomainError):
    """A request's body has 256 kB at most."""

    code = "BODY_TOO_LARGE"
    status = 413


class CrossSiteRequest(DomainError):
    """This request comes from another site's page."""

    code = "CROSS_SITE_REQUEST"
    status = 403


class Unreadable(Invalid):
    """The address holds a character that nothing here can hold."""

    code = "INVALID_REQUEST"


class Edge:
    """The middleware; `setup.set_up` adds it."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        given = _find_trace(Headers(scope=scope))
        http = scope["type"] == "http"
        span = tracing.Request(given, _method(scope)) if http and tracing.active() else None
        scope["caravan.trace"] = trace = (span and span.traceparent) or given or new_traceparent()
        with structlog.contextvars.bound_contextvars(trace_id=trace.split("-")[1]):
            if http:
                await self._serve(scope, receive, send, span)
            else:
                await self._app(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send, span: tracing.Request | None) -> None:
        answer = _Answer(send)
        started = time.perf_counter()
        try:
            request = Request(scope, receive)
            _check_address(request)
            self._check_origin(request)
            await self._app(scope, await _bounded(request, receive), answer.send)
        except ClientDisconnect:
            answer.status = answer.status or CLIENT_GONE  # nobody to answer, and no fault of ours
        except Exception as error:  # noqa: BLE001, RUF100 - the net: whatever it is, the client gets a problem
            if answer.status:
                raise  # half an answer is out already; the server closes the connection
            response = await answer_error(Request(scope), error)
            await response(scope, receive, answer.send)
        finally:
            seconds = time.perf_counter() - started
            method, route = _method(scope), _route(scope)
            metrics.REQUESTS.labels(method, route, answer.status).observe(seconds)
            if span is not None:
                span.end(f"{method} {route}", route, answer.status)
            if not scope["path"].startswith(QUIET_PATHS):
                # The path only: a query can hold a ticket or a name.
                log.info(
                    "request",
                    method=scope["method"],
                    path=scope["path"],
                    status=answer.status,
                    ms=round(seconds * 1000, 1),
                )

    def _check_origin(self, request: Request) -> None:
        """Refuse a change that another site's page asks for in the name of whoever is signed in here."""
        if request.method in SAFE_METHODS or request.url.path.startswith(WEBHOOKS) or find_bearer(request) is not None:
            return
        site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin")
        if site == "same-origin" or (origin is not None and is_same_origin(request, self._settings)):
            return
        # No browser leaves both out. A program without a cookie has nothing that could be abused.
        by_cookie = cookie_name(request) in request.cookies and request.url.path not in COOKIE_COUNTS_NOTHING
        if site is None and origin is None and not by_cookie:
            return
        raise CrossSiteRequest


class _Answer:
    """Puts the headers on an answer, and remembers its status."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status = 0

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            for name, value in SECURITY_HEADERS.items():
                headers[name] = value
            # Everything here is somebody's own, save what says otherwise (static files).
            headers.setdefault("cache-control", "no-store")
        await self._send(message)


def _method(scope: Scope) -> str:
    return scope["method"] if scope["method"] in METHODS else "OTHER"


def _route(scope: Scope) -> str:
    """The route as it is written, `/api/v1/payments/{payment_id}`: never an address that somebody made up."""
    if scope["path"].startswith("/static/"):
        return "/static"
    return getattr(scope.get("route"), "path", "") or "unmatched"


def _find_trace(headers: Headers) -> str | None:
    given = headers.get("traceparent", "")
    return given if tracing.TRACEPARENT.fullmatch(given) else None


def _check_address(request: Request) -> None:
    """PostgreSQL can't keep a NUL: refuse it here, once for every path and query."""
    if "\x00" in request.scope["path"] or b"%00" in request.scope.get("query_string", b""):
        raise Unreadable


async def _bounded(request: Request, receive: Receive) -> Receive:
    """A `receive` that never gives more than the limit. Raises BodyTooLarge before anything else has run."""
    length = request.headers.get("content-length")
    if length is not None:
        if not length.isdecimal() or int(length[:20]) > BODY_BYTES_MAX:
            raise BodyTooLarge
        return receive  # the server holds the client to its word
    if "chunked" not in request.headers.get("transfer-encoding", ""):
        return receive
    return _replay(await _read(receive), receive)


async def _read(receive: Receive) -> bytes:
    body = bytearray()
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > BODY_BYTES_MAX:
            raise BodyTooLarge
        if message["type"] != "http.request" or not message.get("more_body"):
            return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    messages: Iterable[Message] = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def again() -> dict[str, Any]:
        for message in messages:
            return dict(message)
        return dict(await receive())

    return again
