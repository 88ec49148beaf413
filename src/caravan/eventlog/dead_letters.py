"""Events that were given up, openly: parked with the reason, replayed once, or discarded with a note."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

import msgspec

from caravan.db import Tx
from caravan.errors import Conflict, NotFound
from caravan.eventlog import inbox
from caravan.eventlog.codec import Envelope, Unreadable, encode_envelope
from caravan.eventlog.subscription import Subscription
from caravan.ids import new_id


class DeadLetterNotFound(NotFound):
    """There is no such dead letter."""

    code = "DEAD_LETTER_NOT_FOUND"


class DeadLetterResolved(Conflict):
    """The dead letter was replayed or discarded already."""

    code = "DEAD_LETTER_RESOLVED"


class DeadLetterUnreadable(Conflict):
    """This release cannot read the event, or has no such group: replaying it would fail again."""

    code = "DEAD_LETTER_UNREADABLE"


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """`envelope` is the whole CloudEvent as it was; `code` why it was parked, `error` the sentence."""

    id: UUID
    consumer_group: str
    event_id: UUID
    event_type: str
    correlation_id: str | None
    envelope: dict[str, Any]
    code: str
    error: str
    attempts: int
    status: str
    created_at: datetime
    resolved_at: datetime | None
    resolved_by: str | None
    note: str | None


# Give an event up for one group, in the transaction that moves past it. Parked twice is parked once.
PARK = """
insert into dead_letters (id, consumer_group, event_id, event_type, correlation_id, envelope, code, error, attempts,
                          created_at)
values (%(id)s, %(group)s, %(event_id)s, %(event_type)s, %(correlation_id)s, %(envelope)s::text::jsonb, %(code)s,
        %(error)s, %(attempts)s, %(now)s)
on conflict (consumer_group, event_id) where status = 'parked' do nothing
"""


async def park(tx: Tx, group: str, envelope: Envelope, code: str, error: str, *, attempts: int) -> None:
    await tx.execute(
        PARK,
        {
            "id": new_id(),
            "group": group,
            "event_id": envelope.id,
            "event_type": envelope.type,
            "correlation_id": envelope.correlationid,
            "envelope": encode_envelope(envelope),
            "code": code,
            "error": error,
            "attempts": attempts,
            "now": tx.now,
        },
    )


LIST_DEAD_LETTERS = """
select id, consumer_group, event_id, event_type, correlation_id, envelope, code, error, attempts, status, created_at,
       resolved_at, resolved_by, note
from dead_letters
where (%(status)s::text is null or status = %(status)s) and (%(before)s::uuid is null or id < %(before)s)
order by id desc limit %(limit)s
"""


async def list_dead_letters(
    tx: Tx, *, status: str | None = "parked", before: UUID | None = None, limit: int = 50
) -> list[DeadLetter]:
    """The newest first, as their ids have it; `before`, the last one's id, continues a page."""
    return await tx.all(LIST_DEAD_LETTERS, {"status": status, "before": before, "limit": limit}, into=DeadLetter)


GET_DEAD_LETTER = """
select id, consumer_group, event_id, event_type, correlation_id, envelope, code, error, attempts, status, created_at,
       resolved_at, resolved_by, note
from dead_letters where id = %(id)s
"""
LOCK_DEAD_LETTER = GET_DEAD_LETTER + "for update"


async def get_dead_letter(tx: Tx, dead_letter_id: UUID) -> DeadLetter:
    letter = await tx.find(GET_DEAD_LETTER, {"id": dead_letter_id}, into=DeadLetter)
    if letter is None:
        raise DeadLetterNotFound
    return letter


RESOLVE = """
update dead_letters set status = %(status)s, resolved_at = %(now)s, resolved_by = %(by)s, note = %(note)s
where id = %(id)s
"""


async def replay(
    tx: Tx, dead_letter_id: UUID, subscriptions: Mapping[str, Subscription], *, by: str, note: str | None
) -> DeadLetter:
    """Run the event through its group's handler now, in this transaction; a second replay waits, then is refused."""
    letter = await _lock_parked(tx, dead_letter_id)
    subscription = subscriptions.get(letter.consumer_group)
    try:
        envelope = msgspec.convert(letter.envelope, Envelope)
        event = envelope.event()
    except (Unreadable, msgspec.ValidationError) as error:
        raise DeadLetterUnreadable(f"This release cannot read the event ({error}). {_instead(letter)}") from None
    if subscription is None or type(event) not in subscription.handlers:
        said = f"{letter.consumer_group} does not hear {letter.event_type}."
        raise DeadLetterUnreadable(f"{said} {_instead(letter)}")
    if await inbox.claim(tx, subscription.group, [envelope]):
        await inbox.apply_events(tx, subscription, [(envelope, event)])
    await _resolve(tx, dead_letter_id, "replayed", by, note)
    return letter


def _instead(letter: DeadLetter) -> str:
    """What to do with a letter that can't be replayed."""
    payment = letter.correlation_id or "ID"
    return (
        f"It can't be replayed as it is. If `caravan diagnose --payment {payment}` says delivered, discard it;"
        f" otherwise `caravan repair --payment {payment}` does the same work from the tables."
    )


async def discard(tx: Tx, dead_letter_id: UUID, *, by: str, note: str) -> DeadLetter:
    """Give it up for good; the row stays."""
    letter = await _lock_parked(tx, dead_letter_id)
    await _resolve(tx, dead_letter_id, "discarded", by, note)
    return letter


async def _lock_parked(tx: Tx, dead_letter_id: UUID) -> DeadLetter:
    letter = await tx.find(LOCK_DEAD_LETTER, {"id": dead_letter_id}, into=DeadLetter)
    if letter is None:
        raise DeadLetterNotFound
    if letter.status != "parked":
        raise DeadLetterResolved(f"It was {letter.status} by {letter.resolved_by}.")
    return letter


async def _resolve(tx: Tx, dead_letter_id: UUID, status: str, by: str, note: str | None) -> None:
    await tx.execute(RESOLVE, {"id": dead_letter_id, "status": status, "by": by, "note": note, "now": tx.now})
