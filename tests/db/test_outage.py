"""The pool after an outage: back as soon as the server is."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg_pool import PoolTimeout

from caravan.db import Database
from caravan.db.embedded import EmbeddedPostgres
from caravan.errors import is_transient

DOWN_SECONDS = 4.0  # the pool alone would try at 0, 1, 3 and 7 seconds
BACK_SECONDS_MAX = 1.5


@pytest.fixture
def server(data_dir: Path) -> Iterator[EmbeddedPostgres]:
    server = EmbeddedPostgres(data_dir)
    server.start()
    yield server
    server.stop()


async def test_a_transaction_goes_through_soon_after_the_server_is_back(server: EmbeddedPostgres) -> None:
    async with Database(server.url) as db:
        async with db.transaction() as tx:
            await tx.value("select 1")
        pid = int((server.home / "data" / "postmaster.pid").read_text().splitlines()[0])
        os.kill(pid, signal.SIGQUIT)
        server.stop()
        asking = asyncio.create_task(_ask(db))
        await asyncio.wait({asking}, timeout=DOWN_SECONDS)
        assert not asking.done()
        server.start()
        async with asyncio.timeout(BACK_SECONDS_MAX):
            await asking


async def _ask(db: Database) -> None:
    while True:
        try:
            async with db.transaction() as tx:
                await tx.value("select 1")
            return
        except (psycopg.Error, PoolTimeout) as error:
            if not is_transient(error):
                raise
