"""What the browser tests stand on: who is there, signing in, and where screenshots go."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

from playwright.async_api import Page, ViewportSize

from caravan.apps.bootstrap import Platform
from caravan.apps.worker import Workers
from caravan.db import Database
from caravan.ids import new_id
from caravan.web import auth
from caravan.web.auth import Role
from tests import builders

SCREENS = Path(__file__).parents[2] / "build" / "screens"
PASSWORD = "correct horse"
DESK: ViewportSize = {"width": 1100, "height": 800}
PHONE: ViewportSize = {"width": 360, "height": 740}


@dataclass
class Site:
    """What runs, and who is there: a parent with two children, a trainer, two courses."""

    platform: Platform
    workers: Workers
    address: str
    children: list[UUID] = field(default_factory=list)
    robotics: UUID = field(default_factory=new_id)
    trainer: UUID = field(default_factory=new_id)

    @property
    def db(self) -> Database:
        return self.platform.db

    async def furnish(self) -> None:
        password_hash = await auth.hash_password(PASSWORD)
        async with self.db.transaction() as tx:
            parent = await auth.create_account(
                tx, email="parent@example.com", name="Meera", role=Role.STUDENT, password_hash=password_hash
            )
            teacher = await auth.create_account(
                tx, email="ravi@example.com", name="Ravi", role=Role.TRAINER, password_hash=password_hash
            )
            for name in ("Asha", "Bela"):
                child = await builders.a_student(tx, name)
                self.children.append(child)
                await tx.execute(
                    "insert into account_students (account_id, student_id) values (%(parent)s, %(child)s)",
                    {"parent": parent, "child": child},
                )
            await builders.a_course(tx, course_id=self.robotics, tiers={10: 150_000, 30: 360_000})
            chess = await builders.a_course(tx, "Chess", minutes=45, weekdays=(1, 3, 5), modes=("online",))
            await builders.a_trainer(tx, self.robotics, chess, trainer_id=self.trainer)
            await tx.execute(
                "update trainers set account_id = %(account)s where id = %(trainer)s",
                {"account": teacher, "trainer": self.trainer},
            )


async def sign_in(page: Page, email: str = "parent@example.com") -> None:
    await page.goto("/login")
    await page.get_by_label("E-mail").fill(email)
    await page.get_by_label("Password").fill(PASSWORD)
    await page.get_by_role("button", name="Sign in").click()


async def screenshot(page: Page, name: str) -> None:
    SCREENS.mkdir(parents=True, exist_ok=True)
    await page.screenshot(path=SCREENS / f"{name}.png", full_page=True)
