"""How a refusal looks: RFC 9457 problem documents with a stable code, and never a word about our insides."""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus
from typing import Any, cast

import structlog
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from caravan.errors import DomainError, is_transient

log: structlog.stdlib.BoundLogger = structlog.get_logger()

RETRY_AFTER_SECONDS = 2
# What the framework refuses by itself.
CODES = {
    400: "INVALID_REQUEST",
    404: "NOT_FOUND",
    405: "METHOD_NOT_ALLOWED",
    413: "BODY_TOO_LARGE",
    415: "UNSUPPORTED_MEDIA_TYPE",
}
# What the framework says by itself, in words for people.
SENTENCES = {
    "Not Found": "There is nothing at this address.",
    "Method Not Allowed": "This address does not take that method.",
}


class Problem(JSONResponse):
    media_type = "application/problem+json"


def problem(
    request: Request,
    status: int,
    code: str,
    detail: str,
    *,
    extra: dict[str, Any] | None = None,
    headers: dict[str, str] | None = None,
) -> Problem:
    """{type, title, status, detail, code, instance} and what `extra` adds."""
    document: dict[str, Any] = {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        "code": code,
        "instance": request.url.path,
    }
    return Problem((extra or {}) | document, status_code=status, headers=headers)


def from_error(request: Request, error: Exception) -> Problem:
    """The problem that an exception is, whatever it is."""
    if isinstance(error, DomainError):
        return _from_domain_error(request, error)
    if isinstance(error, RequestValidationError):
        return problem(
            request,
            422,
            "INVALID_REQUEST",
            "The request is not what this address expects.",
            extra={"errors": list_errors(error.errors())},
        )
    if isinstance(error, HTTPException):
        code = CODES.get(error.status_code, "REFUSED")
        said = SENTENCES.get(error.detail, str(error.detail))
        return problem(request, error.status_code, code, said, headers=_plain(error.headers))
    if is_transient(error):
        log.warning("request not served, database busy or away", path=request.url.path, error=type(error).__name__)
        return problem(
            request,
            503,
            "TRY_AGAIN",
            "The service is busy or starting: the same request will work in a moment.",
            headers={"retry-after": str(RETRY_AFTER_SECONDS)},
        )
    log.error("request failed", method=request.method, path=request.url.path, exc_info=error)
    return problem(request, 500, "INTERNAL", "Something went wrong here. It has been logged.")


def _from_domain_error(request: Request, error: DomainError) -> Problem:
    headers: dict[str, str] = {}
    if "retryAfterSeconds" in error.extra:
        headers["retry-after"] = str(error.extra["retryAfterSeconds"])
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    if error.status == 500:  # a bug of ours
        log.error("request failed", method=request.method, path=request.url.path, exc_info=error)
    elif error.status > 500:  # something that we need is not there: expected, and the operator's to mend
        said = {"status": error.status, "code": error.problem_code, "error": error.detail}
        log.warning("request refused", method=request.method, path=request.url.path, **said)
    return problem(request, error.status, error.problem_code, error.detail, extra=dict(error.extra), headers=headers)


def list_errors(errors: Sequence[Any]) -> list[dict[str, str]]:
    """What is wrong where. Never the values: a password may be among them."""
    return [{"field": ".".join(str(part) for part in error["loc"]), "detail": str(error["msg"])} for error in errors]


def _plain(headers: Any) -> dict[str, str] | None:
    return dict(cast("dict[str, str]", headers)) if headers else None
