"""Where the cases of one batch play: a database, the product on it, and an operator's request in hand."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, cast
from uuid import UUID

import psycopg
from fastapi import FastAPI

from caravan.apps.web import create_app
from caravan.db import Database
from caravan.db.redis import Redis
from caravan.db.wake import Wake
from caravan.student_views.cache import ViewCache
from caravan.web import auth
from caravan.web.auth import Role
from tests.redis_server import RedisServer
from verify.crashpoints.points import points
from verify.scratch import Databases, ScratchDatabase
from verify.world import SETTINGS, World, open_world

WIRES = 4  # of the product's pool
REDIS_SECONDS = 10.0
EMAIL = "operator@verify.example"


@dataclass(frozen=True, slots=True)
class Template:
    """A database to copy: a world of so many trainers, an operator signed in, the workers up to date."""

    name: str
    token: str
    course: UUID
    trainers: tuple[UUID, ...]


async def make_template(databases: Databases, trainers: int) -> Template:
    scratch = databases.create()
    async with scratch.database() as db:
        world = await open_world(db, trainers=trainers)
        async with db.transaction() as tx:
            account = await auth.create_account(
                tx,
                email=EMAIL,
                name="Operator",
                role=Role.ADMIN,
                password_hash="no password opens this",  # noqa: S106
            )
            token = await auth.issue_token(tx, account)
    return Template(databases.freeze(scratch), token, world.course, tuple(world.trainers))


@dataclass(slots=True)
class Case:
    """One go of a step: its students (with all that they paid), and what the step has to know."""

    students: list[UUID]
    payments: list[UUID] = field(default_factory=list[UUID])
    events: list[UUID] = field(default_factory=list[UUID])
    know: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def payment(self) -> UUID:
        return self.payments[0]

    @property
    def student(self) -> UUID:
        return self.students[0]


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    body: Any

    @property
    def code(self) -> str:
        return str(cast("dict[str, Any]", self.body).get("code", "")) if isinstance(self.body, dict) else ""


class Stage:
    """One batch's database and the product on it. Open with `async with`."""

    def __init__(self, scratch: ScratchDatabase, template: Template) -> None:
        self.scratch = scratch
        self.template = template
        self.wake = Wake(scratch.url)
        self.app = _app()
        self.db = self._connect()
        # What the harness itself asks and does goes over connections that nothing happens to.
        self.ours = Database(scratch.url, max_connections=2, on_hints=self.wake.send)
        self.world = World(self.ours, template.course, list(template.trainers))
        self.on_reopen: list[Any] = []
        self.server: RedisServer | None = None
        self.redis: Redis | None = None

    def _connect(self) -> Database:
        return Database(self.scratch.url, max_connections=WIRES, on_hints=self.wake.send)

    async def __aenter__(self) -> Stage:
        self.scratch.check()
        self.app.state.db = await self.db.open()
        await self.ours.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.db.close()
        await self.ours.close()
        self.app.state.views = None
        if self.redis is not None and self.server is not None:
            await self.redis.close()
            self.server.kill()

    async def open_redis(self) -> ViewCache:
        """For a step that is about Redis: the product uses one from now on."""
        self.server = self.server or RedisServer().start()
        self.redis = Redis(self.server.url).open()
        await self.redis.wait_until_up(REDIS_SECONDS)
        self.app.state.views = views = ViewCache(self.redis)
        return views

    async def reopen(self) -> None:
        """In a forked child: connections of its own, everything else as it was."""
        self.db = self.app.state.db = await self._connect().open()
        self.world.db = await Database(self.scratch.url, max_connections=1).open()
        if self.redis is not None:
            await self.open_redis()
        for told in self.on_reopen:
            told(self.db)

    async def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        headers: Mapping[str, str] | None = None,
        raw: bytes | None = None,
    ) -> Answer:
        """One request to the application in this process, signed in as the operator."""
        payload = raw if raw is not None else b"" if body is None else json.dumps(body).encode()
        sent = {"host": "caravan.test", "authorization": f"Bearer {self.template.token}"}
        sent |= {"content-type": "application/json", "content-length": str(len(payload))} | dict(headers or {})
        return await _request(self.app, method, path, sent, payload)

    async def heal(self) -> None:
        """Throw away the connections that a fault has broken and the pool has not noticed yet."""
        good = 0
        while good < WIRES:
            try:
                async with self.db.connection() as connection:
                    await connection.execute("select 1")
                good += 1
            except psycopg.OperationalError:
                good = 0

    async def alone(self) -> None:
        """Wait until the server has noticed that whoever was killed or cut off is gone."""
        with points.paused():
            async with asyncio.timeout(20):
                while (await self.world.rows(OTHERS))[0]["others"]:  # noqa: ASYNC110 - only the server can tell
                    await asyncio.sleep(0.002)


OTHERS = """
select count(*)::int as others from pg_stat_activity
where datname = current_database() and pid <> pg_backend_pid() and state <> 'idle' and backend_type = 'client backend'
"""


@cache
def _app() -> FastAPI:
    """Built once per process: the routes take their time. The database is each stage's."""
    return create_app(SETTINGS, Database("postgresql:///never-opened"), Wake("postgresql:///never-opened"))


async def _request(app: FastAPI, method: str, path: str, headers: Mapping[str, str], body: bytes) -> Answer:
    scope: dict[str, Any] = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        "client": ("127.0.0.1", 1),
        "server": ("caravan.test", 80),
    }
    inbox: list[dict[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]
    status = 0
    said = b""

    async def receive() -> dict[str, Any]:
        return inbox.pop() if inbox else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        nonlocal status, said
        if message["type"] == "http.response.start":
            status = message["status"]
        else:
            said += message.get("body", b"")

    await app(scope, receive, send)
    return Answer(status, json.loads(said) if said.startswith((b"{", b"[")) else None)
