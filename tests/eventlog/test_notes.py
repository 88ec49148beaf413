"""A group that does nothing with its events still has each once; and nobody is woken for what only others hear."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import pytest

from caravan.db import Database, Tx
from caravan.db.wake import EVERYTHING, KIND, PAYLOAD_BYTES_MAX, Wake
from caravan.eventlog import member, outbox, postgres_log
from caravan.eventlog.consumer import FEW_EVENTS_MAX, Consumer
from caravan.eventlog.subscription import Subscription
from caravan.eventlog.workers import Worker
from caravan.events import BY_TYPE, CourseUpdated, Event, PurchaseConfirmed
from caravan.ids import new_id, new_ids

NOTED = "select count(*), count(distinct event_id) from processed_events where consumer_group = 'notes'"
STRANGE = "update outbox set type = 'FROM_TOMORROW' where id = (select max(id) from outbox)"


async def refuse(*_: object) -> None:
    raise AssertionError("its handlers do nothing")


SUBSCRIPTION = Subscription("notes", "note-worker", "NoteWorker", {PurchaseConfirmed: refuse}, notes_only=True)


def a_consumer(db: Database, subscription: Subscription = SUBSCRIPTION, wake: Wake | None = None) -> Consumer:
    worker = Worker(service="note-worker", group=subscription.group, build="test", name="notes-1")
    return Consumer(db, subscription, worker, wake=wake)


async def say(db: Database, count: int) -> None:
    async with db.transaction("payment-service") as tx:
        outbox.append(
            tx,
            [
                PurchaseConfirmed(payment_id=p, student_id=s, course_id=None, checkout_id=p)
                for p, s in zip(new_ids(count), new_ids(count), strict=True)
            ],
        )
        outbox.append(tx, [CourseUpdated(course_id=new_id(), changed=())])


async def noted(db: Database) -> tuple[int, int]:
    async with db.transaction() as tx:
        [(rows, events)] = await tx.tuples(NOTED)
    return rows, events


async def test_each_event_is_noted_once_also_where_a_place_is_lost(db: Database) -> None:
    consumer = a_consumer(db)
    await consumer.enter()
    await say(db, 30)
    assert await consumer.run_once() == 30
    await say(db, 12)
    assert await consumer.run_once() == 12
    assert await consumer.run_once() == 0
    assert await noted(db) == (42, 42)

    async with db.transaction() as tx:
        await tx.execute("update log_cursors set window_start = '3:3:', window_end = null, last_id = 0")
    await consumer.leave()
    await consumer.enter()
    assert await consumer.run_once() == 42
    assert await noted(db) == (42, 42)


async def test_what_nobody_knows_is_parked_and_the_rest_noted(db: Database) -> None:
    consumer = a_consumer(db, replace(SUBSCRIPTION, handlers={PurchaseConfirmed: ignore}))
    await consumer.enter()
    await say(db, 5)
    async with db.transaction() as tx:
        await tx.execute(STRANGE)
    assert await consumer.run_once() == 6
    assert await noted(db) == (5, 5)
    async with db.transaction() as tx:
        assert await tx.values("select code from dead_letters") == ["UNKNOWN_TYPE"]


async def ignore(*_: object) -> None:
    """As the real ones do."""


async def test_only_news_that_a_group_hears_wakes_it(db: Database) -> None:
    wake = Wake(db.url)
    hears = a_consumer(db, replace(SUBSCRIPTION, notes_only=False), wake)
    woken = hears._woken  # pyright: ignore[reportPrivateUsage]
    wake.subscribe(hears._stir)  # pyright: ignore[reportPrivateUsage]

    async def wakes(*keys: str) -> bool:
        woken.clear()
        wake.send(keys)
        return woken.is_set()

    assert not await wakes(str(new_id()), KIND + CourseUpdated.type)
    assert await wakes(str(new_id()), KIND + PurchaseConfirmed.type)
    assert await wakes(EVERYTHING)


async def test_a_group_looks_again_where_somebody_spoke_meanwhile_and_only_there(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(member, "POLL_SECONDS", 3600.0)
    wake, stop, idle = Wake(db.url), asyncio.Event(), asyncio.Queue[None]()
    db.on_hints = wake.send
    done: list[str] = []
    open_window = postgres_log.open_window

    async def look(db: Database, cursor: postgres_log.Cursor, *heard: Sequence[str]) -> postgres_log.Cursor:
        done.append("look")
        return await open_window(db, cursor, *heard)

    async def hear(_tx: Tx, _events: Sequence[Event]) -> None:
        done.append("hear")
        if done.count("hear") == 2:
            await say(db, 1)  # after the window of this page was opened

    monkeypatch.setattr(postgres_log, "open_window", look)
    consumer = a_consumer(db, replace(SUBSCRIPTION, handlers={PurchaseConfirmed: hear}, notes_only=False), wake)
    wait_for_work = consumer._wait_for_work  # pyright: ignore[reportPrivateUsage]

    async def wait(stopped: asyncio.Task[object]) -> None:
        idle.put_nowait(None)
        await wait_for_work(stopped)

    monkeypatch.setattr(consumer, "_wait_for_work", wait)
    running = asyncio.create_task(consumer.run(stop))
    async with asyncio.timeout(20):
        await idle.get()
        await say(db, 1)
        await idle.get()
        assert done == ["look", "look", "hear"]
        await say(db, 1)
        await idle.get()  # woken already
        await idle.get()
        assert done[3:] == ["look", "hear", "look", "hear"]
        stop.set()
        await running


async def test_who_only_takes_notes_comes_round_once_it_is_quiet(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(member, "POLL_SECONDS", 3600.0)
    wake, stop, idle = Wake(db.url), asyncio.Event(), asyncio.Queue[None]()
    db.on_hints = wake.send
    consumer = a_consumer(db, wake=wake)
    wait_for_work = consumer._wait_for_work  # pyright: ignore[reportPrivateUsage]

    async def wait(stopped: asyncio.Task[object]) -> None:
        idle.put_nowait(None)
        await wait_for_work(stopped)

    monkeypatch.setattr(consumer, "_wait_for_work", wait)
    running = asyncio.create_task(consumer.run(stop))
    async with asyncio.timeout(20):
        await idle.get()
        await say(db, 3)
        await idle.get()
        assert await noted(db) == (3, 3)
        stop.set()
        await running


async def test_a_window_is_opened_only_over_what_concerns_its_group(db: Database) -> None:
    consumer = a_consumer(db)
    await consumer.enter()
    assert await consumer.run_once() == 0
    async with db.transaction("payment-service") as tx:
        outbox.append(tx, [CourseUpdated(course_id=new_id(), changed=())])
    [cursor] = consumer._cursors.values()  # pyright: ignore[reportPrivateUsage]
    heard = await postgres_log.open_window(db, cursor, [PurchaseConfirmed.type], list(BY_TYPE))
    assert heard.window_end is None
    assert heard.window_start != cursor.window_start
    anybody = await postgres_log.open_window(db, cursor)
    assert anybody.window_end is not None
    async with db.transaction() as tx:
        await tx.execute(STRANGE)
    strange = await postgres_log.open_window(db, cursor, [PurchaseConfirmed.type], list(BY_TYPE))
    assert strange.window_end is not None


async def test_few_events_are_handled_by_plans_made_before(db: Database) -> None:
    modes: list[str] = []

    async def see(tx: Tx, _events: Sequence[Event]) -> None:
        modes.append(await tx.value("show plan_cache_mode"))

    consumer = a_consumer(db, replace(SUBSCRIPTION, handlers={PurchaseConfirmed: see}, notes_only=False))
    await consumer.enter()
    for count in (1, FEW_EVENTS_MAX + 1, 2):
        await say(db, count)
        assert await consumer.run_once() == count
    assert modes == ["force_generic_plan", "auto", "force_generic_plan"]


async def test_kinds_are_told_however_many_students_had_news(db: Database) -> None:
    wake = Wake(db.url)
    students = {str(one) for one in new_ids(300)}
    said = await wake._publish({*students, KIND + "B", KIND + "A"})  # pyright: ignore[reportPrivateUsage]
    assert said == f"{EVERYTHING} {KIND}A {KIND}B"
    assert len(said) < PAYLOAD_BYTES_MAX < len(" ".join(students))
