"""What a process started by the supervisor runs: `python -m caravan.apps.child web|workers`.

Imports come first, while the database is still starting; then it does what its standard input says, one JSON line at a
time, and ends when that ends, or on SIGTERM. See children.py for the other end.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress

import structlog
import uvloop

from caravan import telemetry
from caravan.apps.line import Line, Order, leaves
from caravan.apps.process import calm_collector, ended_if_frozen
from caravan.settings import Settings

log: structlog.stdlib.BoundLogger = structlog.get_logger()

Run = Callable[[Line, Settings, Order], Awaitable[None]]


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
        async with ended_if_frozen():
            await run(line, Settings.model_validate(order["settings"]), order)
    except Exception as error:
        first_error = leaves(error)[0]
        line.answer(order, ok=False, error=str(first_error) or type(first_error).__name__)  # of a start that failed
        raise


def main() -> int:
    role = sys.argv[1]
    telemetry.configure_logging()
    try:
        run = _import_or_tell(role)
        calm_collector()
        uvloop.run(_main(run))
    except Exception as error:
        for inner in leaves(error):
            log.error(f"the process of the {role} ends: {type(inner).__name__}: {inner}", exc_info=inner)
        return 1
    return 0


def _import_or_tell(role: str) -> Run:
    """What cannot even be imported is told to the supervisor before anybody asks."""
    try:
        return _import(role)
    except Exception as error:
        with suppress(OSError):
            os.write(0, json.dumps({"last_words": f"{type(error).__name__}: {error}"}).encode() + b"\n")
        raise


def _import(role: str) -> Run:
    if role == "web":
        from caravan.apps import web

        return web.run_child
    from caravan.apps import worker

    return worker.run_child


if __name__ == "__main__":
    sys.exit(main())
