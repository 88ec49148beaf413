"""Wall-clock time turned into instants: slots, zones, weekday patterns, holidays.

Owns the one answer to "when do these N sessions begin?". A schedule is a wall-clock time and an IANA zone, never a
UTC time and seven days, so 6:00 AM stays 6:00 AM across daylight saving. Pure: the caller passes the present in, and
nothing here reads the clock, the database or the network (zone rules are read from the machine's or the tzdata
package's files, once per zone and process). Hears and says no events.

Where the clock jumps, one rule each:

- a wall time that does not exist (the clock skips it) moves forward by the length of the jump: 2:30 AM is held at 3:30;
- a wall time that comes twice means the first one;
- a date that a zone left out altogether (Apia, 30 December 2011) is skipped, and the series extends, as on a holiday.
"""

import re
from bisect import bisect_left
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from functools import cache, lru_cache
from typing import Final
from zoneinfo import ZoneInfo, available_timezones

from caravan.errors import Invalid

EVERY_DAY: Final = (1, 2, 3, 4, 5, 6, 7)
"""ISO weekdays, Monday 1 to Sunday 7, of a daily pattern."""

MAX_SLOT_CHARACTERS: Final = 40
MAX_SESSIONS: Final = 400
MAX_SESSION_MINUTES: Final = 12 * 60  # daily starts are never closer than that, whatever the clock does
MAX_SPAN_DAYS: Final = 10 * 366  # 400 weekly sessions take under eight years; the rest is room for holidays

_DAY: Final = timedelta(days=1)
_LEFT_OUT_DAYS: Final = 10  # more dates than any zone leaves out in ten years
_STRETCH_DAYS: Final = 64
_FAR_YEAR: Final = 9900  # the calendar ends with 9999
_DAY_MINUTES: Final = 24 * 60
_HALF_DAY_MINUTES: Final = 12 * 60


class InvalidSlot(Invalid):
    """The text is no time of day that can be booked, or names a length that the course does not have."""

    code = "INVALID_SLOT"


class InvalidSchedule(Invalid):
    """No dates can be made of this: unknown zone, no weekdays, an impossible number, or nothing but holidays."""

    code = "INVALID_SCHEDULE"


class StartInPast(InvalidSchedule):
    """The requested date is over in the student's zone."""

    code = "START_IN_PAST"


class StartTooSoon(InvalidSchedule):
    """The first session would begin before the notice period is over."""

    code = "START_TOO_SOON"


class StartTooFar(InvalidSchedule):
    """The requested date is further ahead than we plan."""

    code = "START_TOO_FAR"


# --- slots: what people write for a time of day ---


@dataclass(frozen=True, slots=True)
class Slot:
    """A time of day as somebody wrote it.

    `start`: naive wall-clock time, whole minutes. `minutes`: its length, given only if the text named an end.
    """

    start: time
    minutes: int | None = None


# Browsers' own formatters put narrow spaces before AM and a dash between times; they look the same to whoever pastes.
_TYPOGRAPHY: Final = str.maketrans({"\u00a0": " ", "\u2009": " ", "\u202f": " ", "\u2013": "-"})

_SLOT: Final = re.compile(
    r" *(?P<hour>[0-9]{1,2})(?::(?P<minute>[0-9]{2}))?(?: *(?P<half>[AP]M))?"
    r"(?: *(?P<dash>-) *(?P<end_hour>[0-9]{1,2})(?::(?P<end_minute>[0-9]{2}))?(?: *(?P<end_half>[AP]M))?)? *",
    re.IGNORECASE,
)


def parse_slot(text: str) -> Slot:
    """Read `6:00 AM`, `6am`, `06:00`, `18:00-19:00`, `6:00 AM - 7:00 AM` or `6-7 PM`; anything else: InvalidSlot.

    Without AM or PM the clock has 24 hours and is written `HH:MM`, so `6` and `6:00`, which people also write for the
    evening, are refused rather than guessed. Midnight as an end is the end of that day; a slot is 12 hours at most.
    In `6-7 PM` the start takes the half of the day that makes the slot shorter than 12 hours: never more than one.
    """
    found = _SLOT.fullmatch(text.translate(_TYPOGRAPHY)) if len(text) <= MAX_SLOT_CHARACTERS else None
    if found is None:
        raise _unreadable(text)
    hour, minute, half = found["hour"], found["minute"], found["half"]
    if found["dash"] is None:
        return Slot(_to_time(_to_minutes(text, hour, minute, half)))

    end_hour, end_minute, end_half = found["end_hour"], found["end_minute"], found["end_half"]
    if half and not end_half:
        raise InvalidSlot(f"The slot {text!r} names AM or PM for its start only: write it for the end too.")
    end = _end_to_minutes(text, end_hour, end_minute, end_half)
    if end_half and not half:
        if end_hour == "12" and hour != "12":  # so many mix up 12 AM and 12 PM that `11-12 AM` may be meant either way
            raise InvalidSlot(f"The slot {text!r} can be read in two ways: write AM or PM for its start too.")
        start = _start_sharing_half(text, hour, minute, end)
    else:
        start = _to_minutes(text, hour, minute, half)
    if not 0 < end - start <= MAX_SESSION_MINUTES:
        raise _wrong_end(text)
    return Slot(_to_time(start), end - start)


def format_slot(start: time) -> str:
    """Write a wall-clock time the one way we show and store it: `6:00 AM`."""
    return f"{(start.hour - 1) % 12 + 1}:{start.minute:02d} {'AM' if start.hour < 12 else 'PM'}"


def check_slot_length(slot: Slot, session_minutes: int) -> None:
    """Raise InvalidSlot if the slot names a length other than the course's `session_minutes`."""
    if slot.minutes is not None and slot.minutes != session_minutes:
        raise InvalidSlot(
            f"The slot from {format_slot(slot.start)} is {slot.minutes} minutes long, "
            f"but a session of this course takes {session_minutes}."
        )


def _unreadable(text: str) -> InvalidSlot:
    shown = text if len(text) <= MAX_SLOT_CHARACTERS else text[:MAX_SLOT_CHARACTERS] + "..."
    return InvalidSlot(f"{shown!r} is not a time of day: write it like 6:00 AM, 06:00 or 18:00-19:00.")


def _wrong_end(text: str) -> InvalidSlot:
    return InvalidSlot(f"The slot {text!r} must end after it begins, on the same day and within 12 hours.")


def _to_minutes(text: str, hour: str, minute: str | None, half: str | None) -> int:
    """Minutes since midnight, 0 to 1439, of one time on either clock."""
    hours, minutes = int(hour), int(minute or 0)
    if minutes > 59:
        raise _unreadable(text)
    if half:
        if not 1 <= hours <= 12:
            raise _unreadable(text)
        return hours % 12 * 60 + minutes + (_HALF_DAY_MINUTES if half.upper() == "PM" else 0)
    if minute is None or len(hour) != 2 or hours > 23:
        raise _unreadable(text)
    return hours * 60 + minutes


def _end_to_minutes(text: str, hour: str, minute: str | None, half: str | None) -> int:
    """Minutes since midnight, 1 to 1440, of a slot's end, where midnight is the end of the day."""
    if (hour, minute, half) == ("24", "00", None):
        return _DAY_MINUTES
    return _to_minutes(text, hour, minute, half) or _DAY_MINUTES


def _start_sharing_half(text: str, hour: str, minute: str | None, end: int) -> int:
    """The start of `6-7 PM`: of its two readings the one that is less than 12 hours before `end`."""
    for half in ("AM", "PM"):
        start = _to_minutes(text, hour, minute, half)
        if 0 < end - start < _HALF_DAY_MINUTES:
            return start
    raise _wrong_end(text)


def _to_time(minutes: int) -> time:
    return time(minutes // 60, minutes % 60)


# --- zones ---


@cache
def _zone_names() -> frozenset[str]:
    """Every name we accept, spelled as IANA does.

    Asking the list, not the file system, keeps out paths, other spellings on case-blind disks and the machine's own
    files. `localtime` would mean the server's zone, and `Factory` means that nobody has set one.
    """
    return frozenset(available_timezones()) - {"localtime", "posixrules", "Factory"}


@lru_cache(maxsize=1024)
def zone(name: str) -> ZoneInfo:
    """The rules of an IANA zone such as `Asia/Kolkata`; an unknown name is an InvalidSchedule."""
    if name not in _zone_names():
        raise InvalidSchedule(f"{name[:60]!r} is not a time zone we know: use an IANA name such as Asia/Kolkata.")
    return ZoneInfo(name)


def local_date(instant: datetime, zone_name: str) -> date:
    """The date that the calendar on the wall shows in `zone_name` at the aware `instant`."""
    if instant.tzinfo is None:  # astimezone would quietly take the server's zone
        raise TypeError("a naive datetime is no instant")
    return instant.astimezone(zone(zone_name)).date()


# --- patterns: which dates, at which instants ---


@dataclass(frozen=True, slots=True)
class Pattern:
    """When a purchase's sessions are held, as sold. Plain data: `session_starts` judges it.

    `start`: naive wall-clock time. `session_minutes`: length of one session, 1 to 720. `weekdays`: ISO, Monday 1 to
    Sunday 7. `zone_name`: IANA.
    """

    start: time
    session_minutes: int
    weekdays: tuple[int, ...]
    zone_name: str


def session_starts(
    pattern: Pattern, first_date: date, count: int, *, not_before: datetime, holidays: Collection[date] = ()
) -> list[datetime]:
    """The next `count` starts, in UTC, strictly increasing and at least 12 hours apart.

    They fall on the pattern's weekdays from `first_date` (in the pattern's zone) on. Holidays are skipped and extend
    the series. None begins sooner than the aware `not_before` (now and the notice period): a start that has gone by
    rolls forward, with the same slot and number. Pass `holidays` as a frozenset; anything else is copied on each call.

    Raises InvalidSchedule: unknown zone, no or wrong weekdays, `count` not in 1 to 400, a session length not in 1 to
    720 minutes, or fewer than `count` possible dates in ten years.
    """
    if not 1 <= count <= MAX_SESSIONS:
        raise InvalidSchedule(f"{count} sessions can't be scheduled: it must be 1 to {MAX_SESSIONS}.")
    if not 1 <= pattern.session_minutes <= MAX_SESSION_MINUTES:
        raise InvalidSchedule(f"A session can't take {pattern.session_minutes} minutes: 1 to {MAX_SESSION_MINUTES}.")
    # A session of the day before can, moved forward by a jump of the clock, begin on this date.
    earliest = local_date(not_before, pattern.zone_name) - _DAY
    day = max(first_date, earliest)
    while day < earliest + 2 * _DAY:  # the date after is later than not_before in any case
        begins = _start_on(day, pattern.start, pattern.zone_name)
        if begins is not None and begins >= not_before:
            break
        day += _DAY
    return list(_series(pattern.start, pattern.zone_name, tuple(pattern.weekdays), day, count, frozenset(holidays)))


def check_series(
    pattern: Pattern, first_date: date, count: int, *, not_before: datetime, holidays: Collection[date] = ()
) -> None:
    """Raise InvalidSchedule where `session_starts` would; a series that surely can be made is not made for it."""
    weekdays = set(pattern.weekdays)
    dates_at_least = MAX_SPAN_DAYS // 7 * len(weekdays) - len(holidays) - _LEFT_OUT_DAYS
    if (
        1 <= count <= min(MAX_SESSIONS, dates_at_least)
        and 1 <= pattern.session_minutes <= MAX_SESSION_MINUTES
        and weekdays <= set(EVERY_DAY)
        and first_date.year < _FAR_YEAR
    ):
        zone(pattern.zone_name)
    else:
        session_starts(pattern, first_date, count, not_before=not_before, holidays=holidays)


def check_requested_start(
    requested: date,
    pattern: Pattern,
    now: datetime,
    *,
    notice: timedelta,
    horizon_days: int = 90,
    holidays: Collection[date] = (),
) -> None:
    """Refuse a start date that nobody should be sold at `now` (aware).

    StartInPast: before today in the pattern's zone. StartTooFar: more than `horizon_days` after today. StartTooSoon:
    the first session on or after `requested` would begin before `now + notice`, be it hours ahead or earlier today.
    InvalidSchedule: unknown zone, no or wrong weekdays, nothing but holidays.
    """
    today = local_date(now, pattern.zone_name)
    if requested < today:
        raise StartInPast(f"The start date, {_spell_date(requested)}, is already over. Please choose a later one.")
    if (requested - today).days > horizon_days:
        raise StartTooFar(
            f"The start date, {_spell_date(requested)}, is too far ahead. "
            f"Please choose one within the next {horizon_days} days."
        )
    (begins,) = _series(pattern.start, pattern.zone_name, tuple(pattern.weekdays), requested, 1, frozenset(holidays))
    if begins < now + notice:
        held = begins.astimezone(zone(pattern.zone_name))
        raise StartTooSoon(
            f"The first session would be on {_spell_date(held.date())} at {format_slot(held.time())}. "
            f"Please choose a start at least {_spell_hours(notice)} from now."
        )


def _series(
    start: time, zone_name: str, weekdays: tuple[int, ...], first: date, count: int, holidays: frozenset[date]
) -> tuple[datetime, ...]:
    """`count` starts in UTC from the date `first` on."""
    if not weekdays or not set(weekdays) <= set(EVERY_DAY):
        raise InvalidSchedule("A schedule needs weekdays, from Monday (1) to Sunday (7).")
    begin, end = first.toordinal(), first.toordinal() + MAX_SPAN_DAYS
    starts: tuple[datetime, ...] = ()
    for stretch in range(begin // _STRETCH_DAYS, end // _STRETCH_DAYS + 1):
        days, instants = _stretch(start, zone_name, weekdays, stretch, holidays)
        starts += instants[bisect_left(days, begin) : bisect_left(days, end)]
        if len(starts) >= count:
            return starts[:count]
    raise InvalidSchedule(
        f"{count} session{'' if count == 1 else 's'} from {_spell_date(first)} can't be placed:"
        " too few of the dates are no holidays."
    )


@lru_cache(maxsize=1024)
def _stretch(
    start: time, zone_name: str, weekdays: tuple[int, ...], number: int, holidays: frozenset[date]
) -> tuple[list[int], tuple[datetime, ...]]:
    """The dates (ordinals) and starts of a pattern in one stretch of the calendar: the same for all purchases of a
    slot, whenever they begin."""
    days: list[int] = []
    starts: list[datetime] = []
    for ordinal in range(max(1, number * _STRETCH_DAYS), min((number + 1) * _STRETCH_DAYS, date.max.toordinal())):
        day = date.fromordinal(ordinal)
        if day.isoweekday() in weekdays and day not in holidays:
            begins = _start_on(day, start, zone_name)
            if begins is not None:
                days.append(ordinal)
                starts.append(begins)
    return days, tuple(starts)


def _start_on(day: date, start: time, zone_name: str) -> datetime | None:
    """The instant, in UTC, at which the slot begins on `day`; None if the zone left that date out."""
    wall = datetime.combine(day, start, zone(zone_name))
    # fold=0 is zoneinfo's "offset before the jump": in a gap that moves forward, in an overlap it takes the first.
    offset = wall.utcoffset()
    assert offset is not None
    instant = datetime.combine(day, start, UTC) - offset
    if wall.replace(fold=1).utcoffset() == offset:
        return instant  # no jump: the wall time exists, and once
    if instant.astimezone(wall.tzinfo).replace(tzinfo=None) - wall.replace(tzinfo=None) >= _DAY:
        return None  # held a whole day later it would fall on the next date's session
    return instant


def _spell_date(day: date) -> str:
    return f"{day:%A}, {day.day} {day:%B} {day.year}"


def _spell_hours(period: timedelta) -> str:
    hours = period / timedelta(hours=1)
    return "1 hour" if hours == 1 else f"{hours:g} hours"
