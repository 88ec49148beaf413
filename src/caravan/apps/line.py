"""A child's line to its supervisor: orders in, answers out, JSON lines over its standard input. See children.py."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, cast

import structlog

log: structlog.stdlib.BoundLogger = structlog.get_logger()

Order = dict[str, Any]


class Line:
    """The line to the supervisor: orders in, answers out; `stop` is set when it is time to end."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.stop = asyncio.Event()

    async def hear(self) -> Order | None:
        """The next order; None at the end."""
        try:
            line = await self._reader.readline()
        except OSError:
            return None
        return cast("Order", json.loads(line)) if line else None

    def answer(self, order: Order, **more: object) -> None:
        with suppress(OSError):  # a supervisor that was killed hears nothing
            self._writer.write(json.dumps({"id": order.get("id"), "ok": True, **more}).encode() + b"\n")

    async def listen(self, do: Callable[[Order], Awaitable[dict[str, object]]]) -> None:
        """Do what is asked until the input ends, which stops this process. A failure is an answer too."""
        while (order := await self.hear()) is not None:
            try:
                done = await do(order)
            except Exception as error:
                log.exception("order not done", order=order.get("do"))
                self.answer(order, ok=False, error=f"{type(error).__name__}: {error}")
            else:
                self.answer(order, **done)
        self.stop.set()


def leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        group = cast("BaseExceptionGroup[BaseException]", error)
        return [leaf for inner in group.exceptions for leaf in leaves(inner)]
    return [error]
