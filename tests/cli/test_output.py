"""What commands print for a reader, on a terminal of any width."""

from __future__ import annotations

import re
import sys

import pytest

from caravan.apps.services import SERVICES
from caravan.cli.output import table

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
