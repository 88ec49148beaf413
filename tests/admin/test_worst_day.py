"""The worst day through the operator's API and console: pauses, later starts, many repairs, unclaimed money."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx2
import pytest

from caravan.admin import pages, routes, worst_day_pages, worst_day_routes
from caravan.admin.forms import ScopeMissing
from caravan.apps.subscriptions import BY_GROUP
from caravan.db import Database
from caravan.fulfilment.reconciler import Reconciler
from caravan.ids import new_id
from caravan.web.auth import Role
from tests import builders
from tests.admin.conftest import NOTE, Desk
from tests.admin.test_pages import Console, a_console, text_of
from tests.clients import an_account, bearer, client_of, make_app
from tests.shop import SETTINGS, open_shop


@pytest.fixture
async def client(db: Database) -> AsyncIterator[httpx2.AsyncClient]:
    app = make_app(db, routes.router, pages.router, worst_day_routes.router, worst_day_pages.router, settings=SETTINGS)
    app.state.subscriptions = BY_GROUP
    async with client_of(app) as client:
        yield client


@pytest.fixture
async def desk(db: Database, client: httpx2.AsyncClient) -> Desk:
    actor = await an_account(db, "asha@example.com", Role.ADMIN)
    return Desk(await open_shop(db), client, await bearer(db, actor))


@pytest.fixture
async def console(db: Database, client: httpx2.AsyncClient) -> Console:
    return await a_console(db, client, Role.ADMIN)


async def test_a_stage_is_paused_and_resumed_over_the_api(desk: Desk) -> None:
    body = {"stage": "purchased", **NOTE}
    paused = await desk.do("POST", "pauses", body)
    assert (paused["stage"], paused["pausedBy"], paused["underWay"]) == ("purchased", "asha@example.com", 0)
    assert await desk.refused("POST", "pauses", body) == (409, "ALREADY_PAUSED")
    assert await desk.refused("POST", "pauses", {"stage": "paid"}) == (422, "NOTE_REQUIRED")
    assert await desk.refused("POST", "pauses", {"stage": "scheduled", **NOTE}) == (422, "INVALID_REQUEST")
    assert await desk.refused("POST", "pauses", body | {"city": "Atlantis"}) == (422, "CITY_UNKNOWN")
    assert await desk.refused("POST", "pauses", body | {"courseId": str(new_id())}) == (404, "COURSE_NOT_FOUND")
    payment = await desk.shop.bought()
    await desk.shop.work()
    found = await desk.diagnosis(payment)
    assert (found["reason"], found["action"]["name"]) == ("STAGE_PAUSED", "resume")
    [standing] = (await desk.get("pauses"))["items"]
    assert (standing["waiting"], standing["note"]) == (1, "by a test")
    purchase = {"purchaseId": found["purchaseId"], **NOTE}
    assert await desk.refused("POST", "allocations/auto-assign", purchase) == (409, "STAGE_PAUSED")
    repaired = await desk.do("POST", f"payments/{payment}/repair", NOTE)
    assert (repaired["stage"], repaired["reason"]) == ("purchased", "STAGE_PAUSED")
    await desk.do("POST", "pauses/resume", body)
    assert await desk.refused("POST", "pauses/resume", body) == (409, "NOT_PAUSED")
    await Reconciler(desk.shop.db, SETTINGS).run_once()
    await desk.shop.work()
    assert (await desk.diagnosis(payment))["stage"] == "scheduled"


async def test_support_sees_pauses_and_presses_none(desk: Desk) -> None:
    support = await desk.as_role(Role.SUPPORT)
    assert (await support.get("pauses"))["items"] == []
    for path, body in (("pauses", {"stage": "paid"}), ("pauses/resume", {"stage": "paid"}), ("repairs", {"all": True})):
        assert await support.refused("POST", path, body | NOTE) == (403, "NOT_ALLOWED")


async def test_every_page_says_what_is_paused(console: Console) -> None:
    page = text_of(await console.pressed("pauses", stage="allocated", course_id="*", city="Delhi"))
    assert "allocated is paused in Delhi: no sessions are scheduled." in page
    for path in ("", "/waiting", "/purchases", "/workers", "/repairs"):
        page = text_of(await console.page(path))
        assert "Paused: allocated is paused in Delhi" in page
        assert "seen on the console" in page
        assert "admin@example.com" in page
    payment = await console.shop.bought()
    await console.shop.work()
    page = text_of(await console.page(f"/purchases/{payment}"))
    assert "STAGE_PAUSED" in page
    assert "1 payment waits for it" in page
    refused = await console.press("pauses", stage="allocated", course_id="*", city="Delhi")
    assert refused.status_code == 409
    await console.pressed("pauses/resume", stage="allocated", city="Delhi")
    assert "Nothing is paused" in text_of(await console.page("/pauses"))


@pytest.mark.parametrize("left_out", ["course_id", "city"])
async def test_everything_is_paused_only_where_that_was_chosen(console: Console, left_out: str) -> None:
    chosen = {"stage": "purchased", "course_id": "*", "city": "*"}
    refused = await console.press("pauses", **chosen | {left_out: " "})
    assert (refused.status_code, "all courses and everywhere are choices too" in refused.text) == (422, True)
    assert ScopeMissing.code == "SCOPE_REQUIRED"
    assert "Nothing is paused" in text_of(await console.page("/pauses"))
    page = text_of(await console.pressed("pauses", **chosen))
    assert "purchased is paused: no trainers are allocated." in page
    assert " IST" in page
    assert " UTC" not in page
    await console.pressed("pauses/resume", stage="purchased", course_id="", city="")


async def test_a_later_start_is_agreed_on_the_console(console: Console) -> None:
    shop = console.shop
    payment = await shop.bought()
    await shop.work("purchase-worker")
    await shop.run("update student_course_purchases set start_date = current_date - 2")
    await shop.run("update payments set captured_at = captured_at - interval '9 days'")
    await shop.work()
    page = await console.page(f"/purchases/{payment}")
    assert "START_PASSED" in page
    assert f"/admin/payments/{payment}/confirm-start" in page
    await console.pressed(f"payments/{payment}/confirm-start")
    await shop.work()
    assert (await shop.why(payment)).stage == "scheduled"


# ------------------------------------------------------------------ many at once


async def stuck(console_or_desk: Console | Desk, count: int) -> list[str]:
    """Payments whose event was lost behind the product's back."""
    shop, paid = console_or_desk.shop, []
    for number in range(count):
        paid.append(await shop.bought(slot=f"{7 + number}:00 AM"))
    await shop.run("delete from outbox")
    await shop.run("update undelivered set since = since - interval '1 minute'")
    return [str(payment) for payment in paid]


async def test_many_are_repaired_one_first(desk: Desk) -> None:
    await stuck(desk, 3)
    tried = await desk.do("POST", "repairs", {"all": True, "dryRun": True, **NOTE})
    assert (tried["chosen"], tried["moved"]) == (3, 3)
    assert await desk.shop.rows("select 1 from student_course_purchases") == []
    assert await desk.audit() == []
    done = await desk.do("POST", "repairs", {"reason": "EVENT_MISSING", "limit": 2, **NOTE})
    assert (done["chosen"], done["moved"], done["stopped"]) == (2, 2, None)
    assert {line["outcome"] for line in done["items"]} == {"moved"}
    assert [row["action"] for row in await desk.audit()] == ["repair", "repair", "repair many"]
    done = await desk.do("POST", "repairs", {"all": True, **NOTE})
    assert (done["chosen"], done["moved"]) == (1, 1)
    assert (await desk.do("POST", "repairs", {"all": True, **NOTE}))["chosen"] == 0
    await desk.shop.work()
    assert await desk.shop.rows("select 1 from undelivered") == []


async def test_the_first_unexpected_outcome_ends_it(desk: Desk) -> None:
    """Nobody can teach them: the first one says so, and the others are not touched."""
    async with desk.shop.db.transaction() as tx:
        await tx.execute("update trainers set active = false")
    for hour in (6, 7, 8):
        await desk.shop.bought(slot=f"{hour}:00 AM")
    await desk.shop.work()
    done = await desk.do("POST", "repairs", {"reason": "NO_TRAINER_AVAILABLE", **NOTE})
    assert (done["chosen"], done["moved"], len(done["items"])) == (3, 0, 1)
    assert done["items"][0]["outcome"] == "unexpected"
    assert "Stopped at payment" in done["stopped"]


async def test_many_repairs_obey_a_pause_and_a_scope(desk: Desk) -> None:
    await stuck(desk, 2)
    async with desk.shop.db.transaction() as tx:
        other = await builders.a_course(tx, "Chess")
    done = await desk.do("POST", "repairs", {"all": True, "courseId": str(other), **NOTE})
    assert done["chosen"] == 0
    await desk.do("POST", "pauses", {"stage": "paid", "city": "Delhi", **NOTE})
    done = await desk.do("POST", "repairs", {"all": True, "city": "delhi", **NOTE})
    assert (done["chosen"], done["moved"], len(done["items"])) == (2, 0, 1)
    assert done["items"][0]["reason"] == "STAGE_PAUSED"


async def test_bad_asking_is_refused_in_a_sentence(desk: Desk) -> None:
    assert await desk.refused("POST", "repairs", {"all": True}) == (422, "NOTE_REQUIRED")
    assert await desk.refused("POST", "repairs", {"reason": "BAD_LUCK", **NOTE}) == (422, "REASON_UNKNOWN")
    assert await desk.refused("POST", "repairs", {**NOTE}) == (422, "INVALID_REQUEST")


async def test_the_console_tells_in_a_table_what_was_done(console: Console) -> None:
    [first, *_] = await stuck(console, 2)
    tried = text_of((await console.press("repairs", limit="5", dry_run="yes")).text)
    assert "2 of 2 would move on." in tried
    assert "moved" not in tried
    assert "Created purchase" not in tried
    answer = await console.press("repairs", limit="5")
    page = text_of(answer.text)
    assert answer.status_code == 200
    assert "2 of 2 moved on." in page
    assert first in page
    assert "number from 1 to 100" in text_of((await console.press("repairs", limit="many")).text)


# ------------------------------------------------------------------ unclaimed money


async def test_unclaimed_money_is_dealt_with_once(desk: Desk) -> None:
    await desk.shop.webhook(new_id())
    await desk.shop.run("update webhook_events set received_at = received_at - interval '1 hour'")
    [item] = (await desk.get("unclaimed"))["items"]
    body = {"provider": item["provider"], "eventId": item["eventId"]}
    assert await desk.refused("POST", "unclaimed/dealt-with", body) == (422, "NOTE_REQUIRED")
    await desk.do("POST", "unclaimed/dealt-with", body | NOTE)
    assert (await desk.get("unclaimed"))["items"] == []
    assert (await desk.get("overview"))["unclaimed"]["count"] == 0
    assert await desk.refused("POST", "unclaimed/dealt-with", body | NOTE) == (409, "NOT_UNCLAIMED")
    [row] = await desk.audit()
    assert (row["action"], row["note"]) == ("deal with unclaimed money", "by a test")


async def test_a_payment_that_is_known_is_not_unclaimed(desk: Desk) -> None:
    payment = await desk.shop.buy()
    await desk.shop.webhook(payment)
    [event] = await desk.shop.rows("select event_id from webhook_events")
    body = {"provider": "sandbox", "eventId": event["event_id"], **NOTE}
    assert await desk.refused("POST", "unclaimed/dealt-with", body) == (409, "NOT_UNCLAIMED")


async def test_unclaimed_money_is_dealt_with_on_the_console(console: Console) -> None:
    await console.shop.webhook(new_id())
    await console.shop.run("update webhook_events set received_at = received_at - interval '1 hour'")
    [event] = await console.shop.rows("select event_id from webhook_events")
    page = await console.pressed("unclaimed/dealt-with", provider="sandbox", event_id=event["event_id"])
    assert event["event_id"] not in page
