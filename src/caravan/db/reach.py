"""Is the database there? Asked once, before anything is built on it; what stands in the way is one line."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from time import monotonic

import psycopg
from psycopg.conninfo import conninfo_to_dict

from caravan.errors import DomainError

CONNECT_SECONDS = 5  # of one attempt; libpq's own patience is minutes
WAIT_SECONDS = 10.0  # for a server that starts, or a name that is not known yet
PAUSE_SECONDS = 0.5
# Its answers that are the same tomorrow (a server that speaks another language is asked until the wait is over).
HOPELESS = re.compile(
    r"password|authentication|pg_hba|does not exist|no such (user|database)|permission denied|does not support SSL"
    r"|certificate",
    re.IGNORECASE,
)


class Unreachable(DomainError):
    """The database does not answer, or doesn't let us in; the message names the setting."""

    code = "DATABASE_UNREACHABLE"
    status = 503


def why(error: BaseException) -> str:
    """The first line of what the driver said; it never has the password."""
    said = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return " ".join(said.removeprefix("connection failed: ").split())


def where(url: str) -> str:
    """The server and the database of an address: `host:port/database`, never who signs in."""
    parts = conninfo_to_dict(url)
    host, port = parts.get("host") or parts.get("hostaddr") or "localhost", parts.get("port") or 5432
    return f"{host}:{port}/{parts.get('dbname') or parts.get('user') or ''}"


async def wait_until_reachable(
    url: str, setting: str, *, seconds: float = WAIT_SECONDS, waiting: Callable[[str], None] | None = None
) -> None:
    """Return once it lets us in; `waiting` is told the first time it doesn't, where another attempt may help.

    Raises Unreachable where none can, or `seconds` have passed.
    """
    until = monotonic() + seconds
    told = False
    while True:
        try:
            connection = await psycopg.AsyncConnection.connect(url, autocommit=True, connect_timeout=CONNECT_SECONDS)
        except psycopg.OperationalError as error:
            said = f"{setting}: the database does not answer ({why(error)})"
            if HOPELESS.search(str(error)) or monotonic() > until:
                raise Unreachable(said) from None
        else:
            await connection.close()
            return
        if waiting and not told:
            told = True
            waiting(f"{said}; trying again for {seconds:.0f} s")
        await asyncio.sleep(PAUSE_SECONDS)
