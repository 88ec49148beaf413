"""Pages of families and trainers as they are served: what they say, to whom, and what they never say."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, time
from uuid import UUID

import httpx2
import pytest

from caravan.db import Database
from caravan.deliveries import Reason, Stage
from caravan.ids import new_id
from caravan.student_views import pages, wording
from caravan.web.auth import Role
from tests.builders import a_refund, a_trainer
from tests.clients import an_account, bearer, client_of, make_app
from tests.fulfilment import world
from tests.shop import Shop, open_shop
from tests.student_views.test_views import sign_in

PAGE = {"accept": "text/html"}


@pytest.fixture
async def client(db: Database) -> AsyncIterator[httpx2.AsyncClient]:
    async with client_of(make_app(db, pages.router), headers=PAGE) as client:
        yield client


async def read(client: httpx2.AsyncClient, address: str) -> str:
    answer = await client.get(address)
    assert answer.status_code == 200, answer.text
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert " style=" not in answer.text  # the policy forbids both
    assert "<script>" not in answer.text
    return answer.text


async def a_tier(db: Database) -> None:
    async with db.transaction() as tx:
        await tx.execute(
            "insert into course_tiers (course_id, sessions, amount_cents) select id, 30, 360000 from courses"
        )


async def test_the_catalogue_and_a_course_say_what_it_costs(db: Database, client: httpx2.AsyncClient) -> None:
    road = await world.a_payment(db)
    await a_tier(db)
    await sign_in(db, client, road.student_id)
    assert "₹3,600" in await read(client, "/courses")
    page = await read(client, f"/courses/{road.course_id}")
    assert "30 sessions" in page
    assert "Time of Asia/Kolkata" in page
    assert "<option selected>6:00 AM</option>" in page
    assert (await client.get(f"/courses/{new_id()}")).status_code == 404


async def test_the_first_and_the_last_slot_that_are_offered_are_delivered(db: Database) -> None:
    shop = await open_shop(db)
    for slot in (pages.SLOTS[0], pages.SLOTS[-1]):
        payment = await shop.bought(slot=f"{slot:%I:%M %p}")
        await shop.work()
        assert (await shop.why(payment)).stage == "scheduled"
    assert (pages.SLOTS[0], pages.SLOTS[-1]) == (time(5), time(23))


async def test_the_checkout_follows_the_road(db: Database, client: httpx2.AsyncClient) -> None:
    road = await world.a_payment(db, status="created", sessions=3)
    await sign_in(db, client, road.student_id)
    address = f"/checkout/{road.payment_id}"
    page = await read(client, address)
    assert f'data-confirm="{road.payment_id}"' in page
    home = await read(client, "/home")
    assert "Not paid yet" in home
    assert "3 sessions at 6:00 AM, from " in home
    assert ", online" in home
    async with db.transaction() as tx:
        await tx.execute("update payments set status = 'failed'")
    assert "Nothing was taken" in await read(client, address)
    async with db.transaction() as tx:
        await tx.execute(
            "update payments set status = 'succeeded', captured_at = now(), captured_cents = 360000,"
            " captured_currency = 'INR'"
        )
        await tx.execute("update checkouts set paid_by = %(payment)s", {"payment": road.payment_id})
    page = await read(client, address)
    assert "data-confirm" not in page
    assert "Adding the course…" in page
    assert wording.COMFORT not in page
    await world.purchased(db, road)
    assert "Looking for a trainer…" in await read(client, address)
    await world.allocated(db, road)
    await world.scheduled(db, road, close=False)
    page = await read(client, address)
    assert "All set: 3 sessions are booked with Ravi." in page
    assert page.count('class="done"') == 4
    assert page.count("<tr>") == 0
    assert (await read(client, f"/purchases/{road.purchase_id}")).count("Scheduled</td>") == 3


async def test_another_slot_than_ordered_is_said(db: Database, client: httpx2.AsyncClient) -> None:
    road = await world.a_payment(db)
    await world.purchased(db, road)
    await sign_in(db, client, road.student_id)
    address = f"/checkout/{road.payment_id}"
    assert "Changed since" not in await read(client, address)
    async with db.transaction() as tx:
        await tx.execute("update student_course_purchases set slot_start = '07:00'")
    page = await read(client, address)
    assert "3 sessions at 7:00 AM" in page
    assert "Changed since it was ordered: now 7:00 AM, ordered for 6:00 AM." in page
    async with db.transaction() as tx:
        await tx.execute("update student_course_purchases set start_date = '2027-01-04'")
        await tx.execute("update checkouts set start_date = '2027-01-02'")
    page = await read(client, address)
    assert "ordered for 6:00 AM; now from Mon 4 Jan 2027, ordered from Sat 2 Jan 2027." in page


async def test_money_that_came_back_is_said_with_amount_and_day(db: Database, client: httpx2.AsyncClient) -> None:
    shop = await open_shop(db)
    await sign_in(db, client, shop.student)
    payment = await shop.bought()
    await shop.work()
    async with db.transaction("admin-service") as tx:
        await a_refund(tx, payment, sessions=2)
    await shop.work()
    async with db.transaction("admin-service") as tx:
        await a_refund(tx, payment)
    await shop.work()
    await shop.run("update refunds set created_at = timestamptz '2026-11-30T20:00:00Z' - sessions * interval '1 day'")
    for address in ("/learning", f"/checkout/{payment}"):
        page = await read(client, address)
        assert "The money for this course was given back: all ₹3,600, on Tue 1 Dec 2026." in page
    seen = await shop.sees(payment)
    assert (seen["total"], seen["refunded"], seen["owed"], seen["scheduled"]) == (30, 30, 0, 0)
    assert "30 refunded, 0 owed" in " ".join((await shop.why(payment)).evidence)


@pytest.mark.parametrize("reason", list(Reason))
async def test_what_waits_says_why_in_plain_words(db: Database, client: httpx2.AsyncClient, reason: Reason) -> None:
    road = await world.a_payment(db, reason=reason)
    await sign_in(db, client, road.student_id)
    for address in ("/home", f"/checkout/{road.payment_id}"):
        page = await read(client, address)
        assert wording.REASONS[reason].replace("'", "&#39;") in page
        assert reason not in page
    assert ("data-location" in page) == (reason is Reason.STUDENT_LOCATION_MISSING)


async def test_a_long_way_is_comforted_and_a_short_one_is_not(db: Database, client: httpx2.AsyncClient) -> None:
    road = await world.a_payment(db)  # five minutes ago
    await sign_in(db, client, road.student_id)
    assert wording.COMFORT.replace("'", "&#39;") in await read(client, f"/checkout/{road.payment_id}")


async def test_steps_say_what_is_done_and_what_is_missing() -> None:
    def states(stage: Stage, reason: str | None = None, owed: int = 0) -> str:
        item = {"stage": stage, "reason": reason, "owed": owed, "total": 30, "refunded": 0}
        return " ".join(step.state for step in wording.steps(item, 30))

    assert [step.state for step in wording.steps(None, 30)] == ["now", "todo", "todo", "todo"]
    assert wording.steps(None, 1)[3].title == "1 session booked"
    assert states(Stage.PAID) == "done now todo todo"
    assert states(Stage.PURCHASED, "NO_TRAINER_AVAILABLE") == "done done waiting todo"
    assert states(Stage.ALLOCATED) == "done done done now"
    assert states(Stage.SCHEDULED) == states(Stage.COMPLETED) == "done done done done"
    assert states(Stage.SCHEDULED, "TRAINER_LEFT", owed=3) == "done done done waiting"


async def test_a_parent_of_two_chooses_whose_page_it_is(db: Database, client: httpx2.AsyncClient) -> None:
    first, second = await world.a_payment(db), await world.a_payment(db)
    async with db.transaction() as tx:
        await tx.execute("update students set name = 'Bela' where id = %(id)s", {"id": second.student_id})
    await sign_in(db, client, first.student_id, second.student_id)
    page = await read(client, "/home")
    assert "Asha’s courses" in page
    assert f"/home?student={second.student_id}" in page
    assert "Bela’s courses" in await read(client, f"/home?student={second.student_id}")
    assert "Bela’s learning" in await read(client, "/learning")  # remembered
    heads = f'"{first.student_id}": 0'
    assert heads in page


async def test_other_families_pages_do_not_exist(db: Database, client: httpx2.AsyncClient) -> None:
    theirs, mine = await world.a_payment(db), await world.a_payment(db)
    await world.purchased(db, theirs)
    assert (await client.get("/home")).headers["location"].startswith("/login")
    await sign_in(db, client, mine.student_id)
    for address, nobodys in (
        (f"/checkout/{theirs.payment_id}", f"/checkout/{new_id()}"),
        (f"/purchases/{theirs.purchase_id}", f"/purchases/{new_id()}"),
        (f"/home?student={theirs.student_id}", f"/home?student={new_id()}"),
    ):
        refused = await client.get(address)
        assert refused.status_code == 404, address
        assert refused.text == (await client.get(nobodys)).text  # not a word tells them apart
    assert (await client.get("/schedule")).status_code == 403


async def test_a_trainer_sees_the_coming_sessions(db: Database, client: httpx2.AsyncClient) -> None:
    road = await world.a_payment(db)
    await world.purchased(db, road)
    await world.allocated(db, road)
    await world.scheduled(db, road)
    actor = await an_account(db, "ravi@example.com", Role.TRAINER)
    client.headers.update(await bearer(db, actor))
    assert (await client.get("/schedule")).status_code == 404
    async with db.transaction() as tx:
        await tx.execute("update trainers set account_id = %(account)s", {"account": actor.account_id})
    page = await read(client, "/schedule")
    assert page.count("Robotics with Asha") == 3
    assert (await client.get("/home")).status_code == 403


async def a_booked_trainer(db: Database, client: httpx2.AsyncClient, mode: str) -> tuple[Shop, str]:
    """A course that begins in an hour, signed in as its trainer; the address of the way to its first session."""
    shop = await open_shop(db, trainers=1)
    payment = await shop.bought(mode=mode, sessions=10)
    await shop.work()
    await shop.run(
        "update tutoring_sessions set starts_at = now() + interval '1 hour', ends_at = now() + interval '2 hours'"
        " where seq = 1"
    )
    await sign_in_as_trainer(db, client, shop.trainers[0])
    return shop, f"/schedule/{(await shop.sees(payment))['purchase_id']}/1/place"


async def sign_in_as_trainer(db: Database, client: httpx2.AsyncClient, trainer: UUID) -> None:
    actor = await an_account(db, f"{trainer}@example.com", Role.TRAINER)
    async with db.transaction() as tx:
        named = {"account": actor.account_id, "trainer": trainer}
        await tx.execute("update trainers set account_id = %(account)s where id = %(trainer)s", named)
    client.headers.update(await bearer(db, actor))


async def test_the_booked_trainer_is_shown_the_way_to_a_session_at_home(
    db: Database, client: httpx2.AsyncClient
) -> None:
    shop, address = await a_booked_trainer(db, client, "home")
    schedule = await read(client, "/schedule")
    assert schedule.count(f'href="{address}"') == schedule.count("The way there</a>") == 1
    assert schedule.count("the way there is shown from two hours before") == 9
    assert "28.61" not in schedule
    page = await read(client, address)
    assert 'href="https://www.openstreetmap.org/?mlat=28.6139&amp;mlon=77.209#map=17/28.6139/77.209"' in page
    assert "The way to Asha" in page
    [audited] = await shop.rows("select actor, action, subject_id, note, after from audit_log")
    assert audited["actor"] == f"{shop.trainers[0]}@example.com"
    assert (audited["action"], audited["note"]) == ("students:place", "on the way to session 1")
    assert audited["subject_id"] in address
    assert "coordinates" not in str(await shop.violations())  # no text of any table holds the place
    await shop.run("update students set latitude = null, longitude = null")
    assert "Nobody has said where home is" in await read(client, address)


@pytest.mark.parametrize(
    "otherwise",
    [
        "update tutoring_sessions set starts_at = now() + interval '121 minutes', ends_at = now() + interval '3 hours'",
        "update tutoring_sessions set starts_at = now() - interval '1 hour', ends_at = now() - interval '1 second'",
        "update tutoring_sessions set status = 'cancelled'",
        "update tutoring_sessions set status = 'completed'",
        "update bookings set live = false",
        "update student_course_purchases set learning_mode = 'online'",
    ],
    ids=["too early", "over", "cancelled", "held", "booking released", "online"],
)
async def test_a_place_is_not_shown_otherwise(db: Database, client: httpx2.AsyncClient, otherwise: str) -> None:
    shop, address = await a_booked_trainer(db, client, "home")
    assert "28.6139" in await read(client, address)
    await shop.run(otherwise)
    await unknown(client, address)


async def unknown(client: httpx2.AsyncClient, address: str) -> None:
    refused = await client.get(address)
    assert refused.status_code == 404
    assert refused.text == (await client.get(f"/schedule/{new_id()}/1/place")).text
    assert address not in await read(client, "/schedule")


async def test_a_place_is_shown_to_nobody_but_the_booked_trainer(db: Database, client: httpx2.AsyncClient) -> None:
    shop, address = await a_booked_trainer(db, client, "home")
    async with db.transaction() as tx:
        colleague = await a_trainer(tx, shop.course)
    await sign_in_as_trainer(db, client, colleague)
    await unknown(client, address)
    await shop.run("update tutoring_sessions set trainer_id = %(colleague)s", colleague=colleague)
    await unknown(client, address)  # the booking is another's still
    for role in (Role.STUDENT, Role.SUPPORT, Role.ADMIN):
        await sign_in(db, client, shop.student, role=role)
        assert (await client.get(address)).status_code == 403
    assert await shop.rows("select from audit_log") == []


def test_a_reason_of_a_later_release_has_words_too() -> None:
    """While that release rolls out beside us."""
    item = {"stage": "purchased", "reason": "SOMETHING_NEW"}
    assert wording.sentence(item, datetime.now(UTC)) in wording.REASONS.values()
