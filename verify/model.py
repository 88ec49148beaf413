"""Model: Hypothesis lives in a small town, and what the product says must be what a page of plain Python says.

The rules are what customers, providers, operators, trainers and time do, in any order; the workers turn one group at a
time, when the rules let them. After every step money is compared (that is decided at once); at the end of an example
everything drains, and the sessions, reasons and coins are compared too, and the product's invariants hold.
"""

from __future__ import annotations

import asyncio
import random
import sys
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import time, timedelta
from typing import Any, ClassVar, TypeVar
from uuid import UUID

import hypothesis
from hypothesis import HealthCheck, Phase, Verbosity, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from caravan import pauses
from caravan.admin import money, placing, worst_day
from caravan.admin.money import AlreadyHeld, NotHeld, NothingToHold
from caravan.apps.subscriptions import BY_GROUP
from caravan.catalog.courses import Tier, create_course
from caravan.db import Tx
from caravan.deliveries import Stage
from caravan.errors import DomainError
from caravan.fulfilment.invariants import check
from caravan.fulfilment.reconciler import Reconciler
from caravan.fulfilment.repair import OperatorMustDecide
from caravan.ids import new_id
from caravan.pauses import PAUSABLE, AlreadyPaused, Scope
from caravan.payments.captures import NothingToAccept
from caravan.payments.coins import count_available, grant_coins
from caravan.payments.model import Order
from caravan.payments.operations import CheckoutExpired, CheckoutPaid, confirm_payment, create_payment, retry_payment
from caravan.payments.refunds import NotCaptured, RefundSessionsInvalid, RefundTooLarge
from caravan.payments.webhooks import receive_webhook
from caravan.people.availability import Rule
from caravan.people.students import create_student, update_student
from caravan.people.trainers import create_trainer, set_absence, set_active
from caravan.sessions.operations import SessionsAllCounted
from verify.crew import OPERATOR, Crew, MovedClock, Share, agree_to_starts, spread, wipe
from verify.expected import TIER, Attempt, Checkout, Town
from verify.parts import Context
from verify.processes import PROCESSES
from verify.report import PartResult
from verify.world import CENTRE, PRICES, PROVIDERS, RULES, SETTINGS, sandbox, sign

PRICE = PRICES[TIER]
PLACE: dict[str, Any] = {"latitude": CENTRE[0], "longitude": CENTRE[1]}
COINS = 500
COINS_EACH = 5
CHECKOUTS_MAX = 8
TRAINERS_MAX = 4
START_DAYS = 4
STEP_SECONDS_MAX = 60.0
SETTLE_TURNS = 2
NOTICE = timedelta(hours=SETTINGS.notice_hours)

T = TypeVar("T")


async def run(context: Context) -> PartResult:
    """Blocks of examples, each with a seed of its own, so that a failure is repeated without the others."""
    result = context.result()
    blocks = [int(context.case)] if context.case else list(range(context.pick(2, 10)))
    processes = 1 if context.case else PROCESSES
    shares = [
        Share("model", context.scale, context.seed, index, tuple(blocks[index::processes]), context.server.create())
        for index in range(processes)
    ]
    steps = 0
    for found in await spread(shares, live):
        result.merge(found)
        steps += found.extra["steps"]
    result.good_min = result.cases // 4
    result.must_fire = () if context.case else context.pick(OFTEN, (*OFTEN, *SELDOM))
    result.extra = {"steps": steps, "steps_of_each": context.pick(30, 50)}
    return result


@dataclass(slots=True)
class Bench:
    """What the machine of a process works on: its database and its loop, which runs in another thread."""

    db: MovedClock
    crew: Crew
    loop: asyncio.AbstractEventLoop
    result: PartResult
    block: int = 0
    steps: int = 0
    log: list[str] = field(default_factory=list[str])

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(STEP_SECONDS_MAX)

    def transact(self, work: Callable[[Tx], Awaitable[T]], source: str = "payment-service") -> T:
        return self.do(self.db.transact(work, source))


async def live(share: Share) -> PartResult:
    context = Context(share.part, share.scale, share.seed, server=None)  # type: ignore[arg-type]
    result = context.result()
    async with MovedClock(share.database.url) as db, Crew(db) as crew:
        bench = Bench(db, crew, asyncio.get_running_loop(), result)
        for block in share.numbers:
            bench.block = block
            seed = context.dice("block", block).getrandbits(64)
            await asyncio.to_thread(_run_block, bench, seed, context.pick(13, 50), context.pick(30, 50))
        result.extra["steps"] = bench.steps
    return result


def _run_block(bench: Bench, seed: int, examples: int, steps: int) -> None:
    machine = hypothesis.seed(seed)(type("Machine", (TownMachine,), {"bench": bench}))
    random.seed(seed)
    try:
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=examples,
                stateful_step_count=steps,
                database=None,
                deadline=None,
                phases=(Phase.generate,),
                report_multiple_bugs=False,
                suppress_health_check=list(HealthCheck),  # pyright: ignore[reportArgumentType]
                verbosity=Verbosity.quiet,
            ),
        )
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        bench.result.violated(f"{said}\n      after: {'; '.join(bench.log)}", str(bench.block))
    finally:
        bench.do(wipe(bench.db))


# ------------------------------------------------------------------ the machine

MARKS = ("completed", "student_absent", "trainer_absent")
SCOPES = ("everybody", "the course", "the city", "elsewhere")
BEGINNINGS = ("paid", "paid", "open", "wrong", "accepted")
anyone = st.integers(min_value=0, max_value=31)  # which attempt, trainer, session: counted round


class TownMachine(RuleBasedStateMachine):
    bench: ClassVar[Bench]

    def __init__(self) -> None:
        super().__init__()
        self.town = Town()
        self.ids: dict[Attempt, UUID] = {}
        self.checkouts: dict[Checkout, UUID] = {}
        self.trainers: list[UUID] = []
        self.student, self.course, self.elsewhere = new_id(), new_id(), new_id()
        self.taken: dict[Stage, int] = {}
        self.bench.log = []
        self.bench.db.ahead = timedelta(0)
        self.reconciler = Reconciler(self.bench.db, SETTINGS)

    # -- the harness

    def fire(self, kind: str, said: object = "") -> None:
        self.bench.result.fired[kind] += 1
        self.bench.steps += 1
        self.bench.log.append(f"{kind} {said}".strip())

    def some(self, number: int, likely: Callable[[Attempt], bool] = lambda _attempt: True) -> Attempt:
        """An attempt; mostly one for which there is something to do."""
        attempts = self.town.attempts
        chosen = [attempt for attempt in attempts if likely(attempt)] if number % 4 else []
        return (chosen or attempts)[number % len(chosen or attempts)]

    def name(self, attempt: Attempt) -> str:
        return f"#{self.town.attempts.index(attempt)}"

    def refused(self, work: Callable[[Tx], Awaitable[object]], *by: type[DomainError]) -> bool:
        """True where the product refuses with one of `by`."""
        try:
            self.bench.transact(work, "admin-service")
        except by:
            return True
        return False

    # -- the town

    @initialize(
        located=st.sampled_from((True, True, False)),
        trainers=st.sampled_from((1, 2, 0)),
        bought=st.lists(st.tuples(st.booleans(), st.sampled_from(BEGINNINGS)), min_size=1, max_size=3),
        days=st.sampled_from((None, 0, 5, 6, 9)),
        went=st.sampled_from((None, *MARKS)),
    )
    def open_town(
        self, located: bool, trainers: int, bought: list[tuple[bool, str]], days: int | None, went: str | None
    ) -> None:
        """`bought`: checkouts to begin with, at home or not, and how far. `days`: delivered, and so long ago; `went`:
        how a session of the first one was that has begun by then."""
        self.town.located, self.town.granted = located, COINS
        place = PLACE if located else {}

        async def open_(tx: Tx) -> None:
            tiers = [Tier(TIER, PRICE)]
            for course in (self.course, self.elsewhere):
                await create_course(
                    tx, title="Robotics", category="STEM", session_minutes=60, tiers=tiers, course_id=course
                )
            await create_student(tx, name="Asha", student_id=self.student, **place)
            await grant_coins(tx, self.student, COINS, "verify")

        self.bench.transact(open_)
        for _ in range(trainers):
            self._add_trainer()
        self.bench.log.append(f"opened: located {located}, trainers {trainers}")
        for home, beginning in bought:
            self._buy(home, 0, heard_first=beginning == "paid")
            if beginning in ("wrong", "accepted"):
                self._succeed(self.town.attempts[-1], 250)
            if beginning == "accepted":
                self._accept(self.town.attempts[-1])
        if days is not None:
            self.all_work()
        if days:
            self.time_passes(24 * days)
        if went and self.town.checkouts[0].payer:
            self._mark_some(self.town.checkouts[0], 0, many=False, mark=went)

    def _add_trainer(self) -> None:
        async def add(tx: Tx) -> UUID:
            today = tx.now.date()
            rules = [
                Rule(day, time(0), time(0), today - timedelta(days=1), today + timedelta(days=390))
                for day in range(1, 8)
            ]
            modes = ("online", "home")
            return await create_trainer(tx, name="Ravi", course_ids=[self.course], rules=rules, modes=modes, **PLACE)

        self.trainers.append(self.bench.transact(add, "admin-service"))
        self.town.trainers.append(True)

    # -- buying and paying

    @precondition(lambda self: len(self.town.checkouts) < CHECKOUTS_MAX)
    @rule(home=st.booleans(), coins=st.sampled_from((0, 0, COINS_EACH)), heard_first=st.integers(0, 5))
    def buy(self, home: bool, coins: int, heard_first: int) -> None:
        self._buy(home, coins, heard_first=not heard_first)

    def _buy(self, home: bool, coins: int, *, heard_first: bool) -> None:
        payment, hour = new_id(), 5 + len(self.town.checkouts)
        asked = PRICE - coins * RULES.coin_value_cents
        checkout = Checkout(home)
        attempt = Attempt(checkout, asked, coins)
        if heard_first:
            self.bench.result.fired["heard before bought"] += 1
            self._hear(payment, "payment.succeeded", asked)

        async def order(tx: Tx) -> UUID:
            wanted = Order(
                student_id=self.student,
                course_id=self.course,
                session_count=TIER,
                learning_mode="home" if home else "online",
                group_size=1,
                time_slot=f"{hour:02d}:00",
                start_date=(tx.now + timedelta(days=START_DAYS)).date(),
                raw={"from": "verify"},
                coins=coins,
            )
            made = await create_payment(tx, wanted, RULES, PROVIDERS, account_id=None, payment_id=payment)
            return made.payment.checkout_id

        self.checkouts[checkout] = self.bench.transact(order)
        self.ids[attempt] = payment
        checkout.attempts.append(attempt)
        self.town.checkouts.append(checkout)
        if heard_first:
            attempt.succeed(asked)
        self.fire("buy", f"{self.name(attempt)} home {home} coins {coins} heard first {heard_first}")

    @precondition(lambda self: self.town.checkouts)
    @rule(number=anyone)
    def try_again(self, number: int) -> None:
        checkout = self.some(number, lambda attempt: attempt.checkout.may_retry).checkout
        made: list[UUID] = []

        async def retry(tx: Tx) -> None:
            again = await retry_payment(tx, self.checkouts[checkout], RULES, PROVIDERS, account_id=None)
            made.append(again.payment.id)

        refused = self.refused(retry, CheckoutPaid, CheckoutExpired)
        assert refused != checkout.may_retry, f"a second attempt was {'refused' if refused else 'made'}"
        if not refused:
            last = checkout.attempts[-1]
            attempt = Attempt(checkout, last.asked, last.coins)
            self.ids[attempt] = made[-1]
            checkout.attempts.append(attempt)
        self.fire(
            "second attempt refused" if refused else "second attempt", f"of {self.town.checkouts.index(checkout)}"
        )

    @precondition(lambda self: self.town.attempts)
    @rule(number=anyone)
    def pay(self, number: int) -> None:
        attempt = self.some(number, lambda attempt: attempt.captured is None)
        self.bench.transact(lambda tx: confirm_payment(tx, self.ids[attempt], PROVIDERS))
        attempt.succeed(attempt.asked)
        self.fire("pay", self.name(attempt))

    @precondition(lambda self: self.town.attempts)
    @rule(number=anyone, type_=st.sampled_from(("succeeded", "failed")), off=st.sampled_from((0, 0, 0, -100, 250)))
    def webhook(self, number: int, type_: str, off: int) -> None:
        attempt = self.some(number)
        if type_ == "succeeded":
            self._succeed(attempt, off)
        else:
            self._hear(self.ids[attempt], "payment.failed", attempt.asked + off)
            attempt.fail()
            self.fire("failed", self.name(attempt))

    def _succeed(self, attempt: Attempt, off: int) -> None:
        cents = attempt.asked + off
        self._hear(self.ids[attempt], "payment.succeeded", cents)
        self.bench.result.fired["wrong amount"] += off != 0 and attempt.captured is None
        attempt.succeed(cents)
        self.fire("succeeded", f"{self.name(attempt)} {off:+}")

    def _hear(self, payment: UUID, type_: str, cents: int, refund_id: str | None = None, times: int = 1) -> None:
        event_id = f"msg_{new_id()}"

        async def hear(tx: Tx) -> None:
            headers, body = sign(tx.now, payment, type_, cents=cents, refund_id=refund_id, event_id=event_id)
            await receive_webhook(tx, sandbox(), headers, body)

        for _ in range(times):
            self.bench.transact(hear)

    @precondition(lambda self: self.town.attempts)
    @rule(number=anyone)
    def accept(self, number: int) -> None:
        self._accept(self.some(number, lambda attempt: attempt.live and attempt.obstacle == "AMOUNT_MISMATCH"))

    def _accept(self, attempt: Attempt) -> None:
        refused = self.refused(lambda tx: money.accept(tx, OPERATOR, self.ids[attempt], "verify"), NothingToAccept)
        assert refused != attempt.accept(), f"accepting was {'refused' if refused else 'done'}"
        self.fire("accept refused" if refused else "accept", self.name(attempt))

    # -- money goes back

    @precondition(lambda self: self.town.attempts)
    @rule(number=anyone, cents=st.sampled_from((None, PRICE // 4, PRICE // 2)), sessions=st.integers(0, 2))
    def refund(self, number: int, cents: int | None, sessions: int) -> None:
        attempt = self.some(number, lambda attempt: attempt.live)

        async def refund(tx: Tx) -> None:
            await money.refund(
                tx,
                OPERATOR,
                self.ids[attempt],
                "verify",
                providers=PROVIDERS,
                amount_cents=cents,
                sessions=None if cents is None else sessions,
            )

        refused = self.refused(refund, NotCaptured, RefundTooLarge, RefundSessionsInvalid)
        assert refused != attempt.operator_refunds(cents, sessions), f"a refund was {'refused' if refused else 'made'}"
        kind = "refund refused" if refused else "full refund" if attempt.status == "refunded" else "partial refund"
        self.fire(kind, f"{self.name(attempt)} {cents} {sessions}")

    @precondition(lambda self: self.town.attempts)
    @rule(number=anyone, which=st.integers(0, 2), part=st.sampled_from((1, 1, 3)), times=st.integers(1, 2))
    def provider_refund(self, number: int, which: int, part: int, times: int) -> None:
        attempt = self.some(number)
        refund_id, cents = f"refund-{which}-{self.ids[attempt]}", attempt.asked // part
        self._hear(self.ids[attempt], "payment.refunded", cents, refund_id, times)
        attempt.provider_refunds(refund_id, cents)
        self.fire("provider's refund", f"{self.name(attempt)} {refund_id[:8]} {cents}")

    # -- operators

    @precondition(lambda self: self.town.attempts)
    @rule(number=anyone)
    def hold(self, number: int) -> None:
        attempt = self.some(number, lambda attempt: attempt.live and not attempt.held)
        try:
            self.bench.transact(lambda tx: money.hold(tx, OPERATOR, self.ids[attempt], "verify"))
        except NothingToHold:
            assert not attempt.held, "held money is not in the register"
        except AlreadyHeld:
            assert attempt.held, "it says that it is held already"
        else:
            assert attempt.live, "money that isn't there was put on hold"
            attempt.held = True
            self.bench.result.fired["held"] += 1
        self.fire("hold", self.name(attempt))

    @precondition(lambda self: any(attempt.held for attempt in self.town.attempts))
    @rule(number=anyone)
    def release(self, number: int) -> None:
        held = [attempt for attempt in self.town.attempts if attempt.held]
        self._release(held[number % len(held)])

    def _release(self, attempt: Attempt) -> None:
        async def let_go(tx: Tx) -> None:
            await money.release(tx, OPERATOR, self.ids[attempt], "verify", notice=NOTICE)

        self._look_for_hold(attempt)
        assert self.refused(let_go, NotHeld) != attempt.held, "a release was refused or done"
        attempt.held = False
        self.fire("release", self.name(attempt))

    def _look_for_hold(self, attempt: Attempt) -> None:
        """A hold ends by itself where nothing is owed any more: with what it held."""
        held = bool(self.bench.transact(lambda tx: tx.value(IS_HELD, {"payment": self.ids[attempt]})))
        assert attempt.held or not held, "held by nobody"
        assert held or not attempt.held or self._owes_nothing(attempt), "held money was not held"
        attempt.held = held

    def _owes_nothing(self, attempt: Attempt) -> bool:
        return bool(self.bench.transact(lambda tx: tx.value(OWES_NOTHING, {"payment": self.ids[attempt]})))

    @precondition(lambda self: self.town.attempts)
    @rule(number=anyone)
    def repair(self, number: int) -> None:
        attempt = self.some(number)

        async def press(tx: Tx) -> None:
            await money.repair(tx, OPERATOR, self.ids[attempt], "verify", subscriptions=BY_GROUP, notice=NOTICE)

        self._look_for_hold(attempt)
        owes = not self._owes_nothing(attempt)  # what is held only by name is let go of by a repair
        refused = self.refused(press, OperatorMustDecide)
        decides = attempt.live and ((attempt.held and owes) or attempt.obstacle is not None)
        assert refused == decides, f"a repair was {'refused' if refused else 'done'}"
        self.fire("repair", self.name(attempt))

    @rule(stage=st.sampled_from(list(PAUSABLE)), whom=st.sampled_from(SCOPES))
    def pause(self, stage: Stage, whom: str) -> None:
        async def stop(tx: Tx) -> None:
            await worst_day.pause(tx, OPERATOR, self._scope(stage, whom), "verify")

        assert self.refused(stop, AlreadyPaused) == ((stage, whom) in self.town.pauses), "a pause was refused or begun"
        assert self.bench.do(pauses.wait_for_begun(self.bench.db)) == 0
        self.town.pauses.add((stage, whom))
        self.fire("pause", f"{stage} {whom}")

    @precondition(lambda self: self.town.pauses)
    @rule(number=anyone)
    def resume(self, number: int) -> None:
        self._resume(*sorted(self.town.pauses)[number % len(self.town.pauses)])

    def _resume(self, stage: str, whom: str) -> None:
        async def go_on(tx: Tx) -> None:
            await worst_day.resume(tx, OPERATOR, self._scope(stage, whom), "verify")

        self.bench.transact(go_on, "admin-service")
        self.town.pauses.remove((stage, whom))
        self.fire("resume", f"{stage} {whom}")

    def _scope(self, stage: str, whom: str) -> Scope:
        course = {"the course": self.course, "elsewhere": self.elsewhere}.get(whom)
        return Scope(Stage(stage), course, "Delhi" if whom == "the city" else None)

    # -- people

    @precondition(lambda self: not self.town.located)
    @rule()
    def give_location(self) -> None:
        self.bench.transact(lambda tx: update_student(tx, self.student, PLACE), "student-service")
        self.town.located = True
        self.fire("location given")

    @precondition(lambda self: len(self.trainers) < TRAINERS_MAX)
    @rule()
    def trainer_comes(self) -> None:
        self._add_trainer()
        self.fire("trainer added")

    @precondition(lambda self: any(self.town.trainers))
    @rule(number=anyone, leaves=st.booleans())
    def trainer_goes(self, number: int, leaves: bool) -> None:
        """For good, with all that was booked; or for a long time, and what is booked stays."""
        there = [place for place, here in enumerate(self.town.trainers) if here]
        place = there[number % len(there)]

        async def go(tx: Tx) -> None:
            if leaves:
                await set_active(tx, self.trainers[place], False)
            else:
                away = tx.now + timedelta(days=380)
                await set_absence(tx, self.trainers[place], tx.now, away, None)

        self.bench.transact(go, "admin-service")
        self.town.trainers[place] = False
        self.fire("trainer left" if leaves else "trainer away", place)

    @precondition(lambda self: any(checkout.payer for checkout in self.town.checkouts))
    @rule(number=anyone, which=anyone, many=st.booleans(), mark=st.sampled_from(MARKS))
    def mark(self, number: int, which: int, many: bool, mark: Any) -> None:
        """Somebody says how a session went that has begun, or how all of them did; perhaps not for the first time."""
        paid = [checkout for checkout in self.town.checkouts if checkout.payer]
        self._mark_some(paid[number % len(paid)], which, many=many, mark=mark)

    def _mark_some(self, checkout: Checkout, which: int, *, many: bool, mark: Any) -> None:
        assert checkout.payer
        payment = self.ids[checkout.payer]
        begun = self.bench.transact(lambda tx: tx.tuples(LIST_BEGUN, {"payment": payment, "now": tx.now}))
        for purchase, seq in begun if many else begun[which % len(begun) :][:1] if begun else ():
            self._mark(checkout, payment, purchase, seq, mark)

    def _mark(self, checkout: Checkout, payment: UUID, purchase: UUID, seq: int, mark: Any) -> None:
        assert checkout.payer

        async def say(tx: Tx) -> None:
            await placing.mark_session(tx, OPERATOR, purchase, seq, mark, "verify", notice=NOTICE)

        refused = self.refused(say, SessionsAllCounted)
        assert refused != checkout.mark(seq, mark), f"marking was {'refused' if refused else 'done'}"
        self._look_for_hold(checkout.payer)
        self.fire("mark refused" if refused else f"session {mark}", f"{self.name(checkout.payer)} {seq}")

    # -- time, and who works in it

    @rule(hours=st.sampled_from((1, 24, 60, 120)))
    def time_passes(self, hours: int) -> None:
        self.bench.db.ahead += timedelta(hours=hours)
        for checkout in self.town.checkouts:
            checkout.open = False
        self.fire("time passes", hours)

    @rule(group=st.sampled_from(sorted(BY_GROUP)))
    def work(self, group: str) -> None:
        self.bench.do(self.bench.crew.turn(group))
        self.fire("worker's turn", group.split("-")[0])

    @rule()
    def all_work(self) -> None:
        self.bench.do(self.bench.crew.drain())
        self.fire("workers drain")

    @rule()
    def reconcile(self) -> None:
        self._reconcile()
        self.fire("reconciler")

    def _reconcile(self) -> None:
        for task in self.reconciler.tasks:
            task.due = 0.0
        self.bench.do(self.reconciler.run_once())
        failed = [task.error for task in self.reconciler.tasks if task.error]
        assert not failed, failed

    # -- judgement

    @invariant()
    def money_is_as_expected(self) -> None:
        if not self.ids:
            return
        rows = self.bench.transact(lambda tx: tx.tuples(MONEY, {"student": self.student}))
        found = {row[0]: row[1:] for row in rows}
        for attempt, payment in self.ids.items():
            wanted = (attempt.status, attempt.captured, attempt.refunded, attempt.pays, attempt.taken)
            assert found[payment] == wanted, f"{self.name(attempt)} is {found[payment]}, should be {wanted}"

    @invariant()
    def what_is_paused_stands_still(self) -> None:
        """No purchases, no bookings, no sessions more than there were when it was paused."""
        if not self.town.pauses:
            self.taken.clear()
            return
        [counts] = self.bench.transact(lambda tx: tx.tuples(TAKEN))
        taken: dict[Stage, int] = dict(zip(PAUSABLE, counts, strict=True))
        self.taken = {stage: self.taken.get(stage, taken[stage]) for stage in PAUSABLE if self.town.paused(stage)}
        for stage, before in self.taken.items():
            assert taken[stage] == before, f"{stage} is paused, and yet: {before}, then {taken[stage]}"

    def teardown(self) -> None:
        try:
            broken = sys.exc_info()[0] is not None  # by a step: then that is what is told
            if self.ids and not broken:
                self._let_go_on()
                self._settle()
                self._compare()
                held = [attempt for attempt in self.town.attempts if attempt.held]
                for attempt in held:
                    self._release(attempt)
                if held:
                    self._settle()
                    self._compare()
                self._hold_invariants()
            self.bench.result.cases += 1
        finally:
            with suppress(Exception):
                self.bench.do(self.bench.crew.drain())
            self.bench.do(wipe(self.bench.db))

    def _let_go_on(self) -> None:
        """All that can happen beside the pauses has happened, and then they end."""
        if self.town.pauses:
            self._settle()
            self.what_is_paused_stands_still()
            self._hold_invariants()
        for stage, whom in sorted(self.town.pauses):
            self._resume(stage, whom)

    def _settle(self) -> None:
        """Reservations are over, and whatever can happen has happened."""
        self.bench.db.ahead += timedelta(hours=1)
        for _ in range(SETTLE_TURNS):
            self.bench.do(self.bench.crew.drain())
            self._reconcile()
        self.bench.do(self.bench.crew.drain())
        if self.bench.do(agree_to_starts(self.bench.db, NOTICE)):
            self.fire("agreed to a later start", "")
            self.bench.do(self.bench.crew.drain())

    def _compare(self) -> None:
        for attempt in self.town.attempts:
            self._look_for_hold(attempt)
        self.bench.log.append("all is settled")
        rows = self.bench.transact(lambda tx: tx.all(ENDS, {"student": self.student, "now": tx.now}))
        ends = {row["payment_id"]: row for row in rows}
        for attempt, payment in self.ids.items():
            end = ends.get(payment)
            if attempt.captured is None:
                assert end is None, f"{self.name(attempt)} was not captured, but is {end}"
                continue
            assert end, f"{self.name(attempt)} was captured, but is nowhere"
            self._compare_one(attempt, end)
        coins = self.bench.transact(lambda tx: count_available(tx, self.student))
        assert coins == self.town.coins, f"{coins} coins instead of {self.town.coins}"

    def _compare_one(self, attempt: Attempt, end: dict[str, Any]) -> None:
        who, reason = self.name(attempt), end["reason"]
        if not attempt.live:
            assert (end["stage"], end["owed"], end["to_come"], reason) == ("refunded", 0, 0, None), f"{who}: {end}"
            return
        waits = self.town.waits_for(attempt)
        if not attempt.pays:
            assert (end["stage"], reason, end["purchases"]) == ("paid", waits, 0), f"{who} waits for {waits}: {end}"
            return
        done = attempt.checkout.done
        assert end["completed"] + end["student_absent"] == done, f"{who}: {done} were held: {end}"
        if end["purchases"]:
            assert end["refunded"] == min(TIER, attempt.taken), f"{who}: {attempt.taken} were refunded: {end}"
        if waits is None:
            assert (end["owed"], reason) == (0, None), f"{who} can be delivered: {end}"
            assert end["scheduled"] == max(end["begun"], TIER - attempt.taken - done), f"{who}: {end}"
            self.bench.result.good += 1
        elif end["owed"]:
            allowed = ("NO_TRAINER_AVAILABLE", "TRAINER_LEFT") if waits == "NO_TRAINER" else (waits,)
            assert reason in allowed, f"{who} waits for {waits}: {end}"

    def _hold_invariants(self) -> None:
        async def look(tx: Tx) -> list[str]:
            said = [str(violation) for violation in await check(tx, leeway=timedelta(0))]
            return said + await tx.values(LEFT_BEHIND)

        said = self.bench.transact(look)
        assert not said, said


# Sessions whose time has come.
LIST_BEGUN = """
select pu.id, t.seq::int from student_course_purchases pu join tutoring_sessions t on t.purchase_id = pu.id
where pu.payment_id = %(payment)s and t.starts_at <= %(now)s and t.status <> 'cancelled' order by t.seq
"""
IS_HELD = "select held from undelivered where payment_id = %(payment)s"
OWES_NOTHING = "select stage <> 'paid' and owed = 0 from fulfilments where payment_id = %(payment)s"

# What is decided at once.
MONEY = """
select p.id, p.status, p.captured_cents::int, p.refunded_cents::int, coalesce(c.paid_by = p.id, false),
  (select coalesce(sum(r.sessions), 0) from refunds r where r.payment_id = p.id)::int
from payments p join checkouts c on c.id = p.checkout_id where p.student_id = %(student)s
"""

# What may not become more in a paused stage, by stage.
TAKEN = """
select (select count(*) from student_course_purchases), (select count(*) from bookings where kind <> 'hold'),
  (select count(*) from tutoring_sessions)
"""

# What workers make of it.
ENDS = """
select f.payment_id, f.stage, f.scheduled, f.completed, f.student_absent, f.refunded, f.owed, u.reason,
  (select count(*) from student_course_purchases x where x.payment_id = f.payment_id) as purchases,
  (select count(*) from tutoring_sessions t where t.purchase_id = f.purchase_id and t.status = 'scheduled'
     and t.starts_at <= %(now)s) as begun,
  (select count(*) from tutoring_sessions t where t.purchase_id = f.purchase_id and t.status = 'scheduled'
     and t.starts_at > %(now)s) as to_come
from fulfilments f left join undelivered u on u.payment_id = f.payment_id where f.student_id = %(student)s
"""

LEFT_BEHIND = """
select 'parked: ' || event_type || ': ' || error from dead_letters where status = 'parked'
union all
select 'webhook ' || type || ': ' || coalesce(outcome, 'never had an effect') from webhook_events
where starts_with(outcome, 'failing') or (applied_at is null and type <> 'payment.refunded')
"""

# Hypothesis leaves rules out by chance, so what must happen in a few dozen examples is less than what must in hundreds.
OFTEN = (
    "buy", "heard before bought", "second attempt refused", "pay", "succeeded", "failed", "wrong amount", "accept",
    "full refund", "partial refund", "provider's refund", "hold", "repair", "pause", "trainer added", "time passes",
    "worker's turn", "workers drain", "reconciler",
)  # fmt: skip
SELDOM = (
    "second attempt", "refund refused", "held", "release", "resume", "location given", "trainer left", "trainer away",
    "session completed", "session student_absent", "session trainer_absent",
)  # fmt: skip
