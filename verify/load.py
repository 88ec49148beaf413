"""Families that order and pay over HTTP, and write down what they were told.

A client knows only what it was answered.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, cast
from uuid import UUID

from caravan.ids import new_id
from caravan.payments.providers import SandboxProvider
from verify.history import Order, Told

ANSWER_SECONDS_MAX = 4.0
TRIES_MAX = 400
PAUSE_SECONDS = 0.05
WALKS_AWAY = 0.03  # of those whose answer never came: nobody will ask again
DOUBLES = 0.06  # asks again though the answer came, or pays twice at once


class NotSent(Exception):
    """Nobody listens there: surely nothing happened."""


class NoAnswer(Exception):
    """It was sent, and nothing came back: anything may have happened."""


@dataclass(slots=True)
class Line:
    """One client's connections, kept open, one per port."""

    _open: dict[int, tuple[asyncio.StreamReader, asyncio.StreamWriter]] = field(
        default_factory=dict[int, tuple[asyncio.StreamReader, asyncio.StreamWriter]]
    )

    async def ask(
        self, port: int, method: str, path: str, headers: dict[str, str], body: bytes = b""
    ) -> tuple[int, dict[str, Any]]:
        """The status and the JSON. Raises NotSent, NoAnswer."""
        try:
            async with asyncio.timeout(ANSWER_SECONDS_MAX):
                if port in self._open and self._open[port][0].at_eof():  # a server hangs up who says nothing for 5 s
                    self.drop(port)
                if port not in self._open:
                    self._open[port] = await asyncio.open_connection("127.0.0.1", port)
        except (OSError, TimeoutError) as error:
            raise NotSent(str(error)) from None
        reader, writer = self._open[port]
        said = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n{said}\r\n"
        try:
            async with asyncio.timeout(ANSWER_SECONDS_MAX):
                writer.write(head.encode() + body)
                return await _read(reader)
        except (OSError, TimeoutError, asyncio.IncompleteReadError, ValueError) as error:
            self.drop(port)
            raise NoAnswer(type(error).__name__) from None

    def drop(self, port: int) -> None:
        _, writer = self._open.pop(port, (None, None))
        if writer is not None:
            writer.transport.abort()

    def close(self) -> None:
        for port in list(self._open):
            self.drop(port)


async def _read(reader: asyncio.StreamReader) -> tuple[int, dict[str, Any]]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    lines = head.split("\r\n")
    length = next(int(line.split(":")[1]) for line in lines if line.lower().startswith("content-length:"))
    body = await reader.readexactly(length)
    return int(lines[0].split(" ")[1]), cast("dict[str, Any]", json.loads(body) if body else {})


@dataclass(slots=True)
class Load:
    """`clients` work through the orders; `ports` may change while they do. `errors`: answers that must never be."""

    orders: Sequence[Order]
    ports: Callable[[], list[int]]
    provider: SandboxProvider
    dice: random.Random
    clients: int = 16
    done: int = 0
    answers: Counter[str] = field(default_factory=Counter[str])
    errors: list[str] = field(default_factory=list[str])
    slowest_seconds: float = 0.0
    may: Callable[[], bool] = lambda: True  # whether the next order may begin; asked again and again

    @property
    def progress(self) -> float:
        return self.done / len(self.orders) if self.orders else 1.0

    async def run(self) -> None:
        waiting = iter(self.orders)

        async def client() -> None:
            line = Line()
            try:
                for order in waiting:
                    while not self.may():  # noqa: ASYNC110 - what it waits for is a condition of others
                        await asyncio.sleep(PAUSE_SECONDS)
                    started = time.monotonic()
                    await self.serve(line, order)
                    self.slowest_seconds = max(self.slowest_seconds, time.monotonic() - started)
                    self.done += 1
            finally:
                line.close()

        async with asyncio.TaskGroup() as group:
            for _ in range(self.clients):
                group.create_task(client())

    # -------------------------------------------------------------- one order

    async def serve(self, line: Line, order: Order, on_created: Callable[[], None] | None = None) -> None:
        """Make it and pay it. `on_created` is called when it is made; who wants to know that does not walk away."""
        patient = on_created is not None
        order.created = await self._until_told(lambda port: self._create(line, port, order), patient)
        if order.created is Told.OK and on_created:
            on_created()
        if order.created is not Told.OK or not order.pays:
            return
        event_id = f"msg_{new_id()}"
        order.paid = await self._until_told(lambda port: self._pay(line, port, order, event_id), patient)
        if order.paid is Told.OK and self.dice.random() < DOUBLES:  # the browser's button again, the provider again
            await self._until_told(lambda port: self._pay(line, port, order, event_id))

    async def _until_told(self, ask: Callable[[int], Awaitable[int]], patient: bool = False) -> Told:
        """Ask until there is an answer; some give up after one that never came."""
        told = Told.NOTHING
        for _ in range(TRIES_MAX):
            try:
                status = await ask(self.dice.choice(self.ports()))
            except NotSent:
                self.answers["not sent"] += 1
            except NoAnswer as error:
                self.answers[f"no answer: {error}"] += 1
                told = Told.UNKNOWN
                if not patient and self.dice.random() < WALKS_AWAY:
                    return told
            else:
                self.answers[str(status)] += 1
                if status in (200, 201):
                    return Told.OK
                if status == 503:  # try again: what became of it may be unknown (a commit whose answer was lost)
                    told = Told.UNKNOWN
                elif status >= 500:
                    self.errors.append(f"answered {status}")
                    told = Told.UNKNOWN
                elif status != 409:  # 409: the earlier, unanswered request is still at it
                    return Told.FAILED if told is Told.NOTHING else Told.UNKNOWN
            await asyncio.sleep(PAUSE_SECONDS * self.dice.uniform(0.5, 2))
        self.errors.append("no answer after hundreds of tries")
        return Told.UNKNOWN if told is not Told.NOTHING else Told.FAILED

    async def _create(self, line: Line, port: int, order: Order) -> int:
        headers = {
            "Authorization": f"Bearer {order.token}",
            "Content-Type": "application/json",
            "Idempotency-Key": order.mark,
        }
        body = json.dumps(order.body()).encode()
        status, said = await line.ask(port, "POST", "/api/v1/payments", headers, body)
        if status == 201:
            order.payment = UUID(said["id"])
            order.payments_told.add(order.payment)
            if self.dice.random() < DOUBLES:
                order.created = Told.OK
                return await self._again(line, port, order, headers, body)
        elif status == 422 or status == 400:
            self.errors.append(f"refused an order: {said.get('code')} {said.get('detail')}")
        return status

    async def _again(self, line: Line, port: int, order: Order, headers: dict[str, str], body: bytes) -> int:
        """The same request again, whatever becomes of it: an answer must name the same payment."""
        try:
            status, said = await line.ask(port, "POST", "/api/v1/payments", headers, body)
        except (NotSent, NoAnswer):
            return 201
        if status == 201:
            order.payments_told.add(UUID(said["id"]))
        return 201

    async def _pay(self, line: Line, port: int, order: Order, event_id: str) -> int:
        if not order.by_webhook:
            headers = {"Authorization": f"Bearer {order.token}", "Content-Type": "application/json"}
            status, _ = await line.ask(port, "POST", f"/api/v1/payments/{order.payment}/confirm", headers, b"{}")
            return status
        now = datetime.now(UTC)
        data = {"paymentId": str(order.payment), "amountCents": order.cents, "currency": "INR"}
        body = json.dumps({"type": "payment.succeeded", "timestamp": now.isoformat(), "data": data}).encode()
        headers = self.provider.sign(event_id, now, body) | {"Content-Type": "application/json"}
        status, _ = await line.ask(port, "POST", "/api/v1/webhooks/sandbox", headers, body)
        return status
