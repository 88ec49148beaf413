"""Slots, zones and patterns: examples, and the rules that hold for every zone, date and text."""

from collections.abc import Callable
from datetime import UTC, date, datetime, time, timedelta
from itertools import pairwise
from zoneinfo import ZoneInfo, available_timezones

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from caravan import calendar
from caravan.calendar import (
    EVERY_DAY,
    InvalidSchedule,
    InvalidSlot,
    Pattern,
    Slot,
    StartInPast,
    StartTooFar,
    StartTooSoon,
    check_requested_start,
    check_series,
    check_slot_length,
    format_slot,
    local_date,
    parse_slot,
    session_starts,
    zone,
)

DAY = timedelta(days=1)
LONG_AGO = datetime(1980, 1, 1, tzinfo=UTC)
NOTICE = timedelta(hours=12)


def daily(start: str, zone_name: str, weekdays: tuple[int, ...] = EVERY_DAY) -> Pattern:
    return Pattern(parse_slot(start).start, 60, weekdays, zone_name)


def walls(starts: list[datetime], zone_name: str) -> list[str]:
    return [f"{start.astimezone(ZoneInfo(zone_name)):%m-%d %H:%M}" for start in starts]


# --- slots ---


@pytest.mark.parametrize(
    ("text", "start", "minutes"),
    [
        ("6:00 AM", "06:00", None),
        ("6 AM", "06:00", None),
        ("6am", "06:00", None),
        ("6:00am", "06:00", None),
        ("06:00 AM", "06:00", None),
        ("06:00", "06:00", None),
        ("18:00", "18:00", None),
        ("00:00", "00:00", None),
        ("23:59", "23:59", None),
        ("12 AM", "00:00", None),
        ("12:30 am", "00:30", None),
        ("12 PM", "12:00", None),
        ("12:30 PM", "12:30", None),
        ("11:59 PM", "23:59", None),
        ("  6:00   AM  ", "06:00", None),
        ("6:00\u202fAM", "06:00", None),  # as browsers format it
        ("6:00\u00a0AM", "06:00", None),
        ("6:00\u2009\u2013\u20097:00\u202fPM", "18:00", 60),
        ("18:00-19:00", "18:00", 60),
        ("18:00 - 19:30", "18:00", 90),
        ("6:00 AM - 7:00 AM", "06:00", 60),
        ("6:00 AM-7:00 AM", "06:00", 60),
        ("11 AM - 1 PM", "11:00", 120),
        ("6 AM - 6 PM", "06:00", 720),
        ("6-7 PM", "18:00", 60),
        ("6:30-7 PM", "18:30", 30),
        ("06:00-07:00 PM", "18:00", 60),
        ("6-7am", "06:00", 60),
        ("11-1 PM", "11:00", 120),
        ("12-12:30 PM", "12:00", 30),
        ("11 AM - 12 PM", "11:00", 60),
        ("12-1 PM", "12:00", 60),
        ("12-1 AM", "00:00", 60),
        ("23:00-24:00", "23:00", 60),  # midnight ends the day
        ("23:00-00:00", "23:00", 60),
        ("11 PM - 12 AM", "23:00", 60),
    ],
)
def test_reads_the_ways_people_write_a_slot(text: str, start: str, minutes: int | None):
    assert parse_slot(text) == Slot(time.fromisoformat(start), minutes)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "6",
        "18",
        "6:00",  # morning or evening?
        "9:30",
        "25:00",
        "24:00",
        "06:60",
        "6:60 AM",
        "6:5 AM",
        "13 PM",
        "0 AM",
        "00:30 AM",
        "18:00 PM",
        "006:00",
        "06:00:00",
        "0600",
        "-6 AM",
        "6.00 AM",
        "AM",
        "6 M",
        "6 AMPM",
        "noon",
        "06:00-",
        "-07:00",
        "6-7",
        "6:00-7:00",
        "06:00-07:00-08:00",
        "06:00 07:00",
        "18:00-18:00",
        "19:00-18:00",
        "00:00-00:00",
        "24:00-24:00",
        "23:00-24:01",
        "23:00-24:00 PM",
        "23:00-01:00",
        "7 PM - 6 PM",
        "12 AM - 12 AM",
        "6 AM - 12 AM",  # noon was meant
        "06:00-18:01",
        "6-6 PM",
        "11-1 AM",
        "11-12 AM",  # many mix up 12 AM and 12 PM
        "11-12 PM",
        "6 PM - 7",
        "6 PM - 19:00",
        "18:00 - 7 PM",
        "6 AM\n",
        "6\tAM",
        "6 AM\x00",
        "\u0666:\u0660\u0660 AM",  # Arabic-Indic digits
        "\uff10\uff16:\uff10\uff10",  # full-width digits
        "\u00b2 AM",
        "6 \u0410M",  # Cyrillic A
        "06:00" + " " * 36,
        "6" * 100_000,
    ],
)
def test_refuses_what_is_no_slot(text: str):
    with pytest.raises(InvalidSlot) as refused:
        parse_slot(text)
    assert refused.value.code == "INVALID_SLOT"
    assert len(str(refused.value)) < 250


@given(
    st.one_of(
        st.text(max_size=60),
        st.text("0123456789:-aApPmM \u202f\u2013", max_size=24),
        st.from_regex(r"\A[0-9]{1,2}(:[0-9]{2})? ?([ap]m)?(-[0-9]{1,2}(:[0-9]{2})? ?([ap]m)?)?\Z"),
    )
)
def test_any_text_is_a_slot_or_an_invalid_slot(text: str):
    try:
        slot = parse_slot(text)
    except InvalidSlot:
        return
    assert slot.start.tzinfo is None
    assert slot.minutes is None or 0 < slot.minutes <= 24 * 60 - slot.start.hour * 60 - slot.start.minute
    assert parse_slot(format_slot(slot.start)).start == slot.start


def test_every_minute_of_the_day_survives_writing_and_reading():
    for minute in range(24 * 60):
        start = time(minute // 60, minute % 60)
        assert parse_slot(format_slot(start)) == parse_slot(f"{start:%H:%M}") == Slot(start)
    assert [format_slot(time(*t)) for t in [(6, 0), (0, 5), (12, 0), (23, 59)]] == [
        "6:00 AM",
        "12:05 AM",
        "12:00 PM",
        "11:59 PM",
    ]


def test_the_named_length_must_be_the_courses():
    check_slot_length(parse_slot("18:00-19:00"), 60)
    check_slot_length(parse_slot("18:00"), 45)
    for minutes in (45, 90):
        with pytest.raises(InvalidSlot, match="from 6:00 PM is 60 minutes long"):
            check_slot_length(parse_slot("18:00-19:00"), minutes)


# --- zones ---


@pytest.mark.parametrize(
    "name",
    [
        "",
        " ",
        "Mars/Olympus",
        "asia/kolkata",
        "ASIA/KOLKATA",
        "Asia/Kolkata ",
        "Asia/Kolkata\n",
        "Asia/Kolkata\x00",
        "Asia",
        "Asia/",
        "../zoneinfo/Asia/Kolkata",
        "Asia/../Asia/Kolkata",
        "/usr/share/zoneinfo/Asia/Kolkata",
        "posix/Asia/Kolkata",
        "right/Asia/Kolkata",  # counts leap seconds: 27 s off
        "localtime",
        "posixrules",
        "Factory",
        "tzdata.zi",
        "+05:30",
        "A" * 100_000,
        "\ud800",
    ],
)
def test_refuses_what_is_no_zone(name: str):
    with pytest.raises(InvalidSchedule) as refused:
        zone(name)
    assert refused.value.code == "INVALID_SCHEDULE"
    assert len(str(refused.value)) < 400


def test_knows_zones_and_the_date_in_them():
    assert zone("Asia/Kolkata") is zone("Asia/Kolkata")
    assert zone("UTC").key == "UTC"
    instant = datetime(2026, 1, 9, 19, 0, tzinfo=UTC)
    assert local_date(instant, "Asia/Kolkata") == date(2026, 1, 10)
    assert local_date(instant, "America/New_York") == date(2026, 1, 9)
    with pytest.raises(TypeError):
        local_date(datetime(2026, 1, 9), "UTC")


# --- series ---


def test_thirty_sessions_at_six_in_kolkata():
    pattern = daily("6:00 AM", "Asia/Kolkata")
    starts = session_starts(pattern, date(2026, 1, 9), 30, not_before=datetime(2026, 1, 8, tzinfo=UTC))
    assert starts == [datetime(2026, 1, 9, 0, 30, tzinfo=UTC) + n * DAY for n in range(30)]
    assert all(start.tzinfo is UTC for start in starts)


def test_weekdays_and_holidays_skip_and_extend():
    pattern = daily("18:00", "Europe/Berlin", (1, 3, 5))
    holidays = {date(2026, 1, 9), date(2026, 1, 10), date(2026, 1, 14)}
    starts = session_starts(pattern, date(2026, 1, 8), 4, not_before=LONG_AGO, holidays=holidays)
    assert walls(starts, "Europe/Berlin") == ["01-12 18:00", "01-16 18:00", "01-19 18:00", "01-21 18:00"]


def test_a_start_that_has_gone_by_rolls_forward_with_slot_and_number():
    pattern = daily("6:00 AM", "Asia/Kolkata")
    on_time = datetime(2026, 2, 1, 0, 30, tzinfo=UTC)  # 6:00 AM
    kept = session_starts(pattern, date(2026, 1, 9), 30, not_before=on_time)
    rolled = session_starts(pattern, date(2026, 1, 9), 30, not_before=on_time + timedelta(microseconds=1))
    assert (kept[0], len(kept)) == (on_time, 30)
    assert (rolled[0], len(rolled)) == (on_time + DAY, 30)


@pytest.mark.parametrize(
    ("zone_name", "slot", "first", "expected"),
    [
        # the clock skips 2 to 3, and 3 comes before 4 on the day that it does
        ("Europe/Berlin", "02:30", "2026-03-28", ["03-28 02:30", "03-29 03:30", "03-30 02:30"]),
        ("Europe/Berlin", "06:00", "2026-03-28", ["03-28 06:00", "03-29 06:00", "03-30 06:00"]),
        ("America/New_York", "02:00", "2026-03-07", ["03-07 02:00", "03-08 03:00", "03-09 02:00"]),
        ("Australia/Lord_Howe", "02:15", "2026-10-03", ["10-03 02:15", "10-04 02:45", "10-05 02:15"]),
        ("Asia/Kolkata", "02:30", "2026-03-28", ["03-28 02:30", "03-29 02:30", "03-30 02:30"]),
        # midnight itself is skipped
        ("America/Sao_Paulo", "00:00", "2018-11-03", ["11-03 00:00", "11-04 01:00", "11-05 00:00"]),
        ("Asia/Beirut", "00:30", "2022-03-26", ["03-26 00:30", "03-27 01:30", "03-28 00:30"]),
        # the hour before midnight is skipped: held in the next day's first hour
        ("America/Nuuk", "23:30", "2024-03-29", ["03-29 23:30", "03-31 00:30", "03-31 23:30"]),
        # a whole date is skipped
        ("Pacific/Apia", "06:00", "2011-12-29", ["12-29 06:00", "12-31 06:00", "01-01 06:00"]),
        ("Pacific/Apia", "06:00", "2011-12-30", ["12-31 06:00", "01-01 06:00", "01-02 06:00"]),
        ("Pacific/Apia", "00:00", "2011-12-29", ["12-29 00:00", "12-31 00:00", "01-01 00:00"]),
    ],
)
def test_where_the_clock_jumps_forward(zone_name: str, slot: str, first: str, expected: list[str]):
    starts = session_starts(daily(slot, zone_name), date.fromisoformat(first), 3, not_before=LONG_AGO)
    assert walls(starts, zone_name) == expected


@pytest.mark.parametrize(
    ("zone_name", "slot", "day", "expected_utc"),
    [
        ("Europe/Berlin", "02:30", "2026-10-25", "2026-10-25T00:30"),  # 02:30 comes again at 01:30 UTC
        ("America/New_York", "01:30", "2026-11-01", "2026-11-01T05:30"),
        ("Australia/Lord_Howe", "01:45", "2026-04-05", "2026-04-04T14:45"),
        ("Asia/Kolkata", "01:30", "2026-10-25", "2026-10-24T20:00"),
    ],
)
def test_a_time_that_comes_twice_means_the_first(zone_name: str, slot: str, day: str, expected_utc: str):
    (start,) = session_starts(daily(slot, zone_name), date.fromisoformat(day), 1, not_before=LONG_AGO)
    assert start == datetime.fromisoformat(expected_utc).replace(tzinfo=UTC)


def test_a_start_moved_past_midnight_is_still_found_when_rolling():
    # 23:30 of the 30th doesn't exist in Nuuk and is held on the 31st at 0:30, where "today" already is the 31st.
    just_before = datetime(2024, 3, 31, 0, 10, tzinfo=ZoneInfo("America/Nuuk"))
    starts = session_starts(daily("23:30", "America/Nuuk"), date(2024, 1, 1), 2, not_before=just_before)
    assert walls(starts, "America/Nuuk") == ["03-31 00:30", "03-31 23:30"]


@pytest.mark.parametrize(
    ("pattern", "first", "count", "holidays"),
    [
        (daily("06:00", "UTC", ()), date(2026, 1, 9), 1, ()),
        (daily("06:00", "UTC", (0, 1)), date(2026, 1, 9), 1, ()),
        (daily("06:00", "UTC", (8,)), date(2026, 1, 9), 1, ()),
        (daily("06:00", "Nowhere/Atall"), date(2026, 1, 9), 1, ()),
        (Pattern(time(6), 0, EVERY_DAY, "UTC"), date(2026, 1, 9), 1, ()),
        (Pattern(time(6), 721, EVERY_DAY, "UTC"), date(2026, 1, 9), 1, ()),
        (daily("06:00", "UTC"), date(2026, 1, 9), 0, ()),
        (daily("06:00", "UTC"), date(2026, 1, 9), -1, ()),
        (daily("06:00", "UTC"), date(2026, 1, 9), 401, ()),
        (daily("06:00", "UTC"), date(2026, 1, 9), 1, {date(2026, 1, 1) + n * DAY for n in range(5000)}),
        (daily("06:00", "UTC"), date.max, 1, ()),
        (daily("06:00", "UTC"), date.max - 10 * DAY, 30, ()),
    ],
)
def test_refuses_what_has_no_dates(pattern: Pattern, first: date, count: int, holidays: set[date]):
    with pytest.raises(InvalidSchedule):
        session_starts(pattern, first, count, not_before=LONG_AGO, holidays=holidays)
    with pytest.raises(InvalidSchedule):
        check_series(pattern, first, count, not_before=LONG_AGO, holidays=holidays)


@pytest.mark.parametrize("count", [30, 400])
@pytest.mark.parametrize("weekdays", [(7,), (1, 3, 5), EVERY_DAY])
@pytest.mark.parametrize("holidays_per_year", [0, 12, 300, 364])
def test_what_can_be_made_is_judged_as_if_it_were_made(count: int, weekdays: tuple[int, ...], holidays_per_year: int):
    pattern, first = daily("06:00", "Asia/Kolkata", weekdays), date(2026, 1, 9)
    holidays = {date(year, 1, 1) + n * DAY for year in range(2026, 2037) for n in range(holidays_per_year)}

    def possible(judge: Callable[..., object]) -> bool:
        try:
            judge(pattern, first, count, not_before=LONG_AGO, holidays=holidays)
        except InvalidSchedule:
            return False
        return True

    assert possible(check_series) == possible(session_starts)


def test_the_longest_weekly_package_fits_and_the_earliest_date_costs_nothing():
    starts = session_starts(daily("06:00", "UTC", (7,)), date.min, 400, not_before=datetime(2026, 1, 9, tzinfo=UTC))
    assert starts == [datetime(2026, 1, 11, 6, tzinfo=UTC) + n * 7 * DAY for n in range(400)]


ZONE_NAMES = sorted(available_timezones() - {"localtime", "posixrules", "Factory"})
SLOTS = st.times(max_value=time(23, 59)).map(lambda t: t.replace(second=0, microsecond=0))
DATES = st.dates(date(2005, 1, 1), date(2035, 12, 31))


@given(
    pattern=st.builds(
        Pattern,
        start=SLOTS,
        session_minutes=st.integers(1, 720),
        weekdays=st.sets(st.integers(1, 7), min_size=1).map(lambda days: tuple(sorted(days))),
        zone_name=st.sampled_from(ZONE_NAMES),
    ),
    first=DATES,
    count=st.integers(1, 60),
    not_before=st.datetimes(datetime(2005, 1, 1), datetime(2035, 12, 31), timezones=st.just(UTC)),
    offsets=st.frozensets(st.integers(-3, 60), max_size=20),
    sooner=st.integers(1, 800),
)
@example(  # a request made while the only sessions ahead lie around the skipped date
    pattern=Pattern(time(6), 60, EVERY_DAY, "Pacific/Apia"),
    first=date(2011, 12, 1),
    count=5,
    not_before=datetime(2011, 12, 29, 17, tzinfo=UTC),
    offsets=frozenset(),
    sooner=1,
)
def test_every_series_keeps_its_promises(
    pattern: Pattern, first: date, count: int, not_before: datetime, offsets: frozenset[int], sooner: int
):
    today = local_date(not_before, pattern.zone_name)
    holidays = frozenset(max(first, today) + n * DAY for n in offsets)
    starts = session_starts(pattern, first, count, not_before=not_before, holidays=holidays)

    assert len(starts) == count
    assert all(start.tzinfo is UTC for start in starts)
    assert starts[0] >= not_before
    assert all(later - earlier >= NOTICE for earlier, later in pairwise(starts))

    # The plain way to say it: look at each date of the calendar in turn.
    rules = ZoneInfo(pattern.zone_name)
    expected: list[datetime] = []
    day = first if first > today - 3 * DAY else today - 3 * DAY
    while len(expected) < count:
        wall = datetime.combine(day, pattern.start)
        begins = wall.replace(tzinfo=rules).astimezone(UTC)
        shift = begins.astimezone(rules).replace(tzinfo=None) - wall
        assert shift >= timedelta(0)
        if day.isoweekday() in pattern.weekdays and day not in holidays and begins >= not_before and shift < DAY:
            expected.append(begins)
        day += DAY
    assert starts == expected

    # However long ago the requested date was, what is left is the same.
    if first <= today - 3 * DAY:
        again = session_starts(pattern, first - sooner * DAY, count, not_before=not_before, holidays=holidays)
        assert again == starts


def test_every_change_of_every_clock_in_2026_and_2027():
    changes = 0
    for zone_name in ZONE_NAMES:
        rules = ZoneInfo(zone_name)
        for changed_on in clock_changes(rules, date(2026, 1, 1), date(2027, 12, 31)):
            changes += 1
            for slot in (time(0, 0), time(2, 15), time(23, 45)):
                pattern = Pattern(slot, 60, EVERY_DAY, zone_name)
                starts = session_starts(pattern, changed_on - 2 * DAY, 5, not_before=LONG_AGO)
                for day, start in zip((changed_on + n * DAY for n in range(-2, 3)), starts, strict=True):
                    wall, held = datetime.combine(day, slot), start.astimezone(rules)
                    before, after = (wall.replace(tzinfo=rules, fold=fold).utcoffset() for fold in (0, 1))
                    assert before is not None
                    assert after is not None
                    in_gap = after > before
                    assert held.replace(tzinfo=None) == wall + (after - before if in_gap else timedelta(0))
                    assert held.fold == 0
                assert starts == sorted(set(starts))
    assert changes > 400, "the machine's zone rules say nothing about daylight saving"


def clock_changes(rules: ZoneInfo, first: date, last: date) -> list[date]:
    """The dates (UTC) on which a zone's offset changes."""
    midnights = [datetime.combine(first, time(), tzinfo=UTC) + n * DAY for n in range((last - first).days + 2)]
    offsets = [midnight.astimezone(rules).utcoffset() for midnight in midnights]
    return [midnights[n].date() for n in range(len(offsets) - 1) if offsets[n] != offsets[n + 1]]


def test_callers_cannot_spoil_the_series_of_others():
    pattern = daily("6:00 AM", "Asia/Kolkata")
    session_starts(pattern, date(2026, 1, 9), 3, not_before=LONG_AGO).clear()
    assert len(session_starts(pattern, date(2026, 1, 9), 3, not_before=LONG_AGO)) == 3


def test_purchases_of_one_slot_share_a_series_at_different_instants():
    calendar._stretch.cache_clear()
    pattern = daily("6:00 AM", "Asia/Kolkata")
    for second in range(50):
        now = datetime(2026, 1, 5, 12, 0, second, tzinfo=UTC)
        session_starts(pattern, date(2026, 1, 9 + second % 20), 30, not_before=now)
    assert calendar._stretch.cache_info().misses <= 2


def test_a_series_is_the_same_wherever_it_begins():
    """Series are cut from stretches that purchases share; here one begins on each day of two of them."""
    pattern = Pattern(time(2, 30), 60, (1, 3, 6), "Europe/Berlin")
    holidays = frozenset({date(2026, 3, 28), date(2026, 5, 13)})
    whole = session_starts(pattern, date(2026, 1, 1), 150, not_before=LONG_AGO, holidays=holidays)
    for first in (date(2026, 1, 1) + n * DAY for n in range(130)):
        later = [start for start in whole if start.astimezone(ZoneInfo("Europe/Berlin")).date() >= first]
        assert session_starts(pattern, first, 40, not_before=LONG_AGO, holidays=holidays) == later[:40]


# --- what checkout refuses ---

NOW = datetime(2026, 1, 9, 6, 0, tzinfo=UTC)  # 11:30 AM on a Friday in Kolkata


@pytest.mark.parametrize(
    ("requested", "slot", "refusal"),
    [
        ("2026-01-08", "6:00 PM", StartInPast),
        ("0001-01-01", "6:00 PM", StartInPast),
        ("2026-01-09", "6:00 AM", StartTooSoon),  # this morning
        ("2026-01-09", "6:00 PM", StartTooSoon),
        ("2026-01-09", "11:29 PM", StartTooSoon),
        ("2026-01-09", "11:30 PM", None),
        ("2026-01-10", "6:00 AM", None),
        ("2026-04-09", "6:00 AM", None),  # 90 days
        ("2026-04-10", "6:00 AM", StartTooFar),
        ("9999-12-31", "6:00 AM", StartTooFar),
    ],
)
def test_refuses_starts_that_are_past_too_soon_or_too_far(
    requested: str, slot: str, refusal: type[InvalidSchedule] | None
):
    pattern = daily(slot, "Asia/Kolkata")
    if refusal is None:
        check_requested_start(date.fromisoformat(requested), pattern, NOW, notice=NOTICE)
        return
    with pytest.raises(refusal) as refused:
        check_requested_start(date.fromisoformat(requested), pattern, NOW, notice=NOTICE)
    assert type(refused.value) is refusal


def test_today_is_the_students_today():
    late = datetime(2026, 1, 9, 20, 0, tzinfo=UTC)  # the 10th in Kolkata, the 9th in New York
    check_requested_start(date(2026, 1, 9), daily("11 PM", "America/New_York"), late, notice=timedelta(hours=1))
    with pytest.raises(StartInPast):
        check_requested_start(date(2026, 1, 9), daily("11 PM", "Asia/Kolkata"), late, notice=timedelta(hours=1))


def test_the_first_session_counts_not_the_requested_date():
    check_requested_start(date(2026, 1, 9), daily("6:00 AM", "Asia/Kolkata", (6,)), NOW, notice=NOTICE)
    holidays = frozenset({date(2026, 1, 9)})
    check_requested_start(date(2026, 1, 9), daily("6:00 AM", "Asia/Kolkata"), NOW, notice=NOTICE, holidays=holidays)


@pytest.mark.parametrize("zone_name", ["Pacific/Kiritimati", "Etc/GMT+12", "Asia/Kolkata"])
@pytest.mark.parametrize("slot", ["12:00 AM", "11:59 PM"])
def test_an_accepted_start_is_the_one_that_is_scheduled(zone_name: str, slot: str):
    pattern, tomorrow = daily(slot, zone_name), local_date(NOW, zone_name) + 2 * DAY
    check_requested_start(tomorrow, pattern, NOW, notice=NOTICE)
    (start,) = session_starts(pattern, tomorrow, 1, not_before=NOW + NOTICE)
    assert local_date(start, zone_name) == tomorrow


def test_refusals_speak_to_parents_and_carry_codes():
    pattern = daily("6:00 AM", "Asia/Kolkata")
    with pytest.raises(StartTooSoon) as too_soon:
        check_requested_start(date(2026, 1, 9), pattern, NOW, notice=NOTICE)
    assert str(too_soon.value) == (
        "The first session would be on Friday, 9 January 2026 at 6:00 AM. "
        "Please choose a start at least 12 hours from now."
    )
    assert [e.code for e in (StartInPast, StartTooSoon, StartTooFar)] == [
        "START_IN_PAST",
        "START_TOO_SOON",
        "START_TOO_FAR",
    ]
