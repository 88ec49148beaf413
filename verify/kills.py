"""kill -9 and SIGSTOP at random of every kind of process, under a load of payments.

Most kills go to a fleet of forked processes (`fleet`), some to whole trees of `caravan up` (`trees`). Afterwards every
order is held against what its client was told (`history`), and the product's own invariants against the tables.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta

from caravan.apps.services import BACKGROUND
from caravan.db import Database
from caravan.fulfilment.invariants import check
from verify import trees
from verify.fleet import KINDS, TOGETHER, WEB, Fleet, Patch, Slot, make_slots
from verify.history import Order, judge, plan_orders
from verify.load import Load
from verify.parts import Context
from verify.report import PartResult
from verify.scratch import ScratchDatabase, ScratchServer
from verify.waiting import until_quiet
from verify.world import SETTINGS, sandbox

QUIET_SECONDS_MAX = 60.0
KILLS_PER_SECOND_MAX = 12.0
FREEZES = 0.08  # of the faults
LONG_FREEZES = 0.15  # of the freezes: past the lease and past PostgreSQL's patience with an idle transaction
LONG_FREEZE_SECONDS = 10.5
BLACKOUTS = 0.01  # of the faults: everybody at once
AHEAD = 0.03  # how far the load may be ahead of the kills, and they of it: they end together
ROOMY = {"max_connections": "200"}  # every process may fill its pool
CREW = (WEB, WEB, TOGETHER, *BACKGROUND, "allocation-worker")


async def run(context: Context) -> PartResult:
    result = context.result()
    kills, payments = context.pick((54, 520), (1960, 19_000))
    tree_kills, tree_payments = context.pick((6, 80), (40, 1000))
    result.must_fire = tuple(f"{kind} SIGKILL" for kind in KINDS) + trees.MUST_FIRE
    if context.scale == "full":
        result.must_fire += tuple(f"{kind} SIGSTOP" for kind in KINDS)
    result.good_min = int(0.9 * (payments + tree_payments))
    if context.case != "trees":
        await run_fleet(context, result, kills, payments)
    if context.case != "fleet":
        await trees.run(context, result, tree_kills, tree_payments)
    result.cases = sum(count for kind, count in result.fired.items() if kind.endswith("SIGKILL"))
    result.extra["kills"] = result.cases
    return result


async def run_fleet(
    context: Context, result: PartResult, kills: int, payments: int, *, patch: Patch | None = None
) -> None:
    """`kills` kills while `payments` orders are made and paid. `patch`: a fault in every process, for the sabotage."""
    dice = context.dice("fleet")
    async with _database() as (database, db):
        orders = await plan_orders(db, payments, dice)
        slots = make_slots(CREW, dice)
        for slot in slots:
            slot.patch = patch
        assert SETTINGS.sandbox_webhook_secret
        async with Fleet(database.url, SETTINGS.sandbox_webhook_secret, slots) as fleet:
            load = Load(orders, lambda: fleet.ports, sandbox(), context.dice("clients"))
            nemesis = Nemesis(fleet, load, context.dice("nemesis"), kills)
            load.may = lambda: load.progress < nemesis.progress + AHEAD or load.done < load.clients
            started = time.monotonic()
            async with asyncio.TaskGroup() as group:
                group.create_task(load.run())
                group.create_task(nemesis.run())
            seconds = time.monotonic() - started
            quiet_seconds, left = await until_quiet(db, QUIET_SECONDS_MAX)
            for surprise in fleet.troubles():
                result.violated(surprise, "fleet")
        result.fired.update(fleet.fired)
        if left:
            result.violated(left, "fleet")
        await settle(db, result, orders, load, "fleet")
        result.extra["fleet"] = {
            "kills_per_second": round(nemesis.kills / seconds, 1),
            "payments_per_second": round(load.done / seconds, 1),
            "quiet_seconds": round(quiet_seconds, 1),
            "slowest_order_seconds": round(load.slowest_seconds, 1),
            "lives": sum(slot.lives for slot in slots),
            "answers": dict(sorted(load.answers.items())),
        }


@asynccontextmanager
async def _database() -> AsyncGenerator[tuple[ScratchDatabase, Database]]:
    with ScratchServer(settings=ROOMY) as server:
        database = server.create()
        async with database.database() as db:
            yield database, db


async def settle(db: Database, result: PartResult, orders: list[Order], load: Load, case: str | None = None) -> None:
    """Hold a quiet system against the history and the invariants."""
    async with db.transaction("verify", read_only=True) as tx:
        await tx.execute("set local statement_timeout = '120s'")
        judgement = await judge(tx, orders)
        broken = await check(tx, leeway=timedelta(0))
    result.good += judgement.delivered
    for said in (*load.errors, *judgement.wrong, *map(str, broken)):
        result.violated(said, case)
    told = result.extra.setdefault("told", {})
    for name, number in judgement.told.items():
        told[name] = told.get(name, 0) + number


@dataclass(slots=True)
class Nemesis:
    """Kills and freezes by chance, in step with the load."""

    fleet: Fleet
    load: Load
    dice: random.Random
    wanted: int
    kills: int = 0
    _decks: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    _thawing: list[asyncio.Task[None]] = field(default_factory=list[asyncio.Task[None]])

    @property
    def progress(self) -> float:
        return self.kills / self.wanted if self.wanted else 1.0

    async def run(self) -> None:
        while self.kills < self.wanted:
            await asyncio.sleep(self.dice.expovariate(KILLS_PER_SECOND_MAX))
            if self.progress > self.load.progress + AHEAD:
                continue
            chance = self.dice.random()
            if chance < FREEZES:
                self._freeze(self._choose("freeze"))
            elif chance < FREEZES + BLACKOUTS:
                self.kills += sum([self.fleet.kill(slot) for slot in self.fleet.slots])
                self.fleet.fired["blackout"] += 1
            else:
                self.kills += self.fleet.kill(self._choose("kill"))
        await asyncio.gather(*self._thawing)

    def _choose(self, fault: str) -> Slot:
        """A kind first, dealt from a shuffled deck so that each has its share, then one of it."""
        deck = self._decks.setdefault(fault, [])
        if not deck:
            deck += self.dice.sample(KINDS, len(KINDS))
        return self.dice.choice(self.fleet.of(deck.pop()))

    def _freeze(self, slot: Slot) -> None:
        if slot.frozen or not self.fleet.freeze(slot):
            return
        long = self.dice.random() < LONG_FREEZES
        seconds = LONG_FREEZE_SECONDS if long else self.dice.uniform(0.05, 1.0)
        self._thawing.append(asyncio.create_task(self._thaw_after(slot, slot.lives, seconds)))

    async def _thaw_after(self, slot: Slot, life: int, seconds: float) -> None:
        await asyncio.sleep(seconds)
        if slot.lives == life:
            self.fleet.thaw(slot)
