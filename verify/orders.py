"""Orders: whatever happens to a payment, in whatever order and however often, ends in one state.

Lives (see `lives`, which says what is equivalent) are lived in lanes: a dozen students at once on one database, each
with its own order of facts, while the workers of the four groups turn in an order of their own. A lane has a temper:
workers that turn at once, seldom, or not before the end; one group that sleeps; small pages. Then everything drains,
and each life must have ended as its facts say, and exactly as all lives of the same class did.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from functools import cache
from itertools import zip_longest
from random import Random
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

from caravan.catalog.courses import Tier, create_course
from caravan.db import Tx
from caravan.fulfilment.invariants import check
from caravan.fulfilment.reconciler import Reconciler
from caravan.ids import new_id
from caravan.payments.coins import grant_coins
from caravan.payments.model import Order
from caravan.payments.operations import confirm_payment, create_payment, retry_payment
from caravan.payments.refunds import refund_payment
from caravan.payments.webhooks import receive_webhook
from caravan.people.availability import Rule
from caravan.people.students import create_student, update_student
from caravan.people.trainers import create_trainer, set_availability
from verify.crew import Crew, MovedClock, Share, agree_to_starts, spread, wipe
from verify.lives import KINDS, LIVES, Fact, Life, must_end, orders_of, payer_of, with_echoes
from verify.parts import Context
from verify.processes import PROCESSES
from verify.report import PartResult
from verify.world import CENTRE, PRICES, PROVIDERS, RULES, SESSIONS, SETTINGS, sandbox, sign

LANE_CASES = 16
OUTAGE_EVERY = 8  # so manieth lane has an outage
ORDERS_MAX = 720  # of one life; more are chosen by chance
COINS = 100
START_DAYS = 4
SLOT = "6:00 AM"
OUTAGE_DAYS = (5, 30)
AGREED = "agreed to a later start"
TURNS = (0.0, 0.15, 0.4, 0.7)  # how likely it is that a group turns before the next fact
SETTLE_TURNS = 2  # of the reconciler, after an outage
CHANGES_EVERY = 4  # so manieth lane is where the clocks are about to change
CHANGING_ZONE = "Europe/Berlin"
DELIVERING = ("purchase-creation-workers", "trainer-allocation-workers", "session-scheduling-workers")


async def run(context: Context) -> PartResult:
    result = context.result()
    cases = context.pick(320, 3_072)
    lanes = [int(context.case)] if context.case else list(range(cases // LANE_CASES))
    count = 1 if context.case else PROCESSES
    shares = [
        Share("orders", context.scale, context.seed, index, tuple(lanes[index::count]), context.server.create())
        for index in range(count)
    ]
    ends: dict[str, tuple[str, str]] = {}
    for found in await spread(shares, live_lanes):
        result.merge(found)
        for class_, (state, lane) in found.extra["ends"].items():
            if ends.setdefault(class_, (state, lane))[0] != state:
                result.violated(f"{class_} ended in two ways: {ends[class_][0]} and {state}", lane)
    result.good_min = 0 if context.case else cases
    result.must_fire = (
        ()
        if context.case
        else (*KINDS, "the clocks change", "heard twice", "a group slept", "turned in between", AGREED)
    )
    orders = sum(len(list_orders(context.seed, outage)) for outage in (False, True))
    result.extra = {"lives": len(LIVES), "classes": len(ends), "orders": orders}
    return result


async def live_lanes(share: Share) -> PartResult:
    context = Context(share.part, share.scale, share.seed, server=None)  # type: ignore[arg-type]
    result = context.result()
    ends: dict[str, tuple[str, str]] = {}
    async with MovedClock(share.database.url) as db, Crew(db) as crew:
        for number in share.numbers:
            lane = Lane(db, crew, number, context.dice("lane", number), share.seed, result)
            try:
                await lane.live()
            except Exception as error:
                result.violated(f"lane {number} broke off: {type(error).__name__}: {error}", str(number))
                await wipe(db)
                continue
            for class_, state in await lane.judge():
                known = ends.setdefault(class_, (state, str(number)))
                if known[0] != state:
                    result.violated(f"{class_} ended in two ways: {known[0]} (lane {known[1]}), {state}", str(number))
            await wipe(db)
    result.extra["ends"] = ends
    return result


@cache
def list_orders(seed: int, outage: bool) -> list[tuple[Life, tuple[Fact, ...]]]:
    """Every life in every order, the lives by turns; the same list in every process. A lane takes the next few."""
    dice = Random(repr((seed, "orders", outage)))
    lives = [life for life in LIVES if life.outage == outage]
    by_life = [[(life, order) for order in orders_of(life, ORDERS_MAX, dice)] for life in lives]
    return [pair for pairs in zip_longest(*by_life) for pair in pairs if pair is not None]


# ------------------------------------------------------------------ one life


@dataclass(slots=True)
class Case:
    """One student's life: what is still to happen, and who is in it."""

    life: Life
    order: tuple[Fact, ...]
    to_come: list[Fact]
    student: UUID = field(default_factory=new_id)
    course: UUID = field(default_factory=new_id)
    trainer: UUID = field(default_factory=new_id)
    payments: dict[str, UUID] = field(default_factory=dict[str, UUID])
    blocker: UUID | None = None
    checkout: UUID | None = None
    start: date = date.min
    happened: set[str] = field(default_factory=set[str])

    @property
    def class_(self) -> str:
        """What decides the end: the facts, and who paid first."""
        return f"{self.life.name} (paid by {payer_of(self.order)})"

    async def act(self, tx: Tx, fact: Fact, dice: Random) -> None:
        await getattr(self, fact.act)(tx, fact, *fact.args, dice=dice)

    # -- facts

    async def buy(self, tx: Tx, fact: Fact, dice: Random) -> None:
        order = an_order(self.student, self.course, self.start, mode=self.life.mode, coins=self.life.coins)
        made = await create_payment(tx, order, RULES, PROVIDERS, account_id=None, payment_id=self.payments["A"])
        self.checkout = made.payment.checkout_id

    async def attempt(self, tx: Tx, fact: Fact, dice: Random) -> None:
        assert self.checkout
        made = await retry_payment(tx, self.checkout, RULES, PROVIDERS, account_id=None)
        self.payments["B"] = made.payment.id

    async def succeeded(self, tx: Tx, fact: Fact, role: str, dice: Random) -> None:
        await self._hear(tx, fact, role, "payment.succeeded", self._asked, dice)

    async def failed(self, tx: Tx, fact: Fact, role: str, dice: Random) -> None:
        await self._hear(tx, fact, role, "payment.failed", self._asked, dice)

    async def confirm(self, tx: Tx, fact: Fact, role: str, dice: Random) -> None:
        await confirm_payment(tx, self.payments[role], PROVIDERS)

    async def provider_refund(self, tx: Tx, fact: Fact, role: str, cents: int, name: str, dice: Random) -> None:
        refund_id = f"{name}-{self.payments[role]}"
        await self._hear(tx, fact, role, "payment.refunded", cents, dice, refund_id=refund_id)

    async def refund(
        self, tx: Tx, fact: Fact, role: str, cents: int | None, sessions: int | tuple[int, ...] | None, dice: Random
    ) -> None:
        await refund_payment(
            tx, self.payments[role], amount_cents=cents, sessions=sessions, note="verify", source="admin"
        )

    async def locate(self, tx: Tx, fact: Fact, dice: Random) -> None:
        await update_student(tx, self.student, {"latitude": CENTRE[0], "longitude": CENTRE[1]})

    async def free(self, tx: Tx, fact: Fact, dice: Random) -> None:
        if self.life.trainer == "away":
            await set_availability(tx, self.trainer, around_the_clock(tx))
        elif fact.name not in self.happened:
            assert self.blocker
            await refund_payment(tx, self.blocker, note="verify", source="admin")

    async def _hear(
        self, tx: Tx, fact: Fact, role: str, type: str, cents: int, dice: Random, refund_id: str | None = None
    ) -> None:
        """The same webhook again, or another one that says the same."""
        payment = self.payments[role]
        same = fact.name not in self.happened or dice.random() < 0.5
        event_id = f"msg_{payment}_{fact.name.replace(' ', '_')}" if same else None
        headers, body = sign(tx.now, payment, type, cents=cents, refund_id=refund_id, event_id=event_id)
        await receive_webhook(tx, sandbox(), headers, body)

    @property
    def _asked(self) -> int:
        return PRICES[SESSIONS] - self.life.coins * RULES.coin_value_cents


def an_order(student: UUID, course: UUID, start: date, *, mode: str = "online", coins: int = 0) -> Order:
    return Order(
        student_id=student,
        course_id=course,
        session_count=SESSIONS,
        learning_mode=mode,
        group_size=1,
        time_slot=SLOT,
        start_date=start,
        raw={"from": "verify"},
        coins=coins,
    )


def around_the_clock(tx: Tx) -> list[Rule]:
    today = tx.now.date()
    return [Rule(day, time(0), time(0), today - timedelta(days=1), today + timedelta(days=200)) for day in range(1, 8)]


def before_the_change(zone: str) -> timedelta:
    """How far ahead it must be, so that the clocks change on the second day of what is bought then."""
    today = datetime.now(UTC).date()  # as the start is reckoned
    noons = [datetime.combine(today + timedelta(days=day), time(12), ZoneInfo(zone)) for day in range(400)]
    changes = [day for day in range(START_DAYS + 2, 400) if noons[day].utcoffset() != noons[day - 1].utcoffset()]
    return timedelta(days=changes[0] - 1 - START_DAYS)


# ------------------------------------------------------------------ a dozen of them at once


@dataclass(slots=True)
class Lane:
    db: MovedClock
    crew: Crew
    number: int
    dice: Random
    seed: int
    result: PartResult
    cases: list[Case] = field(default_factory=list[Case])

    @property
    def zone(self) -> str:
        """Where its families live; in some lanes the clocks change during the first sessions."""
        return CHANGING_ZONE if self.number % CHANGES_EVERY == 1 else "Asia/Kolkata"

    async def live(self) -> None:
        self.db.ahead = before_the_change(self.zone) if self.zone == CHANGING_ZONE else timedelta(0)
        self.result.fired["the clocks change"] += self.zone == CHANGING_ZONE
        outage = self.number % OUTAGE_EVERY == OUTAGE_EVERY - 1
        await self._open(outage)
        page = self.dice.choice((1, 3, 256, 256))
        for consumer in self.crew.consumers.values():
            consumer._page_max = page  # pyright: ignore[reportPrivateUsage]
        if outage:
            await self._through_an_outage(self.dice.choice((None, *DELIVERING)))
        else:
            asleep = self.dice.choice((None, *self.crew.groups))
            await self._through(asleep, self.dice.choice(TURNS))
        await self.crew.drain()
        self.result.cases += len(self.cases)

    async def _open(self, outage: bool) -> None:
        """The cases of this lane, their students, courses and trainers; the workers are up to date then."""
        orders = list_orders(self.seed, outage)
        lane = self.number // OUTAGE_EVERY if outage else self.number - self.number // OUTAGE_EVERY
        for place in range(LANE_CASES):
            life, order = orders[(lane * LANE_CASES + place) % len(orders)]
            case = Case(life, order, with_echoes(order, self.dice))
            case.payments["A"] = new_id()
            self.cases.append(case)
            self.result.fired.update(life.kinds)
            self.result.fired["heard twice"] += len(case.to_come) - len(order)
        async with self.db.transaction("admin-service") as tx:
            for case in self.cases:
                await self._people(tx, case)
        blocked = [case for case in self.cases if case.life.trainer == "booked"]
        for case in blocked:
            await self.db.transact(lambda tx, case=case: self._block(tx, case), "payment-service")
        await self.crew.drain()

    async def _people(self, tx: Tx, case: Case) -> None:
        case.start = (tx.now + timedelta(days=START_DAYS)).date()
        tiers = [Tier(SESSIONS, PRICES[SESSIONS])]
        await create_course(
            tx, title="Robotics", category="STEM", session_minutes=60, tiers=tiers, course_id=case.course
        )
        place = dict(zip(("latitude", "longitude"), CENTRE, strict=True))
        await create_student(
            tx, name="Asha", student_id=case.student, timezone=self.zone, **(place if case.life.located else {})
        )
        if case.life.coins:
            await grant_coins(tx, case.student, COINS, "verify")
        works = case.life.trainer in ("free", "booked")
        await create_trainer(
            tx,
            name="Ravi",
            course_ids=[case.course],
            rules=around_the_clock(tx) if works else (),
            modes=("online", "home"),
            trainer_id=case.trainer,
            latitude=CENTRE[0],
            longitude=CENTRE[1],
        )

    async def _block(self, tx: Tx, case: Case) -> None:
        """Somebody else has the trainer at that time."""
        other = await create_student(tx, name="Vikram", timezone=self.zone)
        order = an_order(other, case.course, case.start)
        case.blocker = (await create_payment(tx, order, RULES, PROVIDERS, account_id=None)).payment.id
        await confirm_payment(tx, case.blocker, PROVIDERS)

    # -- time passes

    async def _through(self, asleep: str | None, turns: float) -> None:
        """Facts of all cases, each in its order, and turns of the groups between them."""
        self.result.fired["a group slept"] += asleep is not None
        awake = [group for group in self.crew.groups if group != asleep]
        while living := [case for case in self.cases if case.to_come]:
            if self.dice.random() < turns:
                self.result.fired["turned in between"] += await self.crew.turn(self.dice.choice(awake)) > 0
            else:
                await self._happen(self.dice.choice(living))
        if asleep:
            await self.crew.drain(but=asleep)

    async def _through_an_outage(self, asleep: str | None) -> None:
        """All groups are down, or one; and the day on which it was to start goes by."""
        for case in self.cases:
            while case.to_come[0].act != "outage":
                await self._happen(case)
            case.to_come.pop(0)
        if asleep:
            self.result.fired["a group slept"] += 1
            await self.crew.drain(but=asleep)
        self.db.ahead += timedelta(days=self.dice.randint(*OUTAGE_DAYS))
        await self._through(asleep, 0.2)
        await self.crew.drain()
        reconciler = Reconciler(self.db, SETTINGS)
        for _ in range(SETTLE_TURNS):
            await reconciler.run_once()
            await self.crew.drain()
        notice = timedelta(hours=SETTINGS.notice_hours)
        self.result.fired[AGREED] += await agree_to_starts(self.db, notice)
        await self.crew.drain()

    async def _happen(self, case: Case) -> None:
        fact = case.to_come.pop(0)
        await self.db.transact(lambda tx: case.act(tx, fact, self.dice), "payment-service")
        case.happened.add(fact.name)

    # -- judgement

    async def judge(self) -> list[tuple[str, str]]:
        """(class, state) of each case; what is wrong by itself is said here."""
        async with self.db.transaction("verify", read_only=True) as tx:
            for violation in await check(tx, leeway=timedelta(0)):
                self._wrong(str(violation))
            for said in await tx.values(LEFT_BEHIND):
                self._wrong(said)
            rows = await tx.all(STATES, {"students": [case.student for case in self.cases]})
        by_payment = {row["payment_id"]: row for row in rows}
        judged: list[tuple[str, str]] = []
        for case in self.cases:
            states = {
                role: _state(case, by_payment[payment], self.zone) for role, payment in sorted(case.payments.items())
            }
            for role, state in states.items():
                if any(f"{at}:00" != state["slot_start"] for at in state["sessions at"]):
                    self._wrong(f"{case.class_} {role}: sold at {state['slot_start']}, held at {state['sessions at']}")
            for role, end in must_end(case.life, case.order).items():
                wrong = [
                    f"{name} is {states[role][name]!r} instead of {value!r}"
                    for name, value in end.items()
                    if value != states[role][name] and not (name == "refunded" and value is None)
                ]
                if wrong:
                    self._wrong(f"{case.class_} {role}: {', '.join(wrong)}; {' > '.join(f.name for f in case.order)}")
                else:
                    self.result.good += role == "A"
            judged.append((case.class_, json.dumps(states, sort_keys=True, default=str)))
        return judged

    def _wrong(self, said: str) -> None:
        self.result.violated(said, str(self.number))


# Nothing may be parked, stored without effect, or booked at shorter notice than the house gives.
LEFT_BEHIND = """
select 'parked: ' || event_type || ' of ' || consumer_group || ': ' || error from dead_letters where status = 'parked'
union all
select 'webhook ' || type || ' of ' || payment_id || ' never had an effect' from webhook_events where applied_at is null
union all
select 'webhook ' || type || ' of ' || payment_id || ': ' || outcome from webhook_events
where outcome not in ('applied', 'already', 'stale')
union all
select 'booking ' || id || ' begins ' || starts[1] - created_at || ' after it was made' from bookings
where starts[1] < created_at + make_interval(hours => 12)
"""

# What a payment came to, in business columns. A purchase that ended counts as none.
STATES = """
select p.id as payment_id, p.status, p.captured_cents, p.refunded_cents, p.coins, c.paid_by = p.id as pays, f.stage,
  coalesce(f.scheduled, 0) as scheduled, coalesce(f.owed, 0) as owed,
  case when p.status = 'refunded' then null else coalesce(f.refunded, 0) end as refunded, u.reason,
  coalesce(u.held, false) as held, u.payment_id is not null as undelivered, pu.purchase_tier as tier,
  pu.learning_mode, pu.slot_start, pu.start_date, pu.refunded_sessions, a.status as allocation, a.trainer_id,
  (select count(*) from student_course_purchases x where x.checkout_id = c.id and x.is_active) as purchases,
  (select count(*) from trainer_allocations x where x.purchase_id = pu.id and x.status <> 'cancelled') as allocations,
  array(select s from bookings b cross join lateral unnest(b.starts) s
        where b.purchase_id = pu.id and b.live order by s) as booked,
  array(select t.starts_at from tutoring_sessions t
        where t.purchase_id = pu.id and t.status = 'scheduled' order by t.starts_at) as sessions,
  (select count(*) from refunds r where r.payment_id = p.id) as refunds,
  (select coalesce(sum(case when kind in ('granted', 'returned') then coins when kind = 'captured' then -coins
     when kind = 'reserved' and not exists (select from coin_entries d where d.payment_id = e.payment_id
       and d.kind in ('released', 'captured')) then -coins else 0 end), 0)
   from coin_entries e where e.student_id = p.student_id)::int as balance
from payments p join checkouts c on c.id = p.checkout_id
left join fulfilments f on f.payment_id = p.id
left join undelivered u on u.payment_id = p.id
left join student_course_purchases pu on pu.payment_id = p.id and pu.is_active
left join trainer_allocations a on a.purchase_id = pu.id and a.status <> 'cancelled'
where p.student_id = any(%(students)b::uuid[])
"""


def _state(case: Case, row: dict[str, Any], zone: str) -> dict[str, Any]:
    """Comparable between cases: no ids, no instants; days are counted from the requested start."""
    state = {name: row[name] for name in row if name not in ("payment_id", "trainer_id", "start_date")}
    state["slot_start"] = str(row["slot_start"])
    state["start"] = row["start_date"] and (row["start_date"] - case.start).days
    state["trainer"] = row["trainer_id"] and row["trainer_id"] == case.trainer
    for name in ("booked", "sessions"):
        times = [start.astimezone(ZoneInfo(zone)) for start in row[name]]
        state[name] = [(start.date() - case.start).days for start in times] if case.life.dates else len(times)
        state[f"{name} at"] = sorted({start.strftime("%H:%M") for start in times})
    if case.life.outage:
        # What was held, or should have been, while the workers were down is over: only what is to come is compared.
        # And who was too late for the start that was chosen has agreed to another one.
        del state["booked"], state["booked at"], state["start"]
    return state
