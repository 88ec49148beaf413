"""What there is to prove: the names of the contract, each a module of the same name with `async def run(context)`."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from typing import TypeVar

from verify.report import PartResult
from verify.scratch import ScratchServer

NAMES = (
    "crashpoints",
    "kills",
    "pgcrash",
    "stuck",
    "rollout",
    "orders",
    "races",
    "model",
    "fuzz",
    "authz",
    "redis",
    "kafka_outage",
    "kafka_stream",
    "fleet",
    "sabotage",
)
MODULES = {"fleet": "kafka_fleet"}  # `fleet` are the processes that several parts play with

T = TypeVar("T")


@dataclass(slots=True)
class Context:
    """What a part is given: how much to do, with which seed, perhaps one case only, and a fast PostgreSQL to share.

    A part with other needs starts a `ScratchServer` of its own.
    """

    part: str
    scale: str
    seed: int
    server: ScratchServer
    case: str | None = None
    random: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.random = self.dice()

    def dice(self, *of: object) -> random.Random:
        """Chance that depends on the seed, the part and `of` alone: the same in whatever process or order."""
        return random.Random(repr((self.seed, self.part, *of)))

    def pick(self, small: T, full: T) -> T:
        return full if self.scale == "full" else small

    def result(self) -> PartResult:
        """An empty result, to be filled and returned."""
        return PartResult(self.part, self.scale, self.seed)


Part = Callable[[Context], Awaitable[PartResult]]


def list_parts() -> dict[str, str]:
    """The parts that are written, by name: their modules, imported when they run."""
    modules = {name: f"verify.{MODULES.get(name, name)}" for name in NAMES}
    return {name: module for name, module in modules.items() if find_spec(module)}


def load_part(name: str) -> Part:
    return import_module(list_parts()[name]).run
