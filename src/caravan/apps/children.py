"""The supervisor's view of one child process: start it, talk to it, start it again when it ends by itself.

A child gets one end of a socket pair as its standard input. Orders go in and answers come out as JSON lines; when the
supervisor ends, however it ends, the child reads the end of its input and stops. That is why no child outlives it.
"""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any, cast

QUICK_SECONDS = 10.0  # a life shorter than this is a quick crash
QUICK_CRASHES_FREE = 2  # so many in a row are started again at once
BACKOFF_SECONDS_MAX = 30.0
ANSWER_SECONDS_MAX = 15.0
HUNG_UP_SECONDS_MAX = 1.0

Order = dict[str, Any]
Report = Callable[[str, Order], None]


class ChildFailed(Exception):
    """A child ended, or did not answer, where it was needed."""


class Child:
    """One child process and its successors. `role` is its name; `order` what each of them is told first."""

    def __init__(self, role: str, *, pass_fds: tuple[int, ...], output: int | None, report: Report) -> None:
        self.role = role
        self.restarts = 0
        self._pass_fds = pass_fds
        self._output = output
        self._report = report
        self._process: asyncio.subprocess.Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self._waiting: dict[str, asyncio.Future[Order]] = {}
        self._asked = 0
        self._quick_crashes = 0
        self._end = ""  # how the last process ended, once it has

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process and self._process.returncode is None else None

    async def spawn(self) -> None:
        """Start the process; it imports what it needs while the database starts, and waits for its order."""
        ours, theirs = socket.socketpair()
        try:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "caravan.apps.child", self.role),
                stdin=theirs.fileno(),
                stdout=self._output,
                stderr=self._output,
                pass_fds=self._pass_fds,
                start_new_session=True,  # Ctrl-C reaches the supervisor alone, which stops things in order
            )
        finally:
            theirs.close()
        self._end = ""
        ours.setblocking(False)
        if self._writer is not None:
            self._writer.close()  # to its predecessor
        reader, self._writer = await asyncio.open_connection(sock=ours)
        self._reading = asyncio.create_task(self._read(reader), name=f"{self.role} answers")

    async def ask(self, seconds: float = ANSWER_SECONDS_MAX, **order: object) -> Order:
        """Send an order, wait for its answer. Raises ChildFailed with the child's own words where it refuses."""
        if self._end:
            raise ChildFailed(self._end)
        self._asked += 1
        key = str(self._asked)
        answer = self._waiting[key] = asyncio.get_running_loop().create_future()
        try:
            assert self._writer is not None
            self._writer.write(json.dumps({"id": key, **order}).encode() + b"\n")
            async with asyncio.timeout(seconds):
                await self._writer.drain()
                said = await answer
        except (TimeoutError, OSError):
            if self._reading is not None and self._reading.done():
                raise ChildFailed(self._end) from None
            raise ChildFailed(f"the process of the {self.role} does not answer") from None
        finally:
            self._waiting.pop(key, None)
        if not said.get("ok"):
            raise ChildFailed(str(said.get("error", "it refused")))
        return said

    async def _read(self, reader: asyncio.StreamReader) -> None:
        last_words = ""
        try:
            while line := await reader.readline():
                said = cast("Order", json.loads(line))
                last_words = str(said.get("last_words", ""))
                waiting = self._waiting.get(str(said.get("id")))
                if waiting and not waiting.done():
                    waiting.set_result(said)
        except (OSError, ValueError):
            pass  # the child ended in the middle of a word; keep() sees that it ended
        self._end = f"the process of the {self.role} ended ({last_words or await self._exit()})"
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(ChildFailed(self._end))

    async def _exit(self) -> str:
        """The exit code, or the signal, of a process that has hung up."""
        assert self._process is not None
        try:
            async with asyncio.timeout(HUNG_UP_SECONDS_MAX):
                code = await self._process.wait()
        except TimeoutError:
            return "it hung up"
        return f"exit code {code}" if code >= 0 else f"killed by signal {-code}"

    async def keep(self, begin: Callable[[], Awaitable[None]]) -> None:
        """For ever: when the process ends, say so and start another; `begin` gives it its orders."""
        while True:
            assert self._process is not None
            started = time.monotonic()
            code = await self._process.wait()
            lived = time.monotonic() - started
            self._quick_crashes = self._quick_crashes + 1 if lived < QUICK_SECONDS else 0
            pause = self._pause_seconds()
            self._report(
                "process ended, starting it again",
                {"process": self.role, "exit": code, "lived_seconds": round(lived, 1), "pause_seconds": pause},
            )
            await asyncio.sleep(pause)
            self.restarts += 1
            try:
                await self.spawn()
                await begin()
            except (ChildFailed, OSError) as error:  # OSError: the machine has no process to give just now
                self._report("process did not start", {"process": self.role, "error": str(error)})
                self.end()

    def _pause_seconds(self) -> float:
        beyond = self._quick_crashes - QUICK_CRASHES_FREE
        return 0.0 if beyond <= 0 else min(BACKOFF_SECONDS_MAX, 2.0 ** (beyond - 1))

    def end(self) -> None:
        """End the process that runs now; `keep` starts another."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()

    async def stop(self, seconds: float) -> None:
        """Ask it to end; after `seconds` end it."""
        process = self._process
        if process is not None and process.returncode is None:
            process.send_signal(signal.SIGTERM)
            try:
                async with asyncio.timeout(seconds):
                    await process.wait()
            except TimeoutError:
                self._report("process did not stop in time, killed", {"process": self.role})
                process.kill()
                await process.wait()
        if self._writer is not None:
            self._writer.close()
        if self._reading is not None:
            self._reading.cancel()
