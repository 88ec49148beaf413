"""Same key and body: same answer, once done; anything else is refused."""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import uuid4

import pytest

from caravan.db import Database, Tx
from caravan.errors import Conflict
from caravan.web import audit
from caravan.web.auth import Actor, Role
from caravan.web.idempotency import IdempotencyKeyInUse, IdempotencyKeyReused, InvalidIdempotencyKey, once

ROUTE = "POST /api/v1/payments"


class Shop:
    """Counts what really happened: audit rows, in the same transaction as the answer."""

    def __init__(self, db: Database) -> None:
        self.db = db
        self.actor = Actor(account_id=uuid4(), name="asha@example.com", role=Role.STUDENT)
        self.started = asyncio.Event()
        self.go_on = asyncio.Event()
        self.go_on.set()
        self.fail = False

    async def buy(self, key: str, body: bytes = b"{}", route: str = ROUTE, actor: Actor | None = None) -> Any:
        async def work(tx: Tx) -> tuple[int, dict[str, Any]]:
            async def effect() -> tuple[int, dict[str, Any]]:
                await audit.record(tx, self.actor, action="buy", subject_type="x", subject_id=uuid4(), note=None)
                self.started.set()
                await self.go_on.wait()
                if self.fail:
                    raise Conflict
                return 201, {"id": str(uuid4())}

            return await once(tx, actor or self.actor, key, route, body, effect)

        return await self.db.transact(work)

    async def effects(self) -> int:
        async with self.db.transaction() as tx:
            return await tx.value("select count(*) from audit_log")


@pytest.fixture
def shop(db: Database) -> Shop:
    return Shop(db)


async def test_the_same_request_gets_the_same_answer(shop: Shop) -> None:
    first = await shop.buy("k1")
    assert await shop.buy("k1") == first
    assert await shop.effects() == 1
    assert await shop.buy("k2") != first


async def test_another_body_or_route_is_refused(shop: Shop) -> None:
    await shop.buy("k1")
    with pytest.raises(IdempotencyKeyReused):
        await shop.buy("k1", body=b"{} ")
    with pytest.raises(IdempotencyKeyReused):
        await shop.buy("k1", route="POST /api/v1/other")
    assert await shop.effects() == 1


async def test_one_that_still_runs_is_refused(shop: Shop) -> None:
    shop.go_on.clear()
    running = asyncio.create_task(shop.buy("k1"))
    await asyncio.wait_for(shop.started.wait(), 5)
    with pytest.raises(IdempotencyKeyInUse):
        await asyncio.wait_for(shop.buy("k1"), 5)
    shop.go_on.set()
    answer = await running
    assert await shop.buy("k1") == answer


async def test_a_refusal_is_not_kept(shop: Shop) -> None:
    shop.fail = True
    with pytest.raises(Conflict):
        await shop.buy("k1")
    shop.fail = False
    assert (await shop.buy("k1"))[0] == 201
    assert await shop.effects() == 1


async def test_keys_belong_to_their_account(shop: Shop) -> None:
    other = Actor(account_id=uuid4(), name="other@example.com", role=Role.STUDENT)
    assert await shop.buy("k1") != await shop.buy("k1", actor=other)


@pytest.mark.parametrize("key", ["", "x" * 256, "a b", "a\x00", "ключ"])
async def test_odd_keys_are_refused(shop: Shop, key: str) -> None:
    with pytest.raises(InvalidIdempotencyKey):
        await shop.buy(key)


async def test_audit_rows_cannot_be_changed(db: Database, shop: Shop) -> None:
    await shop.buy("k1")
    for change in ("update audit_log set note = 'x'", "delete from audit_log", "truncate audit_log"):
        with pytest.raises(Exception, match="append-only"):
            async with db.transaction() as tx:
                await tx.connection.execute(change)
