"""Who did what by hand: one row per change, in the change's transaction. Owns audit_log (append only)."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from typing import Any
from uuid import UUID

import msgspec

from caravan.db import Tx
from caravan.errors import Invalid
from caravan.ids import new_id
from caravan.web.auth import Actor


class NoteRequired(Invalid):
    """Say why, in `note`: it is kept with the change."""

    code = "NOTE_REQUIRED"


class _Build:
    """The running build, on every row. Set once per process, where the settings are read."""

    name = metadata.version("caravan")


def use_build(build: str) -> None:
    _Build.name = build


def require_note(note: str | None) -> str:
    """The note, trimmed; raises NoteRequired where it says nothing."""
    note = (note or "").strip()
    if not note:
        raise NoteRequired
    return note


INSERT_AUDIT = """
insert into audit_log (id, at, actor, account_id, action, subject_type, subject_id, note, before, after, build)
values (%(id)s, %(now)s, %(actor)s, %(account_id)s, %(action)s, %(subject_type)s, %(subject_id)s, %(note)s,
        %(before)s::jsonb, %(after)s::jsonb, %(build)s)
"""


async def record(
    tx: Tx,
    actor: Actor,
    *,
    action: str,
    subject_type: str,
    subject_id: UUID | str,
    note: str | None,
    before: Mapping[str, Any] | None = None,
    after: Mapping[str, Any] | None = None,
) -> None:
    """Keep a change. `before` and `after` hold what changed, never coordinates or secrets."""
    await tx.execute(
        INSERT_AUDIT,
        {
            "id": new_id(),
            "now": tx.now,
            "actor": actor.name,
            "account_id": actor.account_id,
            "action": action,
            "subject_type": subject_type,
            "subject_id": str(subject_id),
            "note": note,
            "before": _json(before),
            "after": _json(after),
            "build": _Build.name,
        },
    )


async def record_for_family(tx: Tx, actor: Actor, *, action: str, subject_type: str, subject_id: UUID | str) -> None:
    """Keep what staff did in a family's place, by a route that families use themselves; a family's own acts are in the
    rows they made. No note is asked for: the row of the subject says what was done."""
    if actor.reach == "any":
        await record(tx, actor, action=action, subject_type=subject_type, subject_id=subject_id, note=None)


def _json(value: Mapping[str, Any] | None) -> str | None:
    return None if value is None else msgspec.json.encode(value).decode()
