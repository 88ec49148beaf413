"""What people type into the console's forms; each reader raises for what it can't read."""

from __future__ import annotations

import re
from datetime import date
from typing import Final
from uuid import UUID

from caravan.admin.deps import MANY_MAX
from caravan.deliveries import Stage
from caravan.errors import Invalid
from caravan.ids import parse_uuid
from caravan.pauses import PAUSABLE, Scope

EVERY: Final = "*"  # all courses, or everywhere
CENTS: Final = re.compile(r"(\d{1,10})(?:\.(\d{2}))?")


class AmountUnreadable(Invalid):
    """An amount is written like 1200 or 1200.50."""

    code = "AMOUNT_UNREADABLE"


class SessionsUnreadable(Invalid):
    """Sessions are written as how many (2), or as their numbers (#29 #30)."""

    code = "SESSIONS_UNREADABLE"


class DateUnreadable(Invalid):
    """A date is written like 2026-01-09."""

    code = "DATE_UNREADABLE"


class PlaceUnreadable(Invalid):
    """A place is a latitude from -90 to 90 and a longitude from -180 to 180, such as 28.4595 and 77.0266."""

    code = "PLACE_UNREADABLE"


class CourseUnreadable(Invalid):
    """A course is named by its id."""

    code = "COURSE_UNREADABLE"


class StageUnreadable(Invalid):
    """Choose a stage: paid, purchased or allocated."""

    code = "STAGE_NOT_PAUSABLE"


class ScopeMissing(Invalid):
    """Say for which course and in which city; all courses and everywhere are choices too. Nothing was paused."""

    code = "SCOPE_REQUIRED"


class LimitUnreadable(Invalid):
    """How many at most is a number from 1 to 100."""

    code = "LIMIT_UNREADABLE"


def read_cents(text: str) -> int | None:
    """`1200` or `1,200.50` of the currency's unit; None for nothing."""
    text = text.strip().replace(",", "")
    if not text:
        return None
    match = CENTS.fullmatch(text)
    if match is None:
        raise AmountUnreadable
    return int(match[1]) * 100 + int(match[2] or 0)


def read_sessions(text: str) -> list[int] | int | None:
    """`2` is how many, `#29 #30` are which."""
    words = text.replace(",", " ").split()
    if not words:
        return None
    if len(words) == 1 and words[0].isascii() and words[0].isdecimal() and len(words[0]) <= 3:
        return int(words[0])
    if not all(re.fullmatch(r"#\d{1,3}", word, re.ASCII) for word in words):
        raise SessionsUnreadable
    return [int(word[1:]) for word in words]


def read_degrees(text: str, most: int) -> float:
    try:
        degrees = float(text.strip())
    except ValueError:
        raise PlaceUnreadable from None
    if not -most <= degrees <= most:  # NaN too
        raise PlaceUnreadable
    return degrees


def read_count(text: str) -> int | None:
    text = text.strip()
    if not text:
        return None
    if not re.fullmatch(r"\d{1,3}", text, re.ASCII) or not 1 <= int(text) <= 400:
        raise SessionsUnreadable("The number of sessions is between 1 and 400.")
    return int(text)


def read_date(text: str) -> date | None:
    text = text.strip()
    if not text:
        return None
    if not re.fullmatch(r"\d{4}-\d{2}-\d{2}", text, re.ASCII):
        raise DateUnreadable
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise DateUnreadable from None


def read_course(text: str) -> UUID | None:
    course = parse_uuid(text.strip()) if text.strip() else None
    if text.strip() and course is None:
        raise CourseUnreadable
    return course


def read_scope(stage: str, course_id: str, city: str) -> Scope:
    if stage not in PAUSABLE:
        raise StageUnreadable
    return Scope(Stage(stage), read_course(course_id), city.strip() or None)


def read_chosen_scope(stage: str, course_id: str, city: str) -> Scope:
    """What is to be paused: everything only where that was chosen (EVERY), not where a field was left empty."""
    course_id, city = course_id.strip(), city.strip()
    if not course_id or not city:
        raise ScopeMissing
    return read_scope(stage, "" if course_id == EVERY else course_id, "" if city == EVERY else city)


def read_limit(text: str) -> int:
    text = text.strip() or "10"
    if not (text.isascii() and text.isdecimal() and len(text) <= 3 and 1 <= int(text) <= MANY_MAX):
        raise LimitUnreadable
    return int(text)
