"""Races: thirty-two at once on one slot, one checkout, one key, one button, one refund, one purse; and on the log.

Rounds of all kinds by turns (see `rounds` and `commits`), in two processes, each with a database and as many
connections as there are doers: what runs at once here runs at once in PostgreSQL. Nothing but a refusal with a code may
come back, and after every few rounds the workers drain and the product's invariants hold.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import cast

import httpx2

from caravan.apps.web import create_app
from caravan.db import Database, Tx
from caravan.db.wake import Wake
from caravan.fulfilment.invariants import check
from caravan.web.auth import Role
from verify import rounds
from verify.commits import CREATE_HEARD, Readers, reversed_commits
from verify.crew import Crew, Share, spread, wipe
from verify.parts import Context
from verify.processes import PROCESSES
from verify.report import PartResult
from verify.rounds import THIRTY_TWO, Ring
from verify.world import SETTINGS

Round = Callable[[Ring], Awaitable[None]]

ROUNDS: dict[str, Round] = {
    "one trainer": rounds.one_trainer,
    "one key": rounds.one_key,
    "two captures": rounds.two_captures,
    "many keys": rounds.many_keys,
    "one refund": rounds.one_refund,
    "repair": rounds.repair,
    "one student": rounds.one_student,
    "coins": rounds.coins,
    "replay": rounds.replay,
    "many refunds": rounds.many_refunds,
    "refund and deliver": rounds.refund_and_deliver,
    "one purchase": rounds.one_purchase,
}
REVERSED = "commits reversed"
KINDS = (*ROUNDS, REVERSED)
CHEAP = ("one key", "two captures", "many keys", "one refund", "many refunds", REVERSED)
TURNS = (*KINDS, *CHEAP)  # the cheap ones come twice
SPARE_CONNECTIONS = 4  # consumers beside the doers
CHECK_EVERY = 12
ROUND_SECONDS_MAX = 60

# Dead letters that nobody resolved, and webhooks that contradict what we know.
LEFT_BEHIND = """
select 'parked: ' || event_type || ': ' || error from dead_letters where status = 'parked'
union all
select 'webhook ' || type || ': ' || coalesce(outcome, 'never had an effect') from webhook_events
where coalesce(outcome, '') not in ('applied', 'already', 'stale')
"""


async def run(context: Context) -> PartResult:
    result = context.result()
    count = context.pick(60, 2_004)
    numbers = [int(context.case)] if context.case else list(range(count))
    processes = 1 if context.case else PROCESSES
    half = -(-len(numbers) // processes)
    shares = [
        Share(
            "races", context.scale, context.seed, index, tuple(numbers[index * half :][:half]), context.server.create()
        )
        for index in range(processes)
    ]
    for found in await spread(shares, race):
        result.merge(found)
    result.good_min = len(numbers)
    result.must_fire = () if context.case else KINDS
    result.extra = {"at_once": THIRTY_TWO}
    return result


async def race(share: Share) -> PartResult:
    context = Context(share.part, share.scale, share.seed, server=None)  # type: ignore[arg-type]
    result = context.result()
    async with Database(share.database.url, max_connections=THIRTY_TWO + SPARE_CONNECTIONS) as db:
        await db.transact(lambda tx: tx.execute(CREATE_HEARD))
        readers = Readers(db)
        async with _the_web(db) as client:
            admin = await db.transact(_an_admin)
            for place, number in enumerate(share.numbers, 1):
                ring = Ring(db, client, admin, context.dice("round", number), result, number)
                await _one(ring, readers)
                if place % CHECK_EVERY == 0 or number == share.numbers[-1]:
                    await _judge(ring)
                    await wipe(db)
                    admin = await db.transact(_an_admin)
    return result


async def _one(ring: Ring, readers: Readers) -> None:
    kind = TURNS[ring.number % len(TURNS)]
    before = ring.result.violations
    try:
        async with asyncio.timeout(ROUND_SECONDS_MAX):
            await (reversed_commits(ring, readers) if kind == REVERSED else ROUNDS[kind](ring))
    except Exception as error:
        ring.wrong(f"{kind} broke off: {'; '.join(_told(error))}")
    ring.result.cases += 1
    ring.result.fired[kind] += 1
    ring.result.good += ring.result.violations == before


def _told(error: BaseException) -> list[str]:
    """What failed, each part of a group by itself."""
    if isinstance(error, BaseExceptionGroup):
        return [said for part in cast("BaseExceptionGroup[BaseException]", error).exceptions for said in _told(part)]
    return [f"{type(error).__name__}: {error}"]


async def _judge(ring: Ring) -> None:
    """The workers come, catch up and leave: during the rounds there are none, so that what is stuck stays stuck."""
    async with Crew(ring.db) as crew:
        await crew.drain()
    async with ring.db.transaction("verify", read_only=True) as tx:
        for violation in await check(tx, leeway=timedelta(0)):
            ring.wrong(f"after this and the {CHECK_EVERY - 1} rounds before it: {violation}")
        for said in await tx.values(LEFT_BEHIND):
            ring.wrong(said)


@asynccontextmanager
async def _the_web(db: Database) -> AsyncGenerator[httpx2.AsyncClient]:
    app = create_app(SETTINGS, db, Wake(db.url), services=("payment-service", "admin-service"))
    transport = httpx2.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx2.AsyncClient(transport=transport, base_url="http://caravan.test") as client:
        yield client


async def _an_admin(tx: Tx) -> dict[str, str]:
    return await rounds.signed_in(tx, "root@example.com", Role.ADMIN)
