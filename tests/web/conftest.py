from __future__ import annotations

from collections.abc import AsyncIterator

import httpx2
import pytest

from caravan.db import Database
from caravan.web.routes import router
from tests.clients import client_of, make_app


@pytest.fixture
async def client(db: Database) -> AsyncIterator[httpx2.AsyncClient]:
    async with client_of(make_app(db, router)) as client:
        yield client
