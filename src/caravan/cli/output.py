"""What commands print: one JSON document, or lines and tables for a reader."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID


def show(
    document: object, *, as_json: bool, text: str | None = None, as_it_is: Mapping[str, object] | None = None
) -> None:
    """`document` as JSON on standard output, or `text`. `as_it_is`: further members, whose names nobody changes."""
    if as_json:
        shown = plain(document) | dict(as_it_is) if as_it_is else plain(document)
        sys.stdout.write(json.dumps(shown, ensure_ascii=False, indent=2) + "\n")
    elif text:
        sys.stdout.write(text + "\n")


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], *, empty: str) -> None:
    """A table for a reader, or the sentence `empty` where there are no rows.

    Where the terminal is too narrow for a line per row, each row is a few lines instead: what one types next (the first
    column) with what it means (the last one), and the rest below. Nothing is cut, and no word is broken.
    """
    if not rows:
        sys.stdout.write(empty + "\n")
        return
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 200
    cells = [["" if cell is None else str(cell) for cell in row] for row in rows]
    widths = [max(len(row[at]) for row in [list(columns), *cells]) for at in range(len(columns))]
    if sum(widths) + 3 * (len(columns) - 1) + 1 > width:
        sys.stdout.write("\n".join(_stacked(columns, row, width) for row in cells) + "\n")
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    shown = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        shown.add_column(name, no_wrap=True)
    for row in cells:
        shown.add_row(*row)
    Console(width=width, highlight=False, markup=False).print(shown)


def _stacked(columns: Sequence[str], row: Sequence[str], width: int) -> str:
    """One row in lines of `width`: its first and last cell, then the named others that say something."""
    others = "; ".join(f"{name} {cell}" for name, cell in zip(columns[1:-1], row[1:-1], strict=True) if cell)
    lines = ((f"{row[0]}  {row[-1]}", "    "), (f"  {others}", "  "))
    return "\n".join(
        textwrap.fill(
            line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False, drop_whitespace=True
        )
        for line, indent in lines
    )


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
