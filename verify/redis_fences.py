"""Readers, a writer, the cache-worker and a flush, in every order that chance makes: what Redis holds never goes back.

A reader reads PostgreSQL, and puts what it has read later, or never; in between others change the student, fence, read
or flush. After each step what is held must not be older than what was put or fenced since the last flush, and whoever
asks is answered the present.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from uuid import UUID

from caravan.db import Database
from caravan.db.redis import Redis
from caravan.eventlog import outbox
from caravan.events import CourseAccessGranted
from caravan.ids import new_id
from caravan.people.students import create_student
from caravan.student_views.cache import Made, Shown, ViewCache, key_of
from caravan.student_views.handlers import invalidate_views
from caravan.student_views.routes import make_view
from tests.redis_server import RedisServer
from verify.report import PartResult

READERS = 3
STEPS = 14
# What happens next, and how often.
WEIGHTS = {"change": 4, "fence": 3, "read": 5, "put": 5, "ask": 4, "flush": 1}
UP_SECONDS = 10.0


@dataclass(slots=True)
class Play:
    """One student, and what is known of its views."""

    db: Database
    cache: ViewCache
    server: RedisServer
    student: UUID
    version: int = 0
    floor: int = -1  # what is held must not be older: the newest that was put or fenced since the last flush
    read: list[Made] = field(default_factory=list[Made])
    wrong: list[str] = field(default_factory=list[str])

    async def step(self, what: str, dice: random.Random) -> None:
        match what:
            case "change":
                await self._change()
            case "fence":
                await self._fence()
            case "read":
                async with self.db.transaction(read_only=True) as tx:
                    self.read.append(await make_view(tx, self.student, Shown.HOME))
                self.read = self.read[-READERS:]
            case "put" if self.read:
                made = self.read.pop(dice.randrange(len(self.read)))
                await self.cache._put(Shown.HOME, self.student, made, 0.0)  # pyright: ignore[reportPrivateUsage]
                self.floor = max(self.floor, made.head.version)
            case "ask":
                await self._ask()
            case "flush":
                self.server.flush()
                self.floor = -1
            case _:
                pass
        held = self.server.get(key_of(Shown.HOME, self.student))
        if held is not None and int(held.split()[0]) < self.floor:
            self.wrong.append(f"after {what} Redis holds {held[:60]!r}, and had {self.floor} before")

    async def _change(self) -> None:
        async with self.db.transaction("session-worker") as tx:
            outbox.append(tx, [self._event()])
        self.version += 1

    def _event(self) -> CourseAccessGranted:
        return CourseAccessGranted(payment_id=new_id(), student_id=self.student, course_id=None)

    async def _fence(self) -> None:
        """As the cache-worker does for a batch."""
        async with self.db.transaction("cache-worker") as tx:
            await invalidate_views(tx, [self._event()], self.cache)
        self.floor = max(self.floor, self.version)

    async def _ask(self) -> None:
        make = partial(make_view, student_id=self.student, shown=Shown.HOME)
        seen = json.loads(await self.cache.read(self.db, self.student, Shown.HOME, make))
        if seen["version"] != self.version:
            self.wrong.append(f"shown version {seen['version']}, the present is {self.version}")
        self.floor = max(self.floor, self.version)


async def play_fences(
    result: PartResult, db: Database, server: RedisServer, dice: random.Random, cases: int, *, case: str | None = None
) -> None:
    """`cases` plays of STEPS steps each, counted in `result`."""
    async with Redis(server.url) as redis:
        if not await redis.wait_until_up(UP_SECONDS):
            result.failed.append("no connection to Redis")
            return
        cache = ViewCache(redis)
        async with db.transaction("student-service") as tx:
            students = [await create_student(tx, name="Asha") for _ in range(cases)]
        for number, student in enumerate(students):
            play = Play(db, cache, server, student)
            steps = draw(dice)
            for what in steps:
                await play.step(what, dice)
                result.fired[f"fences {what}"] += 1
                if play.wrong:
                    result.violated(f"play {number}, {' '.join(steps)}: {play.wrong[0]}", case)
                    break
            result.cases += 1
            result.good += not play.wrong


def draw(dice: random.Random) -> Sequence[str]:
    return dice.choices(list(WEIGHTS), list(WEIGHTS.values()), k=STEPS)
