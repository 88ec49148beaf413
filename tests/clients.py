"""HTTP clients on a small app of some routers, in this process, over the test's real database."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import httpx2
from fastapi import APIRouter, FastAPI

from caravan.db import Database
from caravan.settings import Settings, load_settings
from caravan.web import auth, policies
from caravan.web.auth import Role
from caravan.web.setup import set_up

PASSWORD = "correct horse"
ORIGIN = "http://caravan.test"


def make_app(db: Database, *routers: APIRouter, settings: Settings | None = None) -> FastAPI:
    app = FastAPI(docs_url=None, redoc_url=None)
    app.state.db = db
    app.state.settings = settings = settings or load_settings({})
    for router in routers:
        app.include_router(router)
    set_up(app, settings)
    policies.check_routes(app)
    return app


@asynccontextmanager
async def client_of(app: FastAPI, base_url: str = ORIGIN, **options: Any) -> AsyncGenerator[httpx2.AsyncClient]:
    transport = httpx2.ASGITransport(app=app)
    async with httpx2.AsyncClient(transport=transport, base_url=base_url, **options) as client:
        yield client


async def an_account(db: Database, email: str, role: Role = Role.STUDENT) -> auth.Actor:
    """An account whose password is PASSWORD."""
    password_hash = await auth.hash_password(PASSWORD)

    async def work(tx: Any) -> auth.Actor:
        account_id = await auth.create_account(tx, email=email, name=email, role=role, password_hash=password_hash)
        return auth.Actor(account_id=account_id, name=email, role=role)

    return await db.transact(work)


async def bearer(db: Database, actor: auth.Actor) -> dict[str, str]:
    """The header of a fresh sign-in."""
    assert actor.account_id is not None
    account_id = actor.account_id
    token = await db.transact(lambda tx: auth.issue_token(tx, account_id))
    return {"authorization": f"Bearer {token}"}
