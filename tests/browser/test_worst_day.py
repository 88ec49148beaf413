"""The console on the worst day, as a tired operator sees it: at a desk, and on a telephone."""

from __future__ import annotations

import pytest
from playwright.async_api import Page, expect

from caravan import pauses
from caravan.deliveries import Stage
from caravan.pauses import Scope
from caravan.web import auth
from caravan.web.auth import Role
from tests.browser.site import DESK, PASSWORD, Site, screenshot, sign_in

NARROW = {"width": 390, "height": 800}
NOTE = "The list of trainers was imported twice; Asha is mending it"


async def test_the_menu_stays_on_one_line_from_1024_pixels_on(site: Site, page: Page) -> None:
    email = "asha.who.answers.the.telephone.at.night@example.com"
    password_hash = await auth.hash_password(PASSWORD)
    async with site.db.transaction() as tx:
        await auth.create_account(tx, email=email, name="Asha", role=Role.ADMIN, password_hash=password_hash)
    await sign_in(page, email)
    for width in (1024, 1100, 1280):
        await page.set_viewport_size({"width": width, "height": 600})
        await page.goto("/admin")
        tops = await page.locator("nav ul:first-child li").evaluate_all("all => all.map(each => each.offsetTop)")
        assert len(set(tops)) == 1, width
        await expect(page.get_by_role("button", name="Sign out")).to_be_in_viewport(ratio=1)
        wide = await page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wide <= 0, width
        await screenshot(page, f"menu-{width}")


@pytest.mark.parametrize("size", ["desk", "narrow"])
async def test_a_pause_is_on_every_page_and_nothing_runs_out_of_the_screen(site: Site, page: Page, size: str) -> None:
    await page.set_viewport_size(DESK if size == "desk" else NARROW)  # type: ignore[arg-type]  # pyright: ignore
    password_hash = await auth.hash_password(PASSWORD)
    async with site.db.transaction() as tx:
        await auth.create_account(
            tx, email="ops@example.com", name="Asha", role=Role.ADMIN, password_hash=password_hash
        )
        for scope in (Scope(Stage.PURCHASED), Scope(Stage.ALLOCATED, site.robotics, "Delhi")):
            await pauses.pause(tx, scope, note=NOTE, by="ops@example.com")
    await sign_in(page, "ops@example.com")
    for name, path in (("console", "/admin"), ("pauses", "/admin/pauses"), ("repairs", "/admin/repairs")):
        await page.goto(path)
        await expect(page.get_by_text("purchased is paused: no trainers are allocated.").first).to_be_visible()
        await screenshot(page, f"worst-day-{name}-{size}")
        wide = await page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wide <= 0, path
    await page.goto("/admin/pauses")
    first = page.get_by_role("article").first
    await first.get_by_label("Why (required)").fill("mended")
    await first.get_by_role("button", name="Resume").click()
    await expect(page.get_by_role("article")).to_have_count(1)
