"""Log lines: one chain for everybody, correlated and without secrets."""

from __future__ import annotations

import io
import json
import logging
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from caravan import telemetry


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    """Where this test's lines go; pytest's own handlers come back afterwards."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    stream = io.StringIO()
    telemetry.configure_logging(json=True, stream=stream)
    yield stream
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_ours_and_the_libraries_lines_look_alike_and_are_correlated(stream: io.StringIO) -> None:
    with telemetry.correlate("pay-1"):
        structlog.get_logger().info("ours", count=3)
        logging.getLogger("library").warning("theirs %s", 4)

    ours, theirs = lines(stream)
    assert (ours["event"], ours["count"], ours["correlation_id"]) == ("ours", 3, "pay-1")
    assert (theirs["event"], theirs["level"], theirs["correlation_id"]) == ("theirs 4", "warning", "pay-1")


def test_the_lines_of_a_batch_name_every_payment_once(stream: io.StringIO) -> None:
    with telemetry.correlate("pay-1", None, "pay-2", "pay-1"):
        structlog.get_logger().info("done", count=2)
    with telemetry.correlate(None):
        structlog.get_logger().info("nothing of a payment")

    done, other = lines(stream)
    assert done["correlation_ids"] == "pay-1 pay-2"
    assert not {"correlation_id", "correlation_ids"} & set(other)


@pytest.mark.parametrize("name", ["password", "access_token", "latitude", "Authorization", "webhookSecret", "lon"])
def test_values_are_hidden_by_name_at_any_depth(stream: io.StringIO, name: str) -> None:
    structlog.get_logger().info("said", **{name: "hunter2"}, deep=[{"x": {name: "hunter2"}}], fine="shown")

    assert "hunter2" not in stream.getvalue()
    assert lines(stream)[0]["fine"] == "shown"


def test_a_password_in_a_url_is_hidden_also_inside_a_traceback(stream: io.StringIO) -> None:
    try:
        raise RuntimeError("cannot reach postgresql://caravan:hunter2@db/caravan")
    except RuntimeError:
        structlog.get_logger().exception("failed", url="redis://:hunter2@cache")

    assert "hunter2" not in stream.getvalue()
    assert "RuntimeError" in lines(stream)[0]["exception"]


def test_a_row_that_postgresql_refused_is_hidden(stream: io.StringIO) -> None:
    detail = "DETAIL:  Failing row contains (1, Ananya (Anu)., 28.4595,\nsecond line)."
    try:
        raise RuntimeError(f"violates check constraint\n{detail}\nCONTEXT:  more")
    except RuntimeError as error:
        structlog.get_logger().exception("failed", error=str(error))

    told = stream.getvalue()
    assert "violates check constraint" in told
    assert "CONTEXT:  more" in told
    assert "Ananya" not in told
    assert "second line" not in told


FAILS = """
import structlog
{configure}
def handle(records):
    return records[0].missing
try:
    handle(["Ananya Shetty, 28.4595"])
except AttributeError:
    structlog.get_logger().exception("failed")
"""


@pytest.mark.parametrize(
    "configure",
    [
        "from caravan import telemetry; telemetry.configure_logging()",
        "import caravan.eventlog.member",  # a benchmark's or a script's way: nobody configures
    ],
    ids=["configured", "left alone"],
)
def test_a_traceback_on_a_terminal_shows_no_local_variable(configure: str) -> None:
    """Whole pages of records stand in a handler's; its lines of code do no harm."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", FAILS.format(configure=configure)]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs) as failing:
        os.close(theirs)
        told = b""
        try:
            while some := os.read(ours, 65536):
                told += some
        except OSError:  # Linux says so at the end
            pass
        finally:
            os.close(ours)
    assert failing.returncode == 0
    assert b"AttributeError" in told
    assert b"Ananya" not in told
    assert told.count(b"\n") < 12
