"""Redis killed, flushed, frozen, cut and filled up while sockets are open and payments are delivered.

Several WebSocket servers and student-services are processes of their own, the workers one; checkouts are made here.
Each client ends with 1..n whatever it was connected to, no answer was older than a frame that came before it, and at
the end every view is what PostgreSQL says. The second half plays with fences, see `redis_fences`.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from uuid import UUID

import httpx2
from websockets.asyncio.client import connect
from websockets.exceptions import WebSocketException

from caravan.db import Database
from caravan.db.redis import Redis
from caravan.db.wake import Wake
from caravan.people.students import create_student, link_student
from caravan.student_views.cache import Shown, key_of
from caravan.student_views.routes import make_view
from caravan.web.auth import Role, create_account, issue_token
from harness.processes import free_port
from tests.redis_server import RedisServer, missing
from verify.fleet import TOGETHER, Fleet, Patch, Slot
from verify.parts import Context
from verify.redis_fences import play_fences
from verify.report import PartResult
from verify.scratch import ScratchServer
from verify.waiting import until_quiet
from verify.world import HOURS, SETTINGS, World, open_world

SERVERS = 3  # of WebSockets
READERS = 2  # student-services
UP_SECONDS = 30.0
QUIET_SECONDS_MAX = 90.0
CATCH_UP_SECONDS_MAX = 20.0
ANSWER_SECONDS = 10.0
LEAVES = 0.02  # after a frame: the client goes and comes back elsewhere
LOOKS = 0.4  # after a frame: it refetches home
MUST_FIRE = ("killed", "flushed", "frozen", "cut", "full", "reconnected")
ROOMY = {"max_connections": "200"}


async def run(context: Context) -> PartResult:
    result = context.result()
    if lack := missing():
        if os.environ.get("CI") == "true":
            result.failed.append(f"CI must have it: {lack}")
        else:
            result.skipped = lack
        return result
    result.good_min = 0
    rounds, sockets, payments, plays = context.pick((6, 40, 80, 60), (50, 200, 800, 1500))
    if context.case in (None, "sockets"):
        result.must_fire = MUST_FIRE
        result.good_min += sockets
        with ScratchServer(settings=ROOMY) as server, RedisServer() as redis:
            database = server.create()
            async with database.database() as db:
                await run_sockets(result, db, database.url, redis, context.dice("sockets"), rounds, sockets, payments)
    if context.case in (None, "fences"):
        result.good_min += plays
        with RedisServer() as redis:
            async with context.server.create().database() as db:
                await play_fences(result, db, redis, context.dice("fences"), plays, case="fences")
    return result


# ------------------------------------------------------------------ sockets


@dataclass(slots=True)
class Family:
    """One student, the account that it belongs to, and the client that listens."""

    student: UUID
    token: str
    seen: list[int] = field(default_factory=list[int])
    wrong: list[str] = field(default_factory=list[str])
    connections: int = 0
    looks: int = 0

    @property
    def last(self) -> int:
        return self.seen[-1] if self.seen else 0

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"}


async def run_sockets(
    result: PartResult,
    db: Database,
    url: str,
    redis: RedisServer,
    dice: random.Random,
    rounds: int,
    sockets: int,
    payments: int,
    *,
    patch: Patch | None = None,
) -> None:
    """`rounds` rounds of trouble while `payments` are delivered to `sockets` clients. `patch`: as in `kills`."""
    world = await open_world(db, trainers=payments // HOURS + 4)
    families = await _open_families(db, sockets)
    slots = [Slot("websocket-server", n, port=free_port(), patch=patch) for n in range(SERVERS)]
    slots += [Slot("student-service", n, port=free_port(), patch=patch) for n in range(SERVERS, SERVERS + READERS)]
    doors = [slot.port for slot in slots]
    assert SETTINGS.sandbox_webhook_secret
    crew = [*slots, Slot(TOGETHER, len(slots), patch=patch)]
    async with (
        Redis(redis.url) as link,
        Fleet(url, SETTINGS.sandbox_webhook_secret, crew, more={"redis_url": redis.url}) as fleet,
    ):
        wake = Wake(url, link)
        await wake.start(listen=False)
        db.on_hints = wake.send
        load = Load(world, families, payments)
        async with httpx2.AsyncClient(timeout=ANSWER_SECONDS) as http:
            await until_up(http, doors)
            looks = Looks(http, doors[SERVERS:])
            listening = [
                asyncio.create_task(listen(family, doors[:SERVERS], random.Random(chance), looks))
                for family, chance in zip(families, [dice.random() for _ in families], strict=True)
            ]
            await until_connected(families)
            nemesis = Nemesis(redis, dice, rounds, load)
            started = time.monotonic()
            async with asyncio.TaskGroup() as group:
                group.create_task(load.run())
                group.create_task(nemesis.run())
            result.fired.update(nemesis.fired)
            busy_seconds = time.monotonic() - started
            quiet_seconds, left = await until_quiet(db, QUIET_SECONDS_MAX)
            if left:
                result.violated(left, "sockets")
            heads = await read_heads(db)
            caught_up_seconds = await until_caught_up(families, heads)
            for task in listening:
                task.cancel()
            await asyncio.gather(*listening, return_exceptions=True)
            for family in families:
                judge_family(result, family, heads.get(family.student, 0))
            deadline = time.monotonic() + ANSWER_SECONDS
            while True:  # a server that has just done without Redis for its last time comes back to it soon
                await _compare_views(result, db, http, families, doors[SERVERS:])
                if len(await _list_held(redis, families)) == 2 * len(families) or time.monotonic() > deadline:
                    break
            await _judge_held(result, redis, families, heads)
        for surprise in fleet.troubles():
            result.violated(surprise, "sockets")
        await wake.stop()
        db.on_hints = None
    result.fired["reconnected"] += sum(family.connections - 1 for family in families)
    result.extra["sockets"] = {
        "clients": sockets,
        "websocket_servers": SERVERS,
        "payments": payments,
        "frames": sum(len(family.seen) for family in families),
        "looks": sum(family.looks for family in families),
        "connections": sum(family.connections for family in families),
        "redis_lives": redis.starts,
        "busy_seconds": round(busy_seconds, 1),
        "quiet_seconds": round(quiet_seconds, 1),
        "caught_up_seconds": round(caught_up_seconds, 2),
    }


@dataclass(slots=True)
class Load:
    """Payments, one after the other, each of the next family at another hour; `share` is how far it has got."""

    world: World
    families: Sequence[Family]
    payments: int
    done: int = 0
    may: asyncio.Event = field(default_factory=asyncio.Event)
    upto: float = 0.0

    @property
    def share(self) -> float:
        return self.done / self.payments

    def let(self, share: float) -> None:
        """It may go on until `share` of the payments are made."""
        self.upto = share
        self.may.set()

    async def run(self) -> None:
        while self.done < self.payments:
            if self.share >= self.upto:
                self.may.clear()
                await self.may.wait()
                continue
            turn, which = divmod(self.done, len(self.families))
            payment = await self.world.buy(self.families[which].student, hour=(which + 5 * turn) % HOURS)
            await self.world.pay([payment])
            self.done += 1


@dataclass(slots=True)
class Nemesis:
    """Each round Redis is flushed and killed, at moments that chance chooses; some rounds have more in them."""

    redis: RedisServer
    dice: random.Random
    rounds: int
    load: Load
    fired: dict[str, int] = field(default_factory=dict[str, int])

    async def run(self) -> None:
        for number in range(self.rounds):
            self.load.let((number + 1) / self.rounds)
            more = ("frozen", "cut", "full")[number % 3]
            for trouble in self.dice.sample(["flushed", "killed", more], 3):
                await self._pause(0.25)
                await getattr(self, f"_{trouble}")()
                self.fired[trouble] = self.fired.get(trouble, 0) + 1
        self.load.let(1.0)

    async def _pause(self, seconds: float) -> None:
        await asyncio.sleep(self.dice.uniform(0, seconds))

    async def _flushed(self) -> None:
        await asyncio.to_thread(self.redis.flush)

    async def _killed(self) -> None:
        await asyncio.to_thread(self.redis.kill)
        await self._pause(0.8)
        await asyncio.to_thread(self.redis.start)

    async def _frozen(self) -> None:
        self.redis.freeze()
        await self._pause(1.0)
        self.redis.thaw()

    async def _cut(self) -> None:
        """Every connection, or those that subscribe."""
        kind = self.dice.choice([("TYPE", "pubsub"), ("TYPE", "normal")])
        await asyncio.to_thread(self.redis.ask, "CLIENT", "KILL", *kind)

    async def _full(self) -> None:
        await asyncio.to_thread(self.redis.ask, "CONFIG", "SET", "maxmemory", "1")
        await self._pause(0.5)
        await asyncio.to_thread(self.redis.ask, "CONFIG", "SET", "maxmemory", "0")


@dataclass(frozen=True, slots=True)
class Looks:
    """With what, and where, clients refetch."""

    http: httpx2.AsyncClient
    ports: Sequence[int]


async def listen(family: Family, doors: Sequence[int], dice: random.Random, looks: Looks | None = None) -> None:
    """A client that comes back wherever it is let in, and says where it left off."""
    while True:
        with suppress(OSError, WebSocketException, TimeoutError):
            door = f"ws://127.0.0.1:{dice.choice(doors)}/ws"
            async with connect(door, additional_headers=family.headers, open_timeout=ANSWER_SECONDS) as ws:
                await ws.send(json.dumps({"type": "resume", "after": family.last}))
                family.connections += 1
                async for text in ws:
                    frame = json.loads(text)
                    if frame["type"] != "business-event" or frame["seq"] != family.last + 1:
                        family.wrong.append(f"after {family.last} came {text[:100]!r}")
                        return
                    family.seen.append(frame["seq"])
                    if looks and dice.random() < LOOKS:
                        await _look(family, looks.http, dice.choice(looks.ports))
                    if dice.random() < LEAVES:
                        ws.transport.abort()
        await asyncio.sleep(0.05)


async def _look(family: Family, http: httpx2.AsyncClient, port: int) -> None:
    """Push is a hint: what is fetched after a frame is as new as the frame."""
    path = f"http://127.0.0.1:{port}/api/v1/students/{family.student}/home"
    answer = await http.get(path, headers=family.headers)
    family.looks += 1
    if answer.status_code != 200:
        family.wrong.append(f"home answered {answer.status_code}: {answer.text[:200]}")
    elif answer.json()["version"] < family.last:
        family.wrong.append(f"home was of {answer.json()['version']} after frame {family.last}")


# ------------------------------------------------------------------ before and after


async def _open_families(db: Database, number: int) -> list[Family]:
    families: list[Family] = []
    async with db.transaction("student-service") as tx:
        for n in range(number):
            named = {"email": f"f{n}@example.com", "name": "Rao", "password_hash": "no password opens this"}
            account = await create_account(tx, role=Role.STUDENT, **named)
            student = await create_student(tx, name=f"Student {n}")
            await link_student(tx, account, student)
            families.append(Family(student, await issue_token(tx, account)))
    return families


async def until_up(http: httpx2.AsyncClient, doors: Sequence[int]) -> None:
    async with asyncio.timeout(UP_SECONDS):
        for port in doors:
            while True:
                with suppress(httpx2.HTTPError):
                    if (await http.get(f"http://127.0.0.1:{port}/healthz")).status_code == 200:
                        break
                await asyncio.sleep(0.1)


async def until_connected(families: Sequence[Family]) -> None:
    async with asyncio.timeout(UP_SECONDS):
        while not all(family.connections for family in families):  # noqa: ASYNC110 - of many tasks
            await asyncio.sleep(0.05)


async def read_heads(db: Database) -> dict[UUID, int]:
    async with db.transaction("verify", read_only=True) as tx:
        return dict(await tx.tuples("select student_id, seq from student_feed_heads"))


async def until_caught_up(families: Sequence[Family], heads: dict[UUID, int]) -> float:
    """How long after the last commit the last client had everything; those who never have are judged later."""
    started = time.monotonic()
    with suppress(TimeoutError):
        async with asyncio.timeout(CATCH_UP_SECONDS_MAX):
            while any(f.last < heads.get(f.student, 0) and not f.wrong for f in families):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
    return time.monotonic() - started


def judge_family(result: PartResult, family: Family, head: int, case: str | None = "sockets") -> None:
    result.cases += 1
    wrong = list(family.wrong)
    if family.seen != list(range(1, head + 1)):
        wrong.append(f"a client has {len(family.seen)} frames up to {family.last}, the feed ends at {head}")
    for said in wrong:
        result.violated(said, case)
    result.good += not wrong


async def _compare_views(
    result: PartResult, db: Database, http: httpx2.AsyncClient, families: Sequence[Family], ports: Sequence[int]
) -> None:
    """Each view from each server, made and then cached, is what PostgreSQL says."""
    for family in families:
        for shown in Shown:
            make = partial(make_view, student_id=family.student, shown=shown)
            async with db.transaction("verify", read_only=True) as tx:
                truth: Any = json.loads((await make(tx)).body)
            for port in ports:
                path = f"http://127.0.0.1:{port}/api/v1/students/{family.student}/{shown}"
                answer = await http.get(path, headers=family.headers)
                if answer.status_code != 200 or answer.json() != truth:
                    result.violated(f"{shown} is {answer.text[:200]}, not {json.dumps(truth)[:200]}", "sockets")


async def _judge_held(
    result: PartResult, redis: RedisServer, families: Sequence[Family], heads: dict[UUID, int]
) -> None:
    """At the end Redis holds both views of everybody, each at the student's present version."""
    held = await _list_held(redis, families)
    for student, version in held:
        if version != heads.get(student, 0):
            result.violated(f"Redis holds version {version}, the feed ends at {heads.get(student)}", "sockets")
    if len(held) < len(families):
        result.violated(f"Redis is hardly used: it holds {len(held)} views of {2 * len(families)}", "sockets")


async def _list_held(redis: RedisServer, families: Sequence[Family]) -> list[tuple[UUID, int]]:
    """Whose views Redis holds, and of which version."""
    held: list[tuple[UUID, int]] = []
    for family in families:
        for shown in Shown:
            value = await asyncio.to_thread(redis.get, key_of(shown, family.student))
            if value is not None and b" " in value.partition(b"\n")[0]:
                held.append((family.student, int(value.split()[0])))
    return held
