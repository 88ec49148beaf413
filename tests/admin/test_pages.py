"""The console: every page in every state it can show, and each form does what its button says."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import httpx2
import pytest

from caravan.admin import pages, routes
from caravan.apps.subscriptions import BY_GROUP
from caravan.db import Database
from caravan.deliveries import Reason
from caravan.fulfilment.diagnose import Technical
from caravan.fulfilment.wording import REASONS
from caravan.ids import new_id
from caravan.web.auth import Role
from tests.clients import ORIGIN, an_account, bearer, client_of, make_app
from tests.fulfilment import world
from tests.shop import SETTINGS, Shop, open_shop

WHY = {"note": "seen on the console"}


@dataclass(slots=True)
class Console:
    shop: Shop
    client: httpx2.AsyncClient

    async def page(self, path: str = "", status: int = 200) -> str:
        answer = await self.client.get(f"/admin{path}", headers={"accept": "text/html"})
        assert answer.status_code == status, answer.text
        return answer.text

    async def press(self, path: str, **fields: Any) -> httpx2.Response:
        return await self.client.post(
            f"/admin/{path}", data=WHY | fields, headers={"origin": ORIGIN, "accept": "text/html"}
        )

    async def pressed(self, path: str, **fields: Any) -> str:
        """Press, follow, read."""
        answer = await self.press(path, **fields)
        assert answer.status_code == 303, answer.text
        return await self.page(answer.headers["location"].removeprefix("/admin"))


async def a_console(db: Database, client: httpx2.AsyncClient, role: Role) -> Console:
    actor = await an_account(db, f"{role}@example.com", role)
    token = (await bearer(db, actor))["authorization"].removeprefix("Bearer ")
    client.cookies.set("caravan_session", token)
    return Console(await open_shop(db), client)


@pytest.fixture
async def client(db: Database) -> AsyncIterator[httpx2.AsyncClient]:
    app = make_app(db, routes.router, pages.router, settings=SETTINGS)
    app.state.subscriptions = BY_GROUP
    async with client_of(app) as client:
        yield client


@pytest.fixture
async def console(db: Database, client: httpx2.AsyncClient) -> Console:
    return await a_console(db, client, Role.ADMIN)


def text_of(page: str) -> str:
    return " ".join(re.sub(r"<[^>]+>", " ", page).split())


@pytest.mark.parametrize("path", ["", "/waiting", "/purchases", "/dead-letters", "/workers"])
async def test_an_empty_house_has_every_page(console: Console, path: str) -> None:
    assert "<h1>" in await console.page(path)


async def test_the_overview_says_what_waits(console: Console) -> None:
    await console.shop.bought()
    await console.shop.webhook(new_id(), cents=777)
    await console.shop.run("update webhook_events set received_at = received_at - interval '20 minutes'")
    await console.shop.run("update outbox set occurred_at = occurred_at - interval '20 minutes'")
    text = text_of(await console.page())
    assert "1 payment, ₹3,600 ; the oldest for" in text
    assert "The worker that should move it on is not running." in text
    assert "1 captured payment that we don't know" in text
    assert "₹7.77" in text


async def test_a_stuck_purchase_is_moved_by_its_one_button(console: Console) -> None:
    payment = await console.shop.bought()
    waiting = await console.page("/waiting")
    assert "Robotics for Asha" in waiting
    assert f'action="/admin/payments/{payment}/repair"' in waiting
    text = text_of(await console.pressed(f"payments/{payment}/repair"))
    assert "Done. repair: seen on the console. Created purchase" in text
    await console.shop.work()
    text = text_of(await console.page(f"/purchases/{payment}"))
    assert "Delivered: the sessions are booked." in text
    assert "Captured ₹3,600" in text
    assert "The next step" not in text
    assert "Nothing waits" in await console.page("/waiting")


@pytest.mark.parametrize("reason", [*Reason])
async def test_every_reason_has_words_and_a_button(console: Console, reason: Reason) -> None:
    road = await world.a_payment(console.shop.db, reason=reason)
    for page in (await console.page(f"/waiting?reason={reason}"), await console.page(f"/purchases/{road.payment_id}")):
        button = '"/admin/pauses"' if reason is Reason.STAGE_PAUSED else f'action="/admin/payments/{road.payment_id}/'
        assert button in page
        assert reason in page


async def test_home_is_entered_where_it_is_missing_and_it_goes_on(console: Console) -> None:
    await console.shop.run("update students set latitude = null, longitude = null")
    payment = await console.shop.bought(mode="home")
    await console.shop.work()
    assert "Latitude" in await console.page(f"/purchases/{payment}")

    looked = text_of(await console.pressed(f"payments/{payment}/repair"))
    refused = await console.press(f"payments/{payment}/enter-location", latitude="north", longitude="77")
    entered = await console.pressed(f"payments/{payment}/enter-location", latitude="28.6139", longitude="77.2090")

    waits = "Looked again: it still waits, because sessions at home were bought, and nobody said where home is."
    assert waits in looked
    assert "Done." not in looked
    assert (refused.status_code, "A place is a latitude" in refused.text) == (422, True)
    assert "Done. enter location: seen on the console. Entered where home is." in text_of(entered)
    assert "28.6139" not in entered
    assert "28.6139" not in str(await console.shop.rows("select * from audit_log"))
    await console.shop.work()
    assert (await console.shop.why(payment)).stage == "scheduled"


async def test_another_slot_says_what_was_set_and_what_came_of_it(console: Console) -> None:
    shop = console.shop
    await shop.bought(slot="6:00 AM")
    await shop.work()
    times = await shop.rows("select * from trainer_time")
    await shop.run("delete from trainer_time")
    payment = await shop.bought(slot="11:00 PM")
    await shop.work()
    press = f"payments/{payment}/mend_purchase"

    nothing = await console.press(press, time_slot=" ", start_date="")
    assert (nothing.status_code, "Choose another slot, another start, or both" in nothing.text) == (422, True)
    assert await shop.rows("select from audit_log") == []
    assert await shop.rows("select from student_course_purchases where slot_start = '23:00'") != []

    clash = await console.pressed(press, time_slot="6 AM")
    said = "Slot 11:00 PM → 6:00 AM, start"
    assert "Done." not in clash
    assert said in text_of(clash)
    why = "it still waits, because the student has other sessions at these times. They are of Robotics, 6:00 AM."
    assert why in clash

    assert "it still waits, because no trainer is free" in await console.pressed(press, time_slot="9 AM")
    for time in times:
        await shop.run("insert into trainer_time values (%(trainer_id)s, %(open)s, %(computed_at)s)", **time)
    booked = text_of(await console.pressed(press, time_slot="10 AM"))
    assert "Done. mend purchase: seen on the console. Slot 9:00 AM → 10:00 AM, start" in booked
    assert "as before. Ravi is booked." in booked
    assert said in booked  # the timeline keeps it
    assert await shop.violations() == []


async def test_an_allocation_is_shown_with_when_it_was_approved(console: Console) -> None:
    payment = await console.shop.bought()
    await console.shop.work()
    await console.shop.run("update trainer_allocations set created_at = '2026-01-02T01:00:00Z'")
    await console.shop.run("update bookings set created_at = '2026-01-02T03:04:05Z'")
    await console.shop.run("update student_course_purchases set slot_start = '07:00'")
    page = text_of(await console.page(f"/purchases/{payment}"))
    assert "Allocation approved Ravi, 2 Jan 2026, 08:34:05.000 IST" in page
    assert re.search(r"20\d\d \(sold: 6:00 AM", page)


async def test_one_zone_on_the_page_of_a_purchase(console: Console) -> None:
    payment = await console.shop.bought()
    page = text_of(await console.page(f"/purchases/{payment}"))
    assert "All times on this page are the student’s: Asia/Kolkata." in page
    assert " IST" in page
    assert " UTC" not in page


async def test_support_is_told_who_may_enter_where_home_is(db: Database, client: httpx2.AsyncClient) -> None:
    console = await a_console(db, client, Role.SUPPORT)
    road = await world.a_payment(db, reason=Reason.STUDENT_LOCATION_MISSING)
    page = text_of(await console.page(f"/purchases/{road.payment_id}"))
    assert "An admin can do this: Enter where home is." in page
    assert f"The family enters it at /checkout/{road.payment_id}" in page
    answer = await console.press(f"payments/{road.payment_id}/enter-location", latitude="1", longitude="1")
    assert answer.status_code == 403


def test_every_reason_is_in_words() -> None:
    assert {*Reason, *Technical} <= set(REASONS)


async def test_refund_a_part_but_not_twice_by_the_same_form(console: Console) -> None:
    payment = await console.shop.bought()
    await console.shop.work()
    form = {"amount": "240.00", "sessions": "#29 #30", "refunded_cents": "0"}
    text = text_of(await console.pressed(f"payments/{payment}/refund", **form))
    assert "given back ₹240" in text
    again = await console.press(f"payments/{payment}/refund", **form)
    assert again.status_code == 409
    assert "has changed since this page was made" in again.text
    await console.shop.work()
    text = text_of(await console.page(f"/purchases/{payment}"))
    assert "₹3,360 is left of this payment." in text
    assert "All of it: ₹3,360; the purchase ends" in text
    text = text_of(await console.pressed(f"payments/{payment}/refund", refunded_cents="24000", all_of_it="yes"))
    assert "The money was given back." in text


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"amount": " "},
        {"sessions": "2"},
        {"as_coins": "yes"},
        {"amount": "5", "sessions": "0", "all_of_it": "yes"},
        {"sessions": "2", "all_of_it": "yes"},
    ],
)
async def test_all_of_it_goes_back_only_when_that_is_said(console: Console, fields: dict[str, str]) -> None:
    payment = await console.shop.bought()
    refused = await console.press(f"payments/{payment}/refund", refunded_cents="0", **fields)
    assert (refused.status_code, "Say how much of it goes back" in refused.text) == (422, True)
    assert pages.RefundUnclear.code == "REFUND_AMOUNT_REQUIRED"
    assert await console.shop.rows("select from refunds") == []
    assert await console.shop.rows("select from audit_log") == []


async def test_the_one_button_of_a_refund_says_how_much(console: Console) -> None:
    first = await console.shop.buy()
    second = await console.shop.buy(again=True, slot="8:00 AM")
    await console.shop.run(
        "update payments set checkout_id = (select checkout_id from payments where id = %(first)s)", first=first
    )
    await console.shop.pay(first)
    await console.shop.pay(second)
    for page in (await console.page("/waiting?reason=PAID_TWICE"), await console.page(f"/purchases/{second}")):
        assert "Refund the second payment: ₹3,600</button>" in page
        assert '<input type="hidden" name="all_of_it" value="yes">' in page
    await console.pressed(f"payments/{second}/refund", refunded_cents="0", all_of_it="yes", as_coins="yes")
    assert await console.shop.rows("select amount_cents from refunds") == [{"amount_cents": 360000}]


@pytest.mark.parametrize(
    ("button", "fields"),
    [
        ("refund", {"amount": "1e3"}),
        ("refund", {"amount": "-5"}),
        ("refund", {"sessions": "two"}),
        ("mend_payment", {"session_count": "0"}),
        ("mend_payment", {"start_date": "2026-13-45"}),
        ("repair", {"note": " "}),
    ],
)
async def test_bad_input_is_told_on_the_page(console: Console, button: str, fields: dict[str, str]) -> None:
    payment = await console.shop.bought()
    answer = await console.press(f"payments/{payment}/{button}", **fields)
    assert answer.status_code == 422
    assert 'role="alert"' in answer.text
    assert await console.shop.rows("select from audit_log") == []


async def test_hold_release_accept_and_mend_by_form(console: Console) -> None:
    payment = await console.shop.buy()
    await console.shop.webhook(payment, cents=350000)
    assert "An operator put it on hold" in await console.pressed(f"payments/{payment}/hold")
    assert "Another amount came" in await console.pressed(f"payments/{payment}/release")
    await console.pressed(f"payments/{payment}/accept")
    await console.shop.work("purchase-worker")
    await console.shop.run("delete from trainer_time")
    await console.shop.work()
    assert "No trainer is free" in await console.page(f"/purchases/{payment}")
    assert "sold: 6:00 AM" in await console.pressed(f"payments/{payment}/mend_purchase", time_slot="9 AM")
    refused = await console.press(f"payments/{payment}/mend_payment", session_count="3")
    assert refused.status_code == 409


async def test_dead_letters_are_replayed_and_discarded_by_form(console: Console) -> None:
    await console.shop.run("alter table student_course_purchases add constraint broken check (purchase_tier < 3)")
    for slot in ("6 AM", "9 AM"):
        await console.shop.bought(slot=slot)
    await console.shop.work("purchase-worker")
    ids: list[UUID] = [row["id"] for row in await console.shop.rows("select id from dead_letters")]
    assert "PURCHASE_CONFIRMED" in await console.page("/dead-letters")
    refused = await console.press(f"dead-letters/{ids[0]}/replay")
    assert refused.status_code == 409
    assert "The handler failed again" in refused.text
    await console.shop.run("alter table student_course_purchases drop constraint broken")
    assert "replayed" in await console.pressed(f"dead-letters/{ids[0]}/replay")
    assert "discarded" in await console.pressed(f"dead-letters/{ids[1]}/discard")


async def test_workers_are_told_in_sentences(console: Console) -> None:
    await console.shop.work()
    await console.shop.bought()
    await world.a_worker(console.shop.db, "PURCHASE_CREATED", failing=new_id())
    text = text_of(await console.page("/workers"))
    assert "1 event waits and no purchase-worker is alive: nothing will start until one does." in text
    assert "KeyError: x" in text


async def test_search_keeps_what_was_asked(console: Console) -> None:
    payment = await console.shop.bought()
    page = await console.page("/purchases?q=asha&stage=paid")
    assert 'value="asha"' in page
    assert f"/admin/purchases/{payment}" in page
    assert "Nothing found" in await console.page("/purchases?q=<script>")
    assert "<script>" not in text_of(await console.page("/purchases?q=<script>"))


async def test_support_sees_no_money_button_and_cannot_press_it(db: Database, client: httpx2.AsyncClient) -> None:
    console = await a_console(db, client, Role.SUPPORT)
    payment = await console.shop.buy()
    await console.shop.webhook(payment, cents=350000)
    page = await console.page(f"/purchases/{payment}")
    assert "An admin can do this" in page
    assert "/refund" not in page
    for button in ("refund", "accept"):
        assert (await console.press(f"payments/{payment}/{button}")).status_code == 403
    assert (await console.press(f"dead-letters/{new_id()}/discard")).status_code == 403


async def test_others_are_led_away(db: Database, client: httpx2.AsyncClient) -> None:
    answer = await client.get("/admin", headers={"accept": "text/html"})
    assert (answer.status_code, answer.headers["location"]) == (303, "/login?next=/admin")
    console = await a_console(db, client, Role.STUDENT)
    await console.page("", status=403)
    await console.page(f"/purchases/{new_id()}", status=403)


async def test_what_does_not_exist(console: Console) -> None:
    assert 'href="/admin/waiting"' in await console.page(f"/purchases/{new_id()}", status=404)  # the way back
    await console.page(f"/purchases/{new_id()}", status=404)
    assert (await console.press(f"payments/{new_id()}/repair")).status_code == 404
    assert (await console.press(f"payments/{new_id()}/explode")).status_code == 404
