"""Coins: a ledger in rows, never a counter. Owns coin_entries.

available = granted + returned - captured - reservations still open (not captured, not released, not past their time).
Whoever takes coins locks the student's row first, so that nobody spends the same coins twice. A shortfall is what a
late success could not take any more: delivered, and written down.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from uuid import UUID

from caravan.db import Tx
from caravan.errors import Conflict, NotFound
from caravan.ids import new_id
from caravan.web.formats import counted


class CoinsInsufficient(Conflict):
    """There are not that many coins to spend."""

    code = "COINS_INSUFFICIENT"


# Who spends a student's coins waits here; editing the student waits too, referring to them doesn't.
LOCK_STUDENT = "select id from students where id = %(student_id)s for no key update"

# What a student can spend now. A payment's own open reservation can be left out of the sum.
AVAILABLE_COINS = """
select coalesce(sum(case
  when e.kind in ('granted', 'returned') then e.coins
  when e.kind = 'captured' then -e.coins
  when e.kind = 'reserved' and e.expires_at > %(now)s::timestamptz
    and e.payment_id is distinct from %(except_payment_id)s::uuid
    and not exists (select from coin_entries d where d.payment_id = e.payment_id and d.kind in ('released', 'captured'))
    then -e.coins
  else 0 end), 0)::bigint
from coin_entries e where e.student_id = %(student_id)s
"""


async def count_available(tx: Tx, student_id: UUID, *, except_payment_id: UUID | None = None) -> int:
    """How many coins the student can spend; the open reservation of `except_payment_id` doesn't count against them."""
    named = {"student_id": student_id, "except_payment_id": except_payment_id, "now": tx.now}
    return await tx.value(AVAILABLE_COINS, named)


INSERT_ENTRY = """
insert into coin_entries (id, student_id, payment_id, kind, coins, expires_at, note, created_at)
values (%(id)s, %(student_id)s, %(payment_id)s, %(kind)s, %(coins)s, %(expires_at)s, %(note)s, %(now)s)
"""


async def _insert(
    tx: Tx,
    kind: str,
    student_id: UUID,
    payment_id: UUID | None,
    coins: int,
    *,
    expires_at: datetime | None = None,
    note: str | None = None,
) -> None:
    values = {
        "id": new_id(),
        "student_id": student_id,
        "payment_id": payment_id,
        "kind": kind,
        "coins": coins,
        "expires_at": expires_at,
        "note": note,
        "now": tx.now,
    }
    await tx.execute(INSERT_ENTRY, values)


async def grant_coins(tx: Tx, student_id: UUID, coins: int, note: str, *, payment_id: UUID | None = None) -> None:
    """Give a student coins (at least one). `payment_id`: the payment they are given for. Raises NotFound."""
    if not await tx.value(LOCK_STUDENT, {"student_id": student_id}):
        raise NotFound("There is no such student.")
    await _insert(tx, "granted", student_id, payment_id, coins, note=note)


async def reserve_coins(tx: Tx, student_id: UUID, payment_id: UUID, coins: int, until: datetime) -> None:
    """Keep coins for a payment until an instant. Raises CoinsInsufficient with what there is."""
    await tx.execute(LOCK_STUDENT, {"student_id": student_id})
    available = await count_available(tx, student_id)
    if coins > available:
        raise CoinsInsufficient(
            f"Asked for {counted(coins, 'coin')}, {available} can be spent.", extra={"availableCoins": available}
        )
    await _insert(tx, "reserved", student_id, payment_id, coins, expires_at=until)


async def capture_coins(tx: Tx, student_id: UUID, payment_id: UUID, coins: int) -> int:
    """Take the coins of a payment that succeeded; the shortfall, where its reservation was over and they are spent."""
    if coins == 0:
        return 0
    await tx.execute(LOCK_STUDENT, {"student_id": student_id})
    # Below nothing for a moment, where we began before a reservation's time came and somebody else after.
    taken = max(0, min(coins, await count_available(tx, student_id, except_payment_id=payment_id)))
    if taken:
        await _insert(tx, "captured", student_id, payment_id, taken)
    if taken < coins:
        await _insert(tx, "shortfall", student_id, payment_id, coins - taken)
    return coins - taken


# The open reservations of some payments end; at most one row each, whoever else says so at the same time.
RELEASE_RESERVATIONS = """
insert into coin_entries (id, student_id, payment_id, kind, coins, created_at)
select new_id(), r.student_id, r.payment_id, 'released', r.coins, %(now)s
from coin_entries r
where r.payment_id = any(%(payment_ids)b::uuid[]) and r.kind = 'reserved'
  and not exists (select from coin_entries d where d.payment_id = r.payment_id and d.kind in ('released', 'captured'))
order by r.payment_id
on conflict (payment_id, kind) where kind <> 'granted' do nothing
"""


async def release_reservations(tx: Tx, payment_ids: Sequence[UUID]) -> int:
    """Give back what is kept for payments that failed or were replaced; how many had something."""
    if not payment_ids:
        return 0
    return await tx.execute(RELEASE_RESERVATIONS, {"payment_ids": list(payment_ids), "now": tx.now})


# Reservations whose time is over and that nobody has closed; oldest first.
LIST_EXPIRED = """
select r.payment_id from coin_entries r
where r.kind = 'reserved' and r.expires_at <= %(now)s
  and not exists (select from coin_entries d where d.payment_id = r.payment_id and d.kind in ('released', 'captured'))
order by r.expires_at limit %(limit)s
"""


async def release_expired(tx: Tx, limit: int = 500) -> int:
    """Write down that reservations are over; how many. They stopped counting by themselves when their time came."""
    return await release_reservations(tx, await tx.values(LIST_EXPIRED, {"now": tx.now, "limit": limit}))


# What a payment really took goes back, once.
RETURN_COINS = """
insert into coin_entries (id, student_id, payment_id, kind, coins, created_at)
select new_id(), c.student_id, c.payment_id, 'returned', c.coins, %(now)s
from coin_entries c where c.payment_id = %(payment_id)s and c.kind = 'captured'
on conflict (payment_id, kind) where kind <> 'granted' do nothing
"""


async def return_coins(tx: Tx, payment_id: UUID) -> None:
    """A payment was refunded in full: the student has its coins again."""
    await tx.execute(RETURN_COINS, {"payment_id": payment_id, "now": tx.now})
