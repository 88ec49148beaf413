"""Idle with nothing waiting, behind, down and unknown are told apart, in a sentence: for groups and for workers."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import pytest

from caravan.db import Database
from caravan.eventlog.lag import GroupLag, list_lag
from caravan.eventlog.standing import stand
from caravan.eventlog.workers import Worker, WorkerRow, enter, list_workers
from tests.shop import open_shop

GROUP, SERVICE = "purchase-creation-workers", "purchase-worker"


def a_lag(**more: Any) -> GroupLag:
    given: dict[str, Any] = {"messages": 0, "seconds": 0.0, "workers_alive": 1, "progress_age_seconds": 0.5} | more
    return GroupLag(group=GROUP, service=SERVICE, **given)


def a_row(name: str = "purchase-worker@here", **more: Any) -> WorkerRow:
    now = datetime.now(UTC)
    given: dict[str, Any] = {
        "consumer_group": GROUP,
        "service": SERVICE,
        "heartbeat_age_seconds": 1.0,
        "progress_age_seconds": 1.0,
        "alive": True,
        "failing_since": None,
        "last_error": None,
    }
    return WorkerRow(
        name=name,
        host="here",
        pid=1,
        build="b",
        started_at=now,
        heartbeat_at=now,
        events_done=0,
        failing_event_id=uuid4() if more.get("failing_since") else None,
        **(given | more),
    )


@pytest.mark.parametrize(
    ("given", "state", "said"),
    [
        ({}, "idle", "Idle: nothing waiting."),
        ({"messages": 1, "seconds": 0.24}, "working", "Working: 1 event waits, the oldest for 0.2 s."),
        ({"messages": 12, "seconds": 40.0}, "behind", "Behind: 12 events wait, the oldest for 40 s."),
        (
            {"messages": 3, "seconds": 40.0, "workers_alive": 0},
            "down",
            "Down? 3 events wait and no purchase-worker is alive: nothing will start until one does."
            " Start it: caravan serve purchase-worker",
        ),
        (
            {"messages": 1, "seconds": 40.0, "workers_alive": 0, "reconciler_alive": True},
            "down",
            "Down? 1 event waits and no purchase-worker is alive: no event is heard, and the reconciler does what is"
            " missing meanwhile, slowly. Start it: caravan serve purchase-worker",
        ),
        (
            {"workers_alive": 0},
            "unknown",
            "Unknown: nothing waits, and no purchase-worker is alive to say so."
            " Start it: caravan serve purchase-worker",
        ),
    ],
)
def test_a_group_in_a_word_and_a_sentence(given: dict[str, Any], state: str, said: str) -> None:
    lag = a_lag(**given)
    assert (lag.state, lag.sentence) == (state, said)


@pytest.mark.parametrize(
    ("row", "lag", "state", "said"),
    [
        ({}, {}, "idle", "Idle: nothing waiting."),
        ({}, {"messages": 2, "seconds": 3.0}, "working", "Working: 2 events wait, the oldest for 3.0 s."),
        ({}, {"messages": 2, "seconds": 30.0}, "behind", "Behind: 2 events wait, the oldest for 30 s."),
        (
            {"progress_age_seconds": 40.0},
            {},
            "behind",
            "Behind: it beats, but has not come round for 40 s.",
        ),
        (
            {"failing_since": datetime.now(UTC), "last_error": "KeyError: x"},
            {"messages": 2},
            "failing",
            "Failing, and trying again: KeyError: x",
        ),
        (
            {"alive": False, "heartbeat_age_seconds": 40.0},
            {"messages": 1, "workers_alive": 0},
            "down",
            "Down? It was not heard of for 40 s, and 1 event waits for it. Start it: caravan serve purchase-worker",
        ),
        (
            {"alive": False, "heartbeat_age_seconds": 40.0},
            {"workers_alive": 0},
            "unknown",
            "Unknown: not heard of for 40 s, and nothing waits for it that would show. Look at its log.",
        ),
        (
            {"service": "reconciler", "consumer_group": None, "progress_age_seconds": 4.0},
            {},
            "idle",
            "Idle: it last came round 4 s ago.",
        ),
    ],
)
def test_a_worker_in_a_word_and_a_sentence(row: dict[str, Any], lag: dict[str, Any], state: str, said: str) -> None:
    standing = next(each for each in stand([a_row(**row)], [a_lag(**lag)]) if each.worker is not None)
    assert (standing.state, standing.sentence) == (state, said)


def test_one_that_was_replaced_is_gone_and_no_trouble() -> None:
    old = a_row("purchase-worker@old", alive=False, heartbeat_age_seconds=60.0)
    states = {each.worker.name: each.state for each in stand([a_row(), old], [a_lag(messages=5)]) if each.worker}
    assert states == {"purchase-worker@here": "working", "purchase-worker@old": "gone"}


def test_whoever_is_alive_stands_before_those_who_are_gone() -> None:
    old = a_row("purchase-worker@a", alive=False, heartbeat_age_seconds=60.0)
    listed = [each.worker.name for each in stand([old, a_row("purchase-worker@b")], [a_lag()]) if each.worker]
    assert listed == ["purchase-worker@b", "purchase-worker@a"]


def test_a_service_without_anybody_is_named_too() -> None:
    assert [(each.service, each.state) for each in stand([], [a_lag(messages=1, workers_alive=0)])] == [
        ("purchase-worker", "down"),
        ("reconciler", "unknown"),
    ]
    assert [each.state for each in stand([], [a_lag(workers_alive=0)])] == ["unknown", "unknown"]


async def test_what_the_reconciler_goes_on_for_does_not_stand_still(db: Database) -> None:
    shop = await open_shop(db)
    await shop.work()
    await shop.bought()

    async def sentences() -> dict[str, str]:
        async with db.transaction(read_only=True) as tx:
            return {lag.service: lag.sentence for lag in await list_lag(tx)}

    assert "nothing will start" in (await sentences())[SERVICE]
    async with db.transaction() as tx:
        await enter(tx, Worker("reconciler", None, "b", "reconciler@here"))
    assert "the reconciler does what is missing" in (await sentences())[SERVICE]
    assert not any("reconciler" in said for service, said in (await sentences()).items() if service == "cache-worker")


async def test_the_same_from_the_database(db: Database) -> None:
    shop = await open_shop(db)
    await shop.work()

    async def state() -> tuple[str, str]:
        async with db.transaction(read_only=True) as tx:
            lags, rows = await list_lag(tx), await list_workers(tx)
        group = next(lag.state for lag in lags if lag.group == GROUP)
        worker = next(each.state for each in stand(rows, lags) if each.service == SERVICE)
        return group, worker

    assert await state() == ("unknown", "unknown")
    await shop.bought()
    assert await state() == ("down", "down")
    async with db.transaction() as tx:
        await enter(tx, Worker(SERVICE, GROUP, "b", "purchase-worker@here"))
    assert await state() == ("working", "working")
    await shop.run("update outbox set occurred_at = occurred_at - interval '1 minute'")
    assert await state() == ("behind", "behind")
    await shop.work()
    assert await state() == ("idle", "idle")
    await shop.run("update workers set expires_at = now()")
    assert await state() == ("unknown", "unknown")
