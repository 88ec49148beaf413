"""What the sandbox remembers, as a real provider would: what it was asked for, what came, what went back.

A file beside the database, not in it: one JSON document per line, appended. It outlives the loss of the database,
and is what a restored one is made whole from. It knows no more of a family than ids.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from uuid import UUID

import msgspec
import structlog

from caravan.payments.model import Checkout, Payment

log: structlog.stdlib.BoundLogger = structlog.get_logger()


class Said(msgspec.Struct, frozen=True, tag_field="kind", tag="said"):
    """Money came or went back: the event that says so, as it was signed."""

    event_id: str
    type: str
    sent_at: datetime
    body: bytes
    payment_id: UUID
    amount_cents: int
    currency: str
    refund_id: str | None = None


class Asked(msgspec.Struct, frozen=True, tag_field="kind", tag="asked"):
    """What we asked for, with the terms that we handed over beside it."""

    payment: Payment
    checkout: Checkout


Line = Said | Asked
_decoder = msgspec.json.Decoder(Line)


class Books:
    """One file; several processes may append."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, line: Line) -> None:
        """Remember. A disk that is full costs the sandbox its memory, never anybody their payment."""
        text = msgspec.json.encode(line) + b"\n"
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            try:
                os.write(descriptor, text)
            finally:
                os.close(descriptor)
        except OSError as error:
            log.warning("the sandbox could not write its books", error=error.strerror)

    def read(self) -> Iterator[Line]:
        """Oldest first. A line that was cut off by a crash is left out."""
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            return
        with file:
            for text in file:
                try:
                    yield _decoder.decode(text)
                except msgspec.DecodeError:
                    log.warning("a line of the sandbox's books can't be read")
