"""How a fault gets in from outside: a function, a statement or the schema is replaced, and each use counted.

For a process that does nothing else: what is replaced stays replaced until it ends.
"""

from __future__ import annotations

import builtins
import pkgutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, cast

import psycopg

import caravan
from caravan.db import Tx
from verify.scratch import Databases, ScratchDatabase


class NoSuchPlace(Exception):
    """The product has changed: what the fault wants to replace is not there any more."""


@dataclass(slots=True)
class Tamper:
    """`hits` counts how often something that was replaced has run: a fault without any proves nothing.

    `patch`: `module:function`, for processes that a harness starts; it puts the fault into those.
    """

    hits: int = 0
    schema: list[str] = field(default_factory=list[str])
    patch: str | None = None
    _statements: set[str] = field(default_factory=set[str])

    def __post_init__(self) -> None:
        load_product()

    def hit(self, number: int = 1) -> None:
        self.hits += number

    def replace(self, place: str, make: Callable[[Any], Any]) -> None:
        """Put `make(old)` wherever the product or the harness names the `module:thing`; `module:Class.thing` too."""
        module, _, name = place.partition(":")
        owner: Any = import_module(f"caravan.{module}")
        *classes, last = name.split(".")
        for each in classes:
            owner = getattr(owner, each)
        names = cast("dict[str, Any]", vars(owner))
        if last not in names:
            raise NoSuchPlace(place)
        old = names[last]
        new = make(old)
        setattr(owner, last, new)
        if classes:
            return
        for loaded, each in list(sys.modules.items()):
            if loaded.startswith(("caravan.", "verify.")):
                for known, value in list(vars(each).items()):
                    if value is old:
                        setattr(each, known, new)

    def put(self, module: str, name: str, value: Any) -> None:
        """Another meaning of a name in one module of the product only."""
        owner = import_module(f"caravan.{module}")
        if name not in vars(owner) and not hasattr(builtins, name):
            raise NoSuchPlace(f"{module}:{name}")
        setattr(owner, name, value)

    def reword(self, place: str, *changes: tuple[str, str]) -> None:
        """Change words of a statement; each time it is sent counts."""

        def change(statement: str) -> str:
            for old, new in changes:
                if old not in statement:
                    raise NoSuchPlace(f"{place}: {old}")
                statement = statement.replace(old, new)
            self._watch(statement)
            return statement

        self.replace(place, change)

    def alter(self, *statements: str) -> None:
        """Change the schema of each database that is made from now on."""
        self.schema += statements

    def _watch(self, statement: str) -> None:
        if not self._statements:
            for name in ("execute", "_fetch"):
                self.replace(f"db.tx:Tx.{name}", self._counted)
        self._statements.add(statement)

    def _counted(self, method: Any) -> Any:
        async def counted(tx: Tx, query: Any, *more: Any) -> Any:
            self.hits += isinstance(query, str) and query in self._statements
            return await method(tx, query, *more)

        return counted


def load_product() -> None:
    """All of it, so that whoever names something is known."""
    for module in pkgutil.walk_packages(caravan.__path__, "caravan."):
        if not module.name.endswith("__main__"):
            import_module(module.name)


@dataclass(frozen=True, slots=True)
class Ground(Databases):
    """Makes databases with the fault in their schema."""

    tamper: Tamper = field(default_factory=Tamper)

    def create(self, template: str | None = None) -> ScratchDatabase:
        made = Databases.create(self, template)
        if template is None and self.tamper.schema:
            with psycopg.connect(made.url, autocommit=True) as connection:
                for statement in self.tamper.schema:
                    connection.execute(statement.encode())
                    self.tamper.hit()
        return made

    @property
    def databases(self) -> Ground:
        """Where a part asks its server for them."""
        return self
