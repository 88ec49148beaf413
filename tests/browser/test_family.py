"""What a family sees: a course bought and delivered while they watch, and every page at desk and phone width."""

from __future__ import annotations

import re
import warnings

import pytest
from playwright.async_api import Page, expect

from caravan.people.trainers import set_active
from tests.browser.site import DESK, PHONE, Site, screenshot, sign_in


async def begin_to_buy(page: Page, *, sessions: int = 30) -> None:
    await page.goto("/courses")
    await page.get_by_role("link", name="Robotics").click()
    await page.get_by_label(re.compile(rf"\b{sessions} sessions")).check()
    await page.get_by_label("Time of day").select_option("6:00 AM")
    await page.get_by_role("button", name="Buy").click()
    await expect(page).to_have_url(re.compile("/checkout/"))


async def milliseconds_since_paid(page: Page) -> float:
    return await page.evaluate("performance.now() - performance.getEntriesByName('caravan:pay').at(-1).startTime")


@pytest.mark.filterwarnings("default:delivered")
async def test_a_paid_course_is_delivered_while_the_family_watches(site: Site, page: Page) -> None:
    await sign_in(page)
    await expect(page.get_by_role("heading", name="Asha’s courses")).to_be_visible()
    await screenshot(page, "home-empty")
    await page.goto("/courses")
    await screenshot(page, "catalogue")
    await page.get_by_role("link", name="Robotics").click()
    await screenshot(page, "course")
    await begin_to_buy(page)
    await page.evaluate("window.untouched = true")  # a reload would lose it
    await screenshot(page, "checkout")
    await page.get_by_role("button", name=re.compile("^Pay ₹3,600")).click()
    await expect(page.locator(".steps li.done")).to_have_count(4)
    took = await milliseconds_since_paid(page)
    await expect(page.get_by_text("All set: 30 sessions are booked with Ravi.")).to_be_visible()
    assert await page.evaluate("window.untouched")
    if took >= 1000:  # said, not failed: a machine may be busy with something else
        warnings.warn(f"delivered on the screen {took:.0f} ms after the press", stacklevel=1)
    await screenshot(page, "delivered")
    await page.get_by_role("button", name="See all sessions").click()
    await expect(page.get_by_role("row")).to_have_count(31)
    await screenshot(page, "purchase")
    await page.get_by_role("link", name="Learning").click()
    await screenshot(page, "learning")
    await page.goto("/home")
    await expect(page.get_by_text("Next session")).to_be_visible()
    await screenshot(page, "home")


async def test_what_waits_is_said_in_plain_words_and_goes_on_by_itself(site: Site, page: Page) -> None:
    async with site.db.transaction() as tx:
        await tx.execute("update trainers set active = false")
    await sign_in(page)
    await begin_to_buy(page)
    await page.get_by_role("button", name=re.compile("^Pay")).click()
    await expect(page.get_by_role("status").filter(has_text="No trainer is free")).to_be_visible()
    await screenshot(page, "waiting")
    async with site.db.transaction("admin-service") as tx:
        await set_active(tx, site.trainer, active=True)
    await expect(page.locator(".steps li.done")).to_have_count(4)


async def test_home_is_filled_in_by_the_device_or_by_hand(site: Site, page: Page) -> None:
    async with site.db.transaction() as tx:
        await tx.execute("update students set latitude = null, longitude = null")
    await page.context.grant_permissions(["geolocation"], origin=site.address)
    await page.context.set_geolocation({"latitude": 28.6139, "longitude": 77.209})
    await sign_in(page)
    await page.goto(f"/courses/{site.robotics}")
    await page.get_by_label("At home").check()
    await page.get_by_role("button", name="Buy").click()
    await page.get_by_role("button", name=re.compile("^Pay")).click()
    await expect(page.get_by_label("Latitude of home")).to_be_visible()
    await page.get_by_role("button", name="Use this device’s position").click()
    await expect(page.get_by_label("Latitude of home")).to_have_value("28.61390")
    await expect(page.get_by_label("Longitude of home")).to_have_value("77.20900")
    await screenshot(page, "home-location")
    await page.get_by_role("button", name="Save home").click()
    await expect(page.locator(".steps li.done")).to_have_count(4)


async def test_a_page_whose_socket_broke_is_right_again_by_itself(site: Site, page: Page) -> None:
    await sign_in(page)
    await begin_to_buy(page)
    payment = page.url.rsplit("/", 1)[1]
    await page.context.set_offline(True)
    await page.evaluate("window.untouched = true")
    answer = await page.context.request.post(f"/api/v1/payments/{payment}/confirm", headers={"origin": site.address})
    assert answer.ok
    await page.context.set_offline(False)
    await expect(page.locator(".steps li.done")).to_have_count(4)
    assert await page.evaluate("window.untouched")


async def test_a_second_order_of_the_same_is_led_to_the_first(site: Site, page: Page) -> None:
    await sign_in(page)
    await begin_to_buy(page)
    first = page.url
    await page.goto(f"/courses/{site.robotics}")
    await page.get_by_label(re.compile(r"\b30 sessions")).check()
    await page.get_by_role("button", name="Buy").click()
    await page.get_by_role("link", name="Go on with that order").click()
    await expect(page).to_have_url(first)


async def test_other_terms_than_those_of_the_open_order_can_be_ordered_too(site: Site, page: Page) -> None:
    await sign_in(page)
    await begin_to_buy(page)
    first = page.url
    await page.goto(f"/courses/{site.robotics}")
    await page.get_by_label(re.compile(r"\b10 sessions")).check()
    await page.get_by_label("At home").check()
    await page.get_by_role("button", name="Buy").click()
    await expect(page.get_by_text("already (30 sessions, online, ₹3,600).")).to_be_visible()
    link = page.get_by_role("link", name="Go on with that order")
    await expect(link).to_have_attribute("href", re.compile(first[-36:]))
    await screenshot(page, "order-open")
    await page.get_by_role("button", name="Order it again with what I chose now").click()
    await expect(page).to_have_url(re.compile("/checkout/"))
    assert page.url != first
    await expect(page.get_by_text(re.compile("10 sessions at 6:00 AM.*at home"))).to_be_visible()
    await page.goto("/home")
    await expect(page.get_by_text("₹1,500 to pay.")).to_be_visible()
    await expect(page.get_by_text(re.compile("10 sessions at 6:00 AM.*at home"))).to_be_visible()
    await screenshot(page, "home-two-unpaid")


async def test_every_page_fits_a_phone(site: Site, page: Page) -> None:
    await sign_in(page)
    await begin_to_buy(page)
    await page.get_by_role("button", name=re.compile("^Pay")).click()
    await expect(page.locator(".steps li.done")).to_have_count(4)
    checkout = page.url
    async with site.db.transaction() as tx:
        purchase = await tx.value("select id from student_course_purchases")
    await page.set_viewport_size(PHONE)
    pages = {
        "home": "/home", "catalogue": "/courses", "course": f"/courses/{site.robotics}", "checkout": checkout,
        "learning": "/learning", "purchase": f"/purchases/{purchase}",
    }  # fmt: skip
    for name, address in pages.items():
        await page.goto(address)
        await screenshot(page, f"phone-{name}")
        assert await page.evaluate("document.documentElement.scrollWidth") <= 360, name
        small = await page.evaluate(
            """[...document.querySelectorAll("main a, main button, main input:not([type=hidden]), main select")]
                 .filter(e => !e.closest("p, td") && e.getBoundingClientRect().height < 24 && !e.closest("label"))
                 .map(e => e.outerHTML)"""
        )
        assert small == [], name


async def test_a_parent_changes_between_children_and_a_trainer_sees_the_day(site: Site, page: Page) -> None:
    await sign_in(page)
    await page.get_by_role("link", name="Bela").click()
    await expect(page.get_by_role("heading", name="Bela’s courses")).to_be_visible()
    await begin_to_buy(page)
    await page.get_by_role("button", name=re.compile("^Pay")).click()
    await expect(page.locator(".steps li.done")).to_have_count(4)
    await page.get_by_role("button", name="Sign out").click()
    await page.set_viewport_size(DESK)
    await sign_in(page, "ravi@example.com")
    await expect(page.get_by_text("Robotics with Bela").first).to_be_visible()
    await screenshot(page, "trainer")
    async with site.db.transaction() as tx:
        await tx.execute("update students set latitude = 28.6139, longitude = 77.209")
        await tx.execute("update student_course_purchases set learning_mode = 'home'")
        await tx.execute(
            "update tutoring_sessions set starts_at = now() + interval '1 hour', ends_at = now() + interval '2 hours'"
            " where seq = 1"
        )
    await page.set_viewport_size(PHONE)
    await page.reload()
    await page.get_by_role("link", name="The way there").click()
    await expect(page.get_by_role("heading", name="The way to Bela")).to_be_visible()
    await screenshot(page, "phone-place")
