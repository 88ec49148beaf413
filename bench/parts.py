"""What there is to measure: each part a module with `async def run(context) -> Result`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from typing import Any, TypeVar

# In the order in which they run. A part whose module is not there is not listed.
NAMES = ("fulfil", "floor", "peers", "latency", "scale", "memory", "reads")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Context:
    """What a part is given. It starts a `bench.server.Server` of its own."""

    part: str
    scale: str
    seed: int

    def pick(self, small: T, full: T) -> T:
        return full if self.scale == "full" else small

    def say(self, line: str) -> None:
        """Progress, on the terminal."""
        print(f"  {line}", flush=True)


@dataclass(slots=True)
class Result:
    """What a part found. `figures`: its entry in build/bench.json, as it is. `ratios`: join the others' (None: absent).

    `lines`: what the terminal is told at the end. `plots`: SVG texts by name, written to build/bench-NAME.svg.
    """

    figures: dict[str, Any] = field(default_factory=dict[str, Any])
    ratios: dict[str, float | None] = field(default_factory=dict[str, "float | None"])
    lines: list[str] = field(default_factory=list[str])
    plots: dict[str, str] = field(default_factory=dict[str, str])


Part = Callable[[Context], Awaitable[Result]]


def list_parts() -> list[str]:
    return [name for name in NAMES if find_spec(f"bench.{name}")]


def load_part(name: str) -> Part:
    return import_module(f"bench.{name}").run
