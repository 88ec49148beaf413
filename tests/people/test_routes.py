"""Students' and trainers' data over HTTP: whose it is, what it shows, what it leaves behind."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID, uuid4

import httpx2
import pytest

from caravan.db import Database
from caravan.people import admin_routes, students, trainers
from caravan.people.routes import router
from caravan.web.auth import Actor, Role
from caravan.web.routes import router as web_router
from tests.clients import PASSWORD, an_account, bearer, client_of, make_app

LATITUDE, LONGITUDE = 28.6139, 77.2090
PLACE = {"latitude": LATITUDE, "longitude": LONGITUDE}
RULE = {
    "weekday": 1,
    "fromTime": "06:00:00",
    "untilTime": "00:00:00",
    "validFrom": "2026-01-01",
    "validUntil": "2099-12-31",
}


class Office:
    """A family, a stranger and the office, each with a way to ask."""

    def __init__(self, db: Database, client: httpx2.AsyncClient) -> None:
        self.db, self.client = db, client
        self.headers: dict[str, dict[str, str]] = {}
        self.student_id = uuid4()
        self.trainer_id = uuid4()
        self.actors: dict[str, Actor] = {}

    async def open(self) -> Office:
        for name, role in (
            ("asha", Role.STUDENT),
            ("stranger", Role.STUDENT),
            ("trainer", Role.TRAINER),
            ("support", Role.SUPPORT),
            ("root", Role.ADMIN),
        ):
            actor = self.actors[name] = await an_account(self.db, f"{name}@example.com", role)
            self.headers[name] = await bearer(self.db, actor)
        async with self.db.transaction() as tx:
            await students.create_student(
                tx,
                name="Mira",
                account_id=self.actors["asha"].account_id,
                student_id=self.student_id,
                latitude=LATITUDE,
                longitude=LONGITUDE,
            )
            await trainers.create_trainer(
                tx, name="Ravi", trainer_id=self.trainer_id, latitude=LATITUDE, longitude=LONGITUDE
            )
        return self

    async def ask(self, who: str, method: str, path: str, body: Any = None) -> httpx2.Response:
        return await self.client.request(method, f"/api/v1{path}", json=body, headers=self.headers.get(who))

    async def said(self) -> list[dict[str, Any]]:
        async with self.db.transaction() as tx:
            return await tx.values("select data from outbox order by id offset 2")

    async def audit(self) -> list[dict[str, Any]]:
        async with self.db.transaction() as tx:
            return await tx.all("select action, actor, note, before, after, build from audit_log order by at, id")


@pytest.fixture
async def office(db: Database) -> AsyncIterator[Office]:
    async with client_of(make_app(db, web_router, router, admin_routes.router)) as client:
        yield await Office(db, client).open()


async def test_who_sees_a_student(office: Office) -> None:
    path = f"/students/{office.student_id}"
    own = (await office.ask("asha", "GET", path)).json()
    assert (own["name"], own["timezone"], own["hasLocation"]) == ("Mira", "Asia/Kolkata", True)
    assert {key: own[key] for key in PLACE} == PLACE
    assert (await office.ask("root", "GET", path)).json()["latitude"] == PLACE["latitude"]
    support = (await office.ask("support", "GET", path)).json()
    assert (support["hasLocation"], support["latitude"], support["longitude"]) == (True, None, None)

    stranger = await office.ask("stranger", "GET", path)
    nobody = await office.ask("stranger", "GET", f"/students/{uuid4()}")
    assert (stranger.status_code, stranger.json()["code"]) == (404, "NOT_FOUND")
    assert stranger.json()["detail"] == nobody.json()["detail"]
    assert (await office.ask("trainer", "GET", path)).status_code == 403
    assert (await office.ask("", "GET", path)).status_code == 401
    assert (await office.ask("root", "GET", f"/students/{uuid4()}")).status_code == 404


async def test_a_family_changes_its_data(office: Office) -> None:
    path = f"/students/{office.student_id}"
    answer = await office.ask("asha", "PATCH", path, {"name": "Mira R", "latitude": 12.5, "timezone": "Asia/Dubai"})
    assert answer.status_code == 200, answer.text
    assert (answer.json()["latitude"], answer.json()["longitude"]) == (12.5, PLACE["longitude"])
    assert (await office.ask("asha", "PATCH", path, {"name": "Mira R"})).status_code == 200
    gone = await office.ask("asha", "PATCH", path, {"latitude": None, "longitude": None})
    assert gone.json()["hasLocation"] is False
    events = await office.said()
    assert [event["changed"] for event in events] == [["name", "latitude", "timezone"], ["latitude", "longitude"]]
    assert "12.5" not in str(events)
    assert await office.audit() == []


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"latitude": None}, "INCOMPLETE_PLACE"),
        ({"latitude": 91}, "INVALID_REQUEST"),
        ({"longitude": "NaN"}, "INVALID_REQUEST"),
        ({"timezone": "Mars/Olympus"}, "UNKNOWN_ZONE"),
        ({"timezone": "../../etc/passwd"}, "UNKNOWN_ZONE"),
        ({"timezone": None}, "INVALID_REQUEST"),
        ({"name": None}, "INVALID_REQUEST"),
        ({"name": " "}, "INVALID_REQUEST"),
        ({"name": "a\x00"}, "INVALID_REQUEST"),
        ([], "INVALID_REQUEST"),
    ],
)
async def test_bad_changes_of_a_student(office: Office, change: Any, code: str) -> None:
    answer = await office.ask("asha", "PATCH", f"/students/{office.student_id}", change)
    assert (answer.status_code, answer.json()["code"]) == (422, code)
    assert await office.said() == []


async def test_who_changes_a_student(office: Office) -> None:
    path = f"/students/{office.student_id}"
    assert (await office.ask("stranger", "PATCH", path, {"name": "x"})).status_code == 404
    assert (await office.ask("support", "PATCH", path, {"name": "x"})).status_code == 403
    unsaid = await office.ask("root", "PATCH", path, {"latitude": 1})
    assert unsaid.json()["code"] == "NOTE_REQUIRED"
    assert (await office.ask("root", "PATCH", path, {"latitude": 1.25, "note": "moved"})).status_code == 200
    (row,) = await office.audit()
    assert (row["actor"], row["note"], row["after"]) == ("root@example.com", "moved", {"changed": ["latitude"]})


async def test_register(office: Office) -> None:
    body = {"email": "New@Example.com", "password": PASSWORD, "studentName": "Tara", "timezone": "Asia/Dubai"}
    answer = await office.ask("", "POST", "/auth/register", body)
    assert answer.status_code == 201, answer.text
    user = answer.json()["user"]
    assert user["role"] == "student"
    (student_id,) = user["studentIds"]
    office.headers["new"] = {"authorization": f"Bearer {answer.json()['token']}"}
    student = (await office.ask("new", "GET", f"/students/{student_id}")).json()
    assert (student["name"], student["timezone"], student["hasLocation"]) == ("Tara", "Asia/Dubai", False)
    again = await office.ask("", "POST", "/auth/login", {"email": "new@example.com", "password": PASSWORD})
    assert again.json()["user"] == user

    for change, status, code in (
        ({}, 409, "EMAIL_TAKEN"),
        ({"email": "x"}, 422, "INVALID_EMAIL"),
        ({"email": "a@b\n.c"}, 422, "INVALID_EMAIL"),
        ({"email": "z@example.com", "password": "short"}, 422, "INVALID_PASSWORD"),
        ({"email": "z@example.com", "timezone": "x"}, 422, "UNKNOWN_ZONE"),
        ({"email": "z@example.com", "phone": "hello"}, 422, "INVALID_REQUEST"),
        ({"email": "z@example.com", "role": "admin", "timezone": "x"}, 422, "UNKNOWN_ZONE"),
    ):
        refused = await office.ask("", "POST", "/auth/register", body | change)
        assert (refused.status_code, refused.json()["code"]) == (status, code)
        assert PASSWORD not in refused.text


async def test_an_admin_changes_a_trainer(office: Office) -> None:
    path = f"/admin/trainers/{office.trainer_id}"
    change = {"modes": ["online", "home"], "radiusKm": 3, "availability": [RULE], "active": False, "name": "Ravi K"}
    answer = await office.ask("root", "PATCH", path, change | {"note": "new contract"})
    assert answer.status_code == 200, answer.text
    shown = answer.json()
    assert (shown["name"], shown["active"], shown["radiusKm"], shown["availability"]) == ("Ravi K", False, 3, [RULE])
    assert {key: shown[key] for key in PLACE} == PLACE
    assert [event["changed"] for event in await office.said()] == [
        ["name"],
        ["modes"],
        ["place"],
        ["availability"],
        ["active"],
    ]
    (row,) = await office.audit()
    assert row["before"]["name"] == "Ravi"
    assert "28.6" not in str(row)

    assert (await office.ask("root", "PATCH", path, change | {"note": "again"})).status_code == 200
    assert len(await office.audit()) == 1, "what changes nothing leaves nothing"
    listed = (await office.ask("support", "GET", "/admin/trainers")).json()["items"]
    assert [(item["name"], item["hasPlace"]) for item in listed] == [("Ravi K", True)]
    assert (await office.ask("support", "GET", path)).json()["latitude"] is None


async def test_absences(office: Office) -> None:
    path = f"/admin/trainers/{office.trainer_id}/absences"
    body = {"startsAt": "2099-01-01T06:00:00+05:30", "endsAt": "2099-01-02T06:00:00+05:30", "note": "wedding"}
    assert (await office.ask("root", "POST", path, body)).status_code == 201
    shown = (await office.ask("root", "GET", f"/admin/trainers/{office.trainer_id}")).json()["absences"]
    assert [away["note"] for away in shown] == ["wedding"]
    for change, code in (
        ({"note": ""}, "NOTE_REQUIRED"),
        ({"endsAt": body["startsAt"]}, "INVALID_ABSENCE"),
        ({"startsAt": "2099-01-01T06:00:00"}, "INVALID_REQUEST"),
        ({"startsAt": "0001-01-01T00:00:00+14:00"}, "INVALID_REQUEST"),
        ({"endsAt": "9999-12-31T23:59:59-14:00"}, "INVALID_REQUEST"),
    ):
        refused = await office.ask("root", "POST", path, body | change)
        assert (refused.status_code, refused.json()["code"]) == (422, code), change
    assert (await office.ask("root", "POST", f"/admin/trainers/{uuid4()}/absences", body)).status_code == 404


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"note": None, "name": "x"}, "NOTE_REQUIRED"),
        ({"modes": []}, "INVALID_REQUEST"),
        ({"modes": ["telepathy"]}, "INVALID_REQUEST"),
        ({"courseIds": [str(UUID(int=1))]}, "UNKNOWN_COURSE"),
        ({"courseIds": ["x"]}, "INVALID_REQUEST"),
        ({"radiusKm": -1}, "INVALID_REQUEST"),
        ({"latitude": None}, "INCOMPLETE_PLACE"),
        ({"availability": [RULE | {"untilTime": "05:00"}]}, "INVALID_REQUEST"),
        ({"availability": [RULE | {"fromTime": "06:00+05:30"}]}, "INVALID_REQUEST"),
        ({"availability": [RULE | {"weekday": 0}]}, "INVALID_REQUEST"),
        ({"availability": [RULE | {"validUntil": "2025-01-01"}]}, "INVALID_REQUEST"),
        ({"availability": [RULE | {"validUntil": "2026-02-30"}]}, "INVALID_REQUEST"),
    ],
)
async def test_bad_changes_of_a_trainer(office: Office, change: Any, code: str) -> None:
    answer = await office.ask("root", "PATCH", f"/admin/trainers/{office.trainer_id}", {"note": "n"} | change)
    assert (answer.status_code, answer.json()["code"]) == (422, code)
    assert await office.said() == []
    assert await office.audit() == []


async def test_disabling_an_account(office: Office) -> None:
    asha = office.actors["asha"].account_id
    path = f"/admin/accounts/{asha}/disable"
    assert (await office.ask("root", "POST", path, {})).json()["code"] == "NOTE_REQUIRED"
    assert (await office.ask("support", "POST", path, {"note": "n"})).status_code == 403
    assert (await office.ask("root", "POST", path, {"note": "fraud"})).json() == {"id": str(asha), "disabled": True}
    assert (await office.ask("asha", "GET", f"/students/{office.student_id}")).status_code == 401
    assert (await office.ask("root", "POST", path, {"note": "again"})).status_code == 200
    assert [row["action"] for row in await office.audit()] == ["accounts:disable"]
    assert (await office.ask("root", "POST", f"/admin/accounts/{uuid4()}/disable", {"note": "n"})).status_code == 404


@pytest.mark.parametrize("who", ["asha", "trainer"])
async def test_the_office_is_closed_to_others(office: Office, who: str) -> None:
    for method, path in (
        ("GET", "/admin/trainers"),
        ("GET", f"/admin/trainers/{office.trainer_id}"),
        ("PATCH", f"/admin/trainers/{office.trainer_id}"),
        ("POST", f"/admin/trainers/{office.trainer_id}/absences"),
        ("POST", f"/admin/accounts/{uuid4()}/disable"),
    ):
        assert (await office.ask(who, method, path, {})).status_code == 403
