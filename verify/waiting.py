"""When a running system has nothing left to do: asked of the database, by anybody, with a deadline."""

from __future__ import annotations

import asyncio
import time

import psycopg
import psycopg_pool

from caravan.db import Database
from caravan.eventlog.lag import list_lag

POLL_SECONDS = 0.1

COUNT_OPEN = "select count(*) from undelivered where reason is null"


async def until_quiet(db: Database, seconds_max: float) -> tuple[float, str | None]:
    """How long it took until every group had got past everything and nothing was owed.

    The second is what was left when that took too long.
    """
    started = time.monotonic()
    left = "the database does not answer"
    while time.monotonic() - started < seconds_max:
        try:
            async with db.transaction("verify", read_only=True) as tx:
                undelivered = await tx.value(COUNT_OPEN)
                # Far behind, the lag is a dear question: asked only once it can be nothing.
                waiting = 0 if undelivered else sum(lag.messages for lag in await list_lag(tx))
        except (psycopg.Error, psycopg_pool.PoolTimeout):
            pass  # it is being restarted
        else:
            if not waiting and not undelivered:
                return time.monotonic() - started, None
            left = f"{undelivered} payments are undelivered" if undelivered else f"{waiting} events wait"
        await asyncio.sleep(POLL_SECONDS)
    return time.monotonic() - started, f"not quiet within {seconds_max:.0f} s: {left}"
