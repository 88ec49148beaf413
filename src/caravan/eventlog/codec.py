"""Events to CloudEvents and back. Strict when speaking, tolerant when listening."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

import msgspec

from caravan.events import BY_TYPE, Event

UNREADABLE = frozenset({"UNKNOWN_TYPE", "NEWER_VERSION", "MALFORMED"})


class Unreadable(Exception):
    """An event that this release cannot read: `code` says why. It is parked, never crashed on."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Envelope(msgspec.Struct, frozen=True, kw_only=True):
    """A CloudEvent 1.0 with our extensions; field names are the wire's."""

    id: UUID
    source: str
    type: str
    subject: str
    time: datetime
    data: dict[str, Any]
    correlationid: str | None = None
    causationid: UUID | None = None
    partitionkey: str
    traceparent: str | None = None
    dataversion: int = 1
    specversion: str = "1.0"

    def event(self) -> Event:
        """The typed event; raises Unreadable with UNKNOWN_TYPE, NEWER_VERSION or MALFORMED."""
        kind = BY_TYPE.get(self.type)
        if kind is None:
            raise Unreadable("UNKNOWN_TYPE", f"no such event type: {self.type}")
        if self.dataversion > kind.version:
            raise Unreadable("NEWER_VERSION", f"{self.type} version {self.dataversion}, known up to {kind.version}")
        try:
            return msgspec.convert(self.data, kind)
        except msgspec.ValidationError as error:
            raise Unreadable("MALFORMED", f"{self.type}: {error}") from None


def encode_data(event: Event) -> str:
    """The event's fields as a JSON object."""
    return msgspec.json.encode(event).decode()


def encode_envelope(envelope: Envelope) -> str:
    return msgspec.json.encode(envelope).decode()


def decode_envelope(document: str | bytes) -> Envelope:
    """Raises Unreadable(MALFORMED) for anything that is not an envelope."""
    try:
        return msgspec.json.decode(document, type=Envelope)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise Unreadable("MALFORMED", str(error)) from None
