"""The catalogue, and what an admin may change in it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import date
from typing import Any
from uuid import UUID

import httpx2
import pytest

from caravan import catalog
from caravan.catalog import Tier
from caravan.catalog.courses import add_holiday, create_course
from caravan.catalog.routes import router
from caravan.db import Database
from caravan.web.auth import Role
from tests.clients import an_account, bearer, client_of, make_app

TIERS = (Tier(30, 360_000), Tier(10, 150_000), Tier(10, 250_000, group_size=2))


@pytest.fixture
async def client(db: Database) -> AsyncIterator[httpx2.AsyncClient]:
    admin = await an_account(db, "root@example.com", Role.ADMIN)
    async with client_of(make_app(db, router), headers=await bearer(db, admin)) as client:
        yield client


@pytest.fixture
async def course(db: Database) -> UUID:
    async with db.transaction() as tx:
        return await create_course(
            tx, title="Robotics", category="STEM", session_minutes=60, tiers=TIERS, group_sizes=(1, 2)
        )


async def said(db: Database) -> list[dict[str, Any]]:
    async with db.transaction() as tx:
        return await tx.values("select data from outbox where type = 'COURSE_UPDATED' order by id")


async def test_the_catalogue_has_the_contracts_shape(client: httpx2.AsyncClient, course: UUID) -> None:
    del client.headers["authorization"]  # open to everybody
    (item,) = (await client.get("/api/v1/courses")).json()["items"]
    assert item == {
        "id": str(course),
        "title": "Robotics",
        "category": "STEM",
        "sessionMinutes": 60,
        "weekdays": [1, 2, 3, 4, 5, 6, 7],
        "learningModes": ["online", "home"],
        "groupSizes": [1, 2],
        "retired": False,
        "tiers": [
            {"sessions": 10, "amountCents": 150_000, "currency": "INR", "groupSize": 1},
            {"sessions": 30, "amountCents": 360_000, "currency": "INR", "groupSize": 1},
        ],
        "groupTiers": [{"sessions": 10, "amountCents": 250_000, "currency": "INR", "groupSize": 2}],
    }
    assert (await client.get(f"/api/v1/courses/{course}")).json() == item
    missing = await client.get("/api/v1/courses/018f0000-0000-7000-8000-000000000000")
    assert (missing.status_code, missing.json()["code"]) == (404, "NOT_FOUND")


async def test_prices_and_holidays(db: Database, course: UUID) -> None:
    async with db.transaction() as tx:
        assert await catalog.price_of(tx, course, 30) == Tier(30, 360_000)
        assert await catalog.price_of(tx, course, 10, 2) == Tier(10, 250_000, "INR", 2)
        assert await catalog.price_of(tx, course, 11) is None
        await add_holiday(tx, date(2026, 1, 26), "Republic Day")
        assert await catalog.list_holidays(tx) == {date(2026, 1, 26)}


async def test_an_admin_changes_a_course(client: httpx2.AsyncClient, db: Database, course: UUID) -> None:
    address = f"/api/v1/admin/courses/{course}"
    change = {"title": "Robots", "tiers": [{"sessions": 5, "amountCents": 0}], "weekdays": [3, 1, 3], "retired": True}
    answer = await client.patch(address, json=change | {"note": "new season"})
    assert answer.status_code == 200, answer.text
    assert answer.json()["retired"] is True
    assert answer.json()["weekdays"] == [1, 3]
    assert answer.json()["tiers"] == [{"sessions": 5, "amountCents": 0, "currency": "INR", "groupSize": 1}]
    assert (await client.get("/api/v1/courses")).json() == {"items": []}
    async with db.transaction() as tx:
        assert await catalog.price_of(tx, course, 5) is None  # retired courses aren't sold
        row = await tx.one("select actor, note, before, after from audit_log")
    assert row["actor"] == "root@example.com"
    assert row["note"] == "new season"
    assert row["before"]["title"] == "Robotics"
    assert row["after"]["title"] == "Robots"
    assert set((await said(db))[-1]["changed"]) == {"title", "tiers", "weekdays", "retired"}

    again = await client.patch(address, json=change | {"note": "once more"})
    assert again.status_code == 200
    assert len(await said(db)) == 2, "what changes nothing says nothing"
    back = await client.patch(address, json={"retired": False, "note": "popular demand"})
    assert back.json()["retired"] is False


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"title": "x"}, "NOTE_REQUIRED"),
        ({"title": "x", "note": "  "}, "NOTE_REQUIRED"),
        ({"title": "", "note": "n"}, "INVALID_REQUEST"),
        ({"weekdays": [], "note": "n"}, "INVALID_REQUEST"),
        ({"weekdays": [8], "note": "n"}, "INVALID_REQUEST"),
        ({"tiers": [{"sessions": 0, "amountCents": 1}], "note": "n"}, "INVALID_REQUEST"),
        ({"tiers": [{"sessions": 1, "amountCents": 10**30}], "note": "n"}, "INVALID_REQUEST"),
        ({"tiers": [{"sessions": 1, "amountCents": 1, "currency": "inr"}], "note": "n"}, "INVALID_REQUEST"),
        ({"tiers": [{"sessions": 1, "amountCents": 1, "groupSize": 3}], "note": "n"}, "INVALID_TIERS"),
        (
            {"tiers": [{"sessions": 1, "amountCents": 1}, {"sessions": 1, "amountCents": 2}], "note": "n"},
            "INVALID_TIERS",
        ),
    ],
)
async def test_bad_changes_change_nothing(
    client: httpx2.AsyncClient, db: Database, course: UUID, change: dict[str, Any], code: str
) -> None:
    before = (await client.get(f"/api/v1/courses/{course}")).json()
    answer = await client.patch(f"/api/v1/admin/courses/{course}", json=change)
    assert (answer.status_code, answer.json()["code"]) == (422, code)
    assert (await client.get(f"/api/v1/courses/{course}")).json() == before
    assert len(await said(db)) == 1


@pytest.mark.parametrize(("role", "status"), [(Role.STUDENT, 403), (Role.TRAINER, 403), (Role.SUPPORT, 403)])
async def test_only_admins_change_courses(db: Database, course: UUID, role: Role, status: int) -> None:
    somebody = await an_account(db, "somebody@example.com", role)
    async with client_of(make_app(db, router)) as client:
        body = {"title": "x", "note": "n"}
        address = f"/api/v1/admin/courses/{course}"
        assert (await client.patch(address, json=body)).status_code == 401
        answer = await client.patch(address, json=body, headers=await bearer(db, somebody))
        assert (answer.status_code, answer.json()["code"]) == (status, "NOT_ALLOWED")
