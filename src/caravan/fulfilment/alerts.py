"""What somebody should know of the platform itself: rules, and the record of when each began and ended.

Owns: alerts, alert_notices. A rule looks and says what it found, in one sentence and a few figures; nothing of a person
is in either, for both leave the house (watch.py sends them). An alert is raised once its rule has held for long enough,
and ends as soon as it holds no more; the next time is a new row.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal
from uuid import UUID

import msgspec

from caravan.db import Tx
from caravan.eventlog.lag import GroupLag, list_lag
from caravan.eventlog.workers import WorkerRow, list_workers
from caravan.fulfilment.gaps import GAPS, HOP_OF_STAGE, list_gap
from caravan.fulfilment.wording import reason_words
from caravan.ids import new_id
from caravan.payments.webhooks import list_unclaimed
from caravan.web.formats import counted, duration, money

Severity = Literal["warning", "critical"]

OVERDUE = timedelta(minutes=2)  # the reconciler has had a dozen turns at such a gap by then
OVERDUE_PAYMENTS_MAX = 10_000
WAITING = timedelta(hours=24)
SILENT_SECONDS = 30.0  # a restart or a failover is over by then
LAG_SECONDS = 60.0
FAILING_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Found:
    """One thing that is not well. `holds_seconds`: for how long it must be seen before somebody is told."""

    name: str
    subject: str
    severity: Severity
    said: str
    facts: dict[str, Any]
    holds_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Looked:
    """What all rules look at, read once."""

    lags: Sequence[GroupLag]
    workers: Sequence[WorkerRow]
    unclaimed_after: timedelta


Rule = Callable[[Tx, Looked], Awaitable[list[Found]]]


# ------------------------------------------------------------------ the rules

SUM_PAYMENTS = """
select currency::text, sum(amount_cents)::int8, extract(epoch from clock_timestamp() - min(since))::float8
from undelivered where payment_id = any(%(payment_ids)b::uuid[]) group by 1 order by 1
"""


async def money_overdue(tx: Tx, _looked: Looked) -> list[Found]:
    """Captured, with nothing that it should wait for, and yet not moved on: by no worker, by no reconciler."""
    found: list[Found] = []
    for gap in GAPS:
        payments = await list_gap(tx, gap, limit=OVERDUE_PAYMENTS_MAX, leeway=OVERDUE)
        if not payments:
            continue
        rows = await tx.tuples(SUM_PAYMENTS, {"payment_ids": payments})
        cents = {currency: amount for currency, amount, _age in rows}
        oldest = max((age for _currency, _amount, age in rows), default=0.0)
        sums = ", ".join(money(amount, currency) for currency, amount in cents.items())
        lack = HOP_OF_STAGE[gap.stage].missing
        found.append(
            Found(
                "MONEY_OVERDUE",
                gap.name,
                "critical",
                f"{counted(len(payments), 'payment')} ({sums}) without {lack};"
                f" the oldest was paid {duration(oldest)} ago.",
                {"payments": len(payments), "amountCents": cents, "oldestSeconds": round(oldest)},
            )
        )
    return found


SUM_WAITING = """
select reason, currency::text, count(*)::int, sum(amount_cents)::int8,
       extract(epoch from clock_timestamp() - min(reason_since))::float8
from undelivered where reason is not null and not held and reason_since < %(before)s group by 1, 2 order by 1, 2
"""


async def money_waiting(tx: Tx, _looked: Looked) -> list[Found]:
    """It waits for a good reason, and has done so for longer than a family should."""
    by_reason: dict[str, list[tuple[str, int, int, float]]] = {}
    for reason, *sums in await tx.tuples(SUM_WAITING, {"before": tx.now - WAITING}):
        by_reason.setdefault(reason, []).append((sums[0], sums[1], sums[2], sums[3]))
    return [
        Found(
            "MONEY_WAITING",
            reason,
            "warning",
            f"{counted(sum(row[1] for row in rows), 'payment')} ({', '.join(money(row[2], row[0]) for row in rows)})"
            f" for {duration(max(row[3] for row in rows))}: {reason_words(reason)}",
            {
                "payments": sum(row[1] for row in rows),
                "amountCents": {row[0]: row[2] for row in rows},
                "oldestSeconds": round(max(row[3] for row in rows)),
            },
        )
        for reason, rows in by_reason.items()
    ]


async def money_unclaimed(tx: Tx, looked: Looked) -> list[Found]:
    """A provider took money for a payment that nobody here knows."""
    items = await list_unclaimed(tx, looked.unclaimed_after)
    if not items:
        return []
    cents: dict[str, int] = {}
    for item in items:
        cents[item.currency] = cents.get(item.currency, 0) + item.amount_cents
    sums = ", ".join(money(amount, currency) for currency, amount in sorted(cents.items()))
    said = f"{counted(len(items), 'payment')} ({sums}) captured by a provider and known to nobody here."
    return [Found("MONEY_UNCLAIMED", "", "warning", said, {"payments": len(items), "amountCents": cents})]


async def group_silent(_tx: Tx, looked: Looked) -> list[Found]:
    """No worker of a group is alive, whether or not anything waits for it already."""
    return [
        Found(
            "GROUP_SILENT",
            lag.group,
            "critical" if lag.messages else "warning",
            f"No {lag.service} is alive; {lag.waiting if lag.messages else 'nothing waits yet'}."
            f" Start it: caravan serve {lag.service}",
            {"service": lag.service, "messages": lag.messages, "seconds": round(lag.seconds)},
            SILENT_SECONDS,
        )
        for lag in looked.lags
        if not lag.workers_alive
    ]


async def lag_growing(_tx: Tx, looked: Looked) -> list[Found]:
    """Workers are alive, and the oldest event waits longer and longer."""
    return [
        Found(
            "LAG_GROWING",
            lag.group,
            "critical",
            f"{lag.service}: {lag.sentence}",
            {"service": lag.service, "messages": lag.messages, "seconds": round(lag.seconds)},
        )
        for lag in looked.lags
        if lag.workers_alive and lag.seconds > LAG_SECONDS
    ]


async def handler_failing(tx: Tx, looked: Looked) -> list[Found]:
    """A live worker cannot get past something. Its error stays in the console: it may quote what it failed on."""
    failing: list[tuple[str, float]] = []
    without_kafka: list[tuple[str, float]] = []  # one outage, told once: not by each who waits for its end
    for worker in looked.workers:
        if worker.alive and worker.failing_since:
            lacks_kafka = (worker.last_error or "").startswith("KafkaUnavailable:")
            seconds = (tx.now - worker.failing_since).total_seconds()
            (without_kafka if lacks_kafka else failing).append((worker.service, seconds))
    outage = max((seconds for _service, seconds in without_kafka), default=0.0)
    waiting = sorted({service for service, _seconds in without_kafka})
    found = [
        Found(
            "HANDLER_FAILING",
            "kafka",
            "critical",
            f"Kafka has not been reached for {duration(outage)} by {', '.join(waiting)}. Checkouts go on. Look at the"
            ' broker; where it stays away: caravan failover postgres-log --note "..."',
            {"seconds": round(outage), "services": waiting},
        )
    ]
    return (found if outage > FAILING_SECONDS else []) + [
        Found(
            "HANDLER_FAILING",
            service,
            "critical",
            f"{service} has been failing for {duration(seconds)}; its error stands in the console under Workers.",
            {"seconds": round(seconds)},
        )
        for service, seconds in dict(sorted(failing, key=lambda each: each[1])).items()
        if seconds > FAILING_SECONDS
    ]


COUNT_PARKED = """
select consumer_group, count(*)::int from dead_letters where status = 'parked' group by 1 order by 1
"""


async def dead_letters(tx: Tx, _looked: Looked) -> list[Found]:
    return [
        Found(
            "DEAD_LETTERS",
            group,
            "critical",
            f"{counted(count, 'event')} given up by {group}: look, then replay or discard.",
            {"events": count},
        )
        for group, count in await tx.tuples(COUNT_PARKED)
    ]


RULES: tuple[Rule, ...] = (
    money_overdue,
    money_waiting,
    money_unclaimed,
    group_silent,
    lag_growing,
    handler_failing,
    dead_letters,
)
NAMES = tuple(rule.__name__.upper() for rule in RULES)


# ------------------------------------------------------------------ begin and end


@dataclass(frozen=True, slots=True)
class Alert:
    """One occurrence. `ended_at` None: it is so now."""

    id: UUID
    name: str
    subject: str
    severity: Severity
    said: str
    facts: dict[str, Any]
    began_at: datetime
    raised_at: datetime
    ended_at: datetime | None


async def look(tx: Tx, unclaimed_after: timedelta) -> tuple[list[Found], Looked]:
    """What all rules find now."""
    looked = Looked(await list_lag(tx), await list_workers(tx), unclaimed_after)
    return [found for rule in RULES for found in await rule(tx, looked)], looked


# What is so is written down, or brought up to date; nobody is told yet.
NOTE_ALERTS = """
insert into alerts (id, name, subject, severity, said, facts, holds_seconds, began_at, seen_at)
select id, name, subject, severity, said, facts::jsonb, holds_seconds, %(now)s, %(now)s
from unnest(%(ids)b::uuid[], %(names)b::text[], %(subjects)b::text[], %(severities)b::text[], %(saids)b::text[],
  %(facts)b::text[], %(holds)b::float8[]) as f(id, name, subject, severity, said, facts, holds_seconds)
on conflict (name, subject) where ended_at is null do update set severity = excluded.severity, said = excluded.said,
  facts = excluded.facts, seen_at = excluded.seen_at
"""

# It has been so for long enough.
RAISE_ALERTS = """
update alerts set raised_at = %(now)s
where ended_at is null and raised_at is null and seen_at = %(now)s
  and began_at + make_interval(secs => holds_seconds) <= %(now)s
returning id, name, subject, severity, said, facts, began_at, raised_at, ended_at
"""

# It is so no more. What nobody was told of is forgotten.
FORGET_ALERTS = """
delete from alerts where ended_at is null and raised_at is null and seen_at < %(now)s
"""

END_ALERTS = """
update alerts set ended_at = %(now)s where ended_at is null and seen_at < %(now)s
returning id, name, subject, severity, said, facts, began_at, raised_at, ended_at
"""


async def record(tx: Tx, found: Sequence[Found]) -> tuple[list[Alert], list[Alert]]:
    """Write down what is so; the alerts that were raised and those that ended by it."""
    named = {"now": tx.now}
    if found:
        await tx.execute(
            NOTE_ALERTS,
            {
                "ids": [new_id() for _ in found],
                "names": [each.name for each in found],
                "subjects": [each.subject for each in found],
                "severities": [each.severity for each in found],
                "saids": [each.said for each in found],
                "facts": [msgspec.json.encode(each.facts).decode() for each in found],
                "holds": [each.holds_seconds for each in found],
                **named,
            },
        )
    raised = await tx.all(RAISE_ALERTS, named, into=Alert)
    await tx.execute(FORGET_ALERTS, named)
    return raised, await tx.all(END_ALERTS, named, into=Alert)


LIST_OPEN = """
select id, name, subject, severity, said, facts, began_at, raised_at, ended_at from alerts
where ended_at is null and raised_at is not null order by severity, began_at
"""


async def list_open(tx: Tx) -> list[Alert]:
    """What is so now, critical first."""
    return await tx.all(LIST_OPEN, into=Alert)


IS_WATCHED = """
select exists (select from workers where service = 'reconciler' and expires_at > clock_timestamp())
"""


async def is_watched(tx: Tx) -> bool:
    """Whether anybody looks: without a reconciler no alert begins or ends."""
    return await tx.value(IS_WATCHED)


LIST_ENDED = """
select id, name, subject, severity, said, facts, began_at, raised_at, ended_at from alerts
where ended_at is not null order by began_at desc limit %(limit)s
"""


async def list_ended(tx: Tx, *, limit: int = 50) -> list[Alert]:
    """What was so, the latest first."""
    return await tx.all(LIST_ENDED, {"limit": limit}, into=Alert)


PURGE_ALERTS = """
delete from alerts where ended_at < %(before)s
"""


async def purge(tx: Tx) -> int:
    """Forget what ended three months ago."""
    return await tx.execute(PURGE_ALERTS, {"before": tx.now - timedelta(days=90)})
