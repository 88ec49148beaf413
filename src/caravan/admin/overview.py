"""The first page an operator opens: what of the last days is where, and whose money waits, how long, why."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from caravan.db import Tx
from caravan.fulfilment.diagnose import explain
from caravan.fulfilment.facts import gather_facts
from caravan.payments.webhooks import Unclaimed, list_unclaimed

ON_ITS_WAY = "ON_ITS_WAY"
NOT_LOOKED_AT = "NOT_LOOKED_AT"
# Technical reasons are computed, so only for so many, the oldest; the rest is counted as not looked at.
EXPLAINED_MAX = 200


@dataclass(frozen=True, slots=True)
class Undelivered:
    """Captured money that is not delivered. `by_reason` counts payments; without any reason they are ON_ITS_WAY."""

    count: int
    amount_cents: int
    oldest_seconds: int
    by_reason: dict[str, int]
    amount_cents_by_currency: dict[str, int]


@dataclass(frozen=True, slots=True)
class Funnel:
    """How far the payments made in a time have come: each stands at one stage. `asked` have no captured money."""

    asked: int
    paid: int
    purchased: int
    allocated: int
    scheduled: int
    refunded: int


@dataclass(frozen=True, slots=True)
class Overview:
    undelivered: Undelivered
    unclaimed: list[Unclaimed]
    last_day: Funnel
    last_week: Funnel


SUM_UNDELIVERED = """
select coalesce(reason, '') as reason, currency::text as currency, count(*)::int as count,
       sum(amount_cents)::bigint as amount_cents, min(since) as oldest
from undelivered group by 1, 2
"""

OLDEST_UNEXPLAINED = """
select payment_id from undelivered where reason is null order by since limit %(limit)s
"""

# Where the payments since an instant stand. The register tells delivered from not, without counting sessions.
COUNT_STAGES = """
select (count(*) filter (where not captured))::int as asked, (count(*) filter (where stage = 'paid'))::int as paid,
       (count(*) filter (where stage = 'purchased'))::int as purchased,
       (count(*) filter (where stage = 'allocated'))::int as allocated,
       (count(*) filter (where stage = 'scheduled'))::int as scheduled,
       (count(*) filter (where stage = 'refunded'))::int as refunded
from (
  select p.captured_at is not null as captured,
         case when p.captured_at is null then null
              when p.status = 'refunded' then 'refunded'
              when pu.id is null then 'paid'
              when u.payment_id is null then 'scheduled'
              when exists (select from trainer_allocations a
                           where a.purchase_id = pu.id and a.status in ('approved', 'completed')) then 'allocated'
              else 'purchased' end as stage
  from payments p
  left join student_course_purchases pu on pu.payment_id = p.id
  left join undelivered u on u.payment_id = p.id
  where p.created_at >= %(since)s
) placed
"""


async def get_overview(tx: Tx, *, unclaimed_after: timedelta) -> Overview:
    return Overview(
        undelivered=await sum_undelivered(tx),
        unclaimed=await list_unclaimed(tx, unclaimed_after),
        last_day=await tx.one(COUNT_STAGES, {"since": tx.now - timedelta(days=1)}, into=Funnel),
        last_week=await tx.one(COUNT_STAGES, {"since": tx.now - timedelta(days=7)}, into=Funnel),
    )


async def sum_undelivered(tx: Tx) -> Undelivered:
    """All captured money that is not delivered, with reasons stored or (for the oldest) computed."""
    rows: list[dict[str, Any]] = await tx.all(SUM_UNDELIVERED)
    by_reason: Counter[str] = Counter()
    by_currency: Counter[str] = Counter()
    for row in rows:
        by_currency[row["currency"]] += row["amount_cents"]
        by_reason[row["reason"]] += row["count"]
    unexplained = by_reason.pop("", 0)
    if unexplained:
        oldest = await tx.values(OLDEST_UNEXPLAINED, {"limit": EXPLAINED_MAX})
        found = Counter(explain(facts, tx.now).reason or ON_ITS_WAY for facts in await gather_facts(tx, oldest))
        by_reason += found
        if unexplained > found.total():
            by_reason[NOT_LOOKED_AT] += unexplained - found.total()
    oldest_at = min((row["oldest"] for row in rows), default=tx.now)
    return Undelivered(
        count=by_reason.total(),
        amount_cents=by_currency.total(),
        oldest_seconds=max(0, int((tx.now - oldest_at).total_seconds())),
        by_reason=dict(by_reason.most_common()),
        amount_cents_by_currency=dict(by_currency),
    )
