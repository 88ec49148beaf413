"""What `caravan up --demo` puts into an empty database, and DIR/demo.json that says how to sign in.

Places are made up around Bengaluru by a seeded generator: nobody lives there. The ids that the incidents name (two
students, two courses, a trainer) are among them, for `caravan demo`.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import secrets
from dataclasses import dataclass
from datetime import date, time, timedelta
from typing import Any
from uuid import UUID

from caravan.apps.folder import DataFolder, write_private
from caravan.catalog.courses import Tier, create_course
from caravan.db import Database, Tx
from caravan.people.availability import Rule
from caravan.people.students import create_student, link_student
from caravan.people.trainers import create_trainer
from caravan.settings import Settings
from caravan.web.auth import Role, create_account, hash_password

SOURCE = "demo-data"
ROBOTICS = UUID("9e16d892-4324-4568-be60-163aa1665683")
ARTIFICIAL_INTELLIGENCE = UUID("ebefde63-8a3a-4d45-a594-c04275a03092")
SEED_TRAINER = UUID("3c9ec9a1-9129-405e-89ed-19e49660e584")
STUDENT_OF_AI = UUID("401ca863-4543-4b3e-9bc6-c8ad49a77a03")
STUDENT_OF_ROBOTICS = UUID("15b88b88-5403-48c7-a29f-77a3d5a8ee87")

CENTRE = (12.9716, 77.5946)  # of the city; nobody's home
SPREAD_KM = 9.0
TRAVEL_KM = 30.0  # so that every trainer reaches every student
TRAINERS = 40
AVAILABLE_DAYS = 3 * 365
OPENS, CLOSES = time(5), time(22)
EVERY_DAY = (1, 2, 3, 4, 5, 6, 7)


@dataclass(frozen=True, slots=True)
class CourseSeed:
    """`cents`: of one session, for one student."""

    title: str
    category: str
    cents: int
    minutes: int = 60
    weekdays: tuple[int, ...] = EVERY_DAY
    id: UUID | None = None


COURSES: tuple[CourseSeed, ...] = (
    CourseSeed("Robotics", "Technology", 12_000, id=ROBOTICS),
    CourseSeed("Artificial Intelligence", "Technology", 14_000, id=ARTIFICIAL_INTELLIGENCE),
    CourseSeed("Python for Beginners", "Technology", 9_000),
    CourseSeed("Web Design", "Technology", 9_500),
    CourseSeed("Game Development", "Technology", 11_000, weekdays=(6, 7)),
    CourseSeed("Electronics Workshop", "Technology", 12_500, weekdays=(1, 3, 5)),
    CourseSeed("Mathematics, Grade 8", "School", 7_500),
    CourseSeed("Mathematics, Grade 10", "School", 8_500),
    CourseSeed("Physics, Grade 10", "School", 8_500, weekdays=(1, 2, 3, 4, 5)),
    CourseSeed("Chemistry, Grade 10", "School", 8_500, weekdays=(1, 2, 3, 4, 5)),
    CourseSeed("Spoken English", "Languages", 6_000, minutes=45),
    CourseSeed("Kannada", "Languages", 6_000, minutes=45, weekdays=(2, 4, 6)),
    CourseSeed("Chess", "Arts and games", 5_000, minutes=45),
    CourseSeed("Guitar", "Arts and games", 7_000, weekdays=(6, 7)),
)
TIERS = (10, 20, 30)
GROUP_PRICES = {1: 100, 2: 160, 3: 200}  # per cent of the price for one: a group that the buyer brings
MODES = ("online", "home", "center")
NOWHERE, LATE, OFFLINE = "Student without a place", "Student of the late evening", "Student with a closed screen"


@dataclass(frozen=True, slots=True)
class AccountSeed:
    key: str
    name: str
    role: Role
    students: tuple[tuple[str, UUID | None, bool], ...] = ()  # name, id, has a place
    for_rehearsal: bool = False


# In the order of `students` in demo.json. The last three are for `caravan demo` alone: what a visitor buys must not
# stand in its way.
ACCOUNTS: tuple[AccountSeed, ...] = (
    AccountSeed("admin", "Anjali (admin)", Role.ADMIN),
    AccountSeed("support", "Suresh (support)", Role.SUPPORT),
    AccountSeed("trainer", "Tara (trainer)", Role.TRAINER),
    AccountSeed("asha", "Asha Rao", Role.STUDENT, (("Asha Rao", None, True),)),
    AccountSeed("meera", "Meera Iyer", Role.STUDENT, (("Rohan Iyer", None, True), ("Diya Iyer", None, True))),
    AccountSeed("farhan", "Farhan Khan", Role.STUDENT, (("Zoya Khan", None, True),)),
    AccountSeed("lakshmi", "Lakshmi Gowda", Role.STUDENT, (("Nikhil Gowda", None, False),)),
    AccountSeed("vikram", "Vikram Shetty", Role.STUDENT, (("Ananya Shetty", STUDENT_OF_ROBOTICS, True),), True),
    AccountSeed("priya", "Priya Nair", Role.STUDENT, (("Kabir Nair", STUDENT_OF_AI, True),), True),
    AccountSeed(
        "rehearsal",
        "Rehearsal",
        Role.STUDENT,
        ((NOWHERE, None, False), (LATE, None, True), (OFFLINE, None, True)),
        True,
    ),
)
TRAINER_NAMES = (
    "Aarav Bhat", "Aditi Hegde", "Akash Pillai", "Amrita Das", "Anand Kulkarni", "Bhavna Shah", "Chetan Murthy",
    "Deepa Menon", "Dev Prasad", "Esha Reddy", "Farida Ali", "Ganesh Naik", "Geeta Joshi", "Harish Kamath",
    "Indira Sen", "Irfan Sheikh", "Jaya Patil", "Kavya Rai", "Kiran Desai", "Latha Swamy", "Madhav Varma",
    "Maya Fernandes", "Mohan Acharya", "Nandini Ghosh", "Naveen Babu", "Neha Kapoor", "Omkar Salian", "Pooja Bose",
    "Prakash Rao", "Radha Krishnan", "Rahul Mehta", "Rekha Alva", "Sameer Mirza", "Shalini Thomas", "Sneha Pai",
    "Sunil Jain", "Tara Mathew", "Uday Holla", "Varsha Bhandari", "Yusuf Baig",
)  # fmt: skip

Passwords = dict[str, str]


class DemoRefused(Exception):
    """The demo cannot start here; the message says what to do."""


def email_of(key: str) -> str:
    return f"{key}@demo.caravan.example"


FIND_DEMO = "select id from accounts where lower(email) = %(email)s"
ANYTHING_THERE = "select exists (select from accounts) or exists (select from courses) or exists (select from payments)"


async def ensure_demo(db: Database, settings: Settings, url: str) -> None:
    """Fill an empty database, once; write DIR/demo.json again. Raises DemoRefused on somebody's real data."""
    folder = DataFolder(settings.data_dir)
    known = _read_passwords(folder)
    async with db.transaction(SOURCE, read_only=True) as tx:
        there = await tx.value(FIND_DEMO, {"email": email_of("admin")}) is not None
        if not there and await tx.value(ANYTHING_THERE):
            raise DemoRefused("This database has data of its own: leave out --demo, or choose another with --data.")
    passwords = {seed.key: known.get(seed.key) or secrets.token_urlsafe(12) for seed in ACCOUNTS}
    lost = [seed.key for seed in ACCOUNTS if seed.key not in known]
    hashes: dict[str, str] = {}
    if lost or not there:
        keys = [seed.key for seed in ACCOUNTS] if not there else lost
        hashes = dict(zip(keys, await asyncio.gather(*(hash_password(passwords[key]) for key in keys)), strict=True))

    async def work(tx: Tx) -> dict[str, Any]:
        if not there:
            await _fill(tx, hashes)
        elif hashes:  # demo.json was thrown away: nobody knows these passwords any more
            await _replace_passwords(tx, hashes)
        document = await _describe(tx, settings, url, passwords)
        write_private(folder.demo, json.dumps(document, indent=2) + "\n")  # before the commit: known, or not there
        return document

    await db.transact(work, SOURCE)


def _read_passwords(folder: DataFolder) -> Passwords:
    """Of an earlier run, by account; empty where there was none."""
    document = folder.read_demo()
    signed_in = [document.get(key, {}) for key in ("admin", "support", "trainer")]
    signed_in += document.get("students", []) + document.get("rehearsal", [])
    by_email = {each["email"]: each["password"] for each in signed_in if "password" in each}
    return {seed.key: by_email[email_of(seed.key)] for seed in ACCOUNTS if email_of(seed.key) in by_email}


REPLACE_PASSWORD = "update accounts set password_hash = %(password_hash)s where lower(email) = %(email)s"  # noqa: S105


async def _replace_passwords(tx: Tx, hashes: Passwords) -> None:
    for key, password_hash in hashes.items():
        await tx.execute(REPLACE_PASSWORD, {"email": email_of(key), "password_hash": password_hash})


# ------------------------------------------------------------------ what is there


async def _fill(tx: Tx, hashes: Passwords) -> None:
    places = random.Random(20260109)  # noqa: S311 - made-up places, the same on every machine
    courses = [await _add_course(tx, seed) for seed in COURSES]
    accounts = {
        seed.key: await create_account(
            tx, email=email_of(seed.key), name=seed.name, role=seed.role, password_hash=hashes[seed.key]
        )
        for seed in ACCOUNTS
    }
    for seed in ACCOUNTS:
        for name, student_id, has_place in seed.students:
            latitude, longitude = _somewhere(places) if has_place else (None, None)
            student = await create_student(tx, name=name, latitude=latitude, longitude=longitude, student_id=student_id)
            await link_student(tx, accounts[seed.key], student)
    for number, name in enumerate(TRAINER_NAMES[:TRAINERS]):
        await _add_trainer(tx, number, name, courses, accounts["trainer"], places)


async def _add_course(tx: Tx, seed: CourseSeed) -> UUID:
    tiers = [
        Tier(sessions, seed.cents * sessions * percent // 100, group_size=size)
        for size, percent in GROUP_PRICES.items()
        for sessions in TIERS
    ]
    return await create_course(
        tx,
        title=seed.title,
        category=seed.category,
        session_minutes=seed.minutes,
        tiers=tiers,
        weekdays=seed.weekdays,
        learning_modes=MODES,
        group_sizes=tuple(GROUP_PRICES),
        course_id=seed.id,
    )


async def _add_trainer(
    tx: Tx, number: int, name: str, courses: list[UUID], account_id: UUID, places: random.Random
) -> None:
    """The first two courses are taught by three in four, each of the others by about two in five."""
    taught = [course for course in courses[:2] if number % 4]
    taught += [course for at, course in enumerate(courses[2:]) if (number + at) % 12 in (0, 1, 2, 5, 8)]
    today = tx.now.date()
    latitude, longitude = _somewhere(places)
    await create_trainer(
        tx,
        name=name,
        course_ids=taught,
        rules=_rules(today),
        modes=MODES,
        latitude=latitude,
        longitude=longitude,
        radius_km=TRAVEL_KM,
        account_id=account_id if number == 1 else None,
        trainer_id=SEED_TRAINER if number == 1 else None,
    )


def _rules(today: date) -> list[Rule]:
    until = today + timedelta(days=AVAILABLE_DAYS)
    return [Rule(weekday, OPENS, CLOSES, today - timedelta(days=1), until) for weekday in EVERY_DAY]


def _somewhere(places: random.Random) -> tuple[float, float]:
    """A point within SPREAD_KM of the city's centre, evenly over the area."""
    km, angle = SPREAD_KM * math.sqrt(places.random()), 2 * math.pi * places.random()
    north, east = km * math.cos(angle), km * math.sin(angle)
    latitude = CENTRE[0] + north / 111.2
    return round(latitude, 5), round(CENTRE[1] + east / (111.2 * math.cos(math.radians(latitude))), 5)


# ------------------------------------------------------------------ demo.json

# Each account's students as they came to it: those that the demo made are the first, whatever they are called by now.
LIST_STUDENTS = """
select s.id, s.name, lower(a.email) as email
from account_students l join accounts a on a.id = l.account_id join students s on s.id = l.student_id
where lower(a.email) = any(%(emails)b::text[]) order by l.created_at, s.id
"""
# Those that the incidents name are the first; the others as they were made.
LIST_COURSES = """
select id, title from courses where retired_at is null
order by array_position(%(ids)b::uuid[], id), created_at, id
"""


async def _describe(tx: Tx, settings: Settings, url: str, passwords: Passwords) -> dict[str, Any]:
    families = [seed for seed in ACCOUNTS if seed.students]
    rows = await tx.all(LIST_STUDENTS, {"emails": [email_of(seed.key) for seed in families]})
    students: dict[bool, list[dict[str, str]]] = {True: [], False: []}
    for seed in families:
        theirs = [row for row in rows if row["email"] == email_of(seed.key)]
        for (part, _id, _place), row in zip(seed.students, theirs, strict=False):  # others may have joined the family
            name = part if seed.for_rehearsal else row["name"]  # `caravan demo` knows who plays a part by its name
            students[seed.for_rehearsal].append(
                {"id": str(row["id"]), "name": name, "email": row["email"], "password": passwords[seed.key]}
            )
    sign_in = {key: {"email": email_of(key), "password": passwords[key]} for key in ("admin", "support", "trainer")}
    rows = await tx.all(LIST_COURSES, {"ids": [seed.id for seed in COURSES if seed.id]})
    courses = [{"id": str(row["id"]), "title": row["title"]} for row in rows]
    return {
        "url": url,
        **sign_in,
        "students": students[False],
        "rehearsal": students[True],
        "courses": courses,
        "sandboxWebhookSecret": settings.sandbox_webhook_secret,
        "postgresUrl": settings.postgres_url,
    }
