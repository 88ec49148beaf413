"""What operators look through: purchases by stage, reason or a name, undelivered money, allocations."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from caravan.db import Tx
from caravan.deliveries import Reason
from caravan.fulfilment.diagnose import Finding, Technical, explain
from caravan.fulfilment.facts import gather_facts
from caravan.ids import parse_uuid
from caravan.student_views.cursor import Cursor

CANDIDATES_MAX = 1000
WORDS_MAX = 8
PREFIX = re.compile("[0-9a-f]{6,31}", re.ASCII | re.IGNORECASE)  # the beginning of an id, as people read it out
PREFIX_STUDENT_MAX = 20  # payments of each student whose id begins so
UNDELIVERED_STAGES = frozenset({"paid", "purchased", "allocated"})


@dataclass(frozen=True, slots=True)
class Listed:
    """A line of the list: whose, which course, how much, since when, and what diagnose says of it."""

    finding: Finding
    student_name: str | None
    title: str | None
    amount_cents: int
    refunded_cents: int
    currency: str
    created_at: datetime
    captured_at: datetime | None
    waiting_since: datetime | None


@dataclass(frozen=True, slots=True)
class Page:
    items: list[Listed]
    next_cursor: str | None


# Captured payments with their stage, the newest first. A stage that few are at is found through the register.
LIST_CAPTURED = """
select p.id, p.created_at, f.stage
from payments p join fulfilments f on f.payment_id = p.id
where (p.created_at, p.id) < (%(before)s, %(before_id)s)
order by p.created_at desc, p.id desc limit %(limit)s
"""

LIST_UNDELIVERED = """
select p.id, p.created_at
from undelivered u join payments p on p.id = u.payment_id join fulfilments f on f.payment_id = p.id
where (p.created_at, p.id) < (%(before)s, %(before_id)s) and (%(stage)s::text is null or f.stage = %(stage)s::text)
  and (%(reason)s::text is null or u.reason = %(reason)s::text) and (not %(unexplained)s::boolean or u.reason is null)
order by p.created_at desc, p.id desc limit %(limit)s
"""

# Everything that somebody may read out on the telephone: an id of anything, an e-mail address, a phone, a name.
SEARCH_BY_ID = """
with found as (
  select id from payments where id = %(id)s
  union select id from payments where checkout_id = %(id)s
  union select id from payments where student_id = %(id)s
  union select payment_id from student_course_purchases where id = %(id)s
  union select pu.payment_id from trainer_allocations a join student_course_purchases pu on pu.id = a.purchase_id
        where a.id = %(id)s
  union select pu.payment_id from trainer_allocations a join student_course_purchases pu on pu.id = a.purchase_id
        where a.trainer_id = %(id)s and a.status = 'approved'
  union select p.id from checkouts c join payments p on p.checkout_id = c.id where c.course_id = %(id)s
)
select p.id, p.created_at from found join payments p using (id) left join fulfilments f on f.payment_id = p.id
where (p.created_at, p.id) < (%(before)s, %(before_id)s) and (%(stage)s::text is null or f.stage = %(stage)s::text)
order by p.created_at desc, p.id desc limit %(limit)s
"""

# A name is found by all of its words that were said, in any order.
SEARCH_BY_TEXT = """
with people as (
  select link.student_id from accounts a join account_students link on link.account_id = a.id
  where lower(a.email) like lower(%(pattern)s::text) or a.phone = %(text)s or a.name ilike all(%(words)s::text[])
  union
  select id from students where name ilike all(%(words)s::text[])
)
select p.id, p.created_at from payments p left join fulfilments f on f.payment_id = p.id
where p.student_id in (select student_id from people)
  and (p.created_at, p.id) < (%(before)s, %(before_id)s) and (%(stage)s::text is null or f.stage = %(stage)s::text)
order by p.created_at desc, p.id desc limit %(limit)s
"""

# The first characters of an id are a range of each key's index. Ids are made in the order of time, so those of one hour
# begin alike: of each kind only the newest so many are looked at.
SEARCH_BY_PREFIX = """
with found as (
  (select id from payments where id between %(first)s and %(last)s order by id desc limit %(candidates)s)
  union
  (select payment_id from student_course_purchases where id between %(first)s and %(last)s
   order by id desc limit %(candidates)s)
  union
  (select p.id from (select id from students where id between %(first)s and %(last)s
                     order by id desc limit %(candidates)s) s
   cross join lateral (select p.id from payments p where p.student_id = s.id
                       order by p.created_at desc limit %(of_each)s) p)
)
select p.id, p.created_at from found join payments p using (id) left join fulfilments f on f.payment_id = p.id
where (p.created_at, p.id) < (%(before)s, %(before_id)s) and (%(stage)s::text is null or f.stage = %(stage)s::text)
order by p.created_at desc, p.id desc limit %(limit)s
"""

LAST = Cursor(datetime.fromisoformat("9999-12-30T00:00:00+00:00"), UUID(int=2**128 - 1))


async def list_purchases(
    tx: Tx, *, stage: str | None, reason: str | None, q: str | None, cursor: str | None, limit: int
) -> Page:
    """A page of payments by stage, reason (business or technical) and search, the newest first. Raises CursorInvalid.

    A search finds payments that were not captured too; a list without one holds captured money only. What SQL can't
    ask an index for is looked for among so many candidates: such a page may be short and still have a next one.
    """
    place = Cursor.decode(cursor) if cursor else LAST
    technical = reason in Technical.__members__
    delivered = stage is not None and stage not in UNDELIVERED_STAGES and not (q or reason)
    read = CANDIDATES_MAX if technical or delivered else limit
    named: dict[str, Any] = {"before": place.starts_at, "before_id": place.id, "stage": stage, "limit": read + 1}
    if q:
        rows = await _search(tx, q, named)
    elif reason or stage in UNDELIVERED_STAGES:
        named |= {"reason": None if technical else reason, "unexplained": technical}
        rows = await tx.tuples(LIST_UNDELIVERED, named)
    else:
        rows = await tx.tuples(LIST_CAPTURED, named)
    more = len(rows) > read
    rows = rows[:read]
    following = Cursor(rows[-1][1], rows[-1][0]).encode() if more else None
    if delivered:
        rows = [row for row in rows if row[2] == stage][: limit + 1]
    items = await list_lines(tx, [row[0] for row in rows])
    items = [line for line in items if reason is None or line.finding.reason == reason]
    if len(items) > limit:
        last = items[limit - 1]
        return Page(items[:limit], Cursor(last.created_at, last.finding.payment_id).encode())
    return Page(items, following)


async def _search(tx: Tx, q: str, named: dict[str, Any]) -> list[tuple[Any, ...]]:
    text = q.strip()
    searched = parse_uuid(text)
    if searched is not None:
        return await tx.tuples(SEARCH_BY_ID, named | {"id": searched})
    patterns = [f"%{_escape(word)}%" for word in text.split()[:WORDS_MAX]]
    rows = await tx.tuples(SEARCH_BY_TEXT, named | {"text": text, "pattern": f"%{_escape(text)}%", "words": patterns})
    if match := PREFIX.fullmatch(text.replace("-", "")):
        # A phone's digits, and some names, read like an id: who is found either way is shown.
        first, last = (UUID(match[0].ljust(32, digit)) for digit in "0f")
        bounds = {"first": first, "last": last, "candidates": CANDIDATES_MAX, "of_each": PREFIX_STUDENT_MAX}
        rows = {*rows, *await tx.tuples(SEARCH_BY_PREFIX, named | bounds)}
        rows = sorted(rows, key=lambda row: (row[1], row[0]), reverse=True)[: named["limit"]]
    return rows


def _escape(text: str) -> str:
    """As LIKE takes it literally."""
    return text.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")


# The register, the longest waiting first.
LIST_WAITING = """
select u.payment_id, u.since from undelivered u
where (u.since, u.payment_id) > (%(after)s, %(after_id)s) and (%(reason)s::text is null or u.reason = %(reason)s::text)
  and (not %(unexplained)s::boolean or u.reason is null)
order by u.since, u.payment_id limit %(limit)s
"""

FIRST = Cursor(datetime.fromisoformat("0001-01-02T00:00:00+00:00"), UUID(int=0))


async def list_undelivered(tx: Tx, *, reason: str | None, cursor: str | None, limit: int) -> Page:
    """A page of undelivered money, the longest waiting first; by a reason, stored or computed. Raises CursorInvalid."""
    place = Cursor.decode(cursor) if cursor else FIRST
    stored = reason if reason in Reason.__members__ else None
    named = {"after": place.starts_at, "after_id": place.id, "reason": stored}
    unexplained = reason is not None and stored is None
    read = CANDIDATES_MAX if unexplained else limit
    rows = await tx.tuples(LIST_WAITING, named | {"unexplained": unexplained, "limit": read + 1})
    lines = {line.finding.payment_id: line for line in await list_lines(tx, [row[0] for row in rows[:read]])}
    in_order = [lines[payment_id] for payment_id, _since in rows[:read]]
    items = [line for line in in_order if reason is None or (line.finding.reason or "ON_ITS_WAY") == reason]
    if len(items) > limit:
        last = items[limit - 1]
        return Page(items[:limit], Cursor(last.waiting_since or place.starts_at, last.finding.payment_id).encode())
    return Page(items, Cursor(rows[read - 1][1], rows[read - 1][0]).encode() if len(rows) > read else None)


# Names for some payments.
LIST_NAMES = """
select p.id as payment_id, s.name as student_name, k.title
from payments p join checkouts c on c.id = p.checkout_id
left join student_course_purchases pu on pu.payment_id = p.id
left join students s on s.id = p.student_id
left join courses k on k.id = coalesce(pu.course_id, c.course_id)
where p.id = any(%(payment_ids)b::uuid[])
"""


async def list_lines(tx: Tx, payment_ids: Sequence[UUID], *, local: bool = False) -> list[Listed]:
    """Lines for some payments, the newest first; evidence in the student's zone (`local`) or in UTC."""
    names = {row["payment_id"]: row for row in await tx.all(LIST_NAMES, {"payment_ids": list(payment_ids)})}
    return [
        Listed(
            finding=explain(facts, tx.now, local=local),
            student_name=names[facts.payment_id]["student_name"],
            title=names[facts.payment_id]["title"],
            amount_cents=facts.captured_cents if facts.captured_cents is not None else facts.amount_cents,
            refunded_cents=facts.refunded_cents,
            currency=facts.currency,
            created_at=facts.created_at,
            captured_at=facts.captured_at,
            waiting_since=facts.since,
        )
        for facts in await gather_facts(tx, payment_ids)
    ]


LIST_ALLOCATIONS = """
select a.id, a.purchase_id, a.student_id, a.course_id, a.trainer_id, a.status, a.created_at, a.updated_at,
       u.reason, pu.payment_id, s.name as student_name, k.title
from trainer_allocations a
join student_course_purchases pu on pu.id = a.purchase_id
left join undelivered u on u.payment_id = pu.payment_id
left join students s on s.id = a.student_id
left join courses k on k.id = a.course_id
where (%(status)s::text is null or a.status = %(status)s::text)
  and (a.created_at, a.id) < (%(before)s, %(before_id)s)
order by a.created_at desc, a.id desc limit %(limit)s
"""


async def list_allocations(
    tx: Tx, *, status: str | None, cursor: str | None, limit: int
) -> tuple[list[dict[str, Any]], str | None]:
    """A page of allocations, the newest first, with the reason why a waiting one waits."""
    place = Cursor.decode(cursor) if cursor else LAST
    named = {"status": status, "before": place.starts_at, "before_id": place.id, "limit": limit + 1}
    rows = await tx.all(LIST_ALLOCATIONS, named)
    page = rows[:limit]
    more = len(rows) > limit
    return page, Cursor(page[-1]["created_at"], page[-1]["id"]).encode() if more else None
