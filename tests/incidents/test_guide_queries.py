"""Every query that the old troubleshooting guide prints runs on our schema and answers truthfully."""

from __future__ import annotations

from uuid import UUID

import pytest

from caravan.db import Database
from tests.shop import Shop, open_shop


@pytest.fixture
async def delivered(db: Database) -> tuple[Shop, dict[str, UUID]]:
    shop = await open_shop(db)
    payment = await shop.bought()
    await shop.work()
    return shop, {"student": shop.student, "course": shop.course, "payment": payment}


Delivered = tuple[Shop, dict[str, UUID]]


async def test_recent_purchase_created_events(delivered: Delivered) -> None:
    shop, _ = delivered
    rows = await shop.rows(
        """
     SELECT event_type, source, processed_at
     FROM processed_events
     WHERE event_type = 'PURCHASE_CREATED'
     ORDER BY processed_at DESC
     LIMIT 5;
   """
    )
    # Once by allocation, once by the cache's group; the service that emitted it is the purchase worker.
    assert [(row["event_type"], row["source"]) for row in rows] == [("PURCHASE_CREATED", "purchase-worker")] * 2


async def test_trainer_of_the_allocation(delivered: Delivered) -> None:
    shop, ids = delivered
    [row] = await shop.rows(
        """
   SELECT id, trainer_id, status
   FROM trainer_allocations
   WHERE student_id = %(student)s
     AND course_id = %(course)s;
   """,
        **ids,
    )
    assert row["status"] == "approved"
    assert row["trainer_id"] in shop.trainers


async def test_coordinates_of_the_student(delivered: Delivered) -> None:
    shop, ids = delivered
    [row] = await shop.rows("SELECT latitude, longitude FROM students WHERE id = %(student)s;", **ids)
    assert row["latitude"] is not None


async def test_purchase_exists(delivered: Delivered) -> None:
    shop, ids = delivered
    [row] = await shop.rows(
        """
SELECT id, student_id, course_id, purchase_tier, created_at
FROM student_course_purchases
WHERE student_id = %(student)s
  AND course_id = %(course)s
  AND is_active = true;
""",
        **ids,
    )
    assert row["purchase_tier"] == 30


async def test_events_of_the_latest_payment(delivered: Delivered) -> None:
    shop, ids = delivered
    rows = await shop.rows(
        """
SELECT event_type, correlation_id, source, processed_at
FROM processed_events
WHERE correlation_id IN (
  SELECT id::text FROM payments
  WHERE student_id = %(student)s
    AND (metadata->>'courseId')::uuid = %(course)s
    AND status = 'succeeded'
  ORDER BY created_at DESC
  LIMIT 1
)
ORDER BY processed_at DESC;
""",
        **ids,
    )
    assert {row["event_type"] for row in rows} == {
        "PURCHASE_CONFIRMED",
        "PURCHASE_CREATED",
        "COURSE_ACCESS_GRANTED",
        "TRAINER_ALLOCATED",
        "SESSIONS_SCHEDULED",
    }
    assert {row["correlation_id"] for row in rows} == {str(ids["payment"])}


async def test_latest_allocation(delivered: Delivered) -> None:
    shop, ids = delivered
    rows = await shop.rows(
        """
SELECT id, trainer_id, status, created_at
FROM trainer_allocations
WHERE student_id = %(student)s
  AND course_id = %(course)s
ORDER BY created_at DESC
LIMIT 1;
""",
        **ids,
    )
    assert [row["status"] for row in rows] == ["approved"]


async def test_recent_purchases(delivered: Delivered) -> None:
    shop, ids = delivered
    rows = await shop.rows(
        """
SELECT scp.id, scp.student_id, scp.course_id, scp.purchase_tier, scp.created_at
FROM student_course_purchases scp
WHERE scp.is_active = true
ORDER BY scp.created_at DESC
LIMIT 10;
"""
    )
    assert [row["student_id"] for row in rows] == [ids["student"]]


async def test_allocation_exists(delivered: Delivered) -> None:
    shop, ids = delivered
    rows = await shop.rows(
        """
SELECT ta.id, ta.trainer_id, ta.status, ta.created_at
FROM trainer_allocations ta
WHERE ta.student_id = %(student)s
  AND ta.course_id = %(course)s;
""",
        **ids,
    )
    assert len(rows) == 1


async def test_count_of_sessions(delivered: Delivered) -> None:
    shop, ids = delivered
    rows = await shop.rows(
        """
SELECT COUNT(*) as total,
       COUNT(*) FILTER (WHERE status = 'scheduled') as scheduled,
       COUNT(*) FILTER (WHERE status = 'completed') as completed
FROM tutoring_sessions
WHERE student_id = %(student)s AND course_id = %(course)s;
""",
        **ids,
    )
    assert rows == [{"total": 30, "scheduled": 30, "completed": 0}]


async def test_metadata_of_the_allocation(delivered: Delivered) -> None:
    shop, _ = delivered
    [row] = await shop.rows("select metadata from trainer_allocations")
    assert row["metadata"]["sessionCount"] == 30
    assert set(row["metadata"]["schedule"]) == {"timeSlot", "date"}
    assert row["metadata"]["schedule"]["timeSlot"] == "6:00 AM"
