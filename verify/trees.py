"""Whole installations: `caravan up` with its embedded PostgreSQL, whose every process is killed, the supervisor too.

A killed supervisor's children must end by themselves; its PostgreSQL stays, and the next `caravan up` on the folder
must take it over, the same process, with everything in it.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from asyncio.subprocess import Process
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from caravan.apps import control
from caravan.db import Database
from caravan.db.embedded import EmbeddedPostgres, embedded_url
from verify.fleet import free_port
from verify.history import plan_orders
from verify.load import Load
from verify.parts import Context
from verify.report import PartResult
from verify.scratch import PREFIX
from verify.waiting import until_quiet
from verify.world import SETTINGS, sandbox

CHILDREN = ("web", "workers")
SERVICE_OF = {"web": "payment-service", "workers": "purchase-worker"}
MUST_FIRE = ("up web SIGKILL", "up workers SIGKILL", "up supervisor SIGKILL", "up workers SIGSTOP")
READY_SECONDS_MAX = 60.0
ORPHANS_SECONDS_MAX = 8.0  # as long as the next supervisor waits for them
BACK_SECONDS_MAX = 40.0  # a child that ends again and again is started with growing pauses
QUIET_SECONDS_MAX = 60.0
FREEZE_SECONDS = 2.0
POLL_SECONDS = 0.05


class NotSo(Exception):
    """The tree did not do what it must; the message says what."""


@dataclass(slots=True)
class Tree:
    """One data folder, and the `caravan up` that runs on it."""

    fired: Counter[str]
    port: int = field(default_factory=free_port)
    folder: Path = field(init=False)
    process: Process | None = None

    def __post_init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-"))
        self.folder.chmod(0o711)  # PostgreSQL's user must be able to enter

    @property
    def url(self) -> str:
        url = embedded_url(self.folder)
        if url is None:
            raise NotSo("the embedded PostgreSQL does not run")
        return url

    @property
    def postmaster(self) -> int:
        """The process id of the embedded PostgreSQL."""
        return int((EmbeddedPostgres(self.folder).home / "data" / "postmaster.pid").read_text().splitlines()[0])

    async def start(self) -> None:
        """Raises NotSo where it does not get ready."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("CARAVAN_", "POSTGRES_", "KAFKA_", "REDIS_"))}
        assert SETTINGS.sandbox_webhook_secret
        with self._log.open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "caravan", "up", "--data", str(self.folder), "--port", str(self.port)),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=kept | {"CARAVAN_SANDBOX_WEBHOOK_SECRET": SETTINGS.sandbox_webhook_secret},
                start_new_session=True,
            )
        await self.until(lambda: (self.folder / "control.sock").exists() and self._answers(), "be ready")

    async def stop(self) -> None:
        """End it as an operator does, and remove it."""
        try:
            if self.process is not None and self.process.returncode is None:
                self.process.send_signal(signal.SIGTERM)
                async with asyncio.timeout(30):
                    await self.process.wait()
        finally:
            if self.process is not None and self.process.returncode is None:
                self.process.kill()
            postgres = EmbeddedPostgres(self.folder)
            if postgres.is_running():
                await asyncio.to_thread(lambda: (postgres.start(), postgres.stop()))
            shutil.rmtree(self.folder, ignore_errors=True)

    async def until(self, condition: Any, what: str, seconds: float = READY_SECONDS_MAX) -> float:
        """How long it took. Raises NotSo."""
        started = time.monotonic()
        while not await asyncio.to_thread(condition):
            if self.process is not None and self.process.returncode is not None:
                raise NotSo(f"caravan up ended ({self.process.returncode}): {self.log_tail}")
            if time.monotonic() - started > seconds:
                raise NotSo(f"caravan up did not {what} within {seconds:.0f} s: {self.log_tail}")
            await asyncio.sleep(POLL_SECONDS)
        return time.monotonic() - started

    # -------------------------------------------------------------- faults

    def child(self, name: str) -> int | None:
        """The process id of the web or the workers now; None while there is none."""
        try:
            return control.ask(self.folder / "control.sock", command="status")["services"][SERVICE_OF[name]]["pid"]
        except (control.NotRunning, OSError):
            return None

    async def kill_child(self, name: str) -> float:
        """Kill it and see another in its place; the seconds that took."""
        await self.until(lambda: self.child(name) is not None, f"have its {name}", BACK_SECONDS_MAX)
        old = self.child(name)
        assert old is not None
        os.kill(old, signal.SIGKILL)
        self.fired[f"up {name} SIGKILL"] += 1
        return await self.until(lambda: self.child(name) not in (None, old), f"replace its {name}", BACK_SECONDS_MAX)

    async def freeze_child(self, name: str) -> None:
        pid = await asyncio.to_thread(self.child, name)
        if pid is None:
            return
        os.kill(pid, signal.SIGSTOP)
        self.fired[f"up {name} SIGSTOP"] += 1
        await asyncio.sleep(FREEZE_SECONDS)
        os.kill(pid, signal.SIGCONT)

    async def kill_supervisor(self) -> float:
        """Kill it; its children must end, and the next one take the database over. The seconds the children took."""
        assert self.process is not None
        children = [pid for name in CHILDREN if (pid := await asyncio.to_thread(self.child, name)) is not None]
        postmaster = self.postmaster
        self.process.kill()
        await self.process.wait()
        self.process = None
        self.fired["up supervisor SIGKILL"] += 1
        seconds = await self.until(
            lambda: not any(_lives(pid) for pid in children), "take its children with it", ORPHANS_SECONDS_MAX
        )
        await self.start()
        if self.postmaster != postmaster:
            raise NotSo("caravan up started another PostgreSQL, though the old one lived")
        return seconds

    # -------------------------------------------------------------- looking

    @property
    def _log(self) -> Path:
        return self.folder / "up.log"

    @property
    def log_tail(self) -> str:
        return self._log.read_bytes()[-1500:].decode(errors="replace").strip()

    def _answers(self) -> bool:
        return all(self.child(name) is not None for name in CHILDREN)


def _lives(pid: int) -> bool:
    """A zombie, which nobody has buried yet, does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def run(context: Context, result: PartResult, kills: int, payments: int) -> None:
    """`kills` kills in one installation while `payments` orders are made and paid."""
    from verify.kills import settle

    dice = context.dice("trees")
    tree = Tree(result.fired)
    children_seconds: list[float] = []
    back_seconds: list[float] = []
    try:
        await tree.start()
        async with Database(tree.url) as db:
            orders = await plan_orders(db, payments, dice)
            load = Load(orders, lambda: [tree.port], sandbox(), context.dice("tree clients"), clients=8)
            load.may = lambda: load.progress < (len(back_seconds) + len(children_seconds) + 1) / (kills + 1)
            async with asyncio.TaskGroup() as group:
                loading = group.create_task(load.run())
                await _kill_all_around(tree, dice, kills, children_seconds, back_seconds)
                await loading
            quiet_seconds, left = await until_quiet(db, QUIET_SECONDS_MAX)
            if left:
                result.violated(left, "trees")
            await settle(db, result, orders, load, "trees")
        result.extra["trees"] = {
            "kills": kills,
            "supervisor_kills": len(children_seconds),
            "children_end_seconds_max": round(max(children_seconds, default=0), 1),
            "child_back_seconds_max": round(max(back_seconds, default=0), 1),
            "quiet_seconds": round(quiet_seconds, 1),
            "slowest_order_seconds": round(load.slowest_seconds, 1),
            "answers": dict(sorted(load.answers.items())),
        }
    except* NotSo as errors:
        for error in errors.exceptions:
            result.violated(str(error), "trees")
    finally:
        await tree.stop()


async def _kill_all_around(
    tree: Tree, dice: random.Random, kills: int, children_seconds: list[float], back_seconds: list[float]
) -> None:
    """Web, workers, supervisor, in a new sequence each round; what each took goes into the lists."""
    frozen = False
    while len(children_seconds) + len(back_seconds) < kills:
        for target in dice.sample(["web", "workers", "supervisor"], 3):
            if len(children_seconds) + len(back_seconds) >= kills:
                break
            await asyncio.sleep(dice.uniform(0.3, 1.5))
            if target == "supervisor":
                children_seconds.append(await tree.kill_supervisor())
            else:
                back_seconds.append(await tree.kill_child(target))
        if not frozen or dice.random() < 0.3:
            await tree.freeze_child("workers")
            frozen = True
