"""The rounds of `races`: each puts THIRTY_TWO doers on one thing at the same moment, and knows what may come of it."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from random import Random
from typing import Any, TypeVar
from uuid import UUID

import httpx2

from caravan import deliveries
from caravan.allocations.operations import settle_allocations
from caravan.apps.subscriptions import BY_GROUP
from caravan.catalog.courses import Tier, create_course
from caravan.db import Database, Tx
from caravan.errors import DomainError
from caravan.eventlog import dead_letters
from caravan.eventlog.codec import Envelope
from caravan.ids import new_id
from caravan.payments.coins import count_available, grant_coins
from caravan.payments.model import Order
from caravan.payments.operations import confirm_payment, create_payment, retry_payment
from caravan.payments.refunds import refund_payment
from caravan.payments.webhooks import receive_webhook
from caravan.people.students import create_student, link_student
from caravan.purchases.operations import create_purchases
from caravan.sessions.operations import sync_sessions
from caravan.web import auth
from caravan.web.auth import Role
from verify.report import PartResult
from verify.world import HOURS, PRICES, PROVIDERS, RULES, SESSIONS, add_trainer, sandbox, sign

THIRTY_TWO = 32
PRICE = PRICES[SESSIONS]
SLOT = "6:00 AM"
NO_PASSWORD = "-"  # noqa: S105 - no password has this hash
COINS = 10  # of each checkout that takes some

T = TypeVar("T")
Answer = httpx2.Response | DomainError | None


@dataclass(slots=True)
class Ring:
    """Where a round takes place: a database with as many connections as doers, and the web in this process."""

    db: Database
    client: httpx2.AsyncClient
    admin: dict[str, str]
    dice: Random
    result: PartResult
    number: int

    # -- doing things at once

    async def together(self, work: Callable[[int], Awaitable[T]]) -> list[T | DomainError]:
        """All at once; refusals are answers, everything else that escapes is a violation."""
        answers: list[T | DomainError] = []
        for answer in await asyncio.gather(*(work(place) for place in range(THIRTY_TWO)), return_exceptions=True):
            if isinstance(answer, BaseException) and not isinstance(answer, DomainError):
                self.wrong(f"{type(answer).__name__} escaped: {answer}")
            else:
                answers.append(answer)
        return answers

    async def transact(self, work: Callable[[Tx], Awaitable[T]], source: str = "payment-service") -> T:
        return await self.db.transact(work, source)

    async def post(self, path: str, body: Any, headers: dict[str, str], key: str | None = None) -> httpx2.Response:
        named = headers | ({"idempotency-key": key} if key else {})
        answer = await self.client.post(f"/api/v1{path}", json=body, headers=named)
        if answer.status_code >= 500:
            self.wrong(f"{path} answered {answer.status_code}: {answer.text[:200]}")
        return answer

    # -- judging

    def wrong(self, said: str) -> None:
        self.result.violated(f"round {self.number}: {said}", str(self.number))

    def must(self, name: str, found: object, wanted: object) -> None:
        if found != wanted:
            self.wrong(f"{name}: {found!r} instead of {wanted!r}")

    async def value(self, query: Any, **params: Any) -> Any:
        async with self.db.transaction("verify", read_only=True) as tx:
            return await tx.value(query, params)


def codes(answers: Sequence[object]) -> Counter[str]:
    """What was answered, how often: 2xx as its number, refusals as their codes."""
    counted: Counter[str] = Counter()
    for answer in answers:
        if isinstance(answer, httpx2.Response):
            counted[str(answer.status_code) if answer.is_success else answer.json().get("code", "?")] += 1
        else:
            counted[answer.problem_code if isinstance(answer, DomainError) else "done"] += 1
    return counted


# ------------------------------------------------------------------ who takes part


async def a_course(tx: Tx) -> UUID:
    tiers = [Tier(SESSIONS, PRICE)]
    return await create_course(tx, title="Robotics", category="STEM", session_minutes=60, tiers=tiers)


def an_order(tx: Tx, student: UUID, course: UUID, *, coins: int = 0, again: bool = False, slot: str = SLOT) -> Order:
    return Order(
        student_id=student,
        course_id=course,
        session_count=SESSIONS,
        learning_mode="online",
        group_size=1,
        time_slot=slot,
        start_date=a_start(tx),
        raw={"from": "verify"},
        coins=coins,
        again=again,
    )


def a_start(tx: Tx) -> date:
    return (tx.now + timedelta(days=4)).date()


async def a_family(tx: Tx) -> tuple[UUID, dict[str, str]]:
    """A student and the header of their account's sign-in."""
    student = await create_student(tx, name="Asha")
    headers = await signed_in(tx, f"{student}@example.com", Role.STUDENT, student)
    return student, headers


async def signed_in(tx: Tx, email: str, role: Role, student: UUID | None = None) -> dict[str, str]:
    """The header of a new account, which nobody can sign in to by password."""
    account = await auth.create_account(tx, email=email, name="Verify", role=role, password_hash=NO_PASSWORD)
    if student:
        await link_student(tx, account, student)
    return {"authorization": f"Bearer {await auth.issue_token(tx, account)}"}


async def a_bought(ring: Ring, *, paid: bool = True, coins: int = 0) -> tuple[UUID, UUID]:
    """Somebody's payment of a course that one trainer teaches: (payment, checkout)."""

    async def work(tx: Tx) -> tuple[UUID, UUID]:
        course = await a_course(tx)
        await add_trainer(tx, [course])
        student = await create_student(tx, name="Asha")
        if coins:
            await grant_coins(tx, student, coins, "verify")
        made = await create_payment(tx, an_order(tx, student, course), RULES, PROVIDERS, account_id=None)
        if paid:
            await confirm_payment(tx, made.payment.id, PROVIDERS)
        return made.payment.id, made.payment.checkout_id

    return await ring.transact(work)


# Many captured payments of one course and slot at once: the races are about what comes after.
INSERT_CHECKOUTS = """
insert into checkouts (id, student_id, course_id, sessions, price_cents, currency, session_minutes, weekdays,
  learning_mode, timezone, slot_start, start_date, raw, expires_at, paid_by)
select checkout, student, %(course)s, %(sessions)s, %(price)s, 'INR', 60, '{1,2,3,4,5,6,7}', 'online', 'Asia/Kolkata',
  '06:00', %(start)s, '{}', %(now)s, payment
from unnest(%(checkouts)b::uuid[], %(payments)b::uuid[], %(students)b::uuid[]) as u(checkout, payment, student)
"""
INSERT_PAYMENTS = """
insert into payments (id, checkout_id, student_id, provider, status, amount_cents, currency, captured_cents,
  captured_currency, captured_at, metadata)
select payment, checkout, student, 'sandbox', 'succeeded', %(price)s, 'INR', %(price)s, 'INR', %(now)s, '{}'
from unnest(%(checkouts)b::uuid[], %(payments)b::uuid[], %(students)b::uuid[]) as u(checkout, payment, student)
"""


async def purchases_of(tx: Tx, course: UUID, students: Sequence[UUID]) -> list[UUID]:
    """A purchase without a trainer for each of `students` (the same one twice buys twice)."""
    payments = [new_id() for _ in students]
    rows = {
        "checkouts": [new_id() for _ in students],
        "payments": payments,
        "students": list(students),
        "course": course,
        "sessions": SESSIONS,
        "price": PRICE,
        "start": a_start(tx),
        "now": tx.now,
    }
    await tx.execute(INSERT_CHECKOUTS, rows)
    await tx.execute(INSERT_PAYMENTS, rows)
    await deliveries.open_deliveries(tx, payments)
    return list((await create_purchases(tx, payments)).created.values())


# ------------------------------------------------------------------ trainers' time

COUNT_BOOKED = "select count(*) from bookings where purchase_id = any(%(purchases)b::uuid[]) and live"
COUNT_WAITING = """
select count(*) from undelivered u join student_course_purchases pu on pu.payment_id = u.payment_id
where pu.id = any(%(purchases)b::uuid[]) and u.reason = %(reason)s
"""


async def one_trainer(ring: Ring) -> None:
    """Allocators of different students want the same trainer at the same time: one gets them, the others wait."""

    async def open_(tx: Tx) -> list[UUID]:
        course = await a_course(tx)
        await add_trainer(tx, [course])
        return await purchases_of(tx, course, [await create_student(tx, name="Asha") for _ in range(THIRTY_TWO)])

    await _allocate(ring, await ring.transact(open_), "NO_TRAINER_AVAILABLE")


async def one_student(ring: Ring) -> None:
    """One student has bought one time of day many times over, and there are trainers enough: held once."""

    async def open_(tx: Tx) -> list[UUID]:
        course = await a_course(tx)
        for _ in range(4):
            await add_trainer(tx, [course])
        return await purchases_of(tx, course, [await create_student(tx, name="Asha")] * THIRTY_TWO)

    await _allocate(ring, await ring.transact(open_), "STUDENT_CONFLICT")


async def _allocate(ring: Ring, purchases: list[UUID], reason: str) -> None:
    # Alone they meet at the trainer's time only; in batches that overlap they wait for each other's purchases first.
    others = ring.dice.choice((0, 0, 3))
    several = {place: ring.dice.sample(purchases, ring.dice.randint(0, others)) for place in range(THIRTY_TWO)}

    async def allocate(place: int) -> None:
        batch = list({purchases[place], *several[place]})
        await ring.transact(lambda tx: settle_allocations(tx, batch), "allocation-worker")

    await ring.together(allocate)
    ring.must("bookings", await ring.value(COUNT_BOOKED, purchases=purchases), 1)
    ring.must(reason, await ring.value(COUNT_WAITING, purchases=purchases, reason=reason), THIRTY_TWO - 1)


# ------------------------------------------------------------------ buying

COUNT_PAYMENTS = "select count(*) from payments where student_id = %(student)s"


async def _buyer(ring: Ring) -> tuple[UUID, dict[str, str], dict[str, Any]]:
    async def work(tx: Tx) -> tuple[UUID, dict[str, str], dict[str, Any]]:
        course = await a_course(tx)
        student, headers = await a_family(tx)
        body = {
            "studentId": str(student),
            "courseId": str(course),
            "sessionCount": SESSIONS,
            "learningMode": "online",
            "timeSlot": SLOT,
            "startDate": a_start(tx).isoformat(),
        }
        return student, headers, body

    return await ring.transact(work)


async def one_key(ring: Ring) -> None:
    """The same request with one key: one payment, one answer; who comes while it runs is told so, and may ask again."""
    student, headers, body = await _buyer(ring)
    key = str(new_id())
    answers = await ring.together(lambda _place: ring.post("/payments", body, headers, key))
    answers.append(await ring.post("/payments", body, headers, key))
    said = codes(answers)
    ring.must("answers", set(said) - {"201", "IDEMPOTENCY_KEY_IN_USE"}, set[str]())
    bodies = {
        json.dumps(answer.json(), sort_keys=True)
        for answer in answers
        if isinstance(answer, httpx2.Response) and answer.status_code == 201
    }
    ring.must("different answers", len(bodies), 1)
    ring.must("payments", await ring.value(COUNT_PAYMENTS, student=student), 1)


async def many_keys(ring: Ring) -> None:
    """The same order with a key of its own each: one checkout is open, the others are told of it."""
    student, headers, body = await _buyer(ring)
    answers = await ring.together(lambda _place: ring.post("/payments", body, headers, str(new_id())))
    ring.must("answers", codes(answers), Counter({"201": 1, "CHECKOUT_OPEN": THIRTY_TWO - 1}))
    ring.must("payments", await ring.value(COUNT_PAYMENTS, student=student), 1)


async def coins(ring: Ring) -> None:
    """More orders at once than there are coins for; then all that got some are paid at once."""
    enough = ring.dice.randint(1, THIRTY_TWO - 1)

    async def open_(tx: Tx) -> tuple[UUID, UUID]:
        student = await create_student(tx, name="Asha")
        await grant_coins(tx, student, enough * COINS + COINS // 2, "verify")
        return student, await a_course(tx)

    student, course = await ring.transact(open_)

    async def order(place: int) -> UUID:
        async def work(tx: Tx) -> UUID:
            slot = f"{place % HOURS:02d}:{place // HOURS * 30:02d}"  # orders of one time of day wait for each other
            wanted = an_order(tx, student, course, coins=COINS, again=True, slot=slot)
            return (await create_payment(tx, wanted, RULES, PROVIDERS, account_id=None)).payment.id

        return await ring.transact(work)

    answers = await ring.together(order)
    ring.must("orders", codes(answers), Counter({"done": enough, "COINS_INSUFFICIENT": THIRTY_TWO - enough}))
    payments = [answer for answer in answers if isinstance(answer, UUID)]

    async def pay(place: int) -> None:
        if payments:
            await ring.transact(lambda tx: confirm_payment(tx, payments[place % len(payments)], PROVIDERS))

    await ring.together(pay)
    async with ring.db.transaction("verify", read_only=True) as tx:
        ring.must("coins left", await count_available(tx, student), COINS // 2)


# ------------------------------------------------------------------ money comes and goes

CAPTURED = """
select (select count(*) from payments p where p.checkout_id = c.id and p.captured_at is not null),
       (select count(*) from outbox o join payments p on o.correlation_id = p.id::text
        where p.checkout_id = c.id and o.type = 'PURCHASE_CONFIRMED'),
       (select count(*) from undelivered u join payments p on p.id = u.payment_id
        where p.checkout_id = c.id and u.reason = 'PAID_TWICE'), c.paid_by is not null
from checkouts c where c.id = %(checkout)s
"""


async def two_captures(ring: Ring) -> None:
    """Both attempts of one checkout are captured, many times each: one buys, the other is PAID_TWICE."""
    first, checkout = await a_bought(ring, paid=False)

    async def attempt(tx: Tx) -> UUID:
        return (await retry_payment(tx, checkout, RULES, PROVIDERS, account_id=None)).payment.id

    payments = [first, await ring.transact(attempt)]
    events = [f"msg_{new_id()}" for _ in range(THIRTY_TWO // 4)]

    async def hear(place: int) -> bool:
        payment = payments[place % 2]
        event_id = f"{events[place % len(events)]}_{place % 2}"
        return await ring.transact(lambda tx: _say(tx, payment, "payment.succeeded", event_id))

    await ring.together(hear)
    async with ring.db.transaction("verify", read_only=True) as tx:
        [row] = await tx.tuples(CAPTURED, {"checkout": checkout})
    ring.must("captured, confirmed, paid twice, paid", row, (2, 1, 1, True))


async def _say(tx: Tx, payment: UUID, type: str, event_id: str, cents: int = PRICE, refund_id: str = "") -> bool:
    headers, body = sign(tx.now, payment, type, cents=cents, refund_id=refund_id or None, event_id=event_id)
    return await receive_webhook(tx, sandbox(), headers, body)


REFUNDS = """
select p.refunded_cents, (select count(*) from refunds r where r.payment_id = p.id),
       (select coalesce(sum(r.sessions), 0)::int from refunds r where r.payment_id = p.id)
from payments p where p.id = %(payment)s
"""


async def one_refund(ring: Ring) -> None:
    """The provider tells of one refund in many words: the money goes back once."""
    payment, _ = await a_bought(ring)
    cents = PRICE if ring.dice.random() < 0.5 else PRICE // 3

    async def hear(_place: int) -> bool:
        return await ring.transact(
            lambda tx: _say(tx, payment, "payment.refunded", f"msg_{new_id()}", cents, f"refund-{payment}")
        )

    await ring.together(hear)
    await _must_have_refunded(ring, payment, (cents, 1, 0))


async def many_refunds(ring: Ring) -> None:
    """Operators give back parts at once: never more money, or more sessions, than there are."""
    payment, _ = await a_bought(ring)
    sessions = ring.dice.choice((0, 1))
    parts = 8

    async def refund(_place: int) -> None:
        await ring.transact(
            lambda tx: refund_payment(
                tx, payment, amount_cents=PRICE // parts, sessions=sessions, note="verify", source="admin"
            )
        )

    answers = await ring.together(refund)
    went = min(parts, SESSIONS) if sessions else parts
    ring.must("refunds", codes(answers)["done"], went)
    await _must_have_refunded(ring, payment, (went * (PRICE // parts), went, went * sessions))


async def _must_have_refunded(ring: Ring, payment: UUID, wanted: tuple[int, int, int]) -> None:
    async with ring.db.transaction("verify", read_only=True) as tx:
        [row] = await tx.tuples(REFUNDS, {"payment": payment})
    ring.must("refunded cents, refunds, sessions", row, wanted)


LEFT = """
select (select count(*) from bookings b where b.purchase_id = pu.id and b.live)
       + (select count(*) from tutoring_sessions t where t.purchase_id = pu.id and t.status = 'scheduled')
from student_course_purchases pu where pu.payment_id = %(payment)s
"""


async def refund_and_deliver(ring: Ring) -> None:
    """Workers deliver while the money goes back in full: once all is said and done, nobody's time is taken."""
    payment, _ = await a_bought(ring)
    made = await ring.transact(lambda tx: create_purchases(tx, [payment]), "purchase-worker")
    purchase = made.created[payment]
    refunder = ring.dice.randrange(THIRTY_TWO)

    async def do(place: int) -> None:
        if place == refunder:
            await ring.transact(lambda tx: refund_payment(tx, payment, note="verify", source="admin"))
        elif place % 2:
            await ring.transact(lambda tx: settle_allocations(tx, [purchase]), "allocation-worker")
        else:
            await ring.transact(lambda tx: sync_sessions(tx, [purchase]), "session-worker")

    await ring.together(do)
    # What the refund's event makes the groups do.
    await ring.transact(lambda tx: settle_allocations(tx, [purchase]), "allocation-worker")
    await ring.transact(lambda tx: sync_sessions(tx, [purchase]), "session-worker")
    ring.must("what is left", await ring.value(LEFT, payment=payment), 0)


BOUGHT = """
select (select count(*) from student_course_purchases pu where pu.payment_id = %(payment)s),
       (select count(*) from outbox o where o.correlation_id = %(payment)s::text and o.type = 'PURCHASE_CREATED')
"""


async def one_purchase(ring: Ring) -> None:
    """Worker, reconciler and operators make the same payment's purchase at once: there is one, and it is said once."""
    payment, _ = await a_bought(ring)
    await ring.together(lambda _place: ring.transact(lambda tx: create_purchases(tx, [payment]), "purchase-worker"))
    async with ring.db.transaction("verify", read_only=True) as tx:
        [row] = await tx.tuples(BOUGHT, {"payment": payment})
    ring.must("purchases, said", row, (1, 1))


# ------------------------------------------------------------------ operators

DELIVERED = """
select f.stage, f.scheduled, f.owed,
  (select count(*) from student_course_purchases x where x.payment_id = f.payment_id),
  (select count(*) from trainer_allocations a where a.purchase_id = f.purchase_id)
from fulfilments f where f.payment_id = %(payment)s
"""
COUNT_AUDIT = "select count(*) from audit_log where subject_id = %(subject)s"


async def repair(ring: Ring) -> None:
    """A button pressed many times: each press does the next step or nothing, and leaves its row in the audit log."""
    payment, _ = await a_bought(ring)
    body = {"note": "double click"}
    answers = await ring.together(lambda _place: ring.post(f"/admin/payments/{payment}/repair", body, ring.admin))
    ring.must("answers", codes(answers), Counter({"200": THIRTY_TWO}))
    async with ring.db.transaction("verify", read_only=True) as tx:
        [row] = await tx.tuples(DELIVERED, {"payment": payment})
    ring.must("stage, scheduled, owed, purchases, allocations", row, ("scheduled", SESSIONS, 0, 1, 1))
    ring.must("audit rows", await ring.value(COUNT_AUDIT, subject=str(payment)), THIRTY_TWO)


FIND_CONFIRMED = """
select event_id as id, source, type, subject, occurred_at as time, data, correlation_id as correlationid,
  causation_id as causationid, partition_key as partitionkey, traceparent, data_version as dataversion
from outbox where correlation_id = %(payment)s and type = 'PURCHASE_CONFIRMED'
"""
FIND_LETTER = "select id from dead_letters where correlation_id = %(payment)s"


async def replay(ring: Ring) -> None:
    """A dead letter replayed many times at once: one does it, the others are told."""
    payment, _ = await a_bought(ring)

    async def park(tx: Tx) -> UUID:
        row = await tx.one(FIND_CONFIRMED, {"payment": str(payment)})
        group = next(group for group, s in BY_GROUP.items() if s.service == "purchase-worker")
        await dead_letters.park(tx, group, Envelope(**row), "HANDLER_FAILED", "verify", attempts=5)
        return await tx.value(FIND_LETTER, {"payment": str(payment)})

    letter = await ring.transact(park, "purchase-worker")
    body = {"note": "double click"}
    answers = await ring.together(lambda _place: ring.post(f"/admin/dead-letters/{letter}/replay", body, ring.admin))
    ring.must("answers", codes(answers), Counter({"200": 1, "DEAD_LETTER_RESOLVED": THIRTY_TWO - 1}))
    async with ring.db.transaction("verify", read_only=True) as tx:
        [row] = await tx.tuples(DELIVERED, {"payment": payment})
    ring.must("stage, scheduled, owed, purchases, allocations", row, ("purchased", 0, SESSIONS, 1, 0))
    ring.must("audit rows", await ring.value(COUNT_AUDIT, subject=str(letter)), 1)
