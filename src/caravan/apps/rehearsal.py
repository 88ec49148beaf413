"""The incidents that started it all, rehearsed on the running system, with the ids and figures of the reports.

Each is a function that breaks something on purpose, tells what it sees, and must end with the money delivered. Money of
an earlier rehearsal is given back first, through the operator's refund, so that families and trainers are free again.
An id that a report names exists once: the first rehearsal uses it, later ones an id derived from it.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import date
from typing import Any
from uuid import UUID, uuid5

from caravan.apps.demo_data import (
    ARTIFICIAL_INTELLIGENCE,
    CENTRE,
    CLOSES,
    EVERY_DAY,
    LATE,
    NOWHERE,
    OFFLINE,
    OPENS,
    ROBOTICS,
    SEED_TRAINER,
    STUDENT_OF_AI,
    STUDENT_OF_ROBOTICS,
)
from caravan.apps.stage import SOURCE, NotAsExpected, Sale, Stage
from caravan.db import Tx
from caravan.payments.operations import capture
from caravan.web.formats import counted

PAYMENT_OF_AI = UUID("5dc56599-cd44-4672-ab73-2bf7f789ef34")
PAYMENT_OF_ROBOTICS = UUID("fb8f4aae-7fb3-43d0-8782-cacbaea2cc8c")
ROBOTICS_CENTS = 360_000
AI_CENTS = 420_000
START = date(2026, 1, 9)
RUNS_MAX = 100_000


@dataclass(slots=True)
class Telling:
    """What became of one incident. `seen`: the reason it showed while it was broken; `seconds` from the payment on."""

    name: str
    title: str
    report: str
    named_payment_id: UUID | None = None
    payment_id: UUID | None = None
    seen: str | None = None
    steps: list[str] = field(default_factory=list[str])
    seconds: float = 0.0
    outcome: str = "failed"
    ok: bool = False

    def say(self, what: str) -> None:
        self.steps.append(what)


Incident = Callable[[Stage, Telling, int], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """`run`: how often this database has rehearsed, from 1."""

    run: int
    seconds: float
    incidents: list[Telling]

    @property
    def ok(self) -> bool:
        return all(each.ok for each in self.incidents)


async def rehearse(stage: Stage, told: Callable[[Telling], None] = lambda _telling: None) -> Rehearsal:
    """All incidents, one after another; `told` hears of each as it ends. Services that were stopped run again after."""
    started = time.monotonic()
    earlier = await stage.earlier()
    for payment_id in earlier:
        await stage.refund(payment_id)
    await stage.until_released(earlier)
    run = await _next_run(stage)
    tellings: list[Telling] = []
    for incident, title, report in INCIDENTS:
        telling = Telling(incident.__name__, title, report)
        await _rehearse_one(stage, incident, telling, run)
        tellings.append(telling)
        told(telling)
    return Rehearsal(run, time.monotonic() - started, tellings)


async def _rehearse_one(stage: Stage, incident: Incident, telling: Telling, run: int) -> None:
    try:
        await incident(stage, telling, run)
        telling.outcome, telling.ok = "delivered", True
    except NotAsExpected as error:
        telling.say(f"Not as it should be: {error}")
        telling.outcome = "failed"
    finally:
        for service in ("purchase-worker", "session-worker"):
            await stage.start(service)


async def _next_run(stage: Stage) -> int:
    for run in range(1, RUNS_MAX):
        if not await stage.exists(_payment_id(PAYMENT_OF_AI, run)):
            return run
    raise NotAsExpected(f"rehearsed {RUNS_MAX} times: start with a new data folder")


def _payment_id(named: UUID, run: int) -> UUID:
    return named if run == 1 else uuid5(named, str(run))


def _name_payment(telling: Telling, named: UUID, run: int) -> UUID:
    telling.named_payment_id = named
    telling.payment_id = _payment_id(named, run)
    if run > 1:
        telling.say(f"Rehearsal {run}: payment {telling.payment_id} stands for {named}, which exists once.")
    return telling.payment_id


async def _delivered(stage: Stage, telling: Telling, payment_id: UUID, since: float) -> dict[str, Any]:
    row = await stage.until_delivered(payment_id)
    telling.seconds = time.monotonic() - since
    sessions = counted(row["scheduled"], "session")
    telling.say(f"Delivered: purchase {row['purchase_id']}, trainer {row['trainer_id']}, {sessions}.")
    return row


async def _capture(stage: Stage, payment_id: UUID, amount_cents: int) -> None:
    await stage.db.transact(lambda tx: capture(tx, payment_id, amount_cents, "INR"), SOURCE)


# ------------------------------------------------------------------ the incidents


async def purchase_worker_stopped(stage: Stage, telling: Telling, run: int) -> None:
    payment_id = _name_payment(telling, PAYMENT_OF_AI, run)
    await stage.stop("purchase-worker")
    telling.say("Stopped the purchase-worker.")
    await stage.record_payment(
        payment_id, Sale(STUDENT_OF_AI, ARTIFICIAL_INTELLIGENCE, "6:00 AM", start=START), AI_CENTS
    )
    since = time.monotonic()
    await _capture(stage, payment_id, AI_CENTS)
    telling.say("Payment succeeded: Artificial Intelligence, 30 sessions, imported as it was.")
    finding = await stage.until_reason(payment_id, "NO_WORKER")
    telling.seen = finding.reason
    telling.say(f"diagnose says NO_WORKER after {time.monotonic() - since:.1f} s: {finding.evidence[-1]}")
    await stage.start("purchase-worker")
    telling.say("Started it again; nothing else was done.")
    await _delivered(stage, telling, payment_id, since)


# What the faulty worker of the report did: the event counts as done for the group, and nothing was.
MARK_PROCESSED = """
insert into processed_events (consumer_group, event_id, event_type, correlation_id, source, processed_at)
select 'purchase-creation-workers', event_id, type, correlation_id, source, now() from outbox
where correlation_id = %(payment_id)s and type = 'PURCHASE_CONFIRMED'
"""


async def marked_processed(stage: Stage, telling: Telling, run: int) -> None:
    await stage.stop("purchase-worker")
    since = time.monotonic()
    telling.payment_id = payment_id = await stage.buy(Sale(STUDENT_OF_AI, ARTIFICIAL_INTELLIGENCE, "7:00 PM"))

    async def mark(tx: Tx) -> None:
        await tx.execute(MARK_PROCESSED, {"payment_id": str(payment_id)})

    await stage.db.transact(mark, "rehearsal")
    await stage.start("purchase-worker")
    telling.say("Paid; PURCHASE_CONFIRMED was marked processed behind the worker's back, so it skips the event.")
    telling.seen = (await stage.until_reason(payment_id, "MARKED_PROCESSED_BUT_MISSING")).reason
    telling.say("diagnose says MARKED_PROCESSED_BUT_MISSING.")
    path = f"/api/v1/admin/payments/{payment_id}/repair"
    done = await stage.http("POST", path, {"note": "caravan demo"}, who=stage.admin)
    telling.say(f"The one button, repair: {done['did']}")
    await _delivered(stage, telling, payment_id, since)


ALLOCATION_OF = """
select a.id from trainer_allocations a join student_course_purchases pu on pu.id = a.purchase_id
where pu.payment_id = %(payment_id)s and a.status = 'approved'
"""
SESSIONS_OF = """
select count(*) from tutoring_sessions t join student_course_purchases pu on pu.id = t.purchase_id
where pu.payment_id = %(payment_id)s
"""
HEARD_BY_SESSION_WORKER = """
select exists (select from processed_events where consumer_group = 'session-scheduling-workers'
               and event_type = 'TRAINER_ALLOCATED' and correlation_id = %(payment_id)s)
"""


async def allocation_without_sessions(stage: Stage, telling: Telling, run: int) -> None:
    await stage.stop("session-worker")
    telling.say("Stopped the session-worker.")
    since = time.monotonic()
    telling.payment_id = payment_id = await stage.buy(Sale(STUDENT_OF_ROBOTICS, ROBOTICS, "5:00 PM"))
    await stage.until_stage(payment_id, "allocated")
    telling.seen = (await stage.until_reason(payment_id, "NO_WORKER")).reason
    allocation = await _value(stage, ALLOCATION_OF, payment_id)
    telling.say(f"Allocation {allocation} is approved and has no sessions; diagnose says {telling.seen}.")
    path = f"/api/v1/admin/allocations/{allocation}/sessions"
    made = await stage.http("POST", path, {"note": "caravan demo"}, who=stage.admin)
    telling.say(f"The operator made them by hand: {counted(made['created'], 'session')}.")
    await _delivered(stage, telling, payment_id, since)
    await stage.start("session-worker")

    async def heard() -> bool:
        return await _value(stage, HEARD_BY_SESSION_WORKER, str(payment_id))

    await stage.until("the session-worker hears of it", heard)
    count = await _value(stage, SESSIONS_OF, payment_id)
    if count != 30:
        raise NotAsExpected(f"{count} sessions after the worker came back")
    telling.say("The worker came back and heard the event late: still 30 sessions.")


async def _value(stage: Stage, query: Any, payment_id: UUID | str) -> Any:
    async with stage.db.transaction("rehearsal", read_only=True) as tx:
        return await tx.value(query, {"payment_id": payment_id})


async def student_without_coordinates(stage: Stage, telling: Telling, run: int) -> None:
    student = stage.student(NOWHERE)
    who = stage.parent_of(student)
    path = f"/api/v1/students/{student}"
    await stage.http("PATCH", path, {"latitude": None, "longitude": None}, who=who)
    since = time.monotonic()
    telling.payment_id = payment_id = await stage.buy(Sale(student, ROBOTICS, "4:00 PM"))
    telling.seen = (await stage.until_reason(payment_id, "STUDENT_LOCATION_MISSING")).reason
    telling.say("Paid for lessons at home, and we don't know where that is: it waits with STUDENT_LOCATION_MISSING.")
    placed = time.monotonic()
    await stage.http("PATCH", path, {"latitude": CENTRE[0], "longitude": CENTRE[1]}, who=who)
    await _delivered(stage, telling, payment_id, since)
    telling.say(f"It went on by itself {time.monotonic() - placed:.1f} s after the parent said where.")


async def no_free_trainer(stage: Stage, telling: Telling, run: int) -> None:
    await _open_evenings(stage, late=False)
    student = stage.student(LATE)
    since = time.monotonic()
    telling.payment_id = payment_id = await stage.buy(Sale(student, ARTIFICIAL_INTELLIGENCE, "11:00 PM"))
    telling.seen = (await stage.until_reason(payment_id, "NO_TRAINER_AVAILABLE")).reason
    telling.say("Paid for 11:00 PM, when no trainer works: it waits with NO_TRAINER_AVAILABLE.")
    opened = time.monotonic()
    await _open_evenings(stage, late=True)
    row = await _delivered(stage, telling, payment_id, since)
    if row["trainer_id"] != SEED_TRAINER:
        raise NotAsExpected(f"trainer {row['trainer_id']} instead of {SEED_TRAINER}")
    telling.say(f"It went on by itself {time.monotonic() - opened:.1f} s after trainer {SEED_TRAINER} opened evenings.")


async def _open_evenings(stage: Stage, *, late: bool) -> None:
    """The trainer of the reports works until ten at night, or until midnight."""
    path = f"/api/v1/admin/trainers/{SEED_TRAINER}"
    rules = (await stage.http("GET", path, who=stage.admin))["availability"]
    known = {"validFrom": rules[0]["validFrom"], "validUntil": rules[0]["validUntil"]}
    until = "00:00:00" if late else CLOSES.isoformat()
    availability = [
        {"weekday": weekday, "fromTime": OPENS.isoformat(), "untilTime": until, **known} for weekday in EVERY_DAY
    ]
    await stage.http("PATCH", path, {"availability": availability, "note": "caravan demo"}, who=stage.admin)


async def push_missed(stage: Stage, telling: Telling, run: int) -> None:
    student = stage.student(OFFLINE)
    who = stage.parent_of(student)
    learning = f"/api/v1/students/{student}/learning"
    last_seen = (await stage.http("GET", learning, who=who))["version"]
    since = time.monotonic()
    telling.payment_id = payment_id = await stage.buy(Sale(student, ROBOTICS, "3:00 PM", mode="online"))
    await _delivered(stage, telling, payment_id, since)
    telling.say(f"The screen was closed all the while; the last message that it had was number {last_seen}.")
    heard = await _resume(stage, who, student, last_seen, payment_id)
    numbers = [frame["seq"] for frame in heard]
    if numbers != list(range(last_seen + 1, last_seen + 1 + len(numbers))):
        raise NotAsExpected(f"the messages have gaps: {numbers}")
    telling.say(
        f"Opened again, it asked for what came after {last_seen} and got {numbers[0]} to {numbers[-1]} without a gap: "
        + ", ".join(dict.fromkeys(frame["event"]["type"] for frame in heard))
        + "."
    )
    items = (await stage.http("GET", learning, who=who))["items"]
    if not any(item["paymentId"] == str(payment_id) and item["stage"] == "scheduled" for item in items):
        raise NotAsExpected("the learning screen does not show the course")
    telling.say("The learning screen shows the course with 30 sessions.")


async def _resume(stage: Stage, who: str, student: UUID, after: int, payment_id: UUID) -> list[dict[str, Any]]:
    """What a client hears that says where it left off, up to the payment's SESSIONS_SCHEDULED."""
    from websockets.asyncio.client import connect

    ticket = (await stage.http("POST", "/api/v1/realtime/tickets", {}, who=who))["ticket"]
    address = stage.demo["url"].replace("http", "ws", 1) + f"/ws?ticket={ticket}"
    heard: list[dict[str, Any]] = []
    try:
        async with asyncio.timeout(10), connect(address, compression=None) as socket:
            await socket.send(json.dumps({"type": "resume", "after": after, "studentId": str(student)}))
            async for frame in socket:
                said = json.loads(frame)
                if said["type"] != "business-event" or said.get("studentId") != str(student):
                    continue
                heard.append(said)
                event = said["event"]
                if event["type"] == "SESSIONS_SCHEDULED" and event["paymentId"] == str(payment_id):
                    return heard
    except TimeoutError:
        pass
    raise NotAsExpected(f"SESSIONS_SCHEDULED never came; heard {[frame['event']['type'] for frame in heard]}")


class LogUnreachable(ConnectionRefusedError):
    """What the report's broker answered."""


SAID_OF = "select count(*) from outbox where correlation_id = %(payment_id)s"
STATUS_OF = "select status from payments where id = %(payment_id)s"


async def log_unreachable(stage: Stage, telling: Telling, run: int) -> None:
    payment_id = _name_payment(telling, PAYMENT_OF_ROBOTICS, run)
    sale = Sale(STUDENT_OF_ROBOTICS, ROBOTICS, "6:00 AM", start=START)
    await stage.record_payment(payment_id, sale, ROBOTICS_CENTS)
    telling.say("₹3,600 for Robotics, 30 sessions from 2026-01-09 at 6:00 AM, and the log refuses the event.")

    async def refuse(_tx: Tx) -> None:
        raise LogUnreachable("connect ECONNREFUSED ::1:9092")

    try:
        async with stage.db.transaction(SOURCE) as tx:
            await capture(tx, payment_id, ROBOTICS_CENTS, "INR")
            tx.flush = refuse
    except LogUnreachable:
        pass
    status, said = await _value(stage, STATUS_OF, payment_id), await _value(stage, SAID_OF, str(payment_id))
    if (status, said) != ("created", 0):
        raise NotAsExpected(f"the payment is {status} with {said} events")
    telling.say("Payment and event are one transaction: neither is there, and the provider is told to try again.")
    since = time.monotonic()
    await _capture(stage, payment_id, ROBOTICS_CENTS)
    await _delivered(stage, telling, payment_id, since)
    telling.say("Told again, it has both. The start of 2026-01-09 is past, so it rolled forward, at the same hour.")


# What is broken, its title, and the report (the seeds' number) that tells of it.
INCIDENTS: tuple[tuple[Incident, str, str], ...] = (
    (purchase_worker_stopped, "Purchase worker stopped", "001"),
    (marked_processed, "Event marked processed, purchase missing", "003"),
    (allocation_without_sessions, "Allocation without sessions", "000, 002"),
    (student_without_coordinates, "Student without coordinates", "000, 002"),
    (no_free_trainer, "No free trainer", "002"),
    (push_missed, "Push missed", "003"),
    (log_unreachable, "Log unreachable at the moment of payment", "004"),
)
