from __future__ import annotations

from datetime import UTC, datetime

import pytest

from caravan.web.formats import counted, duration, money, when


@pytest.mark.parametrize(
    ("cents", "currency", "text"),
    [
        (0, "INR", "₹0"),
        (360_000, "INR", "₹3,600"),
        (99_999, "INR", "₹999.99"),
        (10_000_005, "INR", "₹1,00,000.05"),
        (1_234_567_800, "INR", "₹1,23,45,678"),
        (-360_000, "INR", "-₹3,600"),
        (123_456_789, "USD", "$1,234,567.89"),
        (100_000, "CHF", "CHF 1,000"),
    ],
)
def test_money(cents: int, currency: str, text: str) -> None:
    assert money(cents, currency) == text


def test_things_are_counted() -> None:
    assert [counted(number, "session") for number in (0, 1, 30)] == ["0 sessions", "1 session", "30 sessions"]


def test_times_name_their_zone() -> None:
    instant = datetime(2026, 1, 9, 0, 30, tzinfo=UTC)
    assert str(when(instant, "Asia/Kolkata")) == (
        '<time datetime="2026-01-09T06:00+05:30">Fri 9 Jan 2026, 6:00 AM IST</time>'
    )
    assert "12:30 AM UTC" in when(instant, "Nowhere/At_All")


def test_durations() -> None:
    assert [duration(s) for s in (5, 59, 60, 7200, 86400, 3 * 86400)] == [
        "5 s",
        "59 s",
        "1 min",
        "2 h",
        "24 h",
        "3 days",
    ]
