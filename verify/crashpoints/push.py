"""The gateway between the feed and a socket, struck while it reads and while it hands over a frame.

A client remembers the last number that it saw, comes again after its connection or the gateway died, and asks for what
follows. What it has seen at the end is 1..n, each once.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass

from caravan.realtime.access import Visitor
from caravan.realtime.gateway import Gateway, Socket
from verify.crashpoints.points import points
from verify.crashpoints.stage import Case, Stage
from verify.crashpoints.steps import Refused, Step

FEED = "select coalesce(max(seq), 0)::int as seq from student_feed where student_id = %(student)s"


@dataclass(slots=True)
class Push(Step):
    """One client per case, whose feed is there already."""

    async def act(self, stage: Stage, case: Case) -> bool:
        with points.paused():
            [row] = await stage.world.rows(FEED, student=case.student)
        seen: list[int] = case.know.setdefault("seen", [])
        gateway = Gateway(stage.db, stage.wake)
        socket = gateway.join(Visitor(b"", {case.student: row["seq"]}))
        stop = asyncio.Event()
        reading = asyncio.create_task(_read(socket, seen, row["seq"], stop))
        try:
            gateway.resume(socket, {case.student: seen[-1] if seen else 0})
            await gateway.run(stop)
        finally:
            gateway.leave(socket)
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
            _take(socket, seen)  # what was sent before the end
        if seen != list(range(1, len(seen) + 1)):
            raise Refused(f"the client saw {seen}")
        return len(seen) == row["seq"]


async def _read(socket: Socket, seen: list[int], last: int, stop: asyncio.Event) -> None:
    stirred = asyncio.Event()
    socket.stirred = stirred.set
    _take(socket, seen)
    while not seen or seen[-1] < last:
        await stirred.wait()
        stirred.clear()
        _take(socket, seen)
    stop.set()


def _take(socket: Socket, seen: list[int]) -> None:
    while socket.queue:
        frame = json.loads(socket.queue.popleft())
        if frame["type"] != "business-event":
            raise Refused(f"the client was told to {frame['type']}")
        seen.append(frame["seq"])
