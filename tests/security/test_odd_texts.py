"""Texts that once came through as a bug of ours, where a refusal was promised. All were found by `verify/fuzz.py`."""

from __future__ import annotations

from uuid import UUID

import pytest

from caravan.eventlog.codec import Unreadable, decode_envelope
from caravan.realtime.protocol import FrameRefused, parse_resume
from caravan.web.auth import InvalidEmail, normalise_email

DEEP = "[" * 1500 + "]" * 1500


def test_a_frame_that_is_nested_too_deeply_is_refused() -> None:
    with pytest.raises(FrameRefused):
        parse_resume('{"type": "resume", "after": 1, "x": ' + DEEP + "}", [UUID(int=1)])


@pytest.mark.parametrize("document", ['{"x": ' + DEEP + "}", b'{"specversion": "\xff"}', '{"specversion": "\ud800"}'])
def test_an_envelope_that_cannot_be_text_is_unreadable(document: str | bytes) -> None:
    with pytest.raises(Unreadable):
        decode_envelope(document)


@pytest.mark.parametrize("email", ["as\ud800ha@example.com", "asha@exa\udfffmple.com"])
def test_half_a_surrogate_pair_is_no_e_mail_address(email: str) -> None:
    with pytest.raises(InvalidEmail):
        normalise_email(email)
