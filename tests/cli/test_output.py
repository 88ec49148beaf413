"""What commands print for a reader, on a terminal of any width."""

from __future__ import annotations

import json
import re
import sys

import pytest

from caravan.apps.services import SERVICES
from caravan.cli.output import show, table

SENTENCE = "Unknown: nothing waits, and no {} is alive to say so. Start it: caravan serve {}"


@pytest.mark.parametrize("width", [40, 80, 120])
def test_what_one_types_next_is_never_cut(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", str(width))
    since = "2026-11-30 17:43:53 UTC"

    table(
        ("service", "last turn", "events", "since", "name", "what it means"),
        [
            (name, "3 s ago", 1234, since, f"{name}@caravan-host-0-4f2a1b", SENTENCE.format(name, name))
            for name in SERVICES
        ],
        empty="",
    )

    said = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert "…" not in said
    first_words = [line.split()[0] for line in said.splitlines() if line.strip()]
    assert set(SERVICES) <= set(first_words)
    if width >= 80:
        assert max(len(line.rstrip()) for line in said.splitlines()) <= width
        assert all(word in said for word in ("2026-11-30", "1234", "caravan"))


def test_a_row_that_does_not_fit_is_read_in_lines_of_whole_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A table of eleven signs a column can be read by nobody: at 80 columns a sentence stands as a sentence."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    letter = "01a22e0d-4fb2-7000-8a37-e358af72c821"
    columns = ("id", "group", "event", "payment", "given up", "status", "why")

    table(
        columns,
        [(letter, "purchase-creation-workers", "unknown", None, "2026-11-30 20:02", "parked", "MALFORMED: no JSON")],
        empty="",
    )

    first, *below = capsys.readouterr().out.splitlines()
    assert first == f"{letter}  MALFORMED: no JSON"
    below_said = " ".join(line.strip() for line in below)
    assert below_said == "group purchase-creation-workers; event unknown; given up 2026-11-30 20:02; status parked"
    assert max(map(len, below)) <= 80


def test_what_came_over_the_wire_keeps_its_names(capsys: pytest.CaptureFixture[str]) -> None:
    show({"event_type": "x"}, as_json=True, as_it_is={"envelope": {"headers": {"ce_id": "1"}}})
    assert json.loads(capsys.readouterr().out) == {"eventType": "x", "envelope": {"headers": {"ce_id": "1"}}}
