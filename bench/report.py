"""build/bench.json, and what the terminal is told."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from bench.parts import Result

FOLDER = Path("build")
REPORT = FOLDER / "bench.json"

# The goals of the issue, by ratio: at least this, or (second) at most.
GOALS: dict[str, tuple[float | None, float | None]] = {
    "floor": (0.60, None),
    "guards": (0.75, None),
    "dbos": (12, None),
    "procrastinate": (4, None),
    "celery": (3, None),
    "pgqueuer": (1.5, None),
    "latency_p50": (None, 1.5),
    "latency_p99": (None, 3),
    "latency_loaded_p99": (None, 10),
    "sessions_1e7": (0.85, None),
    "sessions_1e7_buffers": (None, 1.15),
    "trainers_1e5": (0.70, None),
}
RATIOS = (
    "floor", "guards", "dbos", "pgqueuer", "procrastinate", "celery", "latency_p50", "latency_p99", "sessions_1e7",
    "trainers_1e5",
)  # fmt: skip


def spread(values: Sequence[float], digits: int = 1) -> dict[str, Any]:
    """Median with least and greatest, and every run."""
    return {
        "median": round(median(values), digits),
        "min": round(min(values), digits),
        "max": round(max(values), digits),
        "runs": [round(value, digits) for value in values],
    }


def merge_report(name: str, scale: str, seed: int, result: Result, machine: Mapping[str, Any]) -> None:
    """Put one part into the report; the others' entries stay. Each entry says at which scale it was measured."""
    document: dict[str, Any] = {}
    try:
        document = json.loads(REPORT.read_text())
    except (FileNotFoundError, ValueError):
        pass  # none yet, or not one of ours: begin anew
    ratios = dict.fromkeys(RATIOS) | document.get("ratios", {}) | result.ratios
    entry = {"scale": scale, "seed": seed, **result.figures, "machine": dict(machine)}
    document = {"machine": dict(machine), **{k: v for k, v in document.items() if k != "machine"}, name: entry}
    document["ratios"] = ratios
    FOLDER.mkdir(exist_ok=True)
    new = REPORT.with_name(f"{REPORT.name}.{os.getpid()}")
    new.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    new.replace(REPORT)
    for plot, svg in result.plots.items():
        (FOLDER / f"bench-{plot}.svg").write_text(svg)


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Lines of columns: words to the left, numbers to the right."""
    texts = [[_text(cell) for cell in row] for row in rows]
    widths = [max(len(line[k]) for line in [list(header), *texts]) for k in range(len(header))]
    numeric = [all(not isinstance(row[k], str) for row in rows) for k in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [c.rjust(w) if right else c.ljust(w) for c, w, right in zip(cells, widths, numeric, strict=True)]
        return "  ".join(padded).rstrip()

    return [line(list(header)), *(line(text) for text in texts)]


def _text(cell: Any) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, float):
        return f"{cell:,.2f}" if abs(cell) < 100 else f"{cell:,.0f}"
    return f"{cell:,}" if isinstance(cell, int) else str(cell)


def judge(ratios: Mapping[str, float | None]) -> list[str]:
    """The ratios beside their goals."""
    rows: list[list[Any]] = []
    for name, value in ratios.items():
        least, most = GOALS.get(name, (None, None))
        goal = f"at least {least:g}" if least is not None else f"at most {most:g}" if most is not None else ""
        met = value is not None and (least is None or value >= least) and (most is None or value <= most)
        rows.append([name, value, goal, "" if not goal else "absent" if value is None else "met" if met else "MISSED"])
    return table(["ratio", "measured", "goal", ""], rows)
