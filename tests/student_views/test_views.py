"""What a family reads over the API at every stage, and nobody else."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID

import httpx2
import pytest

from caravan.db import Database
from caravan.eventlog import outbox
from caravan.events import CourseAccessGranted
from caravan.ids import new_id
from caravan.student_views.routes import router
from caravan.web.auth import Role
from tests.clients import an_account, bearer, client_of, make_app
from tests.fulfilment import world
from tests.fulfilment.world import Road


@pytest.fixture
async def client(db: Database) -> AsyncIterator[httpx2.AsyncClient]:
    async with client_of(make_app(db, router)) as client:
        yield client


async def sign_in(db: Database, client: httpx2.AsyncClient, *students: UUID, role: Role = Role.STUDENT) -> None:
    actor = await an_account(db, f"{new_id()}@example.com", role)
    async with db.transaction() as tx:
        for student in students:
            await tx.execute(
                "insert into account_students (account_id, student_id) values (%(account)s, %(student)s)",
                {"account": actor.account_id, "student": student},
            )
    client.headers.update(await bearer(db, actor))


async def read(client: httpx2.AsyncClient, road: Road, view: str) -> Any:
    answer = await client.get(f"/api/v1/students/{road.student_id}/{view}")
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_a_payment_is_at_home_from_its_first_second_until_it_is_delivered(
    db: Database, client: httpx2.AsyncClient
) -> None:
    road = await world.a_payment(db, reason="NO_TRAINER_AVAILABLE")
    await sign_in(db, client, road.student_id)
    home = await read(client, road, "home")
    assert home["version"] == 0
    [item] = home["items"]
    assert (item["paymentId"], item["purchaseId"]) == (str(road.payment_id), None)
    assert (item["title"], item["stage"], item["reason"]) == ("Robotics", "paid", "NO_TRAINER_AVAILABLE")
    assert item["trainer"] is None
    assert item["nextSession"] is None
    assert item["sessions"]["total"] == item["sessions"]["owed"] == 3

    await world.purchased(db, road)
    await world.allocated(db, road)
    [item] = (await read(client, road, "home"))["items"]
    assert (item["stage"], item["trainer"]) == ("allocated", {"id": str(road.trainer_id), "name": "Ravi"})

    await world.scheduled(db, road)
    async with db.transaction() as tx:
        await tx.execute(
            "update tutoring_sessions set status = 'completed', starts_at = now() - interval '2 hours', "
            "ends_at = now() - interval '1 hour' where seq = 1"
        )
        await tx.execute("update tutoring_sessions set status = 'trainer_absent' where seq = 2")
        event = CourseAccessGranted(
            payment_id=road.payment_id,
            student_id=road.student_id,
            course_id=road.course_id,
            purchase_id=road.purchase_id,
        )
        outbox.append(tx, [event])
    home = await read(client, road, "home")
    assert home["version"] == 1
    [item] = home["items"]
    assert (item["stage"], item["purchaseId"], item["reason"]) == ("scheduled", str(road.purchase_id), None)
    assert item["sessions"] == {
        "total": 3, "scheduled": 1, "completed": 1, "studentAbsent": 0, "cancelled": 1, "refunded": 0, "owed": 1,
    }  # fmt: skip
    assert item["nextSession"]["seq"] == 3


async def test_learning_keeps_what_is_over_and_home_does_not(db: Database, client: httpx2.AsyncClient) -> None:
    done = await world.a_payment(db)
    await world.purchased(db, done)
    await world.allocated(db, done)
    await world.scheduled(db, done)
    async with db.transaction() as tx:
        await tx.execute("update tutoring_sessions set status = 'completed'")
    refunded = await world.a_payment(db, status="refunded")
    await sign_in(db, client, done.student_id, refunded.student_id)
    for road, stage in ((done, "completed"), (refunded, "refunded")):
        assert (await read(client, road, "home"))["items"] == []
        [item] = (await read(client, road, "learning"))["items"]
        assert item["stage"] == stage


async def test_only_the_family_and_staff_may_look(db: Database, client: httpx2.AsyncClient) -> None:
    road, other = await world.a_payment(db), await world.a_payment(db)
    for view in ("home", "learning", "sessions"):
        assert (await client.get(f"/api/v1/students/{road.student_id}/{view}")).status_code == 401
    await sign_in(db, client, other.student_id)
    for view in ("home", "learning", "sessions"):
        refused = await client.get(f"/api/v1/students/{road.student_id}/{view}")
        assert (refused.status_code, refused.json()["code"]) == (404, "NOT_FOUND")
    await sign_in(db, client, role=Role.SUPPORT)
    assert len((await read(client, road, "home"))["items"]) == 1
    assert (await client.get(f"/api/v1/students/{new_id()}/home")).status_code == 404
    await sign_in(db, client, role=Role.TRAINER)
    assert (await client.get(f"/api/v1/students/{road.student_id}/home")).status_code == 403


async def test_sessions_come_in_pages_without_loss_or_repetition(db: Database, client: httpx2.AsyncClient) -> None:
    road = await world.a_payment(db, sessions=7)
    await world.purchased(db, road)
    await world.allocated(db, road, sessions=7)
    await world.scheduled(db, road)
    await sign_in(db, client, road.student_id)
    seen: list[int] = []
    params: dict[str, Any] = {"limit": 3}
    for more in (True, True, False):
        page = (await client.get(f"/api/v1/students/{road.student_id}/sessions", params=params)).json()
        seen += [session["seq"] for session in page["items"]]
        assert page["items"][0].keys() >= {"id", "purchaseId", "seq", "trainerId", "startsAt", "endsAt", "status"}
        assert (page["nextCursor"] is not None) == more
        params["cursor"] = page["nextCursor"]
    assert seen == [1, 2, 3, 4, 5, 6, 7]


def _encoded(text: str) -> str:
    return base64.urlsafe_b64encode(text.encode()).decode()


@pytest.mark.parametrize(
    "cursor",
    ["x", "", "é", "====", _encoded("[]"), _encoded("null"),
     _encoded('["2026-01-01T00:00:00", "01980000-0000-7000-8000-000000000001"]'),
     _encoded('["2026-01-01T00:00:00Z", "nonsense"]'), _encoded('["2026-01-01T00:00:00Z", "\\u0000"]')],
)  # fmt: skip
async def test_a_cursor_that_we_never_gave_is_refused(db: Database, client: httpx2.AsyncClient, cursor: str) -> None:
    road = await world.a_payment(db)
    await sign_in(db, client, road.student_id)
    refused = await client.get(f"/api/v1/students/{road.student_id}/sessions", params={"cursor": cursor})
    assert (refused.status_code, refused.json()["code"]) == (422, "CURSOR_INVALID")


@pytest.mark.parametrize("limit", ["0", "201", "-1", "x"])
async def test_a_page_has_one_to_200_sessions(db: Database, client: httpx2.AsyncClient, limit: str) -> None:
    road = await world.a_payment(db)
    await sign_in(db, client, road.student_id)
    refused = await client.get(f"/api/v1/students/{road.student_id}/sessions", params={"limit": limit})
    assert (refused.status_code, refused.json()["code"]) == (422, "INVALID_REQUEST")
