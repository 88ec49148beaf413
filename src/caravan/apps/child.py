"""What a process started by the supervisor runs: `python -m caravan.apps.child web|workers`.

Imports come first, while the database is still starting; then it does what its standard input says, one JSON line at a
time, and ends when that ends, or on SIGTERM. See children.py for the other end.
"""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, cast

import structlog
import uvloop

from caravan import telemetry
from caravan.settings import Settings

log: structlog.stdlib.BoundLogger = structlog.get_logger()

Order = dict[str, Any]
Run = Callable[["Line", Settings, Order], Awaitable[None]]


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


async def _main(run: Run) -> None:
    channel = socket.socket(fileno=0)
    channel.setblocking(False)
    line = Line(*await asyncio.open_connection(sock=channel))
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, line.stop.set)
    first = asyncio.create_task(line.hear())
    stopped = asyncio.create_task(line.stop.wait())
    await asyncio.wait({first, stopped}, return_when=asyncio.FIRST_COMPLETED)
    order = first.result() if first.done() else None
    if order is None:
        return
    stopped.cancel()
    try:
        await run(line, Settings.model_validate(order["settings"]), order)
    except Exception as error:
        first_error = leaves(error)[0]
        line.answer(order, ok=False, error=str(first_error) or type(first_error).__name__)  # of a start that failed
        raise


def main() -> int:
    role = sys.argv[1]
    telemetry.configure_logging()
    try:
        uvloop.run(_main(_import(role)))
    except Exception as error:
        for inner in leaves(error):
            log.error(f"the process of the {role} ends: {type(inner).__name__}: {inner}", exc_info=inner)
        return 1
    return 0


def _import(role: str) -> Run:
    if role == "web":
        from caravan.apps import web

        return web.run_child
    from caravan.apps import worker

    return worker.run_child


def leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        group = cast("BaseExceptionGroup[BaseException]", error)
        return [leaf for inner in group.exceptions for leaf in leaves(inner)]
    return [error]


if __name__ == "__main__":
    sys.exit(main())
