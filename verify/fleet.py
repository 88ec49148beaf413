"""Real processes of the product, started by the hundred: each forked from a server that has imported everything.

A fork costs a few milliseconds, an import of the product a second; so a run can kill thousands. What runs in a child is
the product's own: `caravan serve NAME`, or all background services in one process as under `caravan up`.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any, cast

from caravan.apps.services import BACKGROUND, WORKERS
from caravan.settings import Settings
from harness.processes import free_port
from verify.scratch import PREFIX

PRELOAD = ["caravan.apps.serve", "caravan.apps.worker", "caravan.apps.web", "caravan.payments.routes", "verify.fleet"]
WEB = "web"
TOGETHER = "workers"  # every background service in one process
KINDS: tuple[str, ...] = (WEB, TOGETHER, *BACKGROUND)
PR_SET_PDEATHSIG = 1
LOG_TAIL_BYTES = 1500
PAUSE_AFTER_SURPRISE_SECONDS = 0.5
SURPRISES_MAX = 5
BUG = '"event": "request failed"'  # in the log of a web

Patch = str  # "module:function", called in the child before it starts: a fault put in from outside


@dataclass(slots=True)
class Slot:
    """A place in the fleet: one process after the other. `keeps_name`: each takes its predecessor's work back at once;
    otherwise each has a name of its own, and the others wait for the dead one's lease."""

    kind: str
    number: int
    port: int = 0
    keeps_name: bool = True
    patch: Patch | None = None
    lives: int = 0
    frozen: bool = False
    rests: bool = False  # when this process ends, no other follows
    process: ForkServerProcess | None = None

    @property
    def name(self) -> str:
        return f"{self.number}" if self.keeps_name else f"{self.number}-{self.lives}"

    @property
    def pid(self) -> int | None:
        """Of the process that lives in this place now. Not reused while we hold it: its parent reaps it through us."""
        return self.process.pid if self.process is not None and self.process.is_alive() else None


@dataclass(slots=True)
class Fleet:
    """Processes on one database, each started again as soon as it ends. Use as a context.

    `surprises`: processes that ended though nobody killed them, with the end of their log.
    """

    url: str
    secret: str
    slots: list[Slot]
    more: dict[str, Any] = field(default_factory=dict[str, Any])  # further settings of every process
    fired: Counter[str] = field(default_factory=Counter[str])
    surprises: list[str] = field(default_factory=list[str])
    folder: Path = field(init=False)
    _keeping: list[asyncio.Task[None]] = field(default_factory=list[asyncio.Task[None]])

    async def __aenter__(self) -> Fleet:
        self.folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-"))
        self._keeping = [asyncio.create_task(self._keep(slot)) for slot in self.slots]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._keeping:
            task.cancel()
        await asyncio.gather(*self._keeping, return_exceptions=True)
        for slot in self.slots:
            if slot.process is not None:
                slot.process.kill()
                slot.process.join()
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def ports(self) -> list[int]:
        return [slot.port for slot in self.slots if slot.kind == WEB]

    def add(self, slot: Slot) -> None:
        self.slots.append(slot)
        self._keeping.append(asyncio.create_task(self._keep(slot)))

    def of(self, kind: str) -> list[Slot]:
        return [slot for slot in self.slots if slot.kind == kind]

    # -------------------------------------------------------------- faults

    def kill(self, slot: Slot) -> bool:
        """kill -9; False where it is dead already."""
        return self._signal(slot, signal.SIGKILL)

    def freeze(self, slot: Slot) -> bool:
        slot.frozen = self._signal(slot, signal.SIGSTOP)
        return slot.frozen

    def thaw(self, slot: Slot) -> bool:
        slot.frozen = False
        return self._signal(slot, signal.SIGCONT)

    def _signal(self, slot: Slot, number: signal.Signals) -> bool:
        pid = slot.pid
        if pid is None:
            return False
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return False
        self.fired[f"{slot.kind} {number.name}"] += 1
        return True

    # -------------------------------------------------------------- lives

    async def _keep(self, slot: Slot) -> None:
        while not slot.rests:
            slot.lives += 1
            slot.frozen = False
            process = self._start(slot)
            slot.process = process
            await _until_ended(process)
            process.join()
            if process.exitcode != -signal.SIGKILL:
                if len(self.surprises) < SURPRISES_MAX:
                    said = f"{slot.kind} ended by itself ({process.exitcode}): {self.log_tail(slot)}"
                    self.surprises.append(said)
                await asyncio.sleep(PAUSE_AFTER_SURPRISE_SECONDS)

    def _start(self, slot: Slot) -> ForkServerProcess:
        given: dict[str, Any] = {
            "postgres_url": self.url,
            "sandbox_webhook_secret": self.secret,
            "data_dir": str(self.folder),
            "worker_name": slot.name,
            "log_json": True,
            **self.more,
        }
        if slot.port:
            given["port"] = slot.port
        process = _forks().Process(
            target=live, args=(slot.kind, given, str(self._log(slot)), slot.patch), daemon=True, name=slot.kind
        )
        process.start()
        return process

    def _log(self, slot: Slot) -> Path:
        return self.folder / f"{slot.kind}-{slot.number}.log"

    def troubles(self) -> list[str]:
        """The surprises, and every request that a web answered as a bug (500), with its trace. Ask before leaving."""
        said = list(self.surprises)
        for slot in self.of(WEB):
            lines = self._log(slot).read_text(errors="replace").splitlines() if self._log(slot).exists() else []
            bugs = [json.loads(line) for line in lines if BUG in line and line.endswith("}")]
            said += [f"{bug.get('method')} {bug.get('path')} failed: {bug.get('exception')}" for bug in bugs]
        return said

    def log_tail(self, slot: Slot) -> str:
        try:
            return self._log(slot).read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace").strip()
        except FileNotFoundError:
            return "it said nothing"


def make_slots(kinds: Sequence[str], dice: random.Random, *, keeps_name: bool | None = None) -> list[Slot]:
    """One place per kind named; whether its processes keep their name is up to chance unless said."""
    return [
        Slot(
            kind,
            number,
            port=free_port() if kind == WEB else 0,
            keeps_name=dice.random() < 0.5 if keeps_name is None else keeps_name,
        )
        for number, kind in enumerate(kinds)
    ]


def _forks() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


async def _until_ended(process: ForkServerProcess) -> None:
    """Until the fork server says how it ended."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    sentinel = process.sentinel
    loop.add_reader(sentinel, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(sentinel)


# ------------------------------------------------------------------ in the child


def live(kind: str, given: dict[str, Any], log: str, patch: Patch | None) -> None:
    """A process of the fleet, until it is killed."""
    _end_with_parent()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    settings = Settings.model_validate(given)
    if patch:
        module, _, name = patch.partition(":")
        cast("Callable[[], None]", getattr(import_module(module), name))()
    sys.exit(_serve_together(settings) if kind == TOGETHER else _serve(settings, kind))


def _serve(settings: Settings, kind: str) -> int:
    from caravan.apps.serve import serve

    return serve(settings, "payment-service" if kind == WEB else kind)


def _serve_together(settings: Settings) -> int:
    import uvloop

    from caravan import telemetry
    from caravan.apps.bootstrap import open_platform
    from caravan.apps.worker import run_workers

    async def run() -> None:
        async with open_platform(settings) as platform:
            await run_workers(platform, BACKGROUND, asyncio.Event())

    telemetry.configure_logging(json=True)
    uvloop.run(run())
    return 0


def _end_with_parent() -> None:
    """The kernel ends this process when the fork server ends, which ends with the harness."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == 1:
            sys.exit(1)


__all__ = ["KINDS", "TOGETHER", "WEB", "WORKERS", "Fleet", "Patch", "Slot", "live", "make_slots"]
