"""`caravan up`: the database, the schema, the demo's data, one process for the web and one for the workers.

It stays small: no framework is imported here. Children import in parallel with the database's start, and get their
settings over their standard input once the database is there.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import secrets
import signal
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from typing import Any, cast

import psycopg

from caravan.apps import control
from caravan.apps.children import Child, ChildFailed, Order
from caravan.apps.folder import DataFolder, FolderRefused
from caravan.apps.port import PortRefused, address, bind
from caravan.apps.progress import Progress
from caravan.apps.services import WEB, background
from caravan.db.embedded import EmbeddedPostgres, EmbeddedPostgresError
from caravan.db.migrate import SchemaProblem, migrate
from caravan.db.reach import Unreachable, wait_until_reachable, why
from caravan.settings import Settings

CHILDREN_STOP_SECONDS = 3.0
READY_SECONDS_MAX = 60.0
SEED_SECONDS_MAX = 120.0
READY_POLL_SECONDS = 0.05
DATABASE_LOOK_SECONDS = 1.0


class UpRefused(Exception):
    """`caravan up` cannot start; the message is one line that says what to do."""


def up(settings: Settings) -> int:
    """Run until told to stop; the exit code. Problems of the start are one line on standard error."""
    try:
        return asyncio.run(Supervisor(settings).run())
    except (UpRefused, PortRefused, FolderRefused, EmbeddedPostgresError, SchemaProblem) as error:
        print(f"caravan: {error}", file=sys.stderr)  # noqa: T201 - the one line of a refused start
        return 1


class Supervisor:
    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.folder = DataFolder(settings.data_dir)
        self.progress = Progress(json_lines=settings.log_json)
        self.background = background(kafka=settings.kafka_broker is not None)
        self.off: set[str] = set()  # worker services that an operator stopped
        self.embedded = EmbeddedPostgres(settings.data_dir) if settings.postgres_url is None else None
        self._stop = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="postgres")  # EmbeddedPostgres is for one thread
        self._children: list[Child] = []
        self._keeping: list[asyncio.Task[None]] = []
        self._door: asyncio.Server | None = None
        self._ordering = asyncio.Lock()
        self._log_fd: int | None = None
        self._begun = False

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, self._stop.set)
        started = time.monotonic()
        with ExitStack() as ports:
            # A port that is refused leaves no new folder behind. In an old one the children of a killed supervisor
            # may still hold it: their end is waited for first.
            early = None if self.folder.path.exists() else ports.enter_context(self._bind())
            self.folder.take()
            return await self._run(ports, early, started)

    async def _run(self, ports: ExitStack, early: socket.socket | None, started: float) -> int:
        try:
            if self.settings.demo and self.settings.sandbox_webhook_secret is None:
                secret = self.folder.read_demo().get("sandboxWebhookSecret") or _new_webhook_secret()
                self.settings = self.settings.model_copy(update={"sandbox_webhook_secret": secret})
            if self.settings.sandbox_webhook_secret and self.settings.sandbox_books is None:
                self.settings = self.settings.model_copy(update={"sandbox_books": self.folder.sandbox_books})
            listener = early or ports.enter_context(self._bind())
            self._begun = True
            starting = asyncio.create_task(self._start(listener))
            if await self._unless_stopped(starting):
                self.progress.ready(self.url, time.monotonic() - started, self._where_things_are())
                await self._stop.wait()
            return 0
        finally:
            await self._shut_down()

    @property
    def url(self) -> str:
        return address(self.settings.host, self.settings.port)

    # -------------------------------------------------------------- start

    def _bind(self) -> socket.socket:
        """The web's port, taken before anything else starts, and kept over restarts of the web's process."""
        listener = bind(self.settings.host, self.settings.port)
        listener.set_inheritable(True)
        return listener

    async def _unless_stopped(self, starting: asyncio.Task[None]) -> bool:
        """True when the start went through; a stop signal interrupts it between its steps."""
        stopped = asyncio.create_task(self._stop.wait())
        await asyncio.wait({starting, stopped}, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if starting.done():
            starting.result()
            return True
        starting.cancel()
        with suppress(asyncio.CancelledError):
            await starting
        return False

    async def _start(self, listener: socket.socket) -> None:
        output = None if not sys.stdout.isatty() else self.folder.open_log()
        self._log_fd = output
        shared = (self.folder.lock_fd,)
        self.web = Child("web", pass_fds=(*shared, listener.fileno()), output=output, report=self._report)
        self.workers = Child("workers", pass_fds=shared, output=output, report=self._report)
        self._listener_fd = listener.fileno()
        self.progress.begin("PostgreSQL")
        await self.web.spawn()
        self._children.append(self.web)
        await self.workers.spawn()
        self._children.append(self.workers)
        await self._start_database()
        self.progress.begin("Services")
        try:
            await self._begin_workers()
            await self._begin_web()
        except ChildFailed as error:
            raise UpRefused(f"The services did not start: {error}{self._see_log()}") from None
        await self._open_door()
        await self._wait_until_ready()
        self.progress.done("four workers, the reconciler and the web are up")
        self._keeping = [
            asyncio.create_task(self._keep_database(), name="keep database"),
            asyncio.create_task(self.web.keep(self._begin_web), name="keep web"),
            asyncio.create_task(self.workers.keep(self._begin_workers), name="keep workers"),
        ]

    async def _start_database(self) -> None:
        if self.embedded is not None:
            loop = asyncio.get_running_loop()
            starting = loop.run_in_executor(self._thread, self.embedded.start)
            try:
                url = await asyncio.shield(starting)
            except asyncio.CancelledError:
                await starting  # a started one must be stopped too
                raise
            self.settings = self.settings.model_copy(update={"postgres_url": url})
        assert self.settings.postgres_url is not None
        direct = self.settings.postgres_direct_url
        setting = "CARAVAN_POSTGRES_DIRECT_URL" if direct else "POSTGRES_URL"
        try:
            await wait_until_reachable(direct or self.settings.postgres_url, setting, waiting=self.progress.warn)
            applied = await migrate(direct or self.settings.postgres_url)
        except (Unreachable, psycopg.OperationalError) as error:
            said = str(error) if isinstance(error, Unreachable) else f"{setting}: the database went away ({why(error)})"
            raise UpRefused(f"{said}: start it, or unset POSTGRES_URL to use the embedded one.") from None
        self.progress.done(("embedded" if self.embedded else "POSTGRES_URL") + (", schema made" if applied else ""))

    async def _keep_database(self) -> None:
        """For ever: a server that was killed is started again, which recovers it; the services wait and go on."""
        loop = asyncio.get_running_loop()
        while self.embedded is not None:
            await asyncio.sleep(DATABASE_LOOK_SECONDS)
            if await loop.run_in_executor(self._thread, self.embedded.is_running):
                continue
            self._report("the database ended, starting it again", {"log": str(self.embedded.log_path)})
            try:
                url = await loop.run_in_executor(self._thread, _restart, self.embedded)
            except EmbeddedPostgresError as error:
                self._report("the database did not start", {"error": str(error)})
                continue
            if url != self.settings.postgres_url:
                self.settings = self.settings.model_copy(update={"postgres_url": url})
                for child in self._children:
                    child.end()  # it is started again, with the new address

    async def _begin_workers(self) -> None:
        order: Order = {"services": list(self.background), "off": sorted(self.off), "url": self.url}
        await self.workers.ask(SEED_SECONDS_MAX, do="begin", settings=self._settings(), **order)

    async def _begin_web(self) -> None:
        await self.web.ask(do="begin", settings=self._settings(), services=list(WEB), fd=self._listener_fd)

    def _settings(self) -> dict[str, Any]:
        return self.settings.model_dump(mode="json")

    async def _wait_until_ready(self) -> None:
        """Until /readyz is green: the database, the schema, every worker."""
        deadline = time.monotonic() + READY_SECONDS_MAX
        while True:
            status, problems = await _get_readyz(self.settings.host, self.settings.port)
            if status == 200:
                return
            if self.web.pid is None or self.workers.pid is None or time.monotonic() > deadline:
                raise UpRefused(f"The services do not get ready: {problems}{self._see_log()}")
            await asyncio.sleep(READY_POLL_SECONDS)

    # -------------------------------------------------------------- the door

    async def _open_door(self) -> None:
        self._door = await asyncio.start_unix_server(
            self._answer, sock=control.listen(self.folder.control), limit=control.LINE_BYTES_MAX
        )

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            request = json.loads(await reader.readline())
            answer = await self._do(cast("dict[str, Any]", request))
        except (ValueError, ChildFailed) as error:
            answer: dict[str, Any] = {"ok": False, "error": str(error)}
        with suppress(OSError):
            writer.write(json.dumps(answer).encode() + b"\n")
            await writer.drain()
            writer.close()

    async def _do(self, request: dict[str, Any]) -> dict[str, Any]:
        command, name = request.get("command"), request.get("name")
        if command in ("stop", "start"):
            if name not in self.background:
                raise ValueError(f"{name} is not one of {', '.join(self.background)}")
            async with self._ordering:
                await self.workers.ask(do=command, name=name)
                (self.off.add if command == "stop" else self.off.discard)(name)
        elif command == "metrics":
            told = await self.workers.ask(do="metrics")
            return {"ok": True, "families": told["families"]}
        elif command != "status":
            raise ValueError(f"no such command: {command}")
        return {"ok": True, "url": self.url, "pid": os.getpid(), "services": self._status()}

    def _status(self) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for names, child in ((WEB, self.web), (self.background, self.workers)):
            for name in names:
                state = "stopped" if name in self.off else "running" if child.pid else "restarting"
                found[name] = {"state": state, "pid": child.pid, "restarts": child.restarts}
        return found

    # -------------------------------------------------------------- the end

    async def _shut_down(self) -> None:
        if self._begun:
            self.progress.stopping()
        for task in self._keeping:
            task.cancel()
        await asyncio.gather(*self._keeping, return_exceptions=True)
        if self._door:
            self._door.close()
            self.folder.control.unlink(missing_ok=True)
        await asyncio.gather(*(child.stop(CHILDREN_STOP_SECONDS) for child in self._children))
        if self.embedded:  # last: nobody is left who might want to say something
            await asyncio.get_running_loop().run_in_executor(self._thread, self.embedded.stop)
        self._thread.shutdown()
        self.folder.release()
        if self._begun:
            self.progress.stopped()

    def _report(self, what: str, facts: dict[str, Any]) -> None:
        self.progress.warn(what, **facts)

    def _where_things_are(self) -> dict[str, str]:
        found = {"data": str(self.folder.path)}
        if self.settings.demo:
            found["accounts"] = str(self.folder.demo)
        elif self.settings.sandbox_webhook_secret is None:
            found["payments"] = "off: no provider is set up (to try it: --demo, or CARAVAN_SANDBOX_WEBHOOK_SECRET)"
        if self._log_fd is not None:
            found["log"] = str(self.folder.log)
        return found

    def _see_log(self) -> str:
        return f" (see {self.folder.log})" if self._log_fd is not None else ""


async def _get_readyz(host: str, port: int) -> tuple[int, str]:
    """The status, and what the answer says is wrong; 0 where there is none. Plain HTTP: no client to import."""
    try:
        async with asyncio.timeout(5):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                writer.write(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                said = await reader.read(100_000)
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return 0, "no answer"
    head, _, body = said.partition(b"\r\n\r\n")
    status = int(head.split(b" ", 2)[1]) if head.startswith(b"HTTP/") else 0
    with suppress(ValueError):
        return status, "; ".join(json.loads(body).get("problems", []))
    return status, "no answer"


def _restart(embedded: EmbeddedPostgres) -> str:
    embedded.stop()
    return embedded.start()


def _new_webhook_secret() -> str:
    return "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode()
