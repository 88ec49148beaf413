"""The crash points find what they must: with the product broken from outside, the same strikes end in violations."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from caravan.db import Database, Tx, pool
from caravan.eventlog import consumer, member, outbox
from caravan.eventlog.consumer import Consumer
from caravan.realtime import gateway
from verify.crashpoints.every import list_steps
from verify.crashpoints.play import Batch, Found, name_of, parse_case, play
from verify.crashpoints.points import Fault, Point, Strike, strikes_at
from verify.crashpoints.stage import Template, make_template
from verify.sabotages import claim_aside
from verify.scratch import Databases, ScratchServer

Plan = tuple[Strike, ...]


@pytest.fixture(scope="module")
def databases() -> Iterator[Databases]:
    with ScratchServer() as server:
        yield server.databases


@pytest.fixture(scope="module")
def template(databases: Databases) -> Template:
    return asyncio.run(make_template(databases, 4))


@pytest.fixture(autouse=True)
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """`play` hurries the product for good, because its process is its own; here it must end with the test."""
    changed = {consumer: ("HEARTBEAT_SECONDS",), member: ("backoff_seconds", "HEARTBEAT_SECONDS"), pool: ("random",)}
    changed[gateway] = ("RETRY_SECONDS", "POLL_SECONDS")
    for module, names in changed.items():
        for name in names:
            monkeypatch.setattr(module, name, getattr(module, name))


async def struck(databases: Databases, template: Template, step: str, *plans: str) -> Found:
    parsed = [parse_case(f"{step}/{plan}")[1] for plan in plans]
    return await play(Batch(databases, template, step, 0, tuple(parsed)))


async def place(databases: Databases, template: Template, step: str, label: str) -> int:
    """Where in a step's points a statement stands."""
    found = await struck(databases, template, step)
    return next(at for at, point in enumerate(found.points) if point.label == label)


def violated(found: Found) -> set[str]:
    return {case for case, _said in found.violations}


def test_every_step_has_a_name_of_its_own() -> None:
    names = [step.name for step in list_steps()]
    assert len(names) == len(set(names))


def test_a_case_is_repeated_by_its_name() -> None:
    first = Strike(2, "after", Fault.LIED, "payments.store.LOCK_PAYMENTS")
    plan = (first, Strike(3, "before", Fault.SERIALIZATION))
    assert parse_case(name_of("refund-part", plan)) == ("refund-part", plan)


def test_all_seven_faults_strike_before_and_after_a_statement() -> None:
    assert len(strikes_at(Point("statement", "purchases.store.INSERT_PURCHASES"))) == 14


async def test_the_product_survives_what_the_broken_ones_below_do_not(databases: Databases, template: Template) -> None:
    commit = await place(databases, template, "refund-part", "commit")
    purchases = await struck(
        databases,
        template,
        "purchases",
        "carts.handlers.DELETE_BOUGHT_ITEMS#0+exception",
        "eventlog.postgres_log.TAKE_PAGE#0-connection-dropped",
        "wake-up hint#0-exception",
    )
    refunds = await struck(databases, template, "refund-part", f"{commit}+done-reported-failed", "10-40P01")
    for found in (purchases, refunds):
        assert found.violations == []
        assert found.silent == 0
    assert purchases.fired.total() + refunds.fired.total() == 5


async def test_a_claim_that_is_committed_before_the_effect_is_seen(
    databases: Databases, template: Template, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Consumer, "_page", claim_aside(lambda: None))
    at = await place(databases, template, "purchases", "purchases.store.INSERT_PURCHASES")
    found = await struck(databases, template, "purchases", f"{at}+exception")
    assert f"purchases/{at}+exception" in violated(found)


async def test_events_that_are_published_outside_of_the_transaction_are_seen(
    databases: Databases, template: Template, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = outbox._write

    async def write_aside(tx: Tx) -> None:
        async with await aside(tx) as connection:
            other = Tx(connection, tx.now, tx.source)
            other.outgoing, other.causes = tx.outgoing, tx.causes
            await write(other)

    monkeypatch.setattr(outbox, "_write", write_aside)
    at = await place(databases, template, "purchases", "commit")
    found = await struck(databases, template, "purchases", f"{at}-exception")
    assert f"purchases/{at}-exception" in violated(found)


async def test_a_commit_that_is_repeated_blindly_is_seen(
    databases: Databases, template: Template, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(_self: Database, _tx: Tx, _error: Exception) -> bool:
        return False

    monkeypatch.setattr(Database, "_committed", never)
    found = await struck(databases, template, "refund-part")
    last = max(at for at, point in enumerate(found.points) if point.label == "commit")
    found = await struck(databases, template, "refund-part", f"{last}+done-reported-failed")
    assert f"refund-part/{last}+done-reported-failed" in violated(found)


async def aside(tx: Tx) -> psycopg.AsyncConnection[Any]:
    """Another transaction than the one that it belongs into; it commits on leaving."""
    return await psycopg.AsyncConnection.connect(tx.connection.info.dsn, password=tx.connection.info.password)
