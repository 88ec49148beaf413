"""The operator's API over a small marketplace, asked as admin unless said otherwise."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import httpx2
import pytest

from caravan.admin import routes
from caravan.apps.subscriptions import BY_GROUP
from caravan.db import Database
from caravan.web.auth import Role
from tests.clients import an_account, bearer, client_of, make_app
from tests.shop import SETTINGS, Shop, open_shop

NOTE = {"note": "by a test"}


@dataclass(slots=True)
class Desk:
    """An operator's desk: `get`, `post`, `patch` below /api/v1/admin, and the shop that it is about."""

    shop: Shop
    client: httpx2.AsyncClient
    headers: dict[str, str]

    async def get(self, path: str, **query: Any) -> Any:
        answer = await self.client.get(f"/api/v1/admin/{path}", params=query, headers=self.headers)
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def ask(
        self, method: str, path: str, body: Any = None, *, headers: Mapping[str, str] | None = None
    ) -> httpx2.Response:
        sent = self.headers | dict(headers or {})
        return await self.client.request(method, f"/api/v1/admin/{path}", json=body, headers=sent)

    async def do(self, method: str, path: str, body: Any = None) -> Any:
        answer = await self.ask(method, path, body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def refused(self, method: str, path: str, body: Any = None) -> tuple[int, str]:
        answer = await self.ask(method, path, body)
        assert answer.headers["content-type"] == "application/problem+json", answer.text
        return answer.status_code, answer.json()["code"]

    async def audit(self) -> list[dict[str, Any]]:
        return await self.shop.rows(
            "select action, actor, note, before, after, subject_id from audit_log order by at, id"
        )

    async def diagnosis(self, payment: UUID) -> dict[str, Any]:
        [item] = (await self.get("diagnose", paymentId=str(payment)))["items"]
        return item

    async def as_role(self, role: Role) -> Desk:
        actor = await an_account(self.shop.db, f"{role}@example.com", role)
        return Desk(self.shop, self.client, await bearer(self.shop.db, actor))


@pytest.fixture
async def desk(db: Database) -> AsyncIterator[Desk]:
    app = make_app(db, routes.router, settings=SETTINGS)
    app.state.subscriptions = BY_GROUP
    actor = await an_account(db, "asha@example.com", Role.ADMIN)
    async with client_of(app) as client:
        yield Desk(await open_shop(db), client, await bearer(db, actor))
