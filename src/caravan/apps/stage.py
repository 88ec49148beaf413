"""The running system as a rehearsal sees it: over HTTP, at the supervisor's door, and in the database."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Any, TypeVar, cast
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen
from uuid import UUID

from caravan import calendar
from caravan.apps import control
from caravan.db import Database, Tx
from caravan.fulfilment.diagnose import Finding, diagnose
from caravan.ids import new_id
from caravan.payments import store
from caravan.payments.model import SANDBOX, Checkout, Order, Payment, Status

T = TypeVar("T")
POLL_SECONDS = 0.03
PATIENCE_SECONDS = 20.0
SOURCE = "payment-service"
MARK = "rehearsal"  # in a checkout's raw input: money of a rehearsal


class NotAsExpected(Exception):
    """The rehearsal did not go as it should; the message says what was expected and what was found."""


@dataclass(frozen=True, slots=True)
class Sale:
    """What is bought in an incident. `start` None: in three days."""

    student_id: UUID
    course_id: UUID
    slot: str
    sessions: int = 30
    mode: str = "home"
    start: date | None = None


class Stage:
    """One running `caravan up --demo`."""

    def __init__(self, db: Database, demo: dict[str, Any], door: Path) -> None:
        self.db = db
        self.demo = demo
        self._door = door
        self._tokens: dict[str, str] = {}

    # -------------------------------------------------------------- over HTTP

    async def http(self, method: str, path: str, body: object = None, *, who: str) -> Any:
        """The JSON of a successful answer to `who` (an account's e-mail). Raises NotAsExpected with the refusal."""
        return await asyncio.to_thread(self._request, method, path, body, await self.token(who))

    async def token(self, who: str) -> str:
        if who not in self._tokens:
            signed_in = await asyncio.to_thread(self._request, "POST", "/api/v1/auth/login", self._account(who), None)
            self._tokens[who] = signed_in["token"]
        return self._tokens[who]

    def _account(self, who: str) -> dict[str, str]:
        accounts = [self.demo["admin"], *self.demo["rehearsal"]]
        found = next(each for each in accounts if each["email"] == who)
        return {"email": found["email"], "password": found["password"]}

    def _request(self, method: str, path: str, body: object, token: str | None) -> Any:
        request = Request(self.demo["url"] + path, method=method)  # noqa: S310 - our own address, from demo.json
        request.add_header("Content-Type", "application/json")
        if token:
            request.add_header("Authorization", f"Bearer {token}")
        data = None if body is None else json.dumps(body, default=str).encode()
        try:
            with urlopen(request, data, timeout=PATIENCE_SECONDS) as answer:  # noqa: S310
                return json.load(answer)
        except HTTPError as error:
            said = cast("dict[str, Any]", json.load(error))
            detail = f"{error.code} {said.get('code')}: {said.get('detail')}"
            raise NotAsExpected(f"{method} {path} answered {detail}") from None
        except URLError as error:
            refused = f"{self.demo['url']} does not answer ({error.reason})"
            raise NotAsExpected(f"{refused}: start it with `caravan up --demo`") from None

    @property
    def admin(self) -> str:
        return self.demo["admin"]["email"]

    def parent_of(self, student_id: UUID) -> str:
        return next(each["email"] for each in self.demo["rehearsal"] if each["id"] == str(student_id))

    def student(self, name: str) -> UUID:
        return next(UUID(each["id"]) for each in self.demo["rehearsal"] if each["name"] == name)

    async def buy(self, sale: Sale) -> UUID:
        """Check out and pay as the parent would; the payment's id."""
        who = self.parent_of(sale.student_id)
        asked = {
            "studentId": sale.student_id,
            "courseId": sale.course_id,
            "sessionCount": sale.sessions,
            "learningMode": sale.mode,
            "groupSize": 1,
            "timeSlot": sale.slot,
            "startDate": sale.start or date.today() + timedelta(days=3),
            "again": True,
            MARK: True,
        }
        payment = await self.http("POST", "/api/v1/payments", asked, who=who)
        await self.http("POST", f"/api/v1/payments/{payment['id']}/confirm", {}, who=who)
        return UUID(payment["id"])

    async def refund(self, payment_id: UUID) -> None:
        path = f"/api/v1/admin/payments/{payment_id}/refund"
        await self.http("POST", path, {"note": "An earlier rehearsal makes room for the next."}, who=self.admin)

    # -------------------------------------------------------------- over the door

    async def stop(self, service: str) -> None:
        await self._order("stop", service)

    async def start(self, service: str) -> None:
        await self._order("start", service)

    async def _order(self, command: str, service: str) -> None:
        answer = await asyncio.to_thread(control.ask, self._door, command=command, name=service)
        if not answer["ok"]:
            raise NotAsExpected(f"{command} {service}: {answer['error']}")

    # -------------------------------------------------------------- looking

    async def look(self, payment_id: UUID) -> Finding:
        async with self.db.transaction("rehearsal", read_only=True) as tx:
            found = await diagnose(tx, payment_id=payment_id)
        if not found:
            raise NotAsExpected(f"payment {payment_id} is not there")
        return found[0]

    async def until(self, what: str, check: Callable[[], Awaitable[T | None]]) -> T:
        """The first true answer. Raises NotAsExpected after PATIENCE_SECONDS."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not (found := await check()):
            if time.monotonic() > deadline:
                raise NotAsExpected(f"not within {PATIENCE_SECONDS:.0f} s: {what}")
            await asyncio.sleep(POLL_SECONDS)
        return found

    async def until_reason(self, payment_id: UUID, reason: str) -> Finding:
        async def check() -> Finding | None:
            finding = await self.look(payment_id)
            return finding if finding.reason == reason else None

        return await self.until(f"payment {payment_id} waiting with {reason}", check)

    async def until_stage(self, payment_id: UUID, stage: str) -> Finding:
        async def check() -> Finding | None:
            finding = await self.look(payment_id)
            return finding if finding.stage == stage else None

        return await self.until(f"payment {payment_id} at stage {stage}", check)

    async def until_delivered(self, payment_id: UUID) -> dict[str, Any]:
        """Scheduled, nothing owed, no reason; the row of `fulfilments`."""

        async def check() -> dict[str, Any] | None:
            async with self.db.transaction("rehearsal", read_only=True) as tx:
                row = await tx.find(DELIVERED, {"payment_id": payment_id})
            return row

        return await self.until(f"payment {payment_id} delivered", check)

    # -------------------------------------------------------------- importing money as it was

    async def record_payment(self, payment_id: UUID, sale: Sale, amount_cents: int) -> None:
        """A payment that a provider knows already, with its own id and terms, whatever today's rules for a checkout."""

        async def work(tx: Tx) -> None:
            await _insert(tx, payment_id, sale, amount_cents)

        await self.db.transact(work, SOURCE)

    async def exists(self, payment_id: UUID) -> bool:
        async with self.db.transaction("rehearsal", read_only=True) as tx:
            return await store.find_payment(tx, payment_id) is not None

    async def earlier(self) -> list[UUID]:
        """Payments of earlier rehearsals that were not given back yet."""
        async with self.db.transaction("rehearsal", read_only=True) as tx:
            return await tx.values(EARLIER, {"mark": MARK})

    async def until_released(self, payment_ids: Sequence[UUID]) -> None:
        """Until nobody's time is taken for these payments any more."""

        async def check() -> bool:
            async with self.db.transaction("rehearsal", read_only=True) as tx:
                return not await tx.value(STILL_BOOKED, {"payment_ids": list(payment_ids)})

        await self.until("the time of earlier rehearsals is free again", check)


DELIVERED = """
select f.* from fulfilments f left join undelivered u on u.payment_id = f.payment_id
where f.payment_id = %(payment_id)s and f.stage = 'scheduled' and f.owed = 0 and u.payment_id is null
"""

EARLIER = """
select p.id from payments p join checkouts c on c.id = p.checkout_id
where c.raw ? %(mark)s and p.captured_at is not null and p.status <> 'refunded' order by p.id
"""

STILL_BOOKED = """
select exists (select from bookings b join student_course_purchases pu on pu.id = b.purchase_id
               where pu.payment_id = any(%(payment_ids)b::uuid[]) and b.live)
"""


async def _insert(tx: Tx, payment_id: UUID, sale: Sale, amount_cents: int) -> None:
    """The checkout and its payment, asked for and not captured yet."""
    assert sale.start is not None
    raw = {
        "courseId": str(sale.course_id),
        "sessionCount": sale.sessions,
        "learningMode": sale.mode,
        "groupSize": 1,
        "timeSlot": sale.slot,
        "startDate": sale.start.isoformat(),
    }
    order = Order(sale.student_id, sale.course_id, sale.sessions, sale.mode, 1, sale.slot, sale.start, raw)
    offer = await store.find_offer(tx, order)
    if offer is None:
        raise NotAsExpected("the demo's course or student is not there: was this database made by `up --demo`?")
    checkout = Checkout(
        id=new_id(),
        account_id=None,
        student_id=sale.student_id,
        course_id=sale.course_id,
        sessions=sale.sessions,
        price_cents=amount_cents,
        currency="INR",
        session_minutes=offer.session_minutes,
        weekdays=list(offer.weekdays),
        learning_mode=sale.mode,
        group_size=1,
        timezone=offer.timezone,
        slot_start=calendar.parse_slot(sale.slot).start,
        start_date=sale.start,
        cart_item_id=None,
        expires_at=tx.now,
        paid_by=None,
    )
    payment = Payment(
        id=payment_id,
        checkout_id=checkout.id,
        student_id=sale.student_id,
        provider=SANDBOX,
        status=Status.CREATED,
        amount_cents=amount_cents,
        currency="INR",
        coins=0,
        captured_cents=None,
        captured_currency=None,
        captured_at=None,
        refunded_cents=0,
        accepted_at=None,
        created_at=tx.now,
    )
    await store.insert_checkout(tx, checkout, raw | {MARK: True})
    await store.insert_payment(tx, payment, account_id=None, metadata=raw)
