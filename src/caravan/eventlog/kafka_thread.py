"""A thread for one client of librdkafka, whose calls block, and now and then never come back.

A client must be closed in its thread, whatever happens. One that is merely forgotten is destroyed wherever the garbage
collector happens to be: in the middle of the event loop, and librdkafka then waits there for an answer that only the
loop could give (seen: for as long as the process lived). And nobody waits for the thread itself, unlike for those of a
ThreadPoolExecutor: a process may end while a call hangs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Thread
from typing import Any, TypeVar

T = TypeVar("T")


class ClientThread:
    """Runs calls one after the other, in the order of asking. `end` with the last one: the thread ends behind it."""

    def __init__(self, name: str) -> None:
        self._calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        Thread(target=_run, args=(self._calls,), name=name, daemon=True).start()

    async def call(self, do: Callable[..., T], *given: object) -> T:
        """What `do` returns or raises. Who is cancelled meanwhile leaves it running, or never begun."""
        return await asyncio.wrap_future(self._submit(lambda: do(*given)))

    def end(self, last: Callable[[], object]) -> Future[object]:
        """Close the client by `last`, behind whatever was asked before: not at once, but surely, waited for or not."""
        future = self._submit(last)
        self._calls.put(None)
        return future

    def _submit(self, do: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        self._calls.put((future, do))
        return future


def _run(calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]) -> None:
    while (asked := calls.get()) is not None:
        future, do = asked
        del asked
        if future.set_running_or_notify_cancel():
            try:
                result = do()
            except BaseException as error:  # raised where the answer is awaited
                future.set_exception(error)
            else:
                future.set_result(result)
                del result
        del future, do  # what they hold goes here, not in whichever thread is next
