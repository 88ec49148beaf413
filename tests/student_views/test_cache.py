"""Home and learning with a real Redis: always what PostgreSQL says, whatever Redis holds, forgets or does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any
from uuid import UUID

import httpx2
import pytest
from fastapi.routing import APIRoute

from caravan.apps.subscriptions import subscribe
from caravan.db import Database, Tx
from caravan.db.redis import Redis
from caravan.eventlog import outbox
from caravan.eventlog.drain import drain
from caravan.events import CourseAccessGranted
from caravan.ids import new_id
from caravan.student_views import cache as caching
from caravan.student_views import routes
from caravan.student_views.cache import Made, Shown, ViewCache, key_of
from caravan.student_views.queries import Head
from caravan.student_views.routes import make_view, router
from caravan.telemetry.metrics import REDIS_ERRORS, VIEW_READS, VIEW_WRITES
from tests.clients import client_of, make_app
from tests.redis_server import RedisServer
from tests.shop import Shop, open_shop
from tests.student_views.test_views import sign_in

DEADLINE_SECONDS = 10.0
VIEWS = tuple(Shown)


def count(counter: Any, **labels: str) -> float:
    return counter.labels(**labels)._value.get()


@dataclass
class House:
    """A shop whose views are cached, and the same application without a Redis to compare with."""

    shop: Shop
    server: RedisServer
    redis: Redis
    cache: ViewCache
    client: httpx2.AsyncClient
    plain: httpx2.AsyncClient

    async def see(self, shown: Shown = Shown.HOME) -> Any:
        """The view; it has to be what it is without a Redis."""
        path = f"/api/v1/students/{self.shop.student}/{shown}"
        answer, truth = await self.client.get(path), await self.plain.get(path)
        assert (answer.status_code, answer.text) == (200, truth.text)
        assert answer.headers["content-type"] == truth.headers["content-type"] == "application/json"
        return answer.json()

    async def work(self) -> None:
        """Every worker, with the cache."""
        await drain(self.shop.db, subscribe(views=self.cache))

    async def say(self) -> None:
        async with self.shop.db.transaction("session-worker") as tx:
            outbox.append(tx, [CourseAccessGranted(payment_id=new_id(), student_id=self.shop.student, course_id=None)])

    def held(self, shown: Shown = Shown.HOME) -> str | None:
        """The mark of what Redis holds: version, event and student of a value, a version alone for a fence."""
        found = self.server.get(key_of(shown, self.shop.student))
        return found.partition(b"\n")[0].decode() if found is not None else None

    def version(self, shown: Shown = Shown.HOME) -> int:
        held = self.held(shown)
        assert held is not None
        return int(held.split()[0])

    async def until(self, up: bool) -> None:
        async with asyncio.timeout(DEADLINE_SECONDS):
            while self.redis.is_up != up:  # noqa: ASYNC110 - the loop has to turn, nothing tells
                await asyncio.sleep(0.005)


@pytest.fixture
async def house(db: Database, redis_server: RedisServer) -> AsyncIterator[House]:
    shop = await open_shop(db)
    app, plain = make_app(db, router), make_app(db, router)
    async with Redis(redis_server.url) as redis, client_of(app) as client, client_of(plain) as plain_client:
        assert await redis.wait_until_up(DEADLINE_SECONDS)
        app.state.views = cache = ViewCache(redis)
        await sign_in(db, client, shop.student)
        plain_client.headers.update(client.headers)
        yield House(shop, redis_server, redis, cache, client, plain_client)


async def test_a_view_is_made_once_and_then_shown_from_redis(house: House) -> None:
    await house.shop.bought()
    await house.work()
    for shown in VIEWS:
        hits, stored = count(VIEW_READS, view=shown, result="hit"), count(VIEW_WRITES, view=shown, result="stored")
        first = await house.see(shown)
        assert first["items"]
        assert house.version(shown) == first["version"] > 0
        assert await house.see(shown) == first
        assert count(VIEW_READS, view=shown, result="hit") == hits + 1
        assert count(VIEW_WRITES, view=shown, result="stored") == stored + 1


async def test_each_change_is_seen_at_once_though_no_worker_has_fenced_it(house: House) -> None:
    """Read your own writes: the cache-worker may be down, or behind."""
    assert (await house.see())["items"] == []
    stale = count(VIEW_READS, view="home", result="stale")
    payment = await house.shop.bought()
    [item] = (await house.see())["items"]
    assert (item["paymentId"], item["stage"]) == (str(payment), "paid")
    await house.shop.work("purchase-worker")
    assert (await house.see())["items"][0]["stage"] == "purchased"
    await house.shop.work()
    assert (await house.see())["items"][0]["stage"] == "scheduled"
    assert count(VIEW_READS, view="home", result="stale") == stale + 3


async def test_the_cache_worker_fences_by_version_and_keeps_what_is_new(house: House) -> None:
    await house.see()
    await house.shop.bought()
    await house.work()
    head = (await house.see(Shown.LEARNING))["version"]
    assert house.held(Shown.HOME) == str(head)  # a fence: nobody asked for home since
    assert house.version(Shown.LEARNING) == head
    value = house.held(Shown.LEARNING)
    await house.cache.fence({house.shop.student: head})  # an event twice
    await house.cache.fence({house.shop.student: head - 1})  # and an old one late
    assert house.held(Shown.LEARNING) == value
    await house.see()
    assert house.version(Shown.HOME) == head


async def slow_reader(house: House, meanwhile: Callable[[], Awaitable[None]]) -> None:
    """Somebody reads PostgreSQL, `meanwhile` happens, and only then what was read is put."""
    async with house.shop.db.transaction(read_only=True) as tx:
        made = await make_view(tx, house.shop.student, Shown.HOME)
    await meanwhile()
    await house.cache._put(Shown.HOME, house.shop.student, made, 0.0)


async def test_a_slow_reader_cannot_put_an_old_view_over_a_newer_one_or_over_a_fence(house: House) -> None:
    await house.see()

    async def newer() -> None:
        await house.say()
        await house.see()

    refused = count(VIEW_WRITES, view="home", result="refused")
    await slow_reader(house, newer)
    assert house.version() == 1
    await slow_reader(house, lambda: _said_and_fenced(house))
    assert house.held() == "2"
    assert count(VIEW_WRITES, view="home", result="refused") == refused + 2
    assert (await house.see())["version"] == 2


async def _said_and_fenced(house: House) -> None:
    await house.say()
    await house.work()


async def test_a_flush_between_reading_and_putting_shows_nobody_the_old_view(house: House) -> None:
    """The fence is gone with the flush: the old value gets in, and is refused by whoever looks."""

    async def flushed() -> None:
        await house.say()
        await house.work()
        house.server.flush()

    await slow_reader(house, flushed)
    assert house.version() == 0
    assert (await house.see())["version"] == 1
    assert house.version() == 1


async def test_what_somebody_put_into_redis_is_not_believed(house: House) -> None:
    await house.say()
    await house.see()
    key = key_of(Shown.HOME, house.shop.student)
    mark = house.held()
    assert mark is not None
    another = mark.replace(str(house.shop.student), str(new_id()))
    for value in ("", "1", "\n", "[]", "x" * 9000, f"{another}\n{{}}", mark, mark.replace("1 ", "2 ", 1) + "\n{}"):
        house.server.ask("SET", key, value)
        await house.see()
    house.server.ask("DEL", key)
    house.server.ask("RPUSH", key, "not a string")
    await house.see()


async def test_a_history_that_was_undone_is_not_shown_where_the_numbers_meet_again(house: House) -> None:
    """As after an older backup was restored: the same version, other events."""
    await house.say()
    await house.see()
    before = house.held()
    await house.shop.run("delete from student_feed")
    await house.shop.run("update student_feed_heads set seq = 0")
    await house.say()
    assert (await house.see())["version"] == 1
    assert house.version() == 1
    assert house.held() != before


async def test_the_next_session_is_not_shown_longer_than_it_lasts(house: House) -> None:
    await house.shop.bought(sessions=10)
    await house.work()
    await house.see()
    until = await house.shop.rows("select min(ends_at) as at, now() as now from tutoring_sessions")
    assert until[0]["at"] - until[0]["now"] > timedelta(seconds=caching.SECONDS_MAX)
    left = int(house.server.ask("PTTL", key_of(Shown.HOME, house.shop.student))[1:])
    assert 0.7 * caching.SECONDS_MAX < left / 1000 <= caching.SECONDS_MAX
    # A second before the first one ends.
    await house.shop.run(
        "update tutoring_sessions set starts_at = starts_at - t.by, ends_at = ends_at - t.by"
        " from (select min(ends_at) - now() - interval '1 second' as by from tutoring_sessions) t"
    )
    house.server.flush()
    assert (await house.see())["items"][0]["nextSession"]["seq"] == 1
    left = int(house.server.ask("PTTL", key_of(Shown.HOME, house.shop.student))[1:])
    assert left <= 1000
    async with asyncio.timeout(DEADLINE_SECONDS):
        while await house.shop.rows("select 1 as yes from tutoring_sessions where ends_at > now() and seq = 1"):  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    assert (await house.see())["items"][0]["nextSession"]["seq"] == 2


async def test_many_at_once_make_it_once_and_one_that_fails_fails_for_all(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, looked = 0, 0
    go, find_end = asyncio.Event(), caching.find_end

    async def make(tx: Tx) -> Made:
        nonlocal made
        made += 1
        await go.wait()
        if made == 2:
            raise LookupError("it broke")
        return await make_view(tx, house.shop.student, Shown.HOME)

    async def counted(db: Database, student_id: UUID) -> Head:
        nonlocal looked
        found = await find_end(db, student_id)
        looked += 1
        return found

    async def all_wait(readers: int) -> None:
        async with asyncio.timeout(DEADLINE_SECONDS):
            while looked < readers or not made:  # noqa: ASYNC110 - the loop has to turn, nothing tells
                await asyncio.sleep(0.005)

    monkeypatch.setattr(caching, "find_end", counted)
    read = partial(house.cache.read, house.shop.db, house.shop.student, Shown.HOME, make)
    readers = [asyncio.create_task(read()) for _ in range(40)]
    await all_wait(40)
    readers[0].cancel()  # whoever began it goes away
    go.set()
    assert len(set(await asyncio.gather(*readers[1:]))) == 1
    assert made == 1
    house.server.flush()
    go.clear()
    failing = [asyncio.create_task(read()) for _ in range(5)]
    await all_wait(45)
    go.set()
    assert all(isinstance(error, LookupError) for error in await asyncio.gather(*failing, return_exceptions=True))
    assert made == 2
    await house.see()


async def test_who_asks_after_a_change_does_not_join_a_reading_that_began_before_it(house: House) -> None:
    read, go = asyncio.Event(), asyncio.Event()

    async def slowly(tx: Tx) -> Made:
        made = await make_view(tx, house.shop.student, Shown.HOME)
        read.set()
        await go.wait()
        return made

    old = asyncio.create_task(house.cache.read(house.shop.db, house.shop.student, Shown.HOME, slowly))
    async with asyncio.timeout(DEADLINE_SECONDS):
        await read.wait()
    await house.say()
    assert (await house.see())["version"] == 1
    go.set()
    assert b'"version":0' in await old


async def test_a_redis_that_is_flushed_killed_or_restarted_changes_no_answer(house: House) -> None:
    await house.shop.bought()
    for _ in range(3):
        await house.work()
        await house.see()
        house.server.flush()
        await house.see()
        house.server.kill()
        await house.see()
        await house.say()
        await house.see()
        house.server.start()
        await house.until(up=True)
        await house.see()
        assert house.version() == (await house.see())["version"]


@pytest.mark.parametrize(
    "order", [("CONFIG", "SET", "maxmemory", "1"), ("REPLICAOF", "127.0.0.1", "1")], ids=["full", "read-only"]
)
async def test_a_redis_that_refuses_writes_changes_no_answer(house: House, order: tuple[str, ...]) -> None:
    await house.see()
    house.server.ask(*order)
    await house.say()
    await house.work()
    for shown in VIEWS:
        assert (await house.see(shown))["version"] == 1


async def test_a_redis_that_hangs_costs_the_first_answer_a_moment_and_the_later_ones_nothing(house: House) -> None:
    await house.see()
    house.server.freeze()
    await house.see()
    assert not house.redis.is_up
    failed = count(REDIS_ERRORS, kind="away")
    seconds: dict[httpx2.AsyncClient, list[float]] = {house.client: [], house.plain: []}
    for _ in range(10):
        await house.say()
        await house.work()
        await house.see()
        for client, took in seconds.items():
            began = perf_counter()
            await client.get(f"/api/v1/students/{house.shop.student}/home")
            took.append(perf_counter() - began)
    assert count(REDIS_ERRORS, kind="away") >= failed + 30  # each asked, and none waited
    assert median(seconds[house.client]) < 3 * median(seconds[house.plain]) + 0.02
    house.server.thaw()
    await house.until(up=True)
    await house.see()


async def test_what_is_not_yours_is_not_shown_though_it_is_cached(house: House, db: Database) -> None:
    await house.see()
    student: UUID = house.shop.student
    await sign_in(db, house.client, new_id_of_nobody := await _another(db))
    for shown in VIEWS:
        refused = await house.client.get(f"/api/v1/students/{student}/{shown}")
        assert (refused.status_code, refused.json()["code"]) == (404, "NOT_FOUND")
        assert (await house.client.get(f"/api/v1/students/{new_id_of_nobody}/{shown}")).status_code == 200


async def _another(db: Database) -> UUID:
    student = new_id()
    async with db.transaction() as tx:
        await tx.execute("insert into students (id, name) values (%(id)s, 'Another')", {"id": student})
    return student


async def test_nothing_of_authorisation_and_no_place_is_in_redis(house: House) -> None:
    await house.shop.run("update students set latitude = 28.61393, longitude = 77.20904")
    await house.shop.bought(mode="home")
    await house.work()
    for shown in VIEWS:
        await house.see(shown)
        value = house.server.get(key_of(shown, house.shop.student))
        assert value is not None
        for secret in (b"28.6", b"77.2", b"latitude", b"role", b"account", b"email", b"token"):
            assert secret not in value
    assert house.server.ask("DBSIZE") == b":2\r\n"


def test_the_answer_is_the_one_that_the_api_describes() -> None:
    """Both addresses answer with ready bytes; their shape is declared, so it must be what the bytes are."""
    paths = {route.path: route for route in routes.router.routes if isinstance(route, APIRoute)}
    for shown in VIEWS:
        assert paths[f"/api/v1/students/{{student_id}}/{shown}"].response_model is routes.ViewOut
