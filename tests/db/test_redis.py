"""The connection to Redis: answers soon or not at all, comes back by itself, and says each outage once."""

from __future__ import annotations

import asyncio
from time import perf_counter
from typing import Any

import pytest
from structlog.testing import capture_logs

from caravan.db import redis as link
from caravan.db.redis import Redis, RedisAway, RedisRefused
from harness.processes import free_port
from tests.redis_server import RedisServer

DEADLINE_SECONDS = 10.0


async def until_down(redis: Redis) -> None:
    async with asyncio.timeout(DEADLINE_SECONDS):
        while redis.is_up:  # noqa: ASYNC110 - the loop has to turn, nothing tells
            await asyncio.sleep(0.005)


def lines(logs: list[Any]) -> list[str]:
    return [entry["event"] for entry in logs]


async def test_answers_come_in_order_to_those_who_asked(redis_server: RedisServer) -> None:
    async with Redis(redis_server.url) as redis:
        assert await redis.wait_until_up(DEADLINE_SECONDS)
        await asyncio.gather(*(redis.call("SET", f"k{n}", n) for n in range(500)))
        assert await asyncio.gather(*(redis.call("GET", f"k{n}") for n in range(500))) == [
            str(n).encode() for n in range(500)
        ]
        assert await redis.ask([("GET", "k1"), ("GET", "none"), ("INCR", "k2")]) == [b"1", None, 3]
        assert await redis.ask([]) == []


async def test_who_goes_away_leaves_nobody_a_wrong_answer(redis_server: RedisServer) -> None:
    async with Redis(redis_server.url) as redis:
        assert await redis.wait_until_up(DEADLINE_SECONDS)
        await redis.ask([("SET", f"k{n}", n) for n in range(50)])
        asked = [asyncio.create_task(redis.call("GET", f"k{n}")) for n in range(50)]
        await asyncio.sleep(0)  # all are on the wire now
        for gone in asked[::2]:
            gone.cancel()
        assert await redis.call("GET", "k7") == b"7"
        assert await asyncio.gather(*asked[1::2]) == [str(n).encode() for n in range(1, 50, 2)]


async def test_a_killed_redis_is_said_once_and_found_again(redis_server: RedisServer) -> None:
    with capture_logs() as logs:
        async with Redis(redis_server.url) as redis:
            assert await redis.wait_until_up(DEADLINE_SECONDS)
            redis_server.kill()
            await until_down(redis)
            for _ in range(50):
                with pytest.raises(RedisAway):
                    await redis.call("GET", "k")
            redis_server.start()
            assert await redis.wait_until_up(DEADLINE_SECONDS)
            assert await redis.call("PING") == b"PONG"
    assert lines(logs) == ["Redis is away, going on without it", "Redis is back"]
    assert logs[0]["setting"] == "REDIS_URL"


async def test_a_redis_that_hangs_costs_its_first_calls_a_moment_and_the_later_ones_nothing(
    redis_server: RedisServer,
) -> None:
    with capture_logs() as logs:
        async with Redis(redis_server.url) as redis:
            assert await redis.wait_until_up(DEADLINE_SECONDS)
            redis_server.freeze()
            began = perf_counter()
            first = await asyncio.gather(*(redis.call("GET", "k") for _ in range(20)), return_exceptions=True)
            assert perf_counter() - began < 10 * link.ANSWER_SECONDS  # together, not one after the other
            assert all(isinstance(error, RedisAway) for error in first)
            began = perf_counter()
            for _ in range(100):
                with pytest.raises(RedisAway):
                    await redis.call("GET", "k")
            assert (perf_counter() - began) / 100 < link.ANSWER_SECONDS / 10
            redis_server.thaw()
            assert await redis.wait_until_up(DEADLINE_SECONDS)
            assert await redis.call("PING") == b"PONG"
    assert lines(logs) == ["Redis is away, going on without it", "Redis is back"]


async def test_a_redis_that_was_never_there_is_said_once(redis_server: RedisServer) -> None:
    with capture_logs() as logs:
        async with Redis(f"redis://:secret@127.0.0.1:{free_port()}/0") as redis:
            assert not await redis.wait_until_up(0.4)
            with pytest.raises(RedisAway):
                await redis.call("PING")
    assert lines(logs) == ["Redis is away, going on without it"]
    assert "secret" not in str(logs)


async def test_a_wrong_password_is_named(redis_server: RedisServer) -> None:
    redis_server.ask("CONFIG", "SET", "requirepass", "right")
    with capture_logs() as logs:
        async with Redis(redis_server.url.replace("//", "//:wrong@")) as redis:
            assert not await redis.wait_until_up(0.3)
        async with Redis(redis_server.url) as redis:
            assert not await redis.wait_until_up(0.3)
        async with Redis(redis_server.url.replace("//", "//:right@")) as redis:
            assert await redis.wait_until_up(DEADLINE_SECONDS)
    wrong, none = logs
    assert (wrong["setting"], none["setting"]) == ("REDIS_URL", "REDIS_URL")
    assert "wrong user or password" in wrong["error"]
    assert "wrong user or password" in none["error"]


@pytest.mark.parametrize(
    ("order", "undo"),
    [
        (("CONFIG", "SET", "maxmemory", "1"), ("CONFIG", "SET", "maxmemory", "0")),
        (("REPLICAOF", "127.0.0.1", "1"), ("REPLICAOF", "NO", "ONE")),
    ],
    ids=["full", "read-only"],
)
async def test_a_redis_that_refuses_writes_is_said_once_and_reads_on(
    redis_server: RedisServer, order: tuple[str, ...], undo: tuple[str, ...]
) -> None:
    with capture_logs() as logs:
        async with Redis(redis_server.url) as redis:
            assert await redis.wait_until_up(DEADLINE_SECONDS)
            redis_server.ask(*order)
            for _ in range(5):
                with pytest.raises(RedisRefused):
                    await redis.call("SET", "k", "v")
            assert await redis.call("GET", "k") is None
            redis_server.ask(*undo)
            await redis.call("SET", "k", "v")
    assert lines(logs) == ["Redis refuses, going on without", "Redis takes it again"]


async def test_an_answer_nobody_asked_for_ends_the_connection(redis_server: RedisServer) -> None:
    """Out of step is out: a later answer could be another's."""
    async with Redis(redis_server.url) as redis:
        assert await redis.wait_until_up(DEADLINE_SECONDS)
        await redis._wire.send_command("PING", check_health=False)
        await until_down(redis)
        assert await redis.wait_until_up(DEADLINE_SECONDS)
        assert await redis.call("GET", "k") is None
