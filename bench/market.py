"""A marketplace to measure in: cities, trainers, courses, students, and captured payments that wait to be delivered.

Everything is drawn from a seed, ids included, so two databases of one seed and one day are alike; the rows are what the
product's own operations leave (tests/speed holds them against each other), written by COPY because there are many.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import psycopg
from psycopg.types.json import Jsonb

from caravan.calendar import format_slot
from caravan.eventlog.codec import encode_data
from caravan.eventlog.outbox import partition_of
from caravan.events import PurchaseConfirmed
from caravan.people.availability import Rule, open_ranges

TRAINERS_PER_CITY_MIN = 100
CITY_KM = 9.0
COURSES_TAUGHT = 3
KNOWN_DAYS = 400
TIERS = (10, 20, 30)
HOURS = range(6, 22)  # slots begin at these hours, of the student's clock
STARTS_IN_DAYS = (3, 60)
HOME_SHARE = 0.4
STUDENTS_PER_PAYMENT = 0.8  # some buy a second course
REACHING_MIN = 8  # a lesson at home is bought where so many come whom no other home needs at that hour
EPOCH_MS = 1_750_000_000_000  # ids are drawn, not timed: only their order matters


@dataclass(frozen=True, slots=True)
class City:
    name: str
    zone: str
    latitude: float
    longitude: float


CITIES = (
    City("Bengaluru", "Asia/Kolkata", 12.9716, 77.5946),
    City("Delhi", "Asia/Kolkata", 28.6139, 77.2090),
    City("Mumbai", "Asia/Kolkata", 19.0760, 72.8777),
    City("Pune", "Asia/Kolkata", 18.5204, 73.8567),
    City("Chennai", "Asia/Kolkata", 13.0827, 80.2707),
    City("Hyderabad", "Asia/Kolkata", 17.3850, 78.4867),
    City("Kolkata", "Asia/Kolkata", 22.5726, 88.3639),
    City("Jaipur", "Asia/Kolkata", 26.9124, 75.7873),
    City("Dubai", "Asia/Dubai", 25.2048, 55.2708),
    City("Singapore", "Asia/Singapore", 1.3521, 103.8198),
    City("London", "Europe/London", 51.5074, -0.1278),
    City("New York", "America/New_York", 40.7128, -74.0060),
)
# When trainers work, on every day, and how many of them in ten.
WORKING_HOURS = ((time(5), time(23), 4), (time(6), time(22), 4), (time(6), time(14), 1), (time(13), time(22), 1))
MODES = ((["home", "online"], 7), (["online"], 2), (["home"], 1))
EVERY_DAY = [1, 2, 3, 4, 5, 6, 7]
PATTERNS = (EVERY_DAY, EVERY_DAY, EVERY_DAY, [1, 3, 5], [1, 2, 3, 4, 5])


@dataclass(frozen=True, slots=True)
class Course:
    id: UUID
    minutes: int
    weekdays: list[int]


@dataclass(frozen=True, slots=True)
class Sale:
    """One captured payment that waits: its ids and terms, drawn."""

    payment_id: UUID
    checkout_id: UUID
    event_id: UUID
    student_id: UUID
    city: City
    course: Course
    sessions: int
    mode: str
    hour: int
    start: date


class Ids:
    """UUIDs of version 7, in order, the same for the same seed; another `kind` never meets them."""

    def __init__(self, dice: random.Random, kind: int, seed: int) -> None:
        self._dice = dice
        self._next = (EPOCH_MS + kind * 10**9 + seed % 1000 * 10**6) << 12

    def __call__(self) -> UUID:
        self._next += 1
        millis, counter = self._next >> 12, self._next & 0xFFF
        return UUID(int=(millis << 80) | (7 << 76) | (counter << 64) | (0b10 << 62) | self._dice.getrandbits(62))


async def build_market(url: str, *, trainers: int, courses: int = 20, seed: int = 1) -> None:
    """Courses, and trainers in cities who teach three of them each, at home or online, with their open hours."""
    dice = random.Random(f"market {seed}")
    ids = Ids(dice, 1, seed)
    now = datetime.now(UTC)
    taught = [Course(ids(), 60 if n % 4 else 45, PATTERNS[n % len(PATTERNS)]) for n in range(courses)]
    cities = _cities(trainers)
    async with await psycopg.AsyncConnection.connect(url) as connection:
        await _copy(
            connection,
            "courses (id, title, category, session_minutes, weekdays, learning_modes, group_sizes)",
            [
                (course.id, f"Course {n}", "STEM", course.minutes, course.weekdays, ["online", "home"], [1])
                for n, course in enumerate(taught)
            ],
        )
        await _copy(
            connection,
            "course_tiers (course_id, sessions, group_size, amount_cents, currency)",
            [(course.id, tier, 1, tier * 12_000, "INR") for course in taught for tier in TIERS],
        )
        people = [(ids(), number, cities[number % len(cities)]) for number in range(trainers)]
        hours = [_draw(dice, [(opens, closes) for opens, closes, _ in WORKING_HOURS], WORKING_HOURS) for _ in people]
        await _copy(
            connection,
            "trainers (id, name, timezone, latitude, longitude, radius_km, modes)",
            (
                (id_, f"Trainer {n}", city.zone, *_near(dice, city), round(dice.uniform(10, 25), 1),
                 _draw(dice, [modes for modes, _ in MODES], MODES))
                for id_, n, city in people
            ),
        )  # fmt: skip
        await _copy(
            connection,
            "trainer_courses (trainer_id, course_id)",
            (
                (id_, course.id)
                for id_, _, _ in people
                for course in dice.sample(taught, min(COURSES_TAUGHT, len(taught)))
            ),
        )
        await _copy(
            connection,
            "trainer_availability (id, trainer_id, weekday, from_time, until_time, valid_from, valid_until)",
            (
                (ids(), person[0], rule.weekday, rule.from_time, rule.until_time, rule.valid_from, rule.valid_until)
                for person, opened in zip(people, hours, strict=True)
                for rule in _rules(opened, now.date())
            ),
        )
        await _write_open_time(connection, [(id_, city.zone) for id_, _, city in people], hours, now)
    await analyze(url)


# Open hours are alike for all who keep the same hours in the same zone: worked out once for those.
INSERT_OPEN_TIME = """
insert into trainer_time (trainer_id, open, computed_at)
select o.trainer_id, s.open, %(now)s
from unnest(%(trainers)b::uuid[], %(shapes)b::int[]) o(trainer_id, shape)
join (select shape, range_agg(tstzrange(begins, ends)) as open
      from unnest(%(of)b::int[], %(begins)b::timestamptz[], %(ends)b::timestamptz[]) r(shape, begins, ends)
      group by shape) s using (shape)
"""


async def _write_open_time(
    connection: psycopg.AsyncConnection[Any],
    people: Sequence[tuple[UUID, str]],
    hours: Sequence[tuple[time, time]],
    now: datetime,
) -> None:
    kept_by = [(zone, *kept) for (_, zone), kept in zip(people, hours, strict=True)]
    shapes = {shape: number for number, shape in enumerate(sorted(set(kept_by)))}
    opened = [
        (number, begins, ends)
        for (zone, opens, closes), number in shapes.items()
        for begins, ends in open_ranges(_rules((opens, closes), now.date()), ZoneInfo(zone), now)
    ]
    await connection.execute(
        INSERT_OPEN_TIME,
        {
            "trainers": [id_ for id_, _ in people],
            "shapes": [shapes[shape] for shape in kept_by],
            "of": [number for number, _, _ in opened],
            "begins": [begins for _, begins, _ in opened],
            "ends": [ends for _, _, ends in opened],
            "now": now,
        },
    )


def _rules(hours: tuple[time, time], today: date) -> list[Rule]:
    until = today + timedelta(days=KNOWN_DAYS)
    return [Rule(weekday, *hours, today - timedelta(days=1), until) for weekday in EVERY_DAY]


# ------------------------------------------------------------------ payments

READ_COURSES = "select id, session_minutes, weekdays from courses order by id"
# Who comes to homes: their courses, place, how far they go, and between which hours.
READ_VISITORS = """
select t.latitude, t.longitude, t.radius_km, array_agg(distinct c.course_id), extract(hour from min(a.from_time))::int,
  extract(hour from max(a.until_time))::int
from trainers t join trainer_courses c on c.trainer_id = t.id join trainer_availability a on a.trainer_id = t.id
where 'home' = any(t.modes) group by t.id order by t.id
"""
COUNT_TRAINERS = "select count(*) from trainers"


@dataclass(frozen=True, slots=True)
class Visitor:
    """A trainer who comes to homes. Places in degrees."""

    latitude: float
    longitude: float
    radius_km: float
    opens: int
    closes: int

    def reaches(self, place: tuple[float, float], hour: int) -> bool:
        north = (place[0] - self.latitude) * 111.2
        east = (place[1] - self.longitude) * 111.2 * math.cos(math.radians(self.latitude))
        return self.opens <= hour < self.closes and math.hypot(north, east) < 0.98 * self.radius_km


async def add_captured_payments(url: str, n: int, seed: int = 1) -> list[UUID]:
    """n payments as `capture` leaves them: the checkout paid, the payment succeeded, the row in the register, and
    PURCHASE_CONFIRMED on the log and on the student's feed; the ids, in the order of the log.

    Tiers, modes, hours and starts are mixed; a student who buys twice does so at different hours. Demand stays within
    what the trainers can hold, so all of it can be delivered.
    """
    dice = random.Random(f"payments {seed}")
    ids = Ids(dice, 2, seed)
    now = datetime.now(UTC)
    async with await psycopg.AsyncConnection.connect(url) as connection:
        courses = [Course(*row) for row in await (await connection.execute(READ_COURSES)).fetchall()]
        counted = await (await connection.execute(COUNT_TRAINERS)).fetchone()
        assert counted is not None
        assert courses, "build_market comes first"
        visitors: dict[UUID, list[Visitor]] = {}
        for latitude, longitude, radius, taught, *hours in await (await connection.execute(READ_VISITORS)).fetchall():
            for course in taught:
                visitors.setdefault(course, []).append(Visitor(latitude, longitude, radius, *hours))
        students = _draw_students(dice, ids, _cities(counted[0]), n)
        sales = _draw_sales(dice, ids, students, courses, visitors, counted[0], n, now.date())
        await _copy(
            connection,
            "students (id, name, timezone, latitude, longitude)",
            ((s.id, f"Student {number}", s.city.zone, *s.place) for number, s in enumerate(students)),
        )
        traces = [f"00-{dice.getrandbits(128):032x}-{dice.getrandbits(64):016x}-01" for _ in sales]
        await _write_money(connection, sales, traces, now)
        await _write_events(connection, sales, traces, now)
    await analyze(url)
    return [sale.payment_id for sale in sales]


@dataclass(frozen=True, slots=True)
class Student:
    id: UUID
    city: City
    place: tuple[float, float]


def _draw_students(dice: random.Random, ids: Ids, cities: Sequence[City], payments: int) -> list[Student]:
    count = max(1, math.ceil(payments * STUDENTS_PER_PAYMENT))
    return [Student(ids(), city, _near(dice, city)) for city in (cities[k % len(cities)] for k in range(count))]


def _draw_sales(
    dice: random.Random,
    ids: Ids,
    students: Sequence[Student],
    courses: Sequence[Course],
    visitors: Mapping[UUID, Sequence[Visitor]],
    trainers: int,
    n: int,
    today: date,
) -> list[Sale]:
    # At one hour one course is asked for at most so often in one city: half of who teaches it there.
    often_max = max(1, trainers * COURSES_TAUGHT // len(courses) // len(_cities(trainers)) // 2)
    asked: Counter[tuple[City, UUID, int]] = Counter()
    taken: set[tuple[UUID, int]] = set()
    needed: set[tuple[Visitor, int]] = set()
    sales: list[Sale] = []
    for k in range(n):
        student = students[k % len(students)]
        while True:
            course, hour = dice.choice(courses), dice.choice(HOURS)
            full = asked[student.city, course.id, hour] >= often_max
            if (student.id, hour) not in taken and (not full or dice.random() < 0.02):
                break
        asked[student.city, course.id, hour] += 1
        taken.add((student.id, hour))
        home = dice.random() < HOME_SHARE and _is_reached(
            dice, visitors.get(course.id, ()), student.place, hour, needed
        )
        sales.append(
            Sale(
                payment_id=ids(),
                checkout_id=ids(),
                event_id=ids(),
                student_id=student.id,
                city=student.city,
                course=course,
                sessions=dice.choice(TIERS),
                mode="home" if home else "online",
                hour=hour,
                start=today + timedelta(days=dice.randint(*STARTS_IN_DAYS)),
            )
        )
    dice.shuffle(sales)
    return sales


def _is_reached(
    dice: random.Random,
    visitors: Sequence[Visitor],
    place: tuple[float, float],
    hour: int,
    needed: set[tuple[Visitor, int]],
) -> bool:
    """Whether enough trainers come here who are not needed elsewhere at that hour; one of them is needed here then.

    Looks around from anywhere in the list, as it may be long.
    """
    first = dice.randrange(len(visitors) or 1)
    reaching: list[Visitor] = []
    for k in range(len(visitors)):
        visitor = visitors[(first + k) % len(visitors)]
        if visitor.reaches(place, hour) and (visitor, hour) not in needed:
            reaching.append(visitor)
        if len(reaching) == REACHING_MIN:
            needed.add((dice.choice(reaching), hour))
            return True
    return False


def _cities(trainers: int) -> Sequence[City]:
    return CITIES[: max(1, min(len(CITIES), trainers // TRAINERS_PER_CITY_MIN))]


async def _write_money(
    connection: psycopg.AsyncConnection[Any], sales: Sequence[Sale], traces: Sequence[str], now: datetime
) -> None:
    await _copy(
        connection,
        "checkouts (id, student_id, course_id, sessions, price_cents, currency, session_minutes, weekdays,"
        " learning_mode, group_size, timezone, slot_start, start_date, raw, created_at, expires_at, paid_by)",
        (
            (s.checkout_id, s.student_id, s.course.id, s.sessions, s.sessions * 12_000, "INR", s.course.minutes,
             s.course.weekdays, s.mode, 1, s.city.zone, time(s.hour), s.start, Jsonb(_raw(s)), now,
             now + timedelta(minutes=30), s.payment_id)
            for s in sales
        ),
    )  # fmt: skip
    await _copy(
        connection,
        "payments (id, checkout_id, student_id, provider, status, amount_cents, currency, captured_cents,"
        " captured_currency, captured_at, metadata, traceparent, created_at, updated_at)",
        (
            (s.payment_id, s.checkout_id, s.student_id, "sandbox", "succeeded", s.sessions * 12_000, "INR",
             s.sessions * 12_000, "INR", now, Jsonb(_metadata(s)), trace, now, now)
            for s, trace in zip(sales, traces, strict=True)
        ),
    )  # fmt: skip
    await _copy(
        connection,
        "undelivered (payment_id, student_id, course_id, amount_cents, currency, since)",
        ((s.payment_id, s.student_id, s.course.id, s.sessions * 12_000, "INR", now) for s in sales),
    )


def _raw(sale: Sale) -> dict[str, Any]:
    return {
        "studentId": str(sale.student_id),
        "courseId": str(sale.course.id),
        "sessionCount": sale.sessions,
        "learningMode": sale.mode,
        "groupSize": 1,
        "timeSlot": format_slot(time(sale.hour)),
        "startDate": sale.start.isoformat(),
    }


def _metadata(sale: Sale) -> dict[str, Any]:
    raw = _raw(sale)
    del raw["studentId"]
    return raw | {"cartItemId": None}


async def _write_events(
    connection: psycopg.AsyncConnection[Any], sales: Sequence[Sale], traces: Sequence[str], now: datetime
) -> None:
    said = [
        PurchaseConfirmed(
            payment_id=s.payment_id, student_id=s.student_id, course_id=s.course.id, checkout_id=s.checkout_id
        )
        for s in sales
    ]
    heads: Counter[UUID] = Counter()
    feed: list[tuple[Any, ...]] = []
    for sale, event in zip(sales, said, strict=True):
        heads[sale.student_id] += 1
        feed.append((sale.student_id, heads[sale.student_id], sale.event_id, event.type, encode_data(event), now))
    await _copy(connection, "student_feed_heads (student_id, seq)", heads.items())
    await _copy(connection, "student_feed (student_id, seq, event_id, type, data, created_at)", feed)
    await _copy(
        connection,
        "outbox (event_id, type, topic, source, subject, partition_key, partition, correlation_id, traceparent,"
        " data_version, data, occurred_at)",
        (
            (s.event_id, e.type, e.topic, "payment-service", e.subject, str(s.student_id),
             partition_of(str(s.student_id)), e.correlation_id, trace, e.version, encode_data(e), now)
            for s, e, trace in zip(sales, said, traces, strict=True)
        ),
    )  # fmt: skip


# ------------------------------------------------------------------ small things


async def analyze(url: str) -> None:
    """Let the planner know what is there, as autovacuum would after a minute."""
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
        await connection.execute("vacuum (analyze)")


async def _copy(connection: psycopg.AsyncConnection[Any], target: str, rows: Iterable[Sequence[Any]]) -> None:
    async with connection.cursor() as cursor, cursor.copy(f"copy {target} from stdin".encode()) as copy:
        for row in rows:
            await copy.write_row(row)


def _draw(dice: random.Random, what: Sequence[Any], weights: Sequence[tuple[Any, ...]]) -> Any:
    return dice.choices(what, [weight[-1] for weight in weights])[0]


def _near(dice: random.Random, city: City) -> tuple[float, float]:
    """A place in the city, evenly over the area."""
    km, angle = CITY_KM * math.sqrt(dice.random()), 2 * math.pi * dice.random()
    latitude = city.latitude + km * math.cos(angle) / 111.2
    return round(latitude, 5), round(
        city.longitude + km * math.sin(angle) / (111.2 * math.cos(math.radians(city.latitude))), 5
    )


__all__ = ["CITIES", "City", "Course", "Sale", "add_captured_payments", "analyze", "build_market"]
