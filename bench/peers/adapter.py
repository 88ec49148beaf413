"""What an adapter is: a module of bench.peers with these names. Nothing but `race` and `station` reads them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol
from uuid import UUID

Way = dict[str, Any]


class Adapter(Protocol):
    """One peer."""

    PACKAGE: str
    """As it is called on the package index."""
    GUARANTEE: str
    """What becomes of the work of a process that dies."""
    WAYS: Sequence[Way]
    """The settings to try: concurrency, batch, pool. All of them together with 1, 2 and 4 processes.

    `processes` in a way is put in by `race`: how many there are.
    """
    OWN_POOL: bool
    """It forks its processes itself: one station is started, which reads `processes`."""

    async def prepare(self, url: str, payments: Sequence[UUID], way: Way, redis: str) -> None:
        """Make its tables and put one job per payment into its queue; not timed."""
        ...

    def work(self, url: str, way: Way, redis: str, go: Callable[[], None]) -> None:
        """A worker process: get ready, call `go`, which returns when the clock starts, then work for ever."""
        ...
