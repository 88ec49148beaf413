"""What can go wrong: expected (DomainError), transient (run the whole transaction again), bug (the rest)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import psycopg
from psycopg import errors as pg


class DomainError(Exception):
    """An expected refusal: it says what is true, with a stable code, and changes nothing.

    Subclasses live beside their raiser. `status` is the HTTP status; `extra` is merged into the problem document.
    """

    code: ClassVar[str] = "REFUSED"
    status: ClassVar[int] = 400

    def __init__(self, detail: str = "", *, extra: Mapping[str, object] | None = None) -> None:
        super().__init__(detail or (type(self).__doc__ or "").strip().split("\n", maxsplit=1)[0])
        self.extra: Mapping[str, object] = extra or {}

    @property
    def detail(self) -> str:
        return str(self)

    @property
    def problem_code(self) -> str:
        """The code to answer; a subclass whose code is data (a waiting reason) overrides it."""
        return self.code


class Transient(Exception):
    """What a component says when trying again later can succeed; the message is one line for the operator."""


class NotFound(DomainError):
    """There is no such thing, or it is not yours."""

    code = "NOT_FOUND"
    status = 404


class Invalid(DomainError):
    """The request says something that cannot be."""

    code = "INVALID"
    status = 422


class Conflict(DomainError):
    """The request contradicts the present state."""

    code = "CONFLICT"
    status = 409


# Retrying the whole transaction can succeed. https://www.postgresql.org/docs/18/errcodes-appendix.html
TRANSIENT: tuple[type[Exception], ...] = (
    pg.SerializationFailure,  # 40001
    pg.DeadlockDetected,  # 40P01
    pg.LockNotAvailable,  # 55P03
    pg.QueryCanceled,  # 57014: statement_timeout, not a user's cancel
    pg.AdminShutdown,  # 57P01
    pg.CrashShutdown,  # 57P02
    pg.CannotConnectNow,  # 57P03
    pg.TooManyConnections,  # 53300
    pg.DiskFull,  # 53100
    pg.IdleInTransactionSessionTimeout,  # 25P03
)


def is_transient(error: BaseException) -> bool:
    """True where the same transaction may succeed when it is run again from BEGIN."""
    if isinstance(error, (*TRANSIENT, Transient)):
        return True
    # A lost connection has no SQLSTATE; its outcome is unknown, and every write is safe to repeat.
    if isinstance(error, psycopg.OperationalError):
        return error.sqlstate is None or error.sqlstate.startswith(("08", "57P"))
    return isinstance(error, psycopg.InterfaceError) and "closed" in str(error)
