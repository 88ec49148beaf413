"""The demo's data over several runs: made once, the same passwords, and new ones where the old are lost."""

from __future__ import annotations

from pathlib import Path
from uuid import UUID

import pytest

from caravan.apps.demo_data import DemoRefused, ensure_demo
from caravan.apps.folder import DataFolder
from caravan.db import Database
from caravan.people.students import link_student
from caravan.settings import Settings, load_settings
from caravan.web.auth import check_password
from tests.builders import a_course

URL = "http://127.0.0.1:8080"


@pytest.fixture
def settings(database_url: str, tmp_path: Path) -> Settings:
    return load_settings({}, postgres_url=database_url, data_dir=tmp_path, demo=True)


async def _accepts(db: Database, email: str, password: str) -> bool:
    async with db.transaction() as tx:
        hashed = await tx.value("select password_hash from accounts where email = %(email)s", {"email": email})
    return await check_password(hashed, password)


async def test_a_second_run_changes_nothing_but_the_address(db: Database, settings: Settings) -> None:
    folder = DataFolder(settings.data_dir)
    await ensure_demo(db, settings, URL)
    first = folder.read_demo()

    await ensure_demo(db, settings, "http://127.0.0.1:9090")

    assert folder.read_demo() == first | {"url": "http://127.0.0.1:9090"}
    async with db.transaction() as tx:
        assert await tx.value("select count(*) from trainers") == 40
        assert await tx.value("select count(*) from accounts") == 10
    for account in (first["admin"], first["support"], first["trainer"], *first["students"], *first["rehearsal"]):
        assert await _accepts(db, account["email"], account["password"])


async def test_who_and_what_was_renamed_is_found_again(db: Database, settings: Settings) -> None:
    folder = DataFolder(settings.data_dir)
    await ensure_demo(db, settings, URL)
    first = folder.read_demo()
    async with db.transaction() as tx:
        await tx.execute("update students set name = 'Renamed ' || name")
        await tx.execute("update courses set title = 'Renamed ' || title")
        await tx.execute("update trainers set name = 'Renamed ' || name")
        await tx.execute("update accounts set name = 'Renamed ' || name")
        # An older student joins a family: still not one of those that the demo made for it.
        await link_student(
            tx,
            await tx.value("select id from accounts where email = 'meera@demo.caravan.example'"),
            UUID(first["students"][0]["id"]),
        )

    await ensure_demo(db, settings, URL)

    again = folder.read_demo()
    for part in ("students", "rehearsal", "courses"):
        assert [each["id"] for each in again[part]] == [each["id"] for each in first[part]]
    assert again["students"][0]["name"] == f"Renamed {first['students'][0]['name']}"
    assert again["rehearsal"] == first["rehearsal"]  # its names are parts to be played


async def test_lost_passwords_are_replaced(db: Database, settings: Settings) -> None:
    folder = DataFolder(settings.data_dir)
    await ensure_demo(db, settings, URL)
    old = folder.read_demo()["admin"]
    folder.demo.unlink()

    await ensure_demo(db, settings, URL)

    new = folder.read_demo()["admin"]
    assert new["password"] != old["password"]
    assert await _accepts(db, new["email"], new["password"])
    assert not await _accepts(db, old["email"], old["password"])


async def test_data_of_somebodys_own_is_left_alone(db: Database, settings: Settings) -> None:
    async with db.transaction() as tx:
        await a_course(tx)

    with pytest.raises(DemoRefused):
        await ensure_demo(db, settings, URL)

    assert not DataFolder(settings.data_dir).demo.exists()
