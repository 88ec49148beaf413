"""What a part found: counted, judged, printed as a table, and merged into build/verify.json."""

from __future__ import annotations

import json
import os
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

REPORT = Path("build/verify.json")
SAID_MAX = 5
SLACK_OF_SMALL = 2


@dataclass(slots=True)
class PartResult:
    """One part's figures. A part passes when it did enough, every kind of fault fired, and nothing was violated.

    `must_fire`: the kinds that have to be in `fired`. `good` counts what succeeded as it should (deliveries, answers,
    rounds); below `good_min` the part fails, because a run in which nothing happened proves nothing. `failed`: further
    reasons of its own why the part can't pass. `skipped`: what this machine lacks for it (never with CI=true). `extra`
    goes into the report as it is.
    """

    name: str
    scale: str
    seed: int
    cases: int = 0
    violations: int = 0
    good: int = 0
    good_min: int = 1
    seconds: float = 0.0
    fired: Counter[str] = field(default_factory=Counter[str])
    must_fire: tuple[str, ...] = ()
    said: list[str] = field(default_factory=list[str])
    failed: list[str] = field(default_factory=list[str])
    skipped: str | None = None
    extra: dict[str, Any] = field(default_factory=dict[str, Any])

    def violated(self, said: str, case: str | None = None) -> None:
        """Something that must never be so, was. The first few are told, each with a line that repeats it."""
        self.violations += 1
        if len(self.said) < SAID_MAX:
            self.said.append(f"{said}\n      again: {repeat(self.name, self.scale, self.seed, case)}")

    def merge(self, other: PartResult) -> None:
        """Add what another process found of the same part."""
        self.cases += other.cases
        self.violations += other.violations
        self.good += other.good
        self.fired.update(other.fired)
        self.said = (self.said + other.said)[:SAID_MAX]
        self.failed += other.failed

    def too_long(self, seconds: float, limit: float) -> bool:
        """Whether something took longer than it may. A small run, for any machine: twice that."""
        return seconds > limit * (SLACK_OF_SMALL if self.scale == "small" else 1)

    @property
    def troubles(self) -> list[str]:
        """Why this part does not pass, besides violations; empty when it does."""
        if self.skipped:
            return []
        troubles = list(self.failed)
        silent = [kind for kind in self.must_fire if not self.fired[kind]]
        if silent:
            troubles.append(f"never fired: {', '.join(silent)}")
        if self.good < self.good_min:
            troubles.append(f"only {self.good} of at least {self.good_min} operations went well: nothing is proved")
        if not self.cases:
            troubles.append("no cases were run")
        return troubles

    @property
    def passed(self) -> bool:
        return not self.violations and not self.troubles

    def document(self) -> dict[str, Any]:
        """The part's entry in build/verify.json."""
        return {
            "cases": self.cases,
            "fired": self.fired.total(),
            "violations": self.violations,
            "seconds": round(self.seconds, 1),
            "seed": self.seed,
            "scale": self.scale,
            "passed": self.passed,
            "good": self.good,
            "fired_by_kind": dict(sorted(self.fired.items())),
            **({"skipped": self.skipped} if self.skipped else {}),
            **self.extra,
        }


def repeat(part: str, scale: str, seed: int, case: str | None = None) -> str:
    """The one line that runs it again."""
    line = f".venv/bin/python -m verify --part {part} --scale {scale} --seed {seed}"
    return f"{line} --case {shlex.quote(case)}" if case else line


def merge_report(results: Sequence[PartResult], path: Path = REPORT) -> dict[str, Any]:
    """Put these parts into the report; other parts' entries stay. The whole is `full` only where every part was."""
    parts: dict[str, Any] = {}
    try:
        parts = cast("dict[str, Any]", json.loads(path.read_text())["parts"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        pass  # none yet, or not one of ours: begin anew
    parts |= {result.name: result.document() for result in results}
    scales = {str(part.get("scale")) for part in parts.values()}
    document = {"scale": "full" if scales == {"full"} else "small", "parts": dict(sorted(parts.items()))}
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.{os.getpid()}")
    new.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    new.replace(path)
    return document


def _word(result: PartResult) -> str:
    return f"skipped: {result.skipped}" if result.skipped else "ok" if result.passed else "FAILED"


def table(results: Sequence[PartResult]) -> str:
    """One line per part, and under it what is wrong."""
    lines = [f"{'part':<14}{'cases':>9}{'faults':>9}{'violations':>12}{'seconds':>9}  {'seed':<8}"]
    for result in results:
        lines.append(
            f"{result.name:<14}{result.cases:>9,}{result.fired.total():>9,}{result.violations:>12,}"
            f"{result.seconds:>9.1f}  {result.seed:<8}{_word(result)}"
        )
        lines += [f"    {said}" for said in result.said]
        if result.violations > len(result.said):
            lines.append(f"    ... and {result.violations - len(result.said)} more")
        lines += [f"    {trouble}" for trouble in result.troubles]
    return "\n".join(lines)
