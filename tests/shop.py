"""A small marketplace on a test's database, driven as customers, providers and operators would.

`work` lets every worker do all that waits; nothing sleeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any
from uuid import UUID

import msgspec

from caravan.apps.subscriptions import SUBSCRIPTIONS
from caravan.db import Database
from caravan.db.tx import Row
from caravan.eventlog.drain import drain
from caravan.fulfilment.diagnose import Finding, diagnose
from caravan.fulfilment.invariants import check
from caravan.ids import new_id
from caravan.payments.model import Order, Rules
from caravan.payments.operations import confirm_payment, create_payment
from caravan.payments.providers import SANDBOX, SandboxProvider, list_providers
from caravan.payments.webhooks import receive_webhook
from caravan.settings import Settings
from caravan.student_views.queries import LEARNING, get_view
from tests import builders

SETTINGS = Settings(sandbox_webhook_secret="whsec_MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIzNDU2Nzg5MDE=")
RULES = Rules.of(SETTINGS)
PROVIDERS = list_providers(SETTINGS)
SANDBOX_PROVIDER = PROVIDERS[SANDBOX]
assert isinstance(SANDBOX_PROVIDER, SandboxProvider)


@dataclass(slots=True)
class Shop:
    """One student, one course, `trainers` trainers of it."""

    db: Database
    student: UUID
    course: UUID
    trainers: list[UUID]

    async def buy(
        self,
        *,
        student: UUID | None = None,
        sessions: int = 30,
        slot: str = "6:00 AM",
        mode: str = "online",
        start: date | None = None,
        again: bool = False,
        payment_id: UUID | None = None,
    ) -> UUID:
        """A new checkout's first payment, not paid yet."""
        async with self.db.transaction("payment-service") as tx:
            order = Order(
                student_id=student or self.student,
                course_id=self.course,
                session_count=sessions,
                learning_mode=mode,
                group_size=1,
                time_slot=slot,
                start_date=start or (tx.now + timedelta(days=3)).date(),
                raw={},
                again=again,
            )
            created = await create_payment(tx, order, RULES, PROVIDERS, account_id=None, payment_id=payment_id)
            return created.payment.id

    async def pay(self, payment: UUID) -> None:
        """The provider says that it succeeded."""
        async with self.db.transaction("payment-service") as tx:
            await confirm_payment(tx, payment, PROVIDERS)

    async def webhook(
        self, payment: UUID, type: str = "payment.succeeded", *, cents: int = 360000, **more: Any
    ) -> None:

        async with self.db.transaction("payment-service") as tx:
            data = {"paymentId": str(payment), "amountCents": cents, "currency": "INR"} | more
            body = msgspec.json.encode({"type": type, "timestamp": tx.now, "data": data})
            assert isinstance(SANDBOX_PROVIDER, SandboxProvider)
            await receive_webhook(tx, SANDBOX_PROVIDER, SANDBOX_PROVIDER.sign(f"msg_{new_id()}", tx.now, body), body)

    async def bought(self, **terms: Any) -> UUID:
        payment = await self.buy(**terms)
        await self.pay(payment)
        return payment

    async def work(self, *services: str) -> int:
        """All workers, or those named, until nothing waits for them."""
        return await drain(self.db, [s for s in SUBSCRIPTIONS if not services or s.service in services])

    async def sees(self, payment: UUID, student: UUID | None = None) -> Row:
        """The course as it is on the student's screen."""
        async with self.db.transaction(read_only=True) as tx:
            view = await get_view(tx, student or self.student, LEARNING, payment_id=payment)
        [item] = view.items
        return item

    async def feed(self, student: UUID | None = None) -> list[str]:
        async with self.db.transaction(read_only=True) as tx:
            rows = await tx.tuples(
                "select seq, type from student_feed where student_id = %(id)s order by seq",
                {"id": student or self.student},
            )
        assert [seq for seq, _ in rows] == list(range(1, len(rows) + 1))
        return [type for _, type in rows]

    async def why(self, payment: UUID) -> Finding:
        async with self.db.transaction(read_only=True) as tx:
            [finding] = await diagnose(tx, payment_id=payment)
        return finding

    async def violations(self) -> Sequence[object]:
        async with self.db.transaction(read_only=True) as tx:
            return await check(tx)

    async def rows(self, query: Any, **params: Any) -> list[Row]:
        async with self.db.transaction() as tx:
            return await tx.all(query, params)

    async def run(self, statement: Any, **params: Any) -> int:
        """Something that happened behind the product's back."""
        async with self.db.transaction() as tx:
            return await tx.execute(statement, params)


async def open_shop(db: Database, *, trainers: int = 2, **ids: UUID) -> Shop:
    async with db.transaction() as tx:
        course = await builders.a_course(tx, tiers={10: 120000, 20: 240000, 30: 360000}, course_id=ids.get("course"))
        student = await builders.a_student(tx, student_id=ids.get("student"))
        taught = [await builders.a_trainer(tx, course) for _ in range(trainers)]
    return Shop(db, student, course, taught)
