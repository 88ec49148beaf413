"""The buttons of the event log: parked events, and who carries it. As admin/money."""

from __future__ import annotations

from collections.abc import Mapping
from uuid import UUID

from caravan.db import Tx
from caravan.eventlog import carrier as carriers
from caravan.eventlog import dead_letters
from caravan.eventlog.carrier import Carrier
from caravan.eventlog.dead_letters import DeadLetter
from caravan.eventlog.subscription import Subscription
from caravan.fulfilment import repair as repairs
from caravan.web import audit
from caravan.web.audit import require_note
from caravan.web.auth import Actor


async def replay(
    tx: Tx, actor: Actor, dead_letter_id: UUID, note: str | None, *, subscriptions: Mapping[str, Subscription]
) -> DeadLetter:
    """Run a parked event once more. Raises ReplayFailed and what dead_letters does."""
    note = require_note(note)
    letter = await repairs.replay(tx, dead_letter_id, subscriptions, by=actor.name, note=note)
    return await _resolved(tx, actor, "replay", letter, note)


async def discard(tx: Tx, actor: Actor, dead_letter_id: UUID, note: str | None) -> DeadLetter:
    """Give a parked event up for good."""
    note = require_note(note)
    letter = await dead_letters.discard(tx, dead_letter_id, by=actor.name, note=note)
    return await _resolved(tx, actor, "discard", letter, note)


async def fail_over(tx: Tx, actor: Actor, carrier: Carrier, note: str | None) -> bool:
    """Have the workers take their events from `carrier`; False where they do already. Raises NoKafka."""
    note = require_note(note)
    before = (await carriers.get_carrier(tx)).carrier
    switched = await carriers.switch_carrier(tx, carrier)
    if switched:
        await audit.record(
            tx,
            actor,
            action="failover",
            subject_type="event log",
            subject_id="event-log",
            note=note,
            before={"carrier": before},
            after={"carrier": carrier},
        )
    return switched


async def _resolved(tx: Tx, actor: Actor, action: str, letter: DeadLetter, note: str) -> DeadLetter:
    now = await dead_letters.get_dead_letter(tx, letter.id)
    await audit.record(
        tx,
        actor,
        action=action,
        subject_type="dead letter",
        subject_id=letter.id,
        note=note,
        before={"status": letter.status, "eventId": letter.event_id, "group": letter.consumer_group},
        after={"status": now.status},
    )
    return now
