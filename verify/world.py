"""A marketplace on a scratch database, driven through the product's own operations, and what its payments come to.

`finals` is how parts compare runs: for each payment all that it came to (money, purchase, sessions, refunds, coins,
events in their order, what each group has processed) without ids and instants, and without which trainer it was. Two
runs that end alike have equal finals; an effect that is there twice, or not at all, shows.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, time, timedelta
from itertools import count
from typing import Any
from uuid import UUID

import msgspec

from caravan.apps.subscriptions import SUBSCRIPTIONS
from caravan.catalog.courses import Tier, create_course
from caravan.db import Database, Tx
from caravan.db.tx import Row
from caravan.eventlog.drain import drain
from caravan.fulfilment.invariants import check
from caravan.ids import new_id
from caravan.payments.coins import grant_coins
from caravan.payments.model import Order, Rules
from caravan.payments.operations import confirm_payment, create_payment
from caravan.payments.providers import SANDBOX, SandboxProvider, list_providers
from caravan.payments.refunds import refund_payment
from caravan.payments.webhooks import receive_webhook
from caravan.people.availability import Rule
from caravan.people.students import create_student
from caravan.people.trainers import create_trainer
from caravan.settings import Settings

SETTINGS = Settings(sandbox_webhook_secret="whsec_MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIzNDU2Nzg5MDE=")  # noqa: S106
RULES = Rules.of(SETTINGS)
PROVIDERS = list_providers(SETTINGS)
CENTRE = (28.6139, 77.2090)
PRICES = {4: 48_000, 8: 96_000, 12: 144_000}
SESSIONS = 4
HOURS = 24


def sandbox() -> SandboxProvider:
    provider = PROVIDERS[SANDBOX]
    assert isinstance(provider, SandboxProvider)
    return provider


def slot_of(hour: int) -> str:
    return f"{hour % HOURS:02d}:00"


@dataclass(slots=True)
class World:
    """One course that `trainers` teach around the clock, online and at home. Students buy SESSIONS of it at some hour.

    A trainer can serve one student per hour of the day: give students different hours, or let them compete.
    """

    db: Database
    course: UUID
    trainers: list[UUID]
    random: random.Random = field(default_factory=lambda: random.Random(0))
    _numbers: count[int] = field(default_factory=lambda: count(1))

    # -- people

    async def students(self, number: int, *, located: bool = True, coins: int = 0) -> list[UUID]:
        """New students; their STUDENT_UPDATED still waits for the workers."""
        async with self.db.transaction("student-service") as tx:
            made: list[UUID] = []
            for _ in range(number):
                latitude, longitude = CENTRE if located else (None, None)
                name = f"Student {next(self._numbers)}"
                made.append(await create_student(tx, name=name, latitude=latitude, longitude=longitude))
                if coins:
                    await grant_coins(tx, made[-1], coins, "verify")
            return made

    async def trainer(self, **more: Any) -> UUID:
        """Another trainer of the course, free around the clock."""
        async with self.db.transaction("admin-service") as tx:
            trainer = await add_trainer(tx, [self.course], **more)
        self.trainers.append(trainer)
        return trainer

    # -- buying and paying

    async def buy(
        self,
        student: UUID,
        *,
        hour: int = 6,
        sessions: int = SESSIONS,
        mode: str = "online",
        start: date | None = None,
        coins: int = 0,
        again: bool = False,
        payment: UUID | None = None,
        tx: Tx | None = None,
    ) -> UUID:
        """A checkout and its first attempt, not paid yet; in `tx`, or in a transaction of its own."""
        if tx is None:
            async with self.db.transaction("payment-service") as own:
                return await self.buy(
                    student,
                    hour=hour,
                    sessions=sessions,
                    mode=mode,
                    start=start,
                    coins=coins,
                    again=again,
                    payment=payment,
                    tx=own,
                )
        order = Order(
            student_id=student,
            course_id=self.course,
            session_count=sessions,
            learning_mode=mode,
            group_size=1,
            time_slot=slot_of(hour),
            start_date=start or (tx.now + timedelta(days=3)).date(),
            raw={"from": "verify"},
            coins=coins,
            again=again,
        )
        made = await create_payment(tx, order, RULES, PROVIDERS, account_id=None, payment_id=payment)
        return made.payment.id

    async def pay(self, payments: Sequence[UUID]) -> None:
        """The sandbox says that they succeeded, in one transaction."""
        async with self.db.transaction("payment-service") as tx:
            for payment in payments:
                await confirm_payment(tx, payment, PROVIDERS)

    async def webhook(
        self,
        payment: UUID,
        type: str = "payment.succeeded",
        *,
        cents: int = PRICES[SESSIONS],
        refund_id: str | None = None,
        event_id: str | None = None,
        currency: str = "INR",
    ) -> bool:
        """The provider tells us, signed; the same `event_id` is the same webhook. False: we had it already."""
        async with self.db.transaction("payment-service") as tx:
            headers, body = sign(
                tx.now, payment, type, cents=cents, refund_id=refund_id, event_id=event_id, currency=currency
            )
            return await receive_webhook(tx, sandbox(), headers, body)

    async def refund(self, payment: UUID, *, cents: int | None = None, sessions: int | None = None) -> None:
        """An operator gives back all, or `cents` with so many sessions."""
        async with self.db.transaction("admin-service") as tx:
            await refund_payment(tx, payment, amount_cents=cents, sessions=sessions, note="verify", source="admin")

    # -- time passes

    async def work(self, *services: str) -> int:
        """All workers, or those of `services`, until nothing waits for them; how many events that were."""
        return await drain(self.db, [s for s in SUBSCRIPTIONS if not services or s.service in services])

    async def run(self, statement: Any, **params: Any) -> int:
        """Something that happens behind the product's back."""
        async with self.db.transaction("verify") as tx:
            return await tx.execute(statement, params)

    async def rows(self, query: Any, **params: Any) -> list[Row]:
        async with self.db.transaction("verify", read_only=True) as tx:
            return await tx.all(query, params)

    # -- what it came to

    async def violations(self, *, leeway: timedelta = timedelta(0)) -> list[str]:
        """The product's own invariants that do not hold; without leeway, so call it after `work`."""
        async with self.db.transaction("verify", read_only=True) as tx:
            return [str(violation) for violation in await check(tx, leeway=leeway)]

    async def finals(self, payments: Sequence[UUID]) -> dict[UUID, dict[str, Any]]:
        """What each payment came to, comparable between runs; see the module."""
        async with self.db.transaction("verify", read_only=True) as tx:
            rows = await tx.tuples(FINALS, {"payment_ids": list(payments)})
        return {payment: document for payment, document in rows}

    async def hashes(self, payments: Sequence[UUID]) -> dict[UUID, str]:
        return {payment: hash_of(final) for payment, final in (await self.finals(payments)).items()}


def hash_of(final: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(final, sort_keys=True).encode()).hexdigest()[:16]


def difference(final: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """In which fields two finals differ, in a line."""
    return "; ".join(
        f"{name}: {json.dumps(final.get(name))} instead of {json.dumps(other.get(name))}"
        for name in sorted({*final, *other})
        if final.get(name) != other.get(name)
    )


def sign(
    now: datetime,
    payment: UUID,
    type: str,
    *,
    cents: int,
    refund_id: str | None = None,
    event_id: str | None = None,
    currency: str = "INR",
) -> tuple[dict[str, str], bytes]:
    """A webhook's headers and body."""
    data: dict[str, Any] = {"paymentId": str(payment), "amountCents": cents, "currency": currency}
    data |= {"refundId": refund_id} if refund_id else {}
    body = msgspec.json.encode({"type": type, "timestamp": now, "data": data})
    return sandbox().sign(event_id or f"msg_{new_id()}", now, body), body


async def open_world(db: Database, *, trainers: int = 2, random: random.Random | None = None) -> World:
    """A course and its trainers, the workers up to date, on an empty migrated database."""
    async with db.transaction("admin-service") as tx:
        tiers = [Tier(sessions, cents) for sessions, cents in PRICES.items()]
        course = await create_course(tx, title="Robotics", category="STEM", session_minutes=60, tiers=tiers)
        taught = [await add_trainer(tx, [course]) for _ in range(trainers)]
    world = World(db, course, taught)
    if random:
        world.random = random
    await world.work()
    return world


async def add_trainer(tx: Tx, courses: Sequence[UUID], *, modes: Sequence[str] = ("online", "home")) -> UUID:
    """A trainer who is free around the clock for a year."""
    today = tx.now.date()
    rules = [
        Rule(weekday, time(0), time(0), today - timedelta(days=1), today + timedelta(days=365))
        for weekday in range(1, 8)
    ]
    return await create_trainer(
        tx,
        name="Ravi",
        course_ids=courses,
        rules=rules,
        modes=modes,
        latitude=CENTRE[0],
        longitude=CENTRE[1],
    )


# All that payments came to, without ids, instants and the choice among equal trainers.
FINALS = """
select p.id, jsonb_build_object(
  'payment', jsonb_build_array(p.status, p.amount_cents, p.captured_cents, p.captured_currency, p.refunded_cents,
                               p.coins, p.provider, p.accepted_at is not null),
  'checkout', jsonb_build_array(c.sessions, c.price_cents, c.paid_by = p.id,
                                (select count(*) from payments o where o.checkout_id = c.id)),
  'undelivered', (select jsonb_agg(jsonb_build_array(u.reason, u.held)) from undelivered u where u.payment_id = p.id),
  'stage', (select jsonb_build_array(f.stage, f.total, f.scheduled, f.completed, f.student_absent, f.cancelled,
                                     f.refunded, f.owed)
            from fulfilments f where f.payment_id = p.id),
  'purchases', (select jsonb_agg(jsonb_build_array(pu.purchase_tier, pu.refunded_sessions, pu.is_active,
                                                   pu.learning_mode, pu.session_minutes, pu.weekdays))
                from student_course_purchases pu where pu.payment_id = p.id),
  'allocations', (select jsonb_agg(jsonb_build_array(a.status, a.trainer_id is not null, a.metadata->'sessionCount')
                                   order by a.status, a.created_at)
                  from trainer_allocations a join student_course_purchases pu on pu.id = a.purchase_id
                  where pu.payment_id = p.id),
  'bookings', (select jsonb_agg(jsonb_build_array(b.kind, b.live, cardinality(b.starts), b.minutes)
                                order by b.live, b.kind, cardinality(b.starts))
               from bookings b join student_course_purchases pu on pu.id = b.purchase_id where pu.payment_id = p.id),
  'sessions', (select jsonb_agg(jsonb_build_array(s.seq, s.status, s.day) order by s.seq)
               from (select t.seq, t.status, extract(epoch from t.starts_at - min(t.starts_at) over ())::bigint as day
                     from tutoring_sessions t join student_course_purchases pu on pu.id = t.purchase_id
                     where pu.payment_id = p.id) s),
  'refunds', (select jsonb_agg(jsonb_build_array(r.amount_cents, r.sessions, r.session_seqs, r.source, r.provider)
                               order by r.amount_cents, r.sessions)
              from refunds r where r.payment_id = p.id),
  'coins', (select jsonb_agg(jsonb_build_array(e.kind, e.coins) order by e.kind, e.coins)
            from coin_entries e where e.payment_id = p.id or (e.payment_id is null and e.student_id = p.student_id)),
  'webhooks', (select jsonb_agg(jsonb_build_array(w.type, w.applied_at is not null, w.outcome)
                                order by w.type, w.outcome)
               from webhook_events w where w.payment_id = p.id),
  'cart', (select count(*) from cart_items i where i.student_id = p.student_id),
  'events', (select jsonb_agg(o.type order by o.id) from outbox o where o.correlation_id = p.id::text),
  'feed', (select jsonb_agg(jsonb_build_array(f.seq, f.type) order by f.seq)
           from student_feed f where f.student_id = p.student_id),
  'processed', (select jsonb_object_agg(e.what, e.times)
                from (select consumer_group || ' ' || event_type as what, count(*) as times
                      from processed_events where correlation_id = p.id::text group by 1) e),
  'dead letters', (select jsonb_agg(jsonb_build_array(d.consumer_group, d.event_type, d.code, d.status)
                                    order by d.consumer_group, d.event_type, d.status)
                   from dead_letters d where d.correlation_id = p.id::text),
  'audit', (select jsonb_agg(l.action order by l.at, l.id) from audit_log l where l.subject_id = p.id::text)
)
from payments p join checkouts c on c.id = p.checkout_id
where p.id = any(%(payment_ids)b::uuid[])
"""
