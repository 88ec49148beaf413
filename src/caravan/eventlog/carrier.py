"""What carries the events to the workers, where there is a Kafka: its topics, or (failed over) the outbox itself."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from caravan.db import Tx
from caravan.errors import Conflict
from caravan.eventlog.outbox import PARTITIONS
from caravan.eventlog.postgres_log import LOCK_GROUP
from caravan.ids import new_id

RELAY_GROUP = "outbox-relay"  # its name in log_cursors; the service has the same


class Carrier(StrEnum):
    KAFKA = "kafka"
    POSTGRES_LOG = "postgres-log"


class NoKafka(Conflict):
    """This installation has no Kafka: its workers read the log in PostgreSQL already."""

    code = "NO_KAFKA"


@dataclass(frozen=True, slots=True)
class CarrierState:
    """`kafka`: whether this installation has one at all; `since`: when somebody last switched."""

    kafka: bool
    carrier: Carrier
    since: datetime | None

    @property
    def failed_over_since(self) -> datetime | None:
        """Since when the workers do without the Kafka that is there; None: they don't."""
        return self.since if self.kafka and self.carrier is Carrier.POSTGRES_LOG else None


GET_CARRIER = """
select exists (select from consumer_groups where name = %(relay)s) as kafka, carrier, carrier_since as since
from installation
"""


async def get_carrier(tx: Tx) -> CarrierState:
    row = await tx.one(GET_CARRIER, {"relay": RELAY_GROUP})
    return CarrierState(row["kafka"], Carrier(row["carrier"]), row["since"])


SWITCH_CARRIER = """
update installation set carrier = %(carrier)s, carrier_since = %(now)s where carrier <> %(carrier)s
"""


async def switch_carrier(tx: Tx, carrier: Carrier) -> bool:
    """Tell all workers; they follow within seconds. False where it was so already. Raises NoKafka."""
    if not (await get_carrier(tx)).kafka:
        raise NoKafka
    return bool(await tx.execute(SWITCH_CARRIER, {"carrier": carrier, "now": tx.now}))


# The relay is no group that handles events, so it hears none; it stands here for its service, lag and workers.
REGISTER_RELAY = """
insert into consumer_groups (name, service, types) values (%(relay)s, %(relay)s, '{}') on conflict (name) do nothing
"""

# A new relay begins where the group that is furthest behind stands (snapshots of one server are ordered by xmax, xmin).
CREATE_RELAY_CURSOR = """
insert into log_cursors (id, consumer_group, partitions, window_start)
select %(id)s, %(relay)s, %(partitions)b::smallint[],
       case when exists (select from consumer_groups g where g.name <> %(relay)s
                         and not exists (select from log_cursors c where c.consumer_group = g.name))
         then '3:3:'::pg_snapshot
         else coalesce((select window_start from log_cursors
                        order by pg_snapshot_xmax(window_start), pg_snapshot_xmin(window_start) limit 1), '3:3:') end
where not exists (select from log_cursors where consumer_group = %(relay)s)
"""


async def register_relay(tx: Tx) -> None:
    """Where KAFKA_BROKER is set, at the start of every process."""
    await tx.execute(REGISTER_RELAY, {"relay": RELAY_GROUP})
    await tx.value(LOCK_GROUP, {"group": RELAY_GROUP})
    await tx.execute(CREATE_RELAY_CURSOR, {"id": new_id(), "relay": RELAY_GROUP, "partitions": list(range(PARTITIONS))})


NO_RELAY = """
not exists (select from workers where consumer_group = %(relay)s and expires_at > clock_timestamp())
"""
FORGET_CURSORS = f"delete from log_cursors where consumer_group = %(relay)s and {NO_RELAY}"  # noqa: S608
FORGET_GROUP = f"delete from consumer_groups where name = %(relay)s and {NO_RELAY}"  # noqa: S608
FORGET_SWITCH = f"update installation set carrier = 'kafka' where carrier <> 'kafka' and {NO_RELAY}"  # noqa: S608


async def forget_relay(tx: Tx) -> None:
    """Without KAFKA_BROKER: nobody reads the relay's place any more, which would keep the outbox from being trimmed.

    Where a relay lives after all, this process is the one that was set up wrongly, and changes nothing.
    """
    for statement in (FORGET_CURSORS, FORGET_GROUP, FORGET_SWITCH):
        await tx.execute(statement, {"relay": RELAY_GROUP})
