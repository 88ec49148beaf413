"""The incidents that it began with, one test each: none of them can happen any more, or it ends in the open."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

import psycopg
import pytest

from caravan.apps.subscriptions import BY_GROUP
from caravan.db import Database, Tx
from caravan.eventlog import outbox
from caravan.eventlog.consumer import Consumer
from caravan.eventlog.lag import list_lag
from caravan.eventlog.subscription import Subscription, register_groups
from caravan.eventlog.workers import Worker
from caravan.events import PurchaseConfirmed, StudentUpdated
from caravan.fulfilment.repair import repair
from tests.shop import Shop, open_shop

ROBOTICS = UUID("9e16d892-4324-4568-be60-163aa1665683")
STUDENT = UUID("15b88b88-5403-48c7-a29f-77a3d5a8ee87")
PAYMENT = UUID("fb8f4aae-7fb3-43d0-8782-cacbaea2cc8c")


@pytest.fixture
async def shop(db: Database) -> Shop:
    return await open_shop(db, course=ROBOTICS, student=STUDENT)


class TestWorkerNotRunning:
    """Seed 001: the event was emitted, the purchase worker did not run, nobody noticed for 13 minutes."""

    async def test_the_event_waits_and_the_diagnosis_names_the_worker(self, shop: Shop) -> None:
        async with shop.db.transaction() as tx:
            await register_groups(tx, list(BY_GROUP.values()))
        payment = await shop.bought(payment_id=PAYMENT)
        await shop.run("update outbox set occurred_at = occurred_at - interval '10 s'")

        finding = await shop.why(payment)

        assert (finding.stage, finding.reason, finding.technical) == ("paid", "NO_WORKER", True)
        async with shop.db.transaction() as tx:
            lag = {row.group: row for row in await list_lag(tx)}["purchase-creation-workers"]
        assert (lag.state, lag.messages) == ("down", 1)
        assert "caravan serve purchase-worker" in lag.sentence

    async def test_it_goes_on_by_itself_when_the_worker_is_back(self, shop: Shop) -> None:
        payment = await shop.bought(payment_id=PAYMENT)
        await shop.work("allocation-worker", "session-worker", "cache-worker")
        assert (await shop.sees(payment))["stage"] == "paid"
        await shop.work()
        assert (await shop.sees(payment))["stage"] == "scheduled"


class TestMarkedProcessedButMissing:
    """Seed 003: the event was marked as processed, creating the purchase failed, redelivery was skipped."""

    async def test_a_failing_handler_leaves_no_mark(self, shop: Shop) -> None:
        payment = await shop.bought()
        purchase_group = BY_GROUP["purchase-creation-workers"]

        async def effect_then_crash(tx: Tx, events: Sequence[PurchaseConfirmed]) -> None:
            await purchase_group.handlers[PurchaseConfirmed](tx, events)
            raise psycopg.OperationalError("the connection broke")

        broken = Subscription(
            purchase_group.group, purchase_group.service, purchase_group.label, {PurchaseConfirmed: effect_then_crash}
        )
        worker = Worker(service=broken.service, group=broken.group, build="test", name="broken")
        consumer = Consumer(shop.db, broken, worker)
        await consumer.enter()
        with pytest.raises(psycopg.OperationalError):
            await consumer.run_once()
        assert await shop.rows("select * from processed_events") == []
        assert await shop.rows("select * from student_course_purchases") == []
        await consumer.leave()

        await shop.work()
        assert (await shop.sees(payment))["stage"] == "scheduled"
        assert len(await shop.rows("select * from student_course_purchases")) == 1

    async def test_a_mark_without_effect_is_named_and_repaired_by_the_workers_own_code(self, shop: Shop) -> None:
        payment = await shop.bought()
        await shop.run(
            "insert into processed_events (consumer_group, event_id, event_type, correlation_id, source)"
            " select 'purchase-creation-workers', event_id, type, correlation_id, source from outbox"
        )
        await shop.work()
        assert (await shop.sees(payment))["stage"] == "paid"  # as it happened
        finding = await shop.why(payment)
        assert finding.reason == "MARKED_PROCESSED_BUT_MISSING"

        async with shop.db.transaction("admin-service") as tx:
            done = await repair(tx, payment, by="test", note="seed 003", subscriptions=BY_GROUP)
        await shop.work()

        assert "Created purchase" in done.did
        assert (await shop.sees(payment))["stage"] == "scheduled"


class TestPushMissed:
    """Seed 003: the push was "best effort"; the course did not appear without a refresh."""

    async def test_whoever_was_away_reads_the_whole_past_in_order(self, shop: Shop) -> None:
        await shop.bought()
        await shop.work()  # nobody was connected
        assert await shop.feed() == [
            "PURCHASE_CONFIRMED",
            "PURCHASE_CREATED",
            "COURSE_ACCESS_GRANTED",
            "TRAINER_ALLOCATED",
            "SESSIONS_SCHEDULED",
        ]

    async def test_the_feed_is_written_where_the_event_is(self, shop: Shop) -> None:
        await shop.bought()
        await shop.work()
        said = await shop.rows("select event_id from outbox where type <> 'STUDENT_UPDATED' order by id")
        fed = await shop.rows("select event_id from student_feed order by seq")
        assert fed == said


class TestBrokerDownAtPayment:
    """Seed 004: the broker refused at the moment of payment; the payment stood, the event was lost for ever."""

    async def test_paying_talks_to_the_database_only_and_the_event_is_part_of_it(self, shop: Shop) -> None:
        wakes: list[object] = []

        def dead_wire(keys: object) -> None:
            wakes.append(keys)  # as if nobody ever heard it

        shop.db.on_hints = dead_wire
        payment = await shop.bought(payment_id=PAYMENT)
        rows = await shop.rows(
            "select p.status, o.type, o.xid = (select max(xid) from outbox) as same from payments p"
            " join outbox o on o.correlation_id = p.id::text"
        )
        assert rows == [{"status": "succeeded", "type": "PURCHASE_CONFIRMED", "same": True}]
        await shop.work()
        assert (await shop.sees(payment))["stage"] == "scheduled"

    async def test_a_payment_that_cannot_be_written_down_is_not_captured(self, shop: Shop) -> None:
        payment = await shop.buy()
        await shop.run("alter table outbox rename to outbox_gone")
        with pytest.raises(psycopg.Error):
            await shop.pay(payment)
        await shop.run("alter table outbox_gone rename to outbox")
        assert await shop.rows("select status from payments") == [{"status": "created"}]
        await shop.pay(payment)
        await shop.work()
        assert (await shop.sees(payment))["stage"] == "scheduled"


class TestAllocationWithoutSessions:
    """Seed 002: the allocation was approved and no sessions were made; an admin had to."""

    async def test_it_is_named_and_the_sessions_are_made_by_the_workers_code(self, shop: Shop) -> None:
        payment = await shop.bought()
        await shop.work("purchase-worker", "allocation-worker")
        await shop.run(
            "insert into processed_events (consumer_group, event_id, event_type, correlation_id, source)"
            " select 'session-scheduling-workers', event_id, type, correlation_id, source from outbox"
        )
        await shop.work()
        finding = await shop.why(payment)
        assert (finding.stage, finding.reason) == ("allocated", "SESSIONS_MISSING")

        async with shop.db.transaction("admin-service") as tx:
            await repair(tx, payment, by="test", note="seed 002", subscriptions=BY_GROUP)

        seen = await shop.sees(payment)
        assert (seen["stage"], seen["scheduled"]) == ("scheduled", 30)


class TestStudentWithoutCoordinates:
    """Seeds 000 and 002: no GPS coordinates, session creation failed, the error was logged and forgotten."""

    async def test_a_course_at_home_waits_in_the_open_and_resumes_when_the_place_arrives(self, shop: Shop) -> None:
        await shop.run("update students set latitude = null, longitude = null")
        payment = await shop.bought(mode="home")
        await shop.work()
        assert (await shop.sees(payment))["reason"] == "STUDENT_LOCATION_MISSING"

        async with shop.db.transaction("student-service") as tx:
            await tx.execute("update students set latitude = 28.6139, longitude = 77.2090")
            outbox.append(tx, [StudentUpdated(student_id=STUDENT, changed=("latitude", "longitude"))])
        await shop.work()

        assert (await shop.sees(payment))["stage"] == "scheduled"
        assert (await shop.sees(payment))["reason"] is None

    async def test_a_course_online_needs_no_place(self, shop: Shop) -> None:
        await shop.run("update students set latitude = null, longitude = null")
        payment = await shop.bought(mode="online")
        await shop.work()
        assert (await shop.sees(payment))["stage"] == "scheduled"

    async def test_coordinates_are_in_no_event_feed_or_decision(self, shop: Shop) -> None:
        await shop.run("update students set latitude = 12.3456789, longitude = 98.7654321")
        await shop.bought(mode="home")
        await shop.work()
        for query in (
            "select count(*) as n from outbox where data::text ~ '12\\.345|98\\.765'",
            "select count(*) as n from student_feed where data::text ~ '12\\.345|98\\.765'",
            "select count(*) as n from trainer_allocations where decision::text ~ '12\\.345|98\\.765'",
            "select count(*) as n from undelivered where detail::text ~ '12\\.345|98\\.765'",
        ):
            assert await shop.rows(query) == [{"n": 0}]


class TestPaidQuantity:
    """Seed 002: a session count that could not be read became 30."""

    async def test_an_unknown_tier_waits_and_is_never_a_default(self, shop: Shop) -> None:
        payment = await shop.buy()
        await shop.run("update checkouts set sessions = null")
        await shop.run("update payments set metadata = metadata - 'sessionCount'")
        await shop.pay(payment)
        await shop.work()
        assert (await shop.why(payment)).reason == "TIER_UNKNOWN"
        assert await shop.rows("select * from student_course_purchases") == []


class TestCart:
    """Seed 002: the cart kept the course where the client had not noted the item's id."""

    async def test_the_cart_is_emptied_by_course_when_the_purchase_exists(self, shop: Shop) -> None:
        await shop.run(
            "insert into cart_items (id, student_id, course_id, session_count, learning_mode, group_size, time_slot,"
            " start_date) values (gen_random_uuid(), %(s)s, %(c)s, 30, 'online', 1, '6:00 AM', current_date + 3)",
            s=STUDENT,
            c=ROBOTICS,
        )
        await shop.bought()
        assert len(await shop.rows("select * from cart_items")) == 1
        await shop.work("purchase-worker")
        assert await shop.rows("select * from cart_items") == []
