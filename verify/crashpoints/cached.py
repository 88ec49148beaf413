"""What Redis is for, struck: views read, written and fenced; hints on their way to the WebSocket servers.

What comes of it is compared as for every step; and whoever looks at home, before or after, is shown the student's
present version.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import psycopg

from caravan.apps.subscriptions import subscribe
from caravan.db.wake import CHANNEL, EVERYTHING, Wake
from caravan.eventlog.consumer import Consumer
from caravan.eventlog.subscription import Subscription
from caravan.eventlog.workers import Worker
from verify.crashpoints.points import points
from verify.crashpoints.stage import Case, Stage
from verify.crashpoints.steps import Refused, Step, Turn

HEARD_SECONDS_MAX = 5.0
HEAD = "select coalesce(max(seq), 0)::int as seq from student_feed_heads where student_id = %(student)s"


@dataclass(slots=True)
class Look(Step):
    """Home is asked for twice: made and put into Redis, then shown from there."""

    async def act(self, stage: Stage, case: Case) -> bool:
        if stage.redis is None:
            with points.paused():
                await stage.open_redis()
        with points.paused():
            [head] = await stage.world.rows(HEAD, student=case.student)
        for _ in range(2):
            answer = await stage.ask("GET", f"/api/v1/students/{case.student}/home")
            if answer.status >= 500:
                return False
            if answer.status != 200 or answer.body["version"] != head["seq"]:
                raise Refused(f"home answered {answer.status} {answer.body}, the feed ends at {head['seq']}")
        return True


@dataclass(slots=True)
class Fence(Turn):
    """A batch of the cache-worker, with a Redis."""

    stage: Stage | None = None

    async def restart(self, stage: Stage) -> None:
        self.stage = stage
        if stage.redis is None:
            with points.paused():
                await stage.open_redis()
        subscription = self._subscription()
        worker = Worker(subscription.service, self.group, "verify", f"verify/{self.group}")
        self.consumer = Consumer(stage.db, subscription, worker, page_events_max=self.page)
        await self.consumer.enter()

    def _subscription(self) -> Subscription:
        assert self.stage is not None
        [ours] = [each for each in subscribe(views=self.stage.app.state.views) if each.group == self.group]
        return ours

    def _moved(self, db: Any) -> None:
        """In a forked child, whose connection to Redis is its own."""
        assert self.consumer is not None
        self.consumer.db = db
        self.consumer.subscription = self._subscription()


@dataclass(slots=True)
class Publish(Step):
    """Two hints about a student, over Redis and by a NOTIFY. Whatever happened to the first, the second is heard."""

    async def act(self, stage: Stage, case: Case) -> bool:
        if stage.redis is None:
            with points.paused():
                await stage.open_redis()
        wake = Wake(stage.scratch.url, stage.redis)
        try:
            with points.paused():
                listening = await psycopg.AsyncConnection.connect(stage.scratch.url, autocommit=True)
                await listening.execute(f"listen {CHANNEL}".encode())
            async with listening:
                await wake.start(listen=False)
                for _hint in ("struck, perhaps", "the next one"):
                    wake.send([str(case.student)])
                    heard = await _hears(listening, str(case.student))
                if not heard:
                    case.know["wrong"] = "no hint was heard any more"
                return heard
        finally:
            await wake.stop()


async def _hears(listening: psycopg.AsyncConnection[Any], key: str) -> bool:
    async for note in listening.notifies(timeout=HEARD_SECONDS_MAX):
        if not {key, EVERYTHING}.isdisjoint(note.payload.split()):
            return True
    return False
