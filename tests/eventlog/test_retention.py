"""What the log lets go, and what it must not."""

from __future__ import annotations

from uuid import UUID

from caravan.db import Database
from caravan.eventlog import outbox
from caravan.eventlog.retention import PARTITION_IDS, maintain
from caravan.ids import new_id
from tests.eventlog.test_log import Heard, confirmed, say

LIST_PARTITIONS = "select inhrelid::regclass::text from pg_inherits where inhparent = 'outbox'::regclass order by 1"


async def run(db: Database, *statements: str) -> None:
    async with db.transaction() as tx:
        for statement in statements:
            await tx.execute(statement)  # type: ignore[arg-type]


async def partitions(db: Database) -> list[str]:
    async with db.transaction() as tx:
        return await tx.values(LIST_PARTITIONS)


async def maintained(db: Database) -> dict[str, int]:
    return await db.transact(maintain)


async def past_the_first_partition(db: Database, heard: Heard) -> None:
    """Events of long ago in the first partition, news in the third; whoever hears the group's past has."""
    await say(db, confirmed(new_id()))
    await run(
        db,
        "update outbox set occurred_at = now() - interval '40 days'",
        f"select setval('outbox_id_seq', {PARTITION_IDS + 5})",
    )
    await say(db, confirmed(new_id()))


async def test_an_old_partition_goes_when_every_group_has_got_past_it(db: Database) -> None:
    heard = Heard()
    consumer = heard.consumer(db)
    await consumer.enter()
    await past_the_first_partition(db, heard)
    assert (await maintained(db))["partitions_dropped"] == 0  # not heard yet
    while await consumer.run_once():
        pass
    assert len(heard.events) == 2
    assert (await maintained(db))["partitions_dropped"] == 1
    assert await partitions(db) == ["outbox_1", "outbox_2", "outbox_3", "outbox_rest"]
    await say(db, confirmed(new_id()))
    assert await consumer.run_once() == 1


async def test_what_committed_after_the_open_window_is_wanted_whatever_its_number(db: Database) -> None:
    heard = Heard()
    consumer = heard.consumer(db, page=1)
    await consumer.enter()
    async with db.transaction("test") as late:
        await late.execute("select pg_current_xact_id()")
        await late.execute(
            "insert into outbox (event_id, type, topic, source, subject, partition_key, partition, data_version, data,"
            " occurred_at) values (gen_random_uuid(), 'PURCHASE_CONFIRMED', 't', 's', 's', 's', 0, 1, '{}', now())"
        )
        await past_the_first_partition(db, heard)
        assert await consumer.run_once() == 1  # the window holds two events, the late one is in neither
    await run(db, "update outbox set occurred_at = now() - interval '40 days' where id < 1000000")
    assert (await maintained(db))["partitions_dropped"] == 0


async def test_partitions_are_made_ahead_also_where_the_net_has_caught_something(db: Database) -> None:
    await run(db, f"select setval('outbox_id_seq', {2 * PARTITION_IDS + 5})")  # nobody made a partition in time
    await say(db, confirmed(new_id()))
    assert (await maintained(db))["partitions_made"] == 2
    assert {"outbox_3", "outbox_4", "outbox_rest"} <= set(await partitions(db))


async def test_partitions_are_made_while_somebody_speaks(db: Database) -> None:
    await run(db, f"select setval('outbox_id_seq', {PARTITION_IDS + 5})")
    async with db.transaction("test") as speaker:
        outbox.append(speaker, [confirmed(new_id())])
        assert speaker.flush
        await speaker.flush(speaker)
        speaker.flush = None
        assert (await maintained(db))["partitions_made"] == 1  # its number is not to be seen yet


async def test_what_the_net_caught_goes_when_it_is_old_and_heard(db: Database) -> None:
    heard = Heard()
    consumer = heard.consumer(db)
    await consumer.enter()
    await run(db, f"select setval('outbox_id_seq', {2 * PARTITION_IDS + 5})")
    await say(db, confirmed(new_id()))
    await run(db, "update outbox set occurred_at = now() - interval '40 days'")
    assert (await maintained(db))["rest_rows_trimmed"] == 0  # not heard yet
    while await consumer.run_once():
        pass
    assert (await maintained(db))["rest_rows_trimmed"] == 1


async def test_old_claims_are_forgotten_group_by_group(db: Database) -> None:
    groups = ("first", "second")
    await run(db, *(f"insert into consumer_groups values ('{group}', 's', '{{}}')" for group in groups))
    olds: list[UUID] = [new_id() for _ in range(3)]
    async with db.transaction() as tx:
        for group in groups:
            for event_id, age in [*((old, "200 days") for old in olds), (new_id(), "1 day")]:
                await tx.execute(
                    "insert into processed_events values"
                    " (%(group)s, %(id)s, 'T', null, 's', now() - %(age)s::text::interval)",
                    {"group": group, "id": event_id, "age": age},
                )
    assert (await maintained(db))["processed_rows_trimmed"] == 6
    async with db.transaction() as tx:
        assert await tx.values("select consumer_group from processed_events order by 1") == ["first", "second"]
