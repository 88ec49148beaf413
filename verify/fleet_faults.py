"""Faults put into a process of the fleet from outside, before it starts: see `fleet.Slot.patch`.

Those of a stuck worker wait for SIGUSR1, so that the worker is well until then.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Awaitable, Callable
from typing import Any, cast

from caravan.eventlog import inbox
from caravan.eventlog.consumer import Consumer

FOR_EVER_SECONDS = 3600.0

_armed: list[int] = []  # the signal, once it came


def _arm() -> None:
    signal.signal(signal.SIGUSR1, lambda number, _frame: _armed.append(number))


def hang() -> None:
    """The handler awaits for ever; the loop of the process goes on."""
    _arm()
    _before_effects(_wait_for_ever)


def block() -> None:
    """The handler blocks the whole loop: a call that is not asynchronous and never returns."""
    _arm()
    _before_effects(_block_for_ever)


def end_task() -> None:
    """The consumer's task ends without a word; the process lives on."""
    _arm()
    run_once = Consumer.run_once

    async def ending(self: Consumer) -> int:
        if _armed:
            raise asyncio.CancelledError
        return await run_once(self)

    Consumer.run_once = ending


async def _wait_for_ever() -> None:
    if _armed:
        await asyncio.Event().wait()


async def _block_for_ever() -> None:
    if _armed:
        time.sleep(FOR_EVER_SECONDS)  # noqa: ASYNC251 - the fault itself


def _before_effects(fault: Callable[[], Awaitable[None]]) -> None:
    apply_events = inbox.apply_events

    async def apply(*given: Any, **named: Any) -> Any:
        await fault()
        return await apply_events(*given, **named)

    inbox.apply_events = cast("Any", apply)
