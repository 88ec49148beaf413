"""Wall-clock rules as instants, also where the clock jumps."""

from __future__ import annotations

from datetime import UTC, date, datetime, time, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caravan.people.availability import Rule, open_ranges

NOW = datetime(2026, 1, 5, 12, tzinfo=UTC)  # a Monday
KOLKATA = ZoneInfo("Asia/Kolkata")
NEW_YORK = ZoneInfo("America/New_York")


def a_rule(weekday: int = 1, since: str = "06:00", until: str = "22:00", first: str = "", last: str = "") -> Rule:
    return Rule(
        weekday,
        time.fromisoformat(since),
        time.fromisoformat(until),
        date.fromisoformat(first or "2020-01-01"),
        date.fromisoformat(last or "2030-12-31"),
    )


def utc(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def test_a_week_on_the_wall_of_the_zone() -> None:
    found = open_ranges([a_rule(2)], KOLKATA, NOW, horizon_days=10)
    assert found == [
        (utc("2026-01-06T00:30"), utc("2026-01-06T16:30")),
        (utc("2026-01-13T00:30"), utc("2026-01-13T16:30")),
    ]


def test_known_dates_only_both_included() -> None:
    found = open_ranges([a_rule(2, first="2026-01-13", last="2026-01-20")], KOLKATA, NOW)
    assert [begins.astimezone(KOLKATA).date().day for begins, _ in found] == [13, 20]
    assert open_ranges([a_rule(first="2019-01-01", last="2020-01-01")], KOLKATA, NOW) == []
    assert open_ranges([a_rule(first="9999-12-31", last="9999-12-31")], KOLKATA, NOW) == []
    assert open_ranges([], KOLKATA, NOW) == []


def test_midnight_is_the_end_of_the_day() -> None:
    found = open_ranges([a_rule(1, "20:00", "00:00"), a_rule(2, "00:00", "02:00")], KOLKATA, NOW, horizon_days=1)
    assert [ends - begins for begins, ends in found] == [timedelta(hours=4), timedelta(hours=2)]
    assert found[0][1] == found[1][0]  # they touch, so a lesson over midnight fits


@pytest.mark.parametrize(
    ("since", "until", "begins", "hours"),
    [
        ("06:00", "10:00", "2026-03-08T10:00", 4),  # after the jump: summer's offset
        ("01:00", "04:00", "2026-03-08T06:00", 2),  # over the jump
        ("02:30", "04:00", "2026-03-08T07:30", 0.5),  # 2:30 doesn't exist: 3:30
    ],
)
def test_spring_in_new_york(since: str, until: str, begins: str, hours: float) -> None:
    rule = a_rule(7, since, until, "2026-03-08", "2026-03-08")
    assert open_ranges([rule], NEW_YORK, NOW) == [(utc(begins), utc(begins) + timedelta(hours=hours))]


def test_an_hour_that_is_skipped_whole_moves_on_and_one_that_turns_round_is_dropped() -> None:
    def on_the_day(since: str, until: str) -> list[tuple[datetime, datetime]]:
        return open_ranges([a_rule(7, since, until, "2026-03-08", "2026-03-08")], NEW_YORK, NOW)

    assert on_the_day("02:00", "03:00") == []
    assert on_the_day("02:45", "03:15") == []
    assert on_the_day("02:15", "02:45") == [(utc("2026-03-08T07:15"), utc("2026-03-08T07:45"))]


def test_autumn_in_new_york() -> None:
    rule = a_rule(7, "01:30", "06:00", "2026-11-01", "2026-11-01")
    # 1:30 comes twice: the first, so the wall's four and a half hours are five and a half.
    assert open_ranges([rule], NEW_YORK, NOW) == [(utc("2026-11-01T05:30"), utc("2026-11-01T11:00"))]


def test_a_date_that_never_was() -> None:
    apia = ZoneInfo("Pacific/Apia")
    now = datetime(2011, 12, 28, tzinfo=UTC)
    friday = a_rule(5, "06:00", "10:00", "2011-12-30", "2011-12-30")
    assert open_ranges([friday], apia, now) == []


zones = st.sampled_from(
    ["Asia/Kolkata", "America/New_York", "Europe/London", "Australia/Lord_Howe", "Africa/Casablanca"]
)


@given(
    zone=zones.map(ZoneInfo),
    weekday=st.integers(1, 7),
    times=st.tuples(st.times(), st.times()).map(sorted).filter(lambda pair: pair[0] < pair[1]),
    now=st.datetimes(datetime(2024, 1, 1), datetime(2029, 1, 1), timezones=st.just(UTC)),
)
def test_every_range_is_on_its_weekday_and_goes_forward(
    zone: ZoneInfo, weekday: int, times: list[time], now: datetime
) -> None:
    rule = Rule(weekday, times[0], times[1], date.min, date.max)
    found = open_ranges([rule], zone, now)
    assert 50 <= len(found) <= 59
    for begins, ends in found:
        assert begins < ends
        assert begins.astimezone(zone).isoweekday() == weekday
        assert ends <= now + timedelta(days=403)
