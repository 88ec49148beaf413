"""What every event log promises, whatever it is made of."""

from __future__ import annotations

import random
from uuid import UUID

import pytest
from psycopg import errors as pg

from caravan.db import Database
from caravan.eventlog import dead_letters
from caravan.eventlog.lag import list_lag
from caravan.events import PurchaseConfirmed, PurchaseCreated
from caravan.ids import new_id
from tests.conformance.logs import Group, Log, confirmed, effects, say

# A group that empties and fills again has to wait on the mock, for nothing that it could show.
RETURNING = pytest.mark.parametrize("log", ["postgres", "kafka"], indirect=True)


async def test_each_event_has_its_effect_once(log: Log, db: Database) -> None:
    group = Group()
    member = await log.member(group)
    said = await say(db, *(confirmed() for _ in range(300)))
    await log.until(lambda: _are_done(db, 300), member)
    await log.settle()
    assert sorted(await effects(db)) == sorted(said)
    async with db.transaction() as tx:
        assert {lag.group: lag.messages for lag in await list_lag(tx)}["effects"] == 0


async def test_two_members_share_the_work_and_keep_each_students_order(log: Log, db: Database) -> None:
    group, rng = Group(), random.Random(3)
    members = [await log.member(group, f"effects-{n}", page=7) for n in (1, 2)]
    await log.until(lambda: log.share(members))
    students = [new_id() for _ in range(10)]
    said: dict[UUID, list[UUID]] = {student: [] for student in students}
    for _ in range(20):
        events = [confirmed(rng.choice(students)) for _ in range(10)]
        for event in events:
            said[event.student_id].append(event.payment_id)
        await say(db, *events)
        await log.turn(members)
    await log.until(lambda: _are_done(db, 200), *members)
    done = await effects(db)
    for payments in said.values():
        assert [payment for payment in done if payment in set(payments)] == payments
    assert all(member.worker.events_done for member in members)


async def test_what_a_handler_says_is_heard(log: Log, db: Database) -> None:
    group = Group()
    group.says = lambda event: [_created(event)]
    await log.member(group)
    await say(db, confirmed(), confirmed())
    await log.until(lambda: _are_done(db, 4))


async def test_a_bug_is_parked_alone_and_the_rest_flows(log: Log, db: Database) -> None:
    group = Group()
    events = [confirmed() for _ in range(60)]
    group.poison = {events[17].payment_id}
    await log.member(group)
    await say(db, *events)
    await log.until(lambda: _are_done(db, 59))
    await log.until(lambda: _are_parked(db, 1))
    async with db.transaction() as tx:
        [letter] = await dead_letters.list_dead_letters(tx)
    assert (letter.code, letter.attempts, letter.event_type) == ("HANDLER_FAILED", 3, "PURCHASE_CONFIRMED")
    assert letter.correlation_id == str(events[17].payment_id)


async def test_an_outage_uses_up_no_attempts(log: Log, db: Database) -> None:
    group = Group()
    group.failures = [pg.SerializationFailure() for _ in range(5)]
    await log.member(group)
    said = await say(db, confirmed(), confirmed())
    await log.until(lambda: _are_done(db, 2))
    assert sorted(await effects(db)) == sorted(said)
    assert not group.failures
    async with db.transaction() as tx:
        assert await dead_letters.list_dead_letters(tx) == []


async def test_an_unknown_type_is_parked(log: Log, db: Database) -> None:
    await log.member(Group())
    await say(db, confirmed())
    async with db.transaction() as tx:
        await tx.execute("update outbox set type = 'OF_ANOTHER_RELEASE'")
    said = await say(db, confirmed())
    topics = log.kafka is not None  # there its topic is purchase-status, which this group does not hear
    await log.until(lambda: _are_done(db, 1))
    assert await effects(db) == said
    if not topics:
        await log.until(lambda: _are_parked(db, 1))


@RETURNING
async def test_a_member_that_left_cleanly_leaves_nothing_to_do_twice(log: Log, db: Database) -> None:
    group = Group()
    first = await log.member(group, "effects-1")
    await say(db, *(confirmed() for _ in range(50)))
    await log.until(lambda: _are_done(db, 50), first)
    await first.leave()
    log.members.remove(first)
    second = await log.member(group, "effects-2")
    said = await say(db, confirmed())
    await log.until(lambda: _are_done(db, 51), second)
    await log.settle(second)
    assert second.worker.events_done == 1  # nothing came again
    assert (await effects(db))[-1:] == said


@RETURNING
async def test_what_comes_again_is_known(log: Log, db: Database) -> None:
    """The whole log once more: from the first window, and (with Kafka) once more into the topics."""
    group = Group()
    first = await log.member(group, "effects-1")
    said = await say(db, *(confirmed() for _ in range(20)))
    await log.until(lambda: _are_done(db, 20), first)
    await first.leave()
    if log.relay:
        await log.relay.leave()
        log.relay = None
    log.members.clear()
    async with db.transaction() as tx:
        await tx.execute("delete from log_cursors")
    second = await log.member(group, "effects-2")
    await log.until(lambda: _has_done(second.worker, 20), second)
    await log.settle(second)
    assert sorted(await effects(db)) == sorted(said)


async def _are_done(db: Database, number: int) -> bool:
    return len(await effects(db)) >= number


async def _has_done(worker: object, number: int) -> bool:
    return getattr(worker, "events_done") >= number  # noqa: B009


async def _are_parked(db: Database, number: int) -> bool:
    async with db.transaction() as tx:
        return len(await dead_letters.list_dead_letters(tx)) >= number


def _created(event: PurchaseConfirmed) -> PurchaseCreated:
    return PurchaseCreated(
        payment_id=event.payment_id, student_id=event.student_id, course_id=event.course_id, session_count=4
    )
