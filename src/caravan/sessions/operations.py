"""Make sessions what the bookings say, and note how each went. Each may run again at any time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal
from uuid import UUID

import structlog

from caravan import bookings, deliveries, pauses
from caravan.db import Tx
from caravan.deliveries import Block, Reason, Stage
from caravan.errors import Conflict, NotFound
from caravan.eventlog import outbox
from caravan.events import SessionChanged, SessionsScheduled
from caravan.pauses import Kept
from caravan.sessions import store
from caravan.sessions.store import Account

log: structlog.stdlib.BoundLogger = structlog.get_logger()

Outcome = Literal["completed", "student_absent", "trainer_absent"]


class NoSuchSession(NotFound):
    """There is no such session."""

    code = "SESSION_NOT_FOUND"


class SessionNotBegun(Conflict):
    """The session has not begun, so nobody can know how it went."""

    code = "SESSION_NOT_BEGUN"


class SessionCancelled(Conflict):
    """The session was cancelled: it was not held."""

    code = "SESSION_CANCELLED"


class SessionsAllCounted(Conflict):
    """All sessions that were bought are held or refunded: this one can't count as held too."""

    code = "SESSIONS_ALL_COUNTED"


@dataclass(slots=True)
class Synced:
    """What happened, by purchase. A purchase that does not exist is in none, one without change only in `owed`."""

    scheduled: dict[UUID, int] = field(default_factory=dict[UUID, int])
    """How many sessions are new."""
    cancelled: dict[UUID, list[int]] = field(default_factory=dict[UUID, list[int]])
    """The numbers of the sessions that were cancelled."""
    owed: dict[UUID, int] = field(default_factory=dict[UUID, int])
    """How many sessions are still to be booked; 0 is delivered. Ended purchases owe none."""
    held: set[UUID] = field(default_factory=set[UUID])
    paused: set[UUID] = field(default_factory=set[UUID])
    """Those whose booked time has no sessions yet, because operators have stopped that."""


async def sync_sessions(tx: Tx, purchase_ids: Sequence[UUID]) -> Synced:
    """Cancel sessions whose time was given back, number booked time that has none, and tell delivered from owed.

    Where operators have paused this, nothing is numbered: it waits. So does what should have begun before it had a
    number: its start is somebody's to agree to.
    """
    done = Synced()
    await bookings.lock_purchases(tx, purchase_ids)
    accounts = await store.list_accounts(tx, purchase_ids)
    done.held = {account.purchase_id for account in accounts if account.held}
    accounts = [account for account in accounts if not account.held]
    by_id = {account.purchase_id: account for account in accounts}
    done.cancelled = await store.cancel_sessions(tx, [account.purchase_id for account in accounts if account.scheduled])
    done.owed = {
        a.purchase_id: a.owed + len(done.cancelled.get(a.purchase_id, ())) if a.active else 0 for a in accounts
    }
    owing = {key: owed for key, owed in done.owed.items() if owed > 0}
    paused = [by_id[key] for key in owing if by_id[key].pause_id]
    scheduled = await store.insert_sessions(
        tx, {key: owed for key, owed in owing.items() if not by_id[key].pause_id} if paused else owing
    )
    for new in scheduled:
        done.scheduled[new.purchase_id] = new.count
        done.owed[new.purchase_id] -= new.count
    await _register(tx, accounts, done.owed)
    late = [by_id[key] for key, owed in done.owed.items() if owed > 0 and not by_id[key].numbered]
    missed = await _wait_for_a_start(tx, [a for a in late if not a.pause_id and a.purchase_id not in done.scheduled])
    await _wait_for_pauses(tx, done, [a for a in accounts if a.purchase_id not in missed], paused)
    outbox.append(
        tx,
        [
            SessionChanged(**_names(by_id[key]), seqs=tuple(seqs), status="cancelled")
            for key, seqs in done.cancelled.items()
        ],
    )
    outbox.append(
        tx,
        [
            SessionsScheduled(
                **_names(by_id[new.purchase_id]),
                allocation_id=new.allocation_id,
                session_count=new.count,
                first_starts_at=new.first_starts_at,
                last_ends_at=new.last_ends_at,
            )
            for new in scheduled
        ],
    )
    if scheduled:
        log.info("Sessions created successfully", count=len(scheduled), sessions=sum(done.scheduled.values()))
    return done


async def _register(tx: Tx, accounts: Sequence[Account], owed: dict[UUID, int]) -> None:
    """Delivered money leaves the register; money that owes sessions is in it. Why it waits, allocations will say."""
    await deliveries.close_deliveries(tx, [a.payment_id for a in accounts if owed[a.purchase_id] <= 0])
    await deliveries.open_deliveries(tx, [a.payment_id for a in accounts if owed[a.purchase_id] > 0])


async def _wait_for_a_start(tx: Tx, accounts: Sequence[Account]) -> set[UUID]:
    """Those whose first booked time went by without a number: nobody moves them to the end in silence."""
    missed = await bookings.list_missed(tx, [account.purchase_id for account in accounts])
    blocks = [
        Block(account.payment_id, account.stage, Reason.START_PASSED, missed[account.purchase_id].detail)
        for account in accounts
        if account.purchase_id in missed
    ]
    await deliveries.block(tx, blocks)
    return set(missed)


async def _wait_for_pauses(tx: Tx, done: Synced, accounts: Sequence[Account], paused: Sequence[Account]) -> None:
    """What a pause keeps from being numbered waits; what one kept before goes on."""
    if paused:
        done.paused = await store.list_unnumbered(tx, [account.purchase_id for account in paused])
        kept = [
            Kept(account.payment_id, account.stage, account.pause_id)
            for account in paused
            if account.purchase_id in done.paused and account.pause_id
        ]
        await pauses.keep(tx, Stage.ALLOCATED, kept)
    over = [a for a in accounts if a.paused_before and a.purchase_id not in done.paused]
    for stage in (Stage.ALLOCATED, Stage.SCHEDULED):
        await deliveries.unblock(tx, [account.payment_id for account in over if account.stage == stage], stage)


def _names(account: Account) -> dict[str, UUID]:
    return {
        "payment_id": account.payment_id,
        "student_id": account.student_id,
        "course_id": account.course_id,
        "purchase_id": account.purchase_id,
    }


async def mark_session(tx: Tx, purchase_id: UUID, seq: int, status: Outcome) -> None:
    """Note how a session went; a later word replaces an earlier one. A trainer's absence makes one owed again.

    The caller, or whoever hears SESSION_CHANGED, settles the allocation next. Raises NoSuchSession, SessionNotBegun,
    SessionCancelled, SessionsAllCounted.
    """
    await bookings.lock_purchases(tx, [purchase_id])
    session = await store.find_session(tx, purchase_id, seq)
    if session is None:
        raise NoSuchSession
    if session.status == "cancelled":
        raise SessionCancelled
    if session.starts_at > tx.now:
        raise SessionNotBegun
    if session.status == status:
        return
    await store.mark_session(tx, purchase_id, seq, status)
    accounts = await store.list_accounts(tx, [purchase_id])
    if status != "trainer_absent" and any(account.excess > 0 for account in accounts):
        raise SessionsAllCounted
    outbox.append(tx, [SessionChanged(**_names(account), seqs=(seq,), status=status) for account in accounts])
    await _register(tx, accounts, {a.purchase_id: a.owed if a.active else 0 for a in accounts})
