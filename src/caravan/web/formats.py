"""How money, numbers of things and instants are written for people. Pure."""

from __future__ import annotations

from datetime import UTC, date, datetime
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from markupsafe import Markup

SIGNS = {"INR": "₹", "USD": "$", "EUR": "€", "GBP": "£"}


def money(amount_cents: int, currency: str = "INR") -> str:
    """`₹3,600` or `₹1,23,456.50`: Indian grouping for rupees, thousands elsewhere; no decimals where there are none."""
    units, cents = divmod(abs(amount_cents), 100)
    digits = _group_indian(units) if currency == "INR" else f"{units:,}"
    sign = SIGNS.get(currency, f"{currency} ")
    return f"{'-' if amount_cents < 0 else ''}{sign}{digits}{f'.{cents:02d}' if cents else ''}"


def _group_indian(units: int) -> str:
    """Thousands, then pairs: 1,23,45,678."""
    head, tail = divmod(units, 1000)
    return f"{_pairs(head)},{tail:03d}" if head else str(tail)


def _pairs(number: int) -> str:
    head, tail = divmod(number, 100)
    return f"{_pairs(head)},{tail:02d}" if head else str(tail)


def counted(count: int, thing: str) -> str:
    """`1 session`, `30 sessions`."""
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"


def when(instant: datetime, zone_name: str = "UTC") -> Markup:
    """A `<time>`: `Fri 9 Jan 2026, 6:00 AM IST`, on the wall of `zone_name`."""
    try:
        local = instant.astimezone(ZoneInfo(zone_name))
    except (ZoneInfoNotFoundError, ValueError):
        local = instant.astimezone(UTC)
    hour = (local.hour - 1) % 12 + 1
    text = f"{day(local.date())}, {hour}:{local.minute:02d} {'AM' if local.hour < 12 else 'PM'} {local.tzname()}"
    return Markup('<time datetime="{}">{}</time>').format(local.isoformat(timespec="minutes"), text)


def day(value: date) -> str:
    """`Fri 9 Jan 2026`."""
    return f"{value:%a} {value.day} {value:%b} {value.year}"


def duration(seconds: float) -> str:
    """About how long: `40 s`, `12 min`, `3 h`, `5 days`."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size or (seconds >= size and unit != "days"):
            return f"{int(seconds // size)} {unit}"
    return f"{int(seconds)} s"
