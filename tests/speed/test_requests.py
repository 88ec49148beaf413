"""What a request asks of PostgreSQL, counted in statements, each of which is a round trip: begin and commit too.

The web process has one core, and a statement costs its Python more than it costs the server, so these counts are what
a request may cost. Lower the limits when the code does better.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Generator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx2
import psycopg
import pytest

from caravan.db import Database
from caravan.ids import new_id
from caravan.payments import routes as payments
from caravan.settings import Settings
from caravan.student_views import routes as views
from tests.builders import SANDBOX, SANDBOX_SECRET
from tests.clients import an_account, bearer, client_of, make_app
from tests.payments.helpers import body_of
from tests.shop import Shop, open_shop

SIGN_IN = 1
LIMITS = {"buy": SIGN_IN + 12, "confirm": SIGN_IN + 16, "webhook": 14, "view": SIGN_IN + 1}


@pytest.fixture
async def shop(db: Database) -> Shop:
    return await open_shop(db)


@pytest.fixture
async def client(shop: Shop) -> AsyncIterator[httpx2.AsyncClient]:
    actor = await an_account(shop.db, "asha@example.com")
    async with shop.db.transaction() as tx:
        await tx.execute(
            "insert into account_students (account_id, student_id) values (%(account)s, %(student)s)",
            {"account": actor.account_id, "student": shop.student},
        )
    app = make_app(shop.db, payments.router, views.router, settings=Settings(sandbox_webhook_secret=SANDBOX_SECRET))
    async with client_of(app, headers=await bearer(shop.db, actor)) as client:
        yield client


@contextmanager
def counted() -> Generator[list[str]]:
    """The statements of this process, in order."""
    asked: list[str] = []
    execute = psycopg.AsyncCursor[Any].execute

    async def listening(cursor: Any, query: Any, *given: Any, **named: Any) -> Any:
        asked.append(" ".join(str(query).split())[:60])
        return await execute(cursor, query, *given, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(psycopg.AsyncCursor, "execute", listening)
        yield asked


async def test_buying_and_paying(shop: Shop, client: httpx2.AsyncClient) -> None:
    start = (datetime.now(UTC) + timedelta(days=5)).date().isoformat()
    order = {
        "studentId": str(shop.student),
        "courseId": str(shop.course),
        "sessionCount": 30,
        "learningMode": "online",
        "groupSize": 1,
        "timeSlot": "6:00 AM",
        "startDate": start,
    }
    with counted() as asked:
        made = await client.post("/api/v1/payments", json=order)
    assert made.status_code == 201, made.text
    assert len(asked) <= LIMITS["buy"], asked
    with counted() as asked:
        paid = await client.post(f"/api/v1/payments/{made.json()['id']}/confirm")
    assert (paid.status_code, paid.json()["status"]) == (200, "succeeded")
    assert len(asked) <= LIMITS["confirm"], asked


async def test_hearing_of_a_payment(shop: Shop, client: httpx2.AsyncClient) -> None:
    body = body_of("payment.succeeded", await shop.buy())
    with counted() as asked:
        heard = await client.post(
            "/api/v1/webhooks/sandbox", content=body, headers=SANDBOX.sign(f"msg_{new_id()}", datetime.now(UTC), body)
        )
    assert heard.status_code == 200, heard.text
    assert len(asked) <= LIMITS["webhook"], asked


@pytest.mark.parametrize("view", ["home", "learning"])
async def test_looking(shop: Shop, client: httpx2.AsyncClient, view: str) -> None:
    await shop.bought()
    await shop.work()
    with counted() as asked:
        seen = await client.get(f"/api/v1/students/{shop.student}/{view}")
    assert len(seen.json()["items"]) == 1
    assert len(asked) <= LIMITS["view"], asked
    # It is written without pydantic, and is what pydantic would write.
    assert views.ViewOut.model_validate_json(seen.content).model_dump(mode="json", by_alias=True) == seen.json()
