"""Hint plus refetch equals the truth: a screen that only refetches after each frame ends up right, whatever is cut."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from httpx2 import AsyncClient
from websockets.asyncio.client import connect

from caravan.apps.subscriptions import SUBSCRIPTIONS
from caravan.db import Database
from caravan.eventlog.drain import drain
from caravan.payments.refunds import refund_payment
from caravan.people.trainers import set_active
from caravan.student_views.routes import router
from tests import builders
from tests.realtime.test_realtime import DEADLINE_SECONDS, House, Person, serve

PURCHASES = 8


@pytest.fixture
async def house(db: Database, database_url: str) -> AsyncIterator[House]:
    async with serve(db, database_url, router) as house:
        yield house


class Screen:
    """A student's screen: what it fetched last, and the last seq that it heard of."""

    def __init__(self, house: House, person: Person) -> None:
        self._house, self._person = house, person
        self._student = person.students[0]
        self.seq = 0
        self.shown: dict[str, Any] = {}
        self.heard: list[int] = []
        self.cuts = 0
        self.moved = asyncio.Event()

    async def fetch(self, http: AsyncClient) -> dict[str, Any]:
        answer = await http.get(f"{self._house.origin}/api/v1/students/{self._student}/learning")
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def watch(self) -> None:
        """Fetch after every frame, losing the connection now and then, until cancelled."""
        chance = random.Random(7)
        async with AsyncClient(headers=self._person.headers) as http:
            self.shown = await self.fetch(http)
            while True:
                async with connect(self._house.url, additional_headers=self._person.headers) as ws:
                    await ws.send(json.dumps({"type": "resume", "after": self.seq}))
                    for _ in range(chance.randint(1, 6)):
                        frame = json.loads(await ws.recv())
                        self.shown = await self.fetch(http)
                        assert self.shown["version"] >= frame["seq"]  # never older than the hint
                        self.seq = frame["seq"]
                        self.heard.append(self.seq)
                        self.moved.set()
                    ws.transport.abort()  # no goodbye
                self.cuts += 1

    async def reach(self, seq: int) -> None:
        while self.seq < seq:
            self.moved.clear()
            await self.moved.wait()


async def head_of(db: Database, student: UUID) -> int:
    async with db.transaction(read_only=True) as tx:
        return await tx.value(
            "select coalesce(max(seq), 0) from student_feed where student_id = %(id)s", {"id": student}
        )


async def live_through_a_lot(db: Database, student: UUID) -> None:
    """Purchases of which some wait, go on, and are refunded; every worker's work in between."""
    async with db.transaction() as tx:
        course = await builders.a_course(tx, tiers={5: 50_000})
        trainer = await builders.a_trainer(tx, course)
    payments: list[UUID] = []
    for number in range(PURCHASES):
        async with db.transaction("admin-service") as tx:
            await set_active(tx, trainer, active=number % 3 != 1)
        async with db.transaction("payment-service") as tx:
            payment = await builders.a_paid_checkout(
                tx, student, course, session_count=5, time_slot=f"{8 + number:02}:00",
                start_date=tx.now.date() + timedelta(days=3),
            )  # fmt: skip
            payments.append(payment.id)
        await drain(db, SUBSCRIPTIONS)
        if number % 4 == 3:
            async with db.transaction("admin-service") as tx:
                await refund_payment(tx, payments[-2], amount_cents=None, sessions=None, note="a test", source="admin")
    async with db.transaction("admin-service") as tx:
        await set_active(tx, trainer, active=True)
    await drain(db, SUBSCRIPTIONS)


async def test_a_screen_that_refetches_after_each_hint_shows_the_truth(house: House) -> None:
    person = await house.person()
    screen = Screen(house, person)
    async with asyncio.timeout(3 * DEADLINE_SECONDS), asyncio.TaskGroup() as tasks:
        watching = tasks.create_task(screen.watch())
        await live_through_a_lot(house.db, person.students[0])
        await screen.reach(await head_of(house.db, person.students[0]))
        watching.cancel()
    async with AsyncClient(headers=person.headers) as http:
        assert screen.shown == await screen.fetch(http)
    assert screen.heard == list(range(1, len(screen.heard) + 1))  # every event once, through all cuts
    assert len(screen.heard) > 4 * PURCHASES
    assert screen.cuts > 5
    stages = {item["stage"] for item in screen.shown["items"]}
    assert stages == {"scheduled", "refunded"}
