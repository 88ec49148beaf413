"""When a trainer works, as wall-clock rules, turned into instants. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from zoneinfo import ZoneInfo

HORIZON_DAYS = 400

_DAY = timedelta(days=1)
_MIDNIGHT = time(0)


@dataclass(frozen=True, slots=True)
class Rule:
    """Open on a weekday (ISO, Monday 1) from one wall-clock time until another, 00:00 being the end of the day; known
    from one date until another, both included."""

    weekday: int
    from_time: time
    until_time: time
    valid_from: date
    valid_until: date


def open_ranges(
    rules: Iterable[Rule], zone: ZoneInfo, now: datetime, horizon_days: int = HORIZON_DAYS
) -> list[tuple[datetime, datetime]]:
    """The instants (UTC; from, until) at which the rules are open: from yesterday to `horizon_days` after today.

    Ranges may touch and overlap. Where the clock jumps, wall times are read as `calendar` reads a session's start: a
    skipped one moves forward by the jump, one that comes twice means the first, a skipped date doesn't happen.
    """
    today = now.astimezone(zone).date()
    found: list[tuple[datetime, datetime]] = []
    for rule in rules:
        day = max(rule.valid_from, today - _DAY)
        last = min(rule.valid_until, today + horizon_days * _DAY)
        if day > last:
            continue
        day += (rule.weekday - day.isoweekday()) % 7 * _DAY
        while day <= last:
            begins = _instant(day, rule.from_time, zone)
            ends = _instant(day + _DAY if rule.until_time == _MIDNIGHT else day, rule.until_time, zone)
            if _happens(day, begins, zone) and begins < ends:
                found.append((begins, ends))
            day += 7 * _DAY
    return found


def _instant(day: date, wall: time, zone: ZoneInfo) -> datetime:
    return datetime.combine(day, wall, tzinfo=zone).astimezone(UTC)


def _happens(day: date, begins: datetime, zone: ZoneInfo) -> bool:
    """False for a date that the zone left out altogether (Apia, 30 December 2011)."""
    return begins.astimezone(zone).date() == day
