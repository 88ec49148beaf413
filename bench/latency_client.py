"""The families, in a process of their own: they listen, pay at times that were set before, and note what they see.

`python -m bench.latency_client`, its order on standard input as one JSON line: where, whose purchases, and the rate
(per second, after so many seconds `apart`; or `flow`, how many at a time, for as fast as it goes). Payments are made
when they were meant to be, however slow the answers are. Says on standard output, for each: meant, sent, answered and
told (SESSIONS_SCHEDULED read), in seconds of this machine's clock.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections.abc import Sequence
from typing import Any

import uvloop
from websockets.asyncio.client import connect

from bench.http import Connection, head

DRAIN_SECONDS = 30.0
CONNECTIONS_OPEN = 8


class Crowd:
    """Everybody who buys in one run."""

    def __init__(self, order: dict[str, Any]) -> None:
        self.http_port: int = order["http_port"]
        self.ws_port: int = order["ws_port"]
        self.purchases: list[dict[str, str]] = order["purchases"]
        self.seen: dict[str, dict[str, float]] = {each["payment_id"]: {} for each in self.purchases}
        self.refused: list[str] = []
        self._missing = set(self.seen)
        self._all_told = asyncio.Event()
        self._free: list[Connection] = []

    # -------------------------------------------------------------- listening

    async def listen(self) -> list[asyncio.Task[None]]:
        families: dict[str, set[str]] = {}
        for each in self.purchases:
            families.setdefault(each["token"], set()).add(each["student_id"])
        ready = [asyncio.Event() for _ in families]
        told = zip(families.items(), ready, strict=True)
        tasks = [asyncio.create_task(self._family(token, students, event)) for (token, students), event in told]
        for event in ready:
            await event.wait()
        return tasks

    async def _family(self, token: str, students: set[str], ready: asyncio.Event) -> None:
        url = f"ws://127.0.0.1:{self.ws_port}/ws"
        headers = {"Authorization": f"Bearer {token}"}
        async with connect(url, additional_headers=headers, compression=None, max_queue=None) as socket:
            await socket.send(json.dumps({"type": "resume", "after": dict.fromkeys(students, 0)}))
            ready.set()
            async for text in socket:
                now = time.time()
                event = json.loads(text).get("event")
                if event and event["type"] == "SESSIONS_SCHEDULED":
                    self._told(event["paymentId"], now)

    def _told(self, payment: str, now: float) -> None:
        if payment in self._missing:
            self.seen[payment]["told"] = now
            self._missing.discard(payment)
            if not self._missing:
                self._all_told.set()

    # -------------------------------------------------------------- paying

    async def pay_at(self, rate: float, seed: int, apart: float = 0.0) -> None:
        """Independent buyers: the times between them are random, with this rate on average, after `apart` seconds."""
        dice = random.Random(seed)
        self._free = [await Connection.open(self.http_port) for _ in range(CONNECTIONS_OPEN)]
        meant = time.time() + 0.5
        paying: list[asyncio.Task[None]] = []
        for each in self.purchases:
            meant += apart + dice.expovariate(rate)
            await asyncio.sleep(max(0.0, meant - time.time()))
            paying.append(asyncio.create_task(self._pay(each, meant)))
        await asyncio.gather(*paying)

    async def pay_fast(self, flow: int) -> None:
        """So many at a time, one after the other."""
        self._free = [await Connection.open(self.http_port) for _ in range(flow)]
        waiting = iter(self.purchases)

        async def one() -> None:
            for each in waiting:
                await self._pay(each, time.time())

        await asyncio.gather(*[one() for _ in range(flow)])

    async def _pay(self, each: dict[str, str], meant: float) -> None:
        self._free = [connection for connection in self._free if not connection.ended]
        connection = self._free.pop() if self._free else await Connection.open(self.http_port)
        seen = self.seen[each["payment_id"]]
        seen |= {"meant": meant, "sent": time.time()}
        status, body = await connection.request(
            head("POST", f"/api/v1/payments/{each['payment_id']}/confirm", each["token"])
        )
        seen["answered"] = time.time()
        self._free.append(connection)
        if status != 200:
            self.refused.append(f"{status} {body[:200].decode(errors='replace')}")

    async def drain(self) -> None:
        try:
            async with asyncio.timeout(DRAIN_SECONDS):
                await self._all_told.wait()
        except TimeoutError:
            pass  # what is missing is told by its absence


async def run(order: dict[str, Any]) -> dict[str, Any]:
    crowd = Crowd(order)
    listening: Sequence[asyncio.Task[None]] = await crowd.listen()
    if "flow" in order:
        await crowd.pay_fast(order["flow"])
    else:
        await crowd.pay_at(order["rate"], order["seed"], order.get("apart", 0.0))
    await crowd.drain()
    for task in listening:
        task.cancel()
    return {"seen": crowd.seen, "refused": crowd.refused[:3]}


if __name__ == "__main__":
    json.dump(uvloop.run(run(json.loads(sys.stdin.readline()))), sys.stdout)
