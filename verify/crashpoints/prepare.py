"""States to strike in: how far a payment has come, made for many cases at once through the product's own operations."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from psycopg.types.json import Jsonb

from caravan import deliveries, pauses
from caravan.carts.operations import add_item
from caravan.ids import new_id
from caravan.payments.operations import retry_payment
from caravan.purchases.operations import create_purchases
from verify.crashpoints.stage import Case, Stage
from verify.world import HOURS, PRICES, PROVIDERS, RULES, SESSIONS, slot_of

Prepare = Callable[[Stage, int], Awaitable[list[Case]]]
EVERYBODY = ("purchase-worker", "allocation-worker", "session-worker", "cache-worker")


async def newcomers(stage: Stage, number: int, *, coins: int = 0, located: bool = True) -> list[Case]:
    """Students who have bought nothing yet, each with an hour of the day."""
    students = await stage.world.students(number, coins=coins, located=located)
    await stage.world.work()
    return [Case([student], know={"hour": at % HOURS}) for at, student in enumerate(students)]


def bought(
    *, pay: bool = False, work: Sequence[str] = (), mode: str = "online", located: bool = True, **more: Any
) -> Prepare:
    """One payment each; `pay`: it succeeded; `work`: the services that have done all that waited for them since."""

    async def prepare(stage: Stage, number: int) -> list[Case]:
        coins, hour = more.get("coins", 0), more.get("hour")
        cases = await newcomers(stage, number, coins=coins, located=located)
        async with stage.world.db.transaction("payment-service") as tx:
            for case in cases:
                at = case.know["hour"] if hour is None else hour
                case.payments = [await stage.world.buy(case.student, hour=at, mode=mode, coins=coins, tx=tx)]
        if pay:
            await stage.world.pay([case.payment for case in cases])
        for service in work:
            await stage.world.work(service)
        await know_more(stage, cases)
        return cases

    return prepare


def paid(*work: str, **more: Any) -> Prepare:
    return bought(pay=True, work=work, **more)


delivered = paid(*EVERYBODY)


async def know_more(stage: Stage, cases: Sequence[Case]) -> None:
    """Purchase, allocation and trainer of each case, where there are any."""
    rows = await stage.world.rows(KNOWN, payments=[case.payment for case in cases])
    known = {row.pop("payment_id"): row for row in rows}
    for case in cases:
        case.know |= known.get(case.payment, {})


KNOWN = """
select pu.payment_id, pu.id as purchase, a.id as allocation, a.trainer_id as trainer
from student_course_purchases pu left join trainer_allocations a on a.purchase_id = pu.id and a.status <> 'cancelled'
where pu.payment_id = any(%(payments)s)
"""


def then(prepare: Prepare, *changes: Callable[[Stage, Case], Awaitable[Any]], work: Sequence[str] = ()) -> Prepare:
    """Something more happens to each case, and then these services work."""

    async def prepared(stage: Stage, number: int) -> list[Case]:
        cases = await prepare(stage, number)
        for case in cases:
            for change in changes:
                await change(stage, case)
        for service in work:
            await stage.world.work(service)
        return cases

    return prepared


# -- what happens to a case


async def refund_all(stage: Stage, case: Case) -> None:
    await stage.world.refund(case.payment)


async def refund_part(stage: Stage, case: Case) -> None:
    await stage.world.refund(case.payment, cents=PRICES[SESSIONS] // SESSIONS, sessions=1)


async def pay_too_little(stage: Stage, case: Case) -> None:
    await stage.world.webhook(case.payment, cents=1_000)


async def attempt_again(stage: Stage, case: Case) -> UUID:
    """A second payment under the case's checkout."""
    async with stage.world.db.transaction("payment-service") as tx:
        checkout = await tx.value(CHECKOUT, {"payment": case.payment})
        return (await retry_payment(tx, checkout, RULES, PROVIDERS, account_id=None)).payment.id


async def pay_twice(stage: Stage, case: Case) -> None:
    """Two attempts succeed; the case is about the second."""
    other = await attempt_again(stage, case)
    await stage.world.pay([case.payment, other])
    case.payments.insert(0, other)


CHECKOUT = "select checkout_id from payments where id = %(payment)s"


async def fill_cart(stage: Stage, case: Case) -> None:
    async with stage.world.db.transaction("payment-service") as tx:
        await add_item(
            tx,
            case.student,
            stage.world.course,
            session_count=SESSIONS,
            learning_mode="online",
            group_size=1,
            time_slot=slot_of(6),
            start_date=(tx.now + timedelta(days=3)).date(),
        )


async def hold(stage: Stage, case: Case) -> None:
    async with stage.world.db.transaction("admin-service") as tx:
        await deliveries.hold(tx, case.payment, deliveries.Stage.PAID, "verify")


async def find_the_student(stage: Stage, case: Case) -> None:
    """Behind the product's back: a place, of which nobody says a word."""
    await stage.world.run("update students set latitude = 28.6, longitude = 77.2 where id = %(id)s", id=case.student)


async def have_begun(stage: Stage, case: Case) -> None:
    """The first session is over: the whole booking began four days earlier."""
    await stage.world.run(SHIFT_BOOKING, purchase=case.know["purchase"])
    await stage.world.run(SHIFT_SESSIONS, purchase=case.know["purchase"])


SHIFT_BOOKING = """
update bookings b set
  starts = array(select s - interval '4 days' from unnest(b.starts) s order by s),
  during = (select range_agg(tstzrange(s - interval '4 days', s - interval '4 days' + make_interval(mins => b.minutes)))
            from unnest(b.starts) s)
where b.purchase_id = %(purchase)s
"""
SHIFT_SESSIONS = """
update tutoring_sessions set starts_at = starts_at - interval '4 days', ends_at = ends_at - interval '4 days'
where purchase_id = %(purchase)s
"""


# -- the worst day: each case in a city of its own, so that what is stopped for one stops no other


async def live_apart(stage: Stage, case: Case) -> None:
    """All of a case's students live in its own city, of which the product is told nothing but where they live."""
    case.know["city"] = f"City of {case.student}"
    north = int.from_bytes(case.student.bytes[-4:]) / 2**32
    place = {"north": 10 + 20 * north, "east": 70.0}
    await stage.world.run(FOUND_CITY, name=case.know["city"], **place)
    await stage.world.run(MOVE_STUDENTS, students=case.students, **place)


FOUND_CITY = """
insert into cities (name, latitude, longitude, radius_km) values (%(name)s, %(north)s, %(east)s, 0.01)
"""
MOVE_STUDENTS = "update students set latitude = %(north)s, longitude = %(east)s where id = any(%(students)s)"


async def stop_city(stage: Stage, case: Case) -> None:
    async with stage.world.db.transaction("admin-service") as tx:
        await pauses.pause(tx, city_of(case), note="verify", by="verify")


def city_of(case: Case) -> pauses.Scope:
    return pauses.Scope(deliveries.Stage.PURCHASED, city=case.know["city"])


async def let_start_pass(stage: Stage, case: Case) -> None:
    """The workers were off for days."""
    await stage.world.run(START_LONG_AGO, payment=case.payment)
    await stage.world.run(PAID_LONG_AGO, payment=case.payment)


START_LONG_AGO = "update student_course_purchases set start_date = current_date - 2 where payment_id = %(payment)s"
PAID_LONG_AGO = "update payments set captured_at = captured_at - interval '9 days' where id = %(payment)s"


async def be_unclaimed(stage: Stage, case: Case) -> None:
    """The provider captured a payment that nobody here knows."""
    case.know["event"] = f"evt_{case.student}"
    await stage.world.webhook(new_id(), event_id=case.know["event"])


def two_each(prepare: Prepare) -> Prepare:
    """Cases of two students, with what each has paid."""

    async def prepared(stage: Stage, number: int) -> list[Case]:
        singles = await prepare(stage, 2 * number)
        return [
            Case([*one.students, *other.students], [*one.payments, *other.payments], know=one.know)
            for one, other in zip(singles[::2], singles[1::2], strict=True)
        ]

    return prepared


def no_trainers(prepare: Prepare) -> Prepare:
    """Nobody teaches while these are to be allocated, so they wait; then all teach again, unsaid."""

    async def prepared(stage: Stage, number: int) -> list[Case]:
        await stage.world.run("update trainers set active = false")
        cases = await prepare(stage, number)
        await stage.world.work()
        await stage.world.run("update trainers set active = true")
        await know_more(stage, cases)
        return cases

    return prepared


async def imported(stage: Stage, number: int) -> list[Case]:
    """Captured money of unknown quantity, for known students: TIER_UNKNOWN."""
    cases = await newcomers(stage, number)
    for case in cases:
        case.payments = [await import_money(stage, case.student, hour=case.know["hour"], sessions=None)]
    await stage.world.work()
    async with stage.world.db.transaction() as tx:
        await create_purchases(tx, [case.payment for case in cases])
    await stage.world.work()
    return cases


async def import_money(stage: Stage, student: UUID, *, hour: int, sessions: int | None) -> UUID:
    """What another system took: rows, and not one event."""
    async with stage.world.db.transaction("import") as tx:
        named: dict[str, Any] = {
            "payment": new_id(),
            "checkout": new_id(),
            "student": student,
            "course": stage.world.course,
            "sessions": sessions,
            "slot": slot_of(hour),
            "start": (tx.now + timedelta(days=3)).date(),
            "metadata": Jsonb({}),
            "now": tx.now,
        }
        await tx.execute(IMPORT_CHECKOUT, named)
        await tx.execute(IMPORT_PAYMENT, named)
        await deliveries.open_deliveries(tx, [named["payment"]])
        return named["payment"]


IMPORT_CHECKOUT = """
insert into checkouts (id, student_id, course_id, sessions, price_cents, currency, session_minutes, weekdays,
  learning_mode, timezone, slot_start, start_date, raw, expires_at, paid_by)
values (%(checkout)s, %(student)s, %(course)s, %(sessions)s, 48000, 'INR', 60, '{1,2,3,4,5,6,7}', 'online',
  'Asia/Kolkata', %(slot)s::time, %(start)s, '{}', %(now)s, %(payment)s)
"""
IMPORT_PAYMENT = """
insert into payments (id, checkout_id, student_id, provider, status, amount_cents, currency, captured_cents,
  captured_currency, captured_at, metadata)
values (%(payment)s, %(checkout)s, %(student)s, 'sandbox', 'succeeded', 48000, 'INR', 48000, 'INR', %(now)s,
  %(metadata)s)
"""


async def strangers(stage: Stage, number: int) -> list[Case]:
    """Captured money for students whom nobody knows yet: STUDENT_NOT_FOUND."""
    cases = [Case([new_id()], know={"hour": at % HOURS}) for at in range(number)]
    for case in cases:
        case.payments = [await import_money(stage, case.student, hour=case.know["hour"], sessions=SESSIONS)]
    async with stage.world.db.transaction() as tx:
        await create_purchases(tx, [case.payment for case in cases])
    await stage.world.work()
    return cases


# -- gaps: what a worker did not do, made old enough for the reconciler to care


def lose(group: str, event_type: str) -> Callable[[Stage, Case], Awaitable[None]]:
    """Marked before the effect (an old incident): the group believes that it has done the event."""

    async def change(stage: Stage, case: Case) -> None:
        named = {"group": group, "type": event_type, "payment": str(case.payment)}
        await stage.world.run(MARK_PROCESSED, **named)
        await make_old(stage, case)

    return change


MARK_PROCESSED = """
insert into processed_events (consumer_group, event_id, event_type, correlation_id, source)
select %(group)s, event_id, type, correlation_id, source from outbox
where correlation_id = %(payment)s and type = %(type)s
"""


async def make_old(stage: Stage, case: Case) -> None:
    for payment in case.payments:
        for statement in MAKE_OLD:
            await stage.world.run(statement, payment=payment)


MAKE_OLD = (
    "update undelivered set since = since - interval '1 hour' where payment_id = %(payment)s",
    "update student_course_purchases set created_at = created_at - interval '1 hour' where payment_id = %(payment)s",
    """update trainer_allocations a set updated_at = a.updated_at - interval '1 hour'
       from student_course_purchases pu where pu.id = a.purchase_id and pu.payment_id = %(payment)s""",
)


async def forget(stage: Stage, case: Case) -> None:
    await stage.world.run("delete from undelivered where payment_id = %(id)s", id=case.payment)


async def keep_listed(stage: Stage, case: Case) -> None:
    await stage.world.run(KEEP_LISTED, id=case.payment)


KEEP_LISTED = """
insert into undelivered (payment_id, student_id, course_id, amount_cents, currency, since)
select p.id, p.student_id, c.course_id, p.captured_cents, p.currency, now() - interval '1 hour'
from payments p join checkouts c on c.id = p.checkout_id where p.id = %(id)s
"""


async def lose_sessions(stage: Stage, case: Case) -> None:
    await stage.world.run("delete from tutoring_sessions where student_id = %(id)s", id=case.student)


async def owe_a_session(stage: Stage, case: Case) -> None:
    await stage.world.run(
        "update tutoring_sessions set status = 'trainer_absent' where student_id = %(id)s and seq = 2", id=case.student
    )
    await keep_listed(stage, case)


async def store_webhook(stage: Stage, case: Case) -> None:
    """The provider's word, stored and without effect, as after a bug of ours."""
    await stage.world.run(STORE_WEBHOOK, payment=case.payment, event=f"msg_{case.payment}")


STORE_WEBHOOK = """
insert into webhook_events (provider, event_id, type, payment_id, amount_cents, currency, sent_at, body)
values ('sandbox', %(event)s, 'payment.succeeded', %(payment)s, 48000, 'INR', now(), '{}')
"""


async def let_coins_expire(stage: Stage, case: Case) -> None:
    await stage.world.run(EXPIRE_COINS, id=case.payment)


EXPIRE_COINS = """
update coin_entries set expires_at = now() - interval '1 hour' where payment_id = %(id)s and kind = 'reserved'
"""


async def let_time_stand(stage: Stage, case: Case) -> None:
    await stage.world.run("update trainer_time set computed_at = now() - interval '2 days'")


async def lack_a_partition(stage: Stage, case: Case) -> None:
    await stage.world.run("drop table if exists outbox_2")


def today() -> datetime:
    return datetime.now().astimezone()
