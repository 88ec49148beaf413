"""Hints over Redis: to the processes where the student is connected; and no frame lost, whatever becomes of Redis."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import pytest
from websockets.asyncio.client import ClientConnection, connect

from caravan.db import Database
from caravan.db.redis import Redis
from caravan.db.redis_hints import RedisHints
from caravan.db.wake import EVERYTHING, Wake
from caravan.ids import new_id
from caravan.realtime import gateway as gateways
from harness.processes import free_port
from tests.realtime.test_realtime import DEADLINE_SECONDS, House, Person, read_seqs, serve
from tests.redis_server import RedisServer


@dataclass
class Ears:
    """A process: what its listeners are told."""

    wake: Wake
    redis: Redis
    told: list[str] = field(default_factory=list[str])
    moved: asyncio.Event = field(default_factory=asyncio.Event)

    def hear(self, keys: frozenset[str]) -> None:
        self.told += sorted(keys)
        self.moved.set()

    async def until(self, key: str) -> None:
        async with asyncio.timeout(DEADLINE_SECONDS):
            while key not in self.told:
                self.moved.clear()
                await self.moved.wait()

    @property
    def hints(self) -> RedisHints:
        assert self.wake._over_redis is not None
        return self.wake._over_redis

    async def until_heard(self, *keys: str) -> None:
        async with asyncio.timeout(DEADLINE_SECONDS):
            while not all(self.hints.hears(key) for key in keys):  # noqa: ASYNC110 - nothing tells
                await asyncio.sleep(0.005)


class Mouths:
    """Processes of one installation."""

    def __init__(self, url: str, stack: AsyncExitStack) -> None:
        self._url, self._stack = url, stack

    async def process(self, redis_url: str, *, listen: bool = True) -> Ears:
        redis = await self._stack.enter_async_context(Redis(redis_url))
        wake = Wake(self._url, redis)
        ears = Ears(wake, redis)
        wake.subscribe(ears.hear)
        await wake.start(listen=listen)
        self._stack.push_async_callback(wake.stop)
        if listen:
            await ears.until(EVERYTHING)  # the LISTEN stands
            ears.told.clear()
        return ears


@pytest.fixture
async def mouths(database_url: str) -> AsyncIterator[Mouths]:
    async with AsyncExitStack() as stack:
        yield Mouths(database_url, stack)


async def test_a_hint_reaches_who_watches_and_the_notify_repeats_it_to_the_others_only(
    mouths: Mouths, redis_server: RedisServer
) -> None:
    speaker, watcher, other = [await mouths.process(redis_server.url) for _ in range(3)]
    assert await speaker.redis.wait_until_up(DEADLINE_SECONDS)
    mine, theirs, last = str(new_id()), str(new_id()), str(new_id())
    watcher.wake.watch(mine)
    await watcher.until_heard(mine)
    watcher.told.clear()
    speaker.wake.send([mine, theirs])
    await watcher.until(theirs)  # of the NOTIFY: what Redis did not bring to this process
    await other.until(mine)
    speaker.wake.send([last])
    await watcher.until(last)
    assert watcher.told.count(mine) == 1
    redis_server.kill()
    async with asyncio.timeout(DEADLINE_SECONDS):
        while speaker.redis.is_up:  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0.005)
    watcher.told.clear()
    speaker.wake.send([mine])
    await watcher.until(mine)  # by NOTIFY, at once
    redis_server.start()
    await watcher.until_heard(mine)  # it subscribed again by itself
    watcher.wake.unwatch(mine)
    async with asyncio.timeout(DEADLINE_SECONDS):
        while watcher.hints.hears(mine):  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0.005)
    assert redis_server.ask("PUBSUB", "CHANNELS") == b"*0\r\n"


async def test_many_are_watched_over_one_connection_and_a_process_without_sockets_has_none(
    mouths: Mouths, redis_server: RedisServer
) -> None:
    watcher, idle = await mouths.process(redis_server.url), await mouths.process(redis_server.url)
    assert await idle.redis.wait_until_up(DEADLINE_SECONDS)
    keys = [str(new_id()) for _ in range(1200)]
    for key in keys:
        watcher.wake.watch(key)
    await watcher.until_heard(*keys)
    subscribed = redis_server.ask("CLIENT", "LIST", "TYPE", "pubsub").decode()
    assert subscribed.count("sub=1200") == subscribed.count("addr=") - subscribed.count("laddr=") == 1
    assert set(keys) <= set(watcher.told)  # each is looked at once when its subscription stands


async def test_a_subscription_that_hangs_is_given_up(
    mouths: Mouths, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from caravan.db import redis_hints

    monkeypatch.setattr(redis_hints, "PING_SECONDS", 0.05)
    monkeypatch.setattr(redis_hints, "SILENT_SECONDS", 0.3)
    watcher = await mouths.process(redis_server.url)
    key = str(new_id())
    watcher.wake.watch(key)
    await watcher.until_heard(key)
    watcher.told.clear()
    redis_server.freeze()
    await watcher.until(key)  # it is over: look whether something was missed
    assert not watcher.hints.hears(key)
    redis_server.thaw()
    await watcher.until_heard(key)


@dataclass
class Client:
    """Reads its frames, and comes back with a resume where it is cut off."""

    house: House
    person: Person
    seen: list[int] = field(default_factory=list[int])

    async def listen(self) -> None:
        while True:
            async with connect(self.house.url, additional_headers=self.person.headers) as ws:
                await ws.send(json.dumps({"type": "resume", "after": self.seen[-1] if self.seen else 0}))
                async for text in ws:
                    frame = json.loads(text)
                    assert frame["type"] == "business-event"
                    self.seen.append(frame["seq"])

    async def until(self, last: int) -> None:
        async with asyncio.timeout(DEADLINE_SECONDS):
            while not self.seen or self.seen[-1] < last:  # noqa: ASYNC110 - nothing tells
                await asyncio.sleep(0.005)


async def test_nobody_misses_a_frame_while_redis_is_killed_flushed_frozen_and_refuses(
    db: Database, database_url: str, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two WebSocket servers, several clients, PostgreSQL's poll switched off: hints alone bring everything."""
    monkeypatch.setattr(gateways, "POLL_SECONDS", 60)
    async with AsyncExitStack() as stack:
        houses: list[House] = []
        for _ in range(2):
            redis = await stack.enter_async_context(Redis(redis_server.url))
            house = await stack.enter_async_context(serve(db, database_url, redis=redis))
            await house.wake.start()
            stack.push_async_callback(house.wake.stop)
            houses.append(house)
            assert await redis.wait_until_up(DEADLINE_SECONDS)
        # What a third process writes reaches both by hints only.
        speaker = await Mouths(database_url, stack).process(redis_server.url, listen=False)
        db.on_hints = speaker.wake.send
        person = await houses[0].person(students=1)
        student: UUID = person.students[0]
        clients = [Client(house, person) for house in houses for _ in range(2)]
        listening = [asyncio.create_task(client.listen()) for client in clients]
        said = 0
        server = redis_server
        for trouble in (lambda: None, server.kill, server.start, server.flush, server.freeze,
                        lambda: None, server.thaw, lambda: None,
                        lambda: server.ask("CONFIG", "SET", "maxmemory", "1"),  # full
                        lambda: server.ask("REPLICAOF", "127.0.0.1", "1"),  # read-only
                        lambda: server.ask("ACL", "SETUSER", "default", "-publish"),
                        lambda: server.ask("ACL", "SETUSER", "default", "+publish")):  # fmt: skip
            trouble()
            await houses[0].say(student, 3)
            said += 3
            for client in clients:
                await client.until(said)
        for task in listening:
            task.cancel()
        await asyncio.gather(*listening, return_exceptions=True)
        for client in clients:
            assert client.seen == list(range(1, said + 1))


async def test_a_redis_that_never_was_leaves_everything_as_without(db: Database, database_url: str) -> None:
    async with Redis(f"redis://127.0.0.1:{free_port()}") as redis, serve(db, database_url, redis=redis) as house:
        await house.wake.start()
        person = await house.person()
        ws: ClientConnection
        async with connect(house.url, additional_headers=person.headers) as ws:
            await ws.send('{"type": "resume", "after": 0}')
            await house.say(person.students[0], 3)
            assert await read_seqs(ws, 3) == [1, 2, 3]
        await house.wake.stop()


def test_what_is_marked_is_a_payload_like_any_other(database_url: str) -> None:
    """An older process, or one without a Redis, takes the mark for a key that nobody has."""
    told: list[Any] = []
    wake = Wake(database_url)
    wake.subscribe(told.append)
    wake._hear("+ a b")
    assert {"a", "b"} <= told[0]
