"""Where a page of sessions ended: opaque to whoever carries it back."""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

import msgspec

from caravan.errors import Invalid


class CursorInvalid(Invalid):
    """This cursor is not one that an answer of ours held."""

    code = "CURSOR_INVALID"


@dataclass(frozen=True, slots=True)
class Cursor:
    """The last session that was seen."""

    starts_at: datetime
    id: UUID

    def encode(self) -> str:
        text = msgspec.json.encode((self.starts_at, self.id))
        return base64.urlsafe_b64encode(text).decode().rstrip("=")

    @staticmethod
    def decode(text: str) -> Cursor:
        """Raises CursorInvalid."""
        try:
            padded = text.encode("ascii") + b"=" * (-len(text) % 4)
            starts_at, last_id = msgspec.json.decode(
                base64.b64decode(padded, altchars=b"-_", validate=True), type=tuple[datetime, UUID]
            )
        except (UnicodeError, binascii.Error, msgspec.DecodeError):
            raise CursorInvalid from None
        if starts_at.tzinfo is None:
            raise CursorInvalid
        return Cursor(starts_at, last_id)
