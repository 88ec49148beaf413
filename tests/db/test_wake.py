"""Hints go on after a listener's bug: no process may fall silent, or deaf, for good."""

from __future__ import annotations

import asyncio

import pytest

from caravan.db.wake import EVERYTHING, Wake

SECONDS_MAX = 10.0


async def test_one_listeners_bug_makes_nobody_deaf(database_url: str) -> None:
    ours, theirs = Wake(database_url), Wake(database_url)
    heard: asyncio.Queue[frozenset[str]] = asyncio.Queue()
    bugs = [RuntimeError("a listener's bug")]

    def listen(keys: frozenset[str]) -> None:
        if "first" in keys and bugs:
            raise bugs.pop()
        heard.put_nowait(keys)

    theirs.subscribe(listen)
    await theirs.start()
    await ours.start(listen=False)
    try:
        async with asyncio.timeout(SECONDS_MAX):
            assert await heard.get() == {EVERYTHING}  # it listens now
            ours.send(["first"])
            assert await heard.get() == {EVERYTHING}  # what it did not take in then is not known: look at all
            ours.send(["second"])
            assert await heard.get() == {"second"}
    finally:
        await ours.stop()
        await theirs.stop()
    assert not bugs


async def test_a_bug_on_the_way_out_silences_nobody(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = Wake(database_url), Wake(database_url)
    heard: asyncio.Queue[frozenset[str]] = asyncio.Queue()
    publish = ours._publish  # pyright: ignore[reportPrivateUsage]

    async def fail_once(keys: set[str]) -> str:
        monkeypatch.setattr(ours, "_publish", publish)
        raise RuntimeError(f"a bug with {keys}")

    monkeypatch.setattr(ours, "_publish", fail_once)
    theirs.subscribe(heard.put_nowait)
    await theirs.start()
    await ours.start(listen=False)
    try:
        async with asyncio.timeout(SECONDS_MAX):
            assert await heard.get() == {EVERYTHING}
            ours.send(["first"])
            assert EVERYTHING in await heard.get()
            ours.send(["second"])
            assert await heard.get() == {"second"}
    finally:
        await ours.stop()
        await theirs.stop()
