"""What is struck: every entry of the product, each in the states in which it does something.

A step prepares many cases at once, and `act` runs the entry once for one of them; it is called again, as a client, a
supervisor or an operator would, until it says that it is done.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from caravan import pauses
from caravan.apps.subscriptions import BY_GROUP
from caravan.db import Tx
from caravan.eventlog import dead_letters, workers
from caravan.eventlog.consumer import Consumer
from caravan.eventlog.subscription import Subscription
from caravan.eventlog.workers import Worker
from caravan.fulfilment.gaps import Step as RepairStep
from caravan.fulfilment.reconciler import Reconciler
from caravan.fulfilment.repair import run_step
from caravan.payments import store as payments
from caravan.payments.providers import SANDBOX, SUCCEEDED, ProviderEvent, ProviderRecord, SandboxProvider
from caravan.payments.refill import refill
from caravan.people.students import create_student, update_student
from caravan.people.trainers import set_active
from verify.crashpoints import prepare as p
from verify.crashpoints.points import Bug, Fault, points
from verify.crashpoints.prepare import Prepare
from verify.crashpoints.stage import Answer, Case, Stage
from verify.world import PRICES, SESSIONS, SETTINGS, sign, slot_of

NOTE = {"note": "verify"}
PURCHASES, ALLOCATIONS = "purchase-creation-workers", "trainer-allocation-workers"
SESSION_GROUP, VIEWS = "session-scheduling-workers", "cache-invalidation-workers"
Change = Callable[[Stage, Case], Awaitable[Any]]


# What the product settles by itself: whoever asked hears nothing of it.
RUN_AGAIN = {Fault.SERIALIZATION, Fault.DEADLOCK}


class Refused(Exception):
    """The product answered what no client should hear at this point."""


async def nothing(_stage: Stage, _case: Case) -> None:
    return None


@dataclass(slots=True)
class Step:
    """`size`: students per case. `loose`: what may differ from the clean run, because somebody asked again."""

    name: str
    prepared: Prepare
    before: Change = nothing
    trainers: int = 4
    size: int = 1
    loose: Collection[str] = ()
    tries: int = 14
    finish: Callable[[Stage, Sequence[Case]], Awaitable[None]] | None = None

    async def prepare(self, stage: Stage, number: int) -> list[Case]:
        return await self.prepared(stage, number)

    async def act(self, stage: Stage, case: Case) -> bool:
        raise NotImplementedError

    async def is_done(self, stage: Stage, case: Case) -> bool:
        """Whether acting again would already be about the next case."""
        return False

    async def restart(self, stage: Stage) -> None:
        """The process that acted has died, or has to end: its successor begins."""

    async def end(self, stage: Stage) -> None:
        """The batch is over: whatever runs stops as it should."""


# ------------------------------------------------------------------ over HTTP


@dataclass(slots=True)
class Ask(Step):
    """A request; sent again until it is answered. `settled`: refusals that say that it was done before."""

    request: Callable[[Stage, Case], Awaitable[Answer]] = None  # type: ignore[assignment]  # pyright: ignore
    settled: Collection[str] = ()

    async def act(self, stage: Stage, case: Case) -> bool:
        answer = await self.request(stage, case)
        if answer.status >= 500:
            if points.fired and set(points.fired) <= RUN_AGAIN:
                case.know["wrong"] = (
                    f"answered {answer.status} to {', '.join(points.fired)}: it could have run it again"
                )
            return False
        if answer.code == "IDEMPOTENCY_KEY_IN_USE":
            await asyncio.sleep(0.005)
            return False
        if answer.status < 400 or answer.code in self.settled:
            return True
        raise Refused(f"{answer.status} {answer.code}")


def post(path: str, body: Mapping[str, Any] | None = None, method: str = "POST") -> Any:
    """A request of the operator; the path may name {payment}, {student}, {purchase}, {allocation}, {trainer}..."""

    async def request(stage: Stage, case: Case) -> Answer:
        named = {"payment": case.payments[0] if case.payments else "", "student": case.student} | case.know
        return await stage.ask(method, "/api/v1" + path.format(**named), NOTE if body is None else body)

    return request


def order(**more: Any) -> Any:
    async def request(stage: Stage, case: Case) -> Answer:
        body = {
            "studentId": str(case.student),
            "courseId": str(stage.world.course),
            "sessionCount": SESSIONS,
            "learningMode": "online",
            "groupSize": 1,
            "timeSlot": slot_of(case.know["hour"]),
            "startDate": (p.today() + timedelta(days=3)).date().isoformat(),
        }
        return await stage.ask("POST", "/api/v1/payments", body | more, headers={"idempotency-key": str(case.student)})

    return request


async def another_attempt(stage: Stage, case: Case) -> Answer:
    with points.paused():
        checkout = (await stage.world.rows(p.CHECKOUT, payment=case.payment))[0]["checkout_id"]
    key = {"idempotency-key": str(case.student)}
    return await stage.ask("POST", "/api/v1/payments", {"checkoutId": str(checkout)}, headers=key)


def webhook(type: str, **more: Any) -> Any:
    async def request(stage: Stage, case: Case) -> Answer:
        named: dict[str, Any] = {"cents": PRICES[SESSIONS], "event_id": f"evt_{case.payment}"}
        if type == "payment.refunded":
            named["refund_id"] = f"re_{case.payment}"
        headers, body = sign(p.today(), case.payment, type, **(named | more))
        return await stage.ask("POST", "/api/v1/webhooks/sandbox", headers=headers, raw=body)

    return request


async def refund_part(stage: Stage, case: Case) -> Answer:
    """An operator who got no answer looks before pressing again."""
    with points.paused():
        done = await stage.world.rows("select id from refunds where payment_id = %(id)s", id=case.payment)
    if done:
        return Answer(200, None)
    body = NOTE | {"amountCents": PRICES[SESSIONS] // SESSIONS, "sessions": 1}
    return await stage.ask("POST", f"/api/v1/admin/payments/{case.payment}/refund", body)


async def add_to_cart(stage: Stage, case: Case) -> Answer:
    with points.paused():
        there = await stage.world.rows("select id from cart_items where student_id = %(id)s", id=case.student)
    if there:
        return Answer(200, None)
    body = {
        "courseId": str(stage.world.course),
        "sessionCount": SESSIONS,
        "learningMode": "online",
        "groupSize": 1,
        "timeSlot": slot_of(6),
        "startDate": (p.today() + timedelta(days=3)).date().isoformat(),
    }
    return await stage.ask("POST", f"/api/v1/students/{case.student}/cart", body)


async def release_all(stage: Stage, cases: Sequence[Case]) -> None:
    for case in cases:
        await stage.ask("POST", f"/api/v1/admin/payments/{case.payment}/release", NOTE)


async def create_purchases(stage: Stage, cases: Sequence[Case]) -> None:
    async with stage.world.db.transaction("reconciler") as tx:
        await run_step(tx, RepairStep.CREATE_PURCHASE, [payment for case in cases for payment in case.payments])


async def replay_all(stage: Stage, _cases: Sequence[Case]) -> None:
    for row in await stage.world.rows("select id from dead_letters where status = 'parked'"):
        async with stage.world.db.transaction("admin-service") as tx:
            await dead_letters.replay(tx, row["id"], BY_GROUP, by="verify", note="verify")


async def resume_all(stage: Stage, cases: Sequence[Case]) -> None:
    """The pauses have held; they end, and the reconciler lets all go on."""
    await stage.world.work()
    stages = await stage.world.rows(REASONS, payments=[case.payment for case in cases])
    if [row["reason"] for row in stages] != ["STAGE_PAUSED"] * len(cases):
        raise AssertionError(f"paused, and yet {stages}")
    for case in cases:
        await end_pause(stage, case)
    await let_go_on(stage, cases)


REASONS = "select reason from undelivered where payment_id = any(%(payments)s)"


async def let_go_on(stage: Stage, _cases: Sequence[Case]) -> None:
    """What waited for pauses that are over."""
    reconciler = Reconciler(stage.world.db, SETTINGS)
    reconciler.tasks = tuple(task for task in reconciler.tasks if task.name == "resumed")
    await reconciler.run_once()


async def end_pause(stage: Stage, case: Case) -> None:
    async with stage.world.db.transaction("admin-service") as tx:
        pause_id = await pauses.find_pause(tx, p.city_of(case))
        assert pause_id is not None
        await pauses.resume(tx, pause_id)


def in_its_city(path: str, **more: Any) -> Any:
    """A request of the operator about the case's city."""

    async def request(stage: Stage, case: Case) -> Answer:
        return await stage.ask("POST", f"/api/v1/admin{path}", NOTE | {"city": case.know["city"]} | more)

    return request


async def deal_with(stage: Stage, case: Case) -> Answer:
    body = NOTE | {"provider": "sandbox", "eventId": case.know["event"]}
    return await stage.ask("POST", "/api/v1/admin/unclaimed/dealt-with", body)


async def none_is_unclaimed(stage: Stage, cases: Sequence[Case]) -> None:
    left = await stage.world.rows("select event_id, outcome from webhook_events where outcome <> 'dealt with'")
    told = await stage.world.rows("select 1 from audit_log where action = 'deal with unclaimed money'")
    if left or len(told) != len(cases):
        raise AssertionError(f"{left} of {len(cases)}, {len(told)} in the audit")


# ------------------------------------------------------------------ workers


@dataclass(slots=True)
class Turn(Step):
    """A worker's batch: one page of the log for its group, with the `types` of the case in it."""

    group: str = PURCHASES
    types: tuple[str, ...] = ("PURCHASE_CONFIRMED",)
    per_student: int = 1
    poisoned: bool = False
    consumer: Consumer | None = None
    poison: set[UUID] = field(default_factory=set[UUID])

    @property
    def page(self) -> int:
        return self.size * self.per_student

    async def prepare(self, stage: Stage, number: int) -> list[Case]:
        singles = await self.prepared(stage, number * self.size)
        self.poison = set()
        await self.restart(stage)
        stage.on_reopen.append(self._moved)
        while (pending := await self._pending(stage)) and pending[0]["type"] not in self.types:
            await self._turn()
        owners = {str(key): single for single in singles for key in _names(single)}
        ordered: dict[int, tuple[Case, list[UUID]]] = {}
        for row in pending:
            owner = owners.get(row["correlation_id"]) or owners.get(row["subject"]) or owners.get(row["partition_key"])
            if owner is not None and row["type"] in self.types:
                ordered.setdefault(id(owner), (owner, []))[1].append(row["event_id"])
        found = list(ordered.values())
        cases = [_together(found[at : at + self.size]) for at in range(0, len(found), self.size)]
        if len(cases) != number:
            raise AssertionError(f"{self.name}: {len(cases)} of {number} cases have their events")
        if self.poisoned:
            self.poison.update(case.payments[self.size // 2] for case in cases)
        return cases

    async def act(self, stage: Stage, case: Case) -> bool:
        await self._turn()
        return await self.is_done(stage, case)

    async def is_done(self, stage: Stage, case: Case) -> bool:
        with points.paused():
            rows = await stage.world.rows(HANDLED, group=self.group, events=case.events)
        return rows[0]["handled"] == len(case.events)

    async def restart(self, stage: Stage) -> None:
        subscription = BY_GROUP[self.group]
        worker = Worker(subscription.service, self.group, "verify", f"verify/{self.group}")
        if self.poisoned:
            subscription = poisoned(subscription, self.poison)
        self.consumer = Consumer(stage.db, subscription, worker, page_events_max=self.page)
        await self.consumer.enter()

    async def end(self, stage: Stage) -> None:
        if self.consumer is not None:
            await self.consumer.leave()

    async def _turn(self) -> None:
        assert self.consumer is not None
        await self.consumer.run_once()

    def _moved(self, db: Any) -> None:
        assert self.consumer is not None
        self.consumer.db = db

    async def _pending(self, stage: Stage) -> list[dict[str, Any]]:
        return await stage.world.rows(PENDING, group=self.group, types=BY_GROUP[self.group].types)


PENDING = """
select o.event_id, o.type, o.subject, o.partition_key, o.correlation_id from outbox o
where o.type = any(%(types)s)
  and not exists (select from processed_events e where e.consumer_group = %(group)s and e.event_id = o.event_id)
order by o.id
"""
HANDLED = """
select count(*)::int as handled from unnest(%(events)s::uuid[]) as e(id)
where exists (select from processed_events d where d.consumer_group = %(group)s and d.event_id = e.id)
   or exists (select from dead_letters d where d.consumer_group = %(group)s and d.event_id = e.id)
"""


def _names(case: Case) -> list[object]:
    """By what an event may say whose it is: the payment rather than the student."""
    return [*case.payments, *case.students, case.know.get("trainer"), case.know.get("purchase")]


def _together(found: Sequence[tuple[Case, list[UUID]]]) -> Case:
    return Case(
        students=[student for case, _ in found for student in case.students],
        payments=[payment for case, _ in found for payment in case.payments],
        events=[event for _, events in found for event in events],
        know=found[0][0].know,
    )


def poisoned(subscription: Subscription, payments: Collection[UUID]) -> Subscription:
    """The same group, with a bug that some payments meet."""

    def wrap(handler: Any) -> Any:
        async def handle(tx: Tx, events: Sequence[Any]) -> None:
            if any(getattr(event, "payment_id", None) in payments for event in events):
                raise Bug("poison")
            await handler(tx, events)

        return handle

    handlers = {event: wrap(handler) for event, handler in subscription.handlers.items()}
    return Subscription(subscription.group, subscription.service, subscription.label, handlers)


TURNS = 3  # the old window's end, a new window with the event, and nothing more


@dataclass(slots=True)
class Life(Turn):
    """A worker's whole life: it enters, beats, opens a window, handles an event, leaves. A successor of its name."""

    async def prepare(self, stage: Stage, number: int) -> list[Case]:
        return await self.prepared(stage, number)

    async def act(self, stage: Stage, case: Case) -> bool:
        await self.restart(stage)
        assert self.consumer is not None
        async with stage.db.transaction(self.consumer.worker.service) as tx:
            await workers.beat(tx, self.consumer.worker)
        for _ in range(TURNS):
            await self._turn()
        await self.consumer.leave()
        return await self.is_done(stage, case)

    async def is_done(self, stage: Stage, case: Case) -> bool:
        with points.paused():
            rows = await stage.world.rows(HEARD, group=self.group, payment=str(case.payment))
        return bool(rows)


HEARD = "select 1 as yes from processed_events where consumer_group = %(group)s and correlation_id = %(payment)s"


# ------------------------------------------------------------------ the reconciler, and what has no door


@dataclass(slots=True)
class Round(Step):
    """One task of the reconciler, as its turn runs it; again until it finds nothing more to do."""

    task: str = ""

    async def act(self, stage: Stage, case: Case) -> bool:
        reconciler = Reconciler(stage.db, SETTINGS)
        reconciler.tasks = tuple(task for task in reconciler.tasks if task.name == self.task)
        [task] = reconciler.tasks
        fired = len(points.fired)
        counts = await reconciler.run_once()
        # A turn that was struck may have found the lock still taken, by the session that it lost.
        return task.error is None and len(points.fired) == fired and (not points.fired or counts[self.task] == 0)


@dataclass(slots=True)
class Call(Step):
    """An operation behind a door that is somebody else's; run through `transact`, as its route does."""

    work: Callable[[Tx, Case], Awaitable[Any]] = None  # type: ignore[assignment]  # pyright: ignore

    async def act(self, stage: Stage, case: Case) -> bool:
        await stage.db.transact(lambda tx: self.work(tx, case), "admin-service")
        return True


@dataclass(slots=True)
class Refill(Step):
    """What a provider's books have and ours don't, taken in; the command is given again until it ends."""

    async def act(self, stage: Stage, case: Case) -> bool:
        await refill(stage.db, {SANDBOX: OneRecord(case.know["record"])}, SINCE_EVER)
        return True


SINCE_EVER = datetime(2000, 1, 1, tzinfo=UTC)


class OneRecord(SandboxProvider):
    """A provider whose books have one record."""

    def __init__(self, record: ProviderRecord) -> None:
        super().__init__(["whsec_c2VjcmV0"])
        self._record = record

    def list_records(self, since: datetime) -> Iterator[ProviderRecord]:
        yield self._record


async def be_captured_elsewhere(stage: Stage, case: Case) -> None:
    """The provider has the money, and keeps what we asked for with it."""
    async with stage.world.db.transaction() as tx:
        payment = await payments.find_payment(tx, case.payment)
        assert payment is not None
        checkout = await payments.lock_checkout(tx, payment.checkout_id)
        cents = payment.amount_cents
        event = ProviderEvent(SANDBOX, f"evt_{case.payment}", SUCCEEDED, tx.now, b"{}", payment.id, cents, "INR")
        case.know["record"] = ProviderRecord(event, payment, checkout)


async def be_lost(stage: Stage, case: Case) -> None:
    """The backup is older than the payment."""
    for statement in LOSE_PAYMENT:
        await stage.world.run(statement, payment=case.payment)


LOSE_PAYMENT = (
    "delete from outbox where correlation_id = %(payment)s::text",
    "with lost as (delete from payments where id = %(payment)s returning checkout_id)"
    " delete from checkouts c using lost where c.id = lost.checkout_id",
)


async def locate(tx: Tx, case: Case) -> None:
    await update_student(tx, case.student, {"latitude": 28.6, "longitude": 77.2})


async def locate_student(stage: Stage, case: Case) -> None:
    async with stage.world.db.transaction("student-service") as tx:
        await locate(tx, case)


async def make_known(stage: Stage, case: Case) -> None:
    async with stage.world.db.transaction("student-service") as tx:
        await create_student(tx, name="Late", student_id=case.student)


async def dismiss(stage: Stage, case: Case) -> None:
    async with stage.world.db.transaction("admin-service") as tx:
        await set_active(tx, case.know["trainer"], False)


async def confirm(stage: Stage, case: Case) -> None:
    await stage.world.pay([case.payment])


async def be_absent(stage: Stage, case: Case) -> None:
    body = NOTE | {"status": "completed"}
    answer = await stage.ask("POST", f"/api/v1/admin/purchases/{case.know['purchase']}/sessions/1", body)
    assert answer.status == 200, answer


def dead_lettered(prepare: Prepare) -> Prepare:
    """The purchase group gave each case's event up."""

    async def prepared(stage: Stage, number: int) -> list[Case]:
        cases = await prepare(stage, number)
        subscription = poisoned(BY_GROUP[PURCHASES], {case.payment for case in cases})
        worker = Worker(subscription.service, PURCHASES, "verify", "verify/poison")
        consumer = Consumer(stage.world.db, subscription, worker, page_events_max=1)
        await consumer.enter()
        while await consumer.run_once():
            pass
        await consumer.leave()
        letters = await stage.world.rows("select id, correlation_id from dead_letters")
        by_payment = {row["correlation_id"]: row["id"] for row in letters}
        for case in cases:
            case.know["letter"] = by_payment[str(case.payment)]
        return cases

    return prepared
