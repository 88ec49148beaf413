"""What commands print: one JSON document, or lines and tables for a reader."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID


def show(document: object, *, as_json: bool, text: str | None = None) -> None:
    """`document` as JSON on standard output, or `text`."""
    if as_json:
        sys.stdout.write(json.dumps(plain(document), ensure_ascii=False, indent=2) + "\n")
    elif text:
        sys.stdout.write(text + "\n")


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], *, empty: str) -> None:
    """A table for a reader, or the sentence `empty` where there are no rows.

    The first column is what one types next: it stays whole on any terminal. The others are folded, never cut.
    """
    if not rows:
        sys.stdout.write(empty + "\n")
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    shown = Table(box=SIMPLE_HEAD, pad_edge=False)
    first, *others = columns
    shown.add_column(first, no_wrap=True, min_width=max(len(str(row[0])) for row in rows))
    for name in others:
        shown.add_column(name, overflow="fold")
    for row in rows:
        shown.add_row(*("" if cell is None else str(cell) for cell in row))
    width = None if sys.stdout.isatty() else 200
    Console(width=width, highlight=False, markup=False).print(shown)


def plain(value: Any) -> Any:
    """Anything of ours as what JSON has; field names in camelCase, as on the web."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {_camel(str(key)): plain(inner) for key, inner in value.items()}  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(inner) for inner in value]  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, datetime | date):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    return str(value) if isinstance(value, UUID | Path) else value


def _camel(name: str) -> str:
    if not name.islower():  # a reason, an id: data, not a name of ours
        return name
    head, *rest = name.split("_")
    return head + "".join(part.capitalize() for part in rest)


def duration(seconds: float | None) -> str:
    """`4 s`, `3 min`, `2 h`, `5 d`: short, for a table."""
    if seconds is None:
        return ""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size * 2:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
