"""No third case: whatever is stuck is moved or waits with a reason, and one bad payment holds up no other."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from pathlib import Path

import psycopg
import pytest
from structlog.testing import capture_logs

from caravan.db import Database
from caravan.fulfilment.diagnose import diagnose
from caravan.fulfilment.invariants import check
from caravan.fulfilment.reconciler import TRY_LOCK, Reconciler, Task
from caravan.settings import load_settings
from tests.fulfilment import world
from tests.fulfilment.test_diagnose import some_sessions_gone
from tests.fulfilment.test_repair import a_free_trainer


@pytest.fixture
def reconciler(db: Database) -> Reconciler:
    return Reconciler(db, load_settings({}, data_dir=Path("test")), turn_seconds=0.05)


async def violations(db: Database) -> list[str]:
    async with db.transaction(read_only=True) as tx:
        return [str(violation) for violation in await check(tx, world.BY_HAND, leeway=timedelta(0))]


def moved(counts: dict[str, int]) -> dict[str, int]:
    """What concerned payments; housekeeping has always something to do."""
    return {name: count for name, count in counts.items() if count and name not in ("log", "trainers' time")}


async def test_a_forgotten_payment_is_brought_home(db: Database, reconciler: Reconciler) -> None:
    road = await world.a_payment(db)
    await a_free_trainer(db, road)
    counts = await reconciler.run_once()
    assert counts["PurchaseMissing"] == 1
    async with db.transaction() as tx:  # the purchase is new: let its leeway go by
        await tx.execute("update student_course_purchases set created_at = created_at - interval '1 minute'")
    assert (await reconciler.run_once())["AllocationMissing"] == 1
    async with db.transaction() as tx:
        await tx.execute("update trainer_allocations set updated_at = updated_at - interval '1 minute'")
    assert (await reconciler.run_once())["SessionsMissing"] == 1
    assert await violations(db) == []
    async with db.transaction(read_only=True) as tx:
        (finding,) = await diagnose(tx, payment_id=road.payment_id)
    assert (finding.stage, finding.reason) == ("scheduled", None)


async def test_within_its_leeway_a_payment_is_the_workers(db: Database, reconciler: Reconciler) -> None:
    await world.a_payment(db, ago=timedelta(seconds=1))
    assert moved(await reconciler.run_once()) == {}


async def test_a_waiting_payment_is_looked_at_again(db: Database, reconciler: Reconciler) -> None:
    road = await world.a_payment(db, reason="NO_TRAINER_AVAILABLE")
    await world.purchased(db, road)
    with capture_logs() as lines:
        assert (await reconciler.run_once())["waiting"] == 0
    assert "[Reconciler] step taken" not in [line["event"] for line in lines]
    await a_free_trainer(db, road)
    assert "waiting" not in await reconciler.run_once()  # once a minute
    reconciler.tasks[[task.name for task in reconciler.tasks].index("waiting")].due = 0
    with capture_logs() as lines:
        assert (await reconciler.run_once())["waiting"] == 1
    (taken,) = [line for line in lines if line["event"] == "[Reconciler] step taken"]
    assert (taken["task"], taken["step"], taken["count"]) == ("waiting", "allocate_trainer", 1)


async def test_money_missing_from_the_register_is_found(db: Database, reconciler: Reconciler) -> None:
    road = await world.a_payment(db, registered=False)
    await a_free_trainer(db, road)
    assert (await reconciler.run_once())["register"] == 1
    assert await violations(db) == []


async def test_delivered_money_leaves_the_register(db: Database, reconciler: Reconciler) -> None:
    road = await world.a_payment(db)
    await world.purchased(db, road)
    await world.allocated(db, road)
    await world.scheduled(db, road, close=False)
    assert (await reconciler.run_once())["register"] == 1
    assert await violations(db) == []


async def test_held_money_stays_where_it_is(db: Database, reconciler: Reconciler) -> None:
    await world.a_payment(db, reason="OPERATOR_HOLD")
    assert moved(await reconciler.run_once()) == {}


REFUSE = """
create function refuse() returns trigger language plpgsql as $$
begin
  if new.payment_id = '{}' then raise exception 'broken row'; end if;
  return new;
end $$;
create trigger refuse before insert on student_course_purchases for each row execute function refuse()
"""


async def test_a_failing_payment_holds_up_no_other_and_shows(db: Database, reconciler: Reconciler) -> None:
    bad = await world.a_payment(db)
    good = await world.a_payment(db)
    async with db.transaction() as tx:
        await tx.connection.execute(REFUSE.format(bad.payment_id).encode())
    await reconciler.run_once()
    async with db.transaction(read_only=True) as tx:
        found = {f.payment_id: f.stage for f in await diagnose(tx)}
    assert found == {bad.payment_id: "paid", good.payment_id: "purchased"}
    assert "broken row" in (reconciler.worker.last_error or "")
    # Others go on having their turn, and the trouble stays visible meanwhile.
    await world.a_payment(db)
    assert (await reconciler.run_once())["PurchaseMissing"] == 1
    assert "broken row" in (reconciler.worker.last_error or "")


async def test_another_reconciler_at_work_is_left_alone(
    db: Database, database_url: str, reconciler: Reconciler
) -> None:
    await world.a_payment(db)
    with psycopg.connect(database_url) as other:
        other.execute(TRY_LOCK, {"task": "PurchaseMissing"})
        assert (await reconciler.run_once())["PurchaseMissing"] == 0
    assert (await reconciler.run_once())["PurchaseMissing"] == 1


async def test_runs_until_told_to_stop_and_is_known_meanwhile(db: Database, reconciler: Reconciler) -> None:
    road = await world.a_payment(db)
    stop, moved_on = asyncio.Event(), asyncio.Event()

    async def look() -> int:
        if await stage_of(db, road) == "purchased":
            moved_on.set()
        return 0

    reconciler.tasks += (Task("look", timedelta(0), look),)
    running = asyncio.create_task(reconciler.run(stop))
    await asyncio.wait_for(moved_on.wait(), 10)
    async with db.transaction(read_only=True) as tx:
        assert await tx.values("select service from workers") == ["reconciler"]
    stop.set()
    await asyncio.wait_for(running, 5)
    async with db.transaction(read_only=True) as tx:
        assert await tx.values("select service from workers") == []


async def stage_of(db: Database, road: world.Road) -> str:
    async with db.transaction(read_only=True) as tx:
        (finding,) = await diagnose(tx, payment_id=road.payment_id)
    return finding.stage


async def test_a_stop_does_not_wait_for_a_task_that_hangs(db: Database, reconciler: Reconciler) -> None:
    hanging = asyncio.Event()

    async def hang() -> int:
        hanging.set()
        await asyncio.Event().wait()
        return 0

    reconciler.tasks = (Task("hang", timedelta(0), hang),)
    stop = asyncio.Event()
    running = asyncio.create_task(reconciler.run(stop))
    await asyncio.wait_for(hanging.wait(), 10)
    stop.set()
    await asyncio.wait_for(running, 4)


async def test_when_the_database_is_away_the_turn_ends_and_the_next_one_works(
    db: Database, reconciler: Reconciler
) -> None:
    await world.a_payment(db)
    away = [psycopg.OperationalError("connection refused")]
    told: list[str] = []

    async def fail_once() -> int:
        if away:
            raise away.pop()
        told.append("here again")
        return 1

    reconciler.tasks = (Task("first", timedelta(0), fail_once), *reconciler.tasks)
    assert await reconciler.run_once() == {"first": 0}
    assert "connection refused" in (reconciler.worker.last_error or "")
    counts = await reconciler.run_once()
    assert (counts["first"], counts["PurchaseMissing"]) == (1, 1)
    assert reconciler.worker.last_error is None


@pytest.mark.parametrize("registered", [True, False])
async def test_some_sessions_that_vanished_come_back(db: Database, reconciler: Reconciler, registered: bool) -> None:
    await some_sessions_gone(db, registered=registered)
    assert sum(moved(await reconciler.run_once()).values()) == 1
    assert await violations(db) == []
