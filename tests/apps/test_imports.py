"""What a process does not need it does not load: that is what keeps the start short and the idle cost low."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("module", "without"),
    [
        ("caravan.cli.app", ["pydantic", "psycopg", "rich.table", "caravan.settings"]),
        ("caravan.apps.supervisor", ["fastapi", "starlette", "uvicorn", "argon2", "caravan.eventlog", "rich"]),
        ("caravan.apps.worker", ["fastapi", "uvicorn", "jinja2", "websockets"]),
    ],
)
def test_it_loads_without(module: str, without: list[str]) -> None:
    loaded = subprocess.run(
        [sys.executable, "-c", f"import {module}, sys; print(*sys.modules)"], capture_output=True, text=True, check=True
    ).stdout.split()

    assert module in loaded
    assert set(without) & set(loaded) == set()
