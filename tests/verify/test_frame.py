"""The frame of the proof: it refuses in a line, touches only what it made, and does not pass when nothing happened."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from psycopg.conninfo import make_conninfo

from caravan.db import Database
from verify.fleet import WEB, Fleet, Slot
from verify.parts import NAMES, Context, list_parts
from verify.report import PartResult, merge_report, table
from verify.scratch import NotScratch, ScratchDatabase, ScratchServer
from verify.world import difference, hash_of, open_world


@pytest.mark.parametrize(
    "arguments",
    [
        ["--part", "nonsense"],
        ["--scale", "huge"],
        ["--seed", "-1"],
        ["--seed", "x"],
        ["--seed", "٣"],
        ["--case", "one"],
        ["--database", "postgresql://localhost/theirs"],
    ],
)
def test_what_it_does_not_know_is_refused_in_one_line(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", "verify", *arguments], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("verify: ")
    assert done.stderr.count("\n") == 1


def test_every_part_is_one_of_the_contract() -> None:
    assert set(list_parts()) <= set(NAMES)


def test_a_database_that_it_did_not_make_is_left_alone(database_url: str) -> None:
    theirs = ScratchDatabase(database_url, "caravan verify scratch 1234")
    with pytest.raises(NotScratch):
        theirs.database()
    with pytest.raises(NotScratch):
        ScratchDatabase(database_url, "").database()
    with pytest.raises(NotScratch):
        ScratchDatabase(make_conninfo(database_url, dbname="no_such"), "caravan verify scratch 1").database()


def test_its_own_databases_are_marked_copied_and_gone_with_the_server() -> None:
    with ScratchServer() as server:
        first = server.create()
        first.check()
        other = ScratchDatabase(first.url, "caravan verify scratch of another run")
        with pytest.raises(NotScratch):
            server.drop(other)
        copy = server.create(server.databases.freeze(first))
        copy.check()
        server.drop(copy)
        with pytest.raises(NotScratch):
            copy.check()
        folder = server.folder
    assert not folder.exists()


def a_result(**more: object) -> PartResult:
    result = PartResult("orders", "small", 7, cases=3, good=3, must_fire=("killed",))
    result.fired = Counter(killed=2)
    for name, value in more.items():
        setattr(result, name, value)
    return result


def test_a_part_passes_only_when_something_happened_and_nothing_was_violated() -> None:
    assert a_result().passed
    assert not a_result(good=0).passed
    assert not a_result(cases=0).passed
    assert not a_result(fired=Counter(other=1)).passed
    assert not a_result(failed=["points were left out"]).passed
    found = a_result()
    found.violated("twice", case="refund/3")
    assert not found.passed
    assert "--part orders --scale small --seed 7 --case refund/3" in table([found])


def test_one_part_is_merged_into_the_report(tmp_path: Path) -> None:
    path = tmp_path / "build" / "verify.json"
    merge_report([a_result(scale="full")], path)
    document = merge_report([a_result(name="races", scale="full", extra={"rounds": 9})], path)
    assert document == json.loads(path.read_text())
    assert (document["scale"], set(document["parts"])) == ("full", {"orders", "races"})
    expected = {"cases": 3, "fired": 2, "violations": 0, "seconds": 0.0, "seed": 7, "rounds": 9}
    assert expected.items() <= document["parts"]["races"].items()
    assert merge_report([a_result()], path)["scale"] == "small"


def test_chance_depends_on_the_seed_alone() -> None:
    def dice(seed: int, *of: object) -> float:
        return Context("orders", "small", seed, server=None).dice(*of).random()  # pyright: ignore[reportArgumentType]

    assert dice(1, "a") == dice(1, "a")
    assert len({dice(1, "a"), dice(2, "a"), dice(1, "b")}) == 3


async def test_two_runs_that_end_alike_have_equal_finals_and_others_do_not(db: Database) -> None:
    world = await open_world(db)
    one, two, three = await world.students(3)
    payments = [await world.buy(one, hour=6), await world.buy(two, hour=9), await world.buy(three, hour=12)]
    await world.pay(payments)
    await world.work()
    await world.refund(payments[2])
    await world.work()
    assert await world.violations() == []
    finals = await world.finals(payments)
    assert hash_of(finals[payments[0]]) == hash_of(finals[payments[1]])
    assert finals[payments[0]]["stage"][0] == "scheduled"
    assert "stage" in difference(finals[payments[2]], finals[payments[0]])
    await world.run("delete from tutoring_sessions where seq = 2 and student_id = %(id)s", id=two)
    changed = await world.finals(payments)
    assert "sessions" in difference(changed[payments[1]], changed[payments[0]])
    assert await world.violations() != []


LOGS_A_BUG = """
import structlog
from fastapi import Request
from caravan import telemetry
from caravan.web.problems import from_error
telemetry.configure_logging(json=True)
request = Request({"type": "http", "method": "GET", "path": "/there", "headers": [], "query_string": b""})
try:
    {}["missing"]
except KeyError as error:
    from_error(request, error)
"""


def test_what_a_web_answered_as_a_bug_is_told_with_its_trace(tmp_path: Path) -> None:
    fleet = Fleet("", "", [Slot(WEB, 0), Slot(WEB, 1)])
    fleet.folder = tmp_path
    with (tmp_path / "web-0.log").open("w") as log:
        subprocess.run([sys.executable, "-c", LOGS_A_BUG], stdout=log, check=True, timeout=60)
    [said] = fleet.troubles()
    assert said.startswith("GET /there failed: Traceback")
    assert "KeyError: 'missing'" in said
