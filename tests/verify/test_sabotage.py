"""The test of the tests is tested too: what it names is there, and a fault that nobody notices fails it."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from verify import sabotage
from verify.drills import DRILLS
from verify.parts import Context
from verify.sabotage import FAULTS_MIN, Job, Outcome
from verify.sabotages import FAULTS
from verify.scratch import Databases, ScratchServer


def test_there_are_enough_faults_each_with_a_drill_that_exists() -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= FAULTS_MIN
    assert {fault.drill for fault in FAULTS} == set(DRILLS)


def test_a_fault_is_caught_in_a_process_of_its_own() -> None:
    with ScratchServer() as server:
        context = Context("sabotage", "small", 1, server, "signature-unchecked")
        result = asyncio.run(sabotage.run(context))
    assert result.passed
    assert (result.extra["caught"], result.extra["of"]) == (1, 1)
    assert result.extra["faults"]["signature-unchecked"]["ran"] > 0


CLEAN, NOTICED = {"good": 9}, {"violations": 3, "hits": 7, "good": 2}


@pytest.mark.parametrize(
    ("clean", "sabotaged"),
    [
        (CLEAN, {"good": 9, "hits": 7}),  # nobody noticed
        (CLEAN, NOTICED | {"hits": 0}),  # it never ran
        (CLEAN, {"hits": 7, "lost": "its process died"}),
        (CLEAN | {"violations": 1, "said": ("x",)}, NOTICED),  # the harness complains anyway
        ({"good": 0}, NOTICED),  # the harness does nothing
    ],
)
def test_what_proves_nothing_fails(
    clean: dict[str, int], sabotaged: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def in_turn(jobs: list[Job]) -> list[Outcome]:
        return [Outcome(job, **(sabotaged if job.fault else clean)) for job in jobs]  # type: ignore[arg-type]

    monkeypatch.setattr(sabotage, "_in_turn", in_turn)
    monkeypatch.setattr(Databases, "migrated", lambda _self: "nowhere")
    server: Any = SimpleNamespace(databases=Databases("", ""))
    context = Context("sabotage", "small", 1, server, "coins-unlocked")
    assert not asyncio.run(sabotage.run(context)).passed
