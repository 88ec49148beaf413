"""Who hears what: one row of the wiring table, and its registration in the database."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from caravan.db import Tx
from caravan.events import Event

Handler = Callable[[Tx, Sequence[Any]], Awaitable[object]]


@dataclass(frozen=True, slots=True)
class Subscription:
    """A consumer group: the service that runs it, the worker's name in the logs, and a handler per event type.

    Renaming a group makes it hear everything again from the beginning of the log. `notes_only`: its handlers do nothing
    at present; events are noted as processed where they lie, in big pages, and nobody is woken for them.
    """

    group: str
    service: str
    label: str
    handlers: Mapping[type[Event], Handler]
    notes_only: bool = False

    @property
    def types(self) -> list[str]:
        return [event.type for event in self.handlers]


# Tell the database which groups there are and what they hear.
REGISTER_GROUPS = """
insert into consumer_groups (name, service, types)
select name, service, string_to_array(types, ' ')
from unnest(%(names)b::text[], %(services)b::text[], %(types)b::text[]) as g(name, service, types)
on conflict (name) do update set service = excluded.service, types = excluded.types
where (consumer_groups.service, consumer_groups.types) is distinct from (excluded.service, excluded.types)
"""


async def register_groups(tx: Tx, subscriptions: Sequence[Subscription]) -> None:
    """At the start of every process: lag is then told for groups whose worker never ran."""
    await tx.execute(
        REGISTER_GROUPS,
        {
            "names": [s.group for s in subscriptions],
            "services": [s.service for s in subscriptions],
            "types": [" ".join(s.types) for s in subscriptions],
        },
    )
