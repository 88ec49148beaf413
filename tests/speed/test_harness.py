"""The benchmark's own promises: its payments are the product's, its check sees what is wrong, its floor is compared."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any
from uuid import UUID

import psycopg
import pytest

from bench import floor
from bench.check import Wrong, check, check_delivered
from bench.floor import compare
from bench.history import write_history
from bench.market import add_captured_payments, build_market
from bench.runs import fulfil
from bench.server import Server
from caravan.apps.subscriptions import SUBSCRIPTIONS
from caravan.db import Database
from caravan.eventlog.drain import drain
from caravan.fulfilment import invariants
from tests.builders import a_paid_checkout, a_student

PAYMENTS, TRAINERS = 24, 100
SETTINGS = {"fsync": "off", "full_page_writes": "off", "shared_buffers": "128MB"}
LEFT_BY_A_CAPTURE = (
    "checkouts", "payments", "undelivered", "student_feed", "student_feed_heads", "outbox", "students",
)  # fmt: skip


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server(SETTINGS) as server:
        yield server


@pytest.fixture(scope="module")
async def market(server: Server) -> None:
    """Two databases to copy: `waiting`, a marketplace with payments that wait, and `delivered`."""
    url = server.create("waiting")
    await build_market(url, trainers=TRAINERS)
    await add_captured_payments(url, PAYMENTS)
    async with Database(server.create("delivered", "waiting")) as db:
        await drain(db, SUBSCRIPTIONS)


@pytest.fixture
def waiting(server: Server, market: None) -> str:
    return server.create("a_copy", "waiting")


@pytest.fixture
def delivered(server: Server, market: None) -> str:
    return server.create("a_copy", "delivered")


def shape(url: str, table: str, one_of: str, value: object) -> dict[str, Any]:
    """Which columns of a row are filled, and with what kind of value."""
    with psycopg.connect(url) as connection:
        cursor = connection.execute(f"select * from {table} where {one_of} = %s limit 1".encode(), [value])
        row = cursor.fetchone()
        assert row is not None, table
        names = [column.name for column in cursor.description or ()]
    return {name: sorted(cell) if isinstance(cell, dict) else type(cell) for name, cell in zip(names, row, strict=True)}


async def test_a_payment_of_the_market_is_what_a_capture_leaves(waiting: str) -> None:
    with psycopg.connect(waiting) as connection:
        drawn = connection.execute("select id, student_id, checkout_id from payments limit 1").fetchone()
        course = connection.execute("select id from courses where session_minutes = 60 limit 1").fetchone()
    assert drawn is not None
    assert course is not None
    async with Database(waiting) as db, db.transaction("payment-service") as tx:
        tx.trace = "00-" + "1" * 32 + "-" + "2" * 16 + "-01"  # as a request has one
        payment = await a_paid_checkout(tx, await a_student(tx), course[0])

    for table in LEFT_BY_A_CAPTURE:
        key, theirs, ours = _key(table, drawn, (payment.id, payment.student_id, payment.checkout_id))
        expected, found = shape(waiting, table, key, ours), shape(waiting, table, key, theirs)
        expected.pop("raw", None)  # the buyer's own words
        found.pop("raw", None)
        assert found == expected, table


def _key(table: str, theirs: tuple[UUID, ...], ours: tuple[UUID, ...]) -> tuple[str, object, object]:
    match table:
        case "checkouts":
            return "id", theirs[2], ours[2]
        case "payments":
            return "id", theirs[0], ours[0]
        case "undelivered":
            return "payment_id", theirs[0], ours[0]
        case "outbox":
            return "correlation_id", str(theirs[0]), str(ours[0])
        case "students":
            return "id", theirs[1], ours[1]
        case _:
            return "student_id", theirs[1], ours[1]


async def test_the_check_passes_what_was_delivered(delivered: str) -> None:
    assert await check(delivered, PAYMENTS) >= 10 * PAYMENTS


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        ("delete from tutoring_sessions where id = (select id from tutoring_sessions limit 1)", "all their sessions"),
        ("update trainer_allocations set status = 'cancelled' where id = (select id from trainer_allocations limit 1)",
         "one approved allocation"),
        ("update bookings set live = false where id = (select id from bookings limit 1)", "one whole booking"),
        ("delete from student_feed where seq = 2 and student_id = (select student_id from student_feed limit 1)",
         "feeds have gaps"),
        ("alter table bookings drop constraint bookings_trainer_free; update bookings set trainer_id ="
         " (select trainer_id from bookings order by id limit 1), starts = (select starts from bookings order by id"
         " limit 1)", "overlap"),
    ],
)  # fmt: skip
async def test_the_check_sees(delivered: str, harm: str, said: str) -> None:
    with psycopg.connect(delivered, autocommit=True) as connection:
        connection.execute(harm.encode())

    with pytest.raises(Wrong, match=said):
        await check_delivered(delivered, PAYMENTS)


async def test_the_check_sees_what_still_waits(waiting: str) -> None:
    with pytest.raises(Wrong, match="undelivered: no reason"):
        await check_delivered(waiting, PAYMENTS)


async def test_the_check_sees_what_was_not_heard(delivered: str) -> None:
    with psycopg.connect(delivered, autocommit=True) as connection:
        connection.execute("delete from processed_events where consumer_group = 'cache-invalidation-workers'")

    with pytest.raises(Wrong, match="cache-invalidation-workers has not heard"):
        await check(delivered, PAYMENTS)


def test_the_floors_comparison_sees_one_changed_row(server: Server, delivered: str) -> None:
    assert compare(server.url_of("delivered"), delivered) > 20 * PAYMENTS
    with psycopg.connect(delivered, autocommit=True) as connection:
        connection.execute("update student_feed set data = data || '{\"x\": 1}' where seq = 2")

    with pytest.raises(Wrong, match="student_feed"):
        compare(server.url_of("delivered"), delivered)


async def test_the_floor_writes_in_batches_what_our_run_left(
    server: Server, market: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(floor, "BATCH", 7)  # several, so that one batch's rows may not be ahead of another's
    server.create(floor.READY, "waiting")
    floor.take_rows(server, ours := server.create("ours", "delivered"))
    for template in (floor.GIVEN, floor.UNGUARDED):
        url = server.create("floor", template)
        floor.warm(url)
        assert await floor.write_floor(url, 2) > 0
        assert compare(ours, url) > 20 * PAYMENTS


async def test_a_run_by_a_worker_process_counts_once_it_is_checked(waiting: str) -> None:
    run = await fulfil(waiting, PAYMENTS)

    assert run.sessions >= 10 * PAYMENTS
    assert run.per_second > 0


async def test_history_is_as_fulfilment_would_have_left_it(server: Server) -> None:
    url = server.create()
    await build_market(url, trainers=TRAINERS)
    write_history(url, 20_000)

    async with Database(url) as db, db.transaction(read_only=True) as tx:
        assert await invariants.check(tx, leeway=timedelta(0)) == []
        assert await tx.value("select count(*) from tutoring_sessions") == 20_000
