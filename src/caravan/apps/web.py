"""The web: one FastAPI application of the services asked for, and the server that runs it."""

from __future__ import annotations

import asyncio
import importlib
import json
import logging
import socket
from collections.abc import Collection, Generator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST

from caravan.apps import control
from caravan.apps.bootstrap import Platform, open_platform
from caravan.apps.connections import BoundedHttp, WebSocketLine
from caravan.apps.folder import DataFolder
from caravan.apps.health import check_ready
from caravan.apps.line import Line, Order
from caravan.apps.metrics import Families, Metrics, Others
from caravan.apps.services import SERVICES, WEB, WORKERS
from caravan.apps.subscriptions import subscribe
from caravan.db import Database
from caravan.db.wake import Wake
from caravan.realtime.gateway import Gateway
from caravan.settings import Settings
from caravan.student_views.cache import ViewCache
from caravan.telemetry.tracing import exporting
from caravan.web.deps import Db
from caravan.web.policies import check_routes, public
from caravan.web.setup import set_up

GRACEFUL_SECONDS = 2
FIGURES_BYTES_MAX = 1_000_000
FRAME_BYTES_MAX = 16_384  # what a client says over a WebSocket is short

health = APIRouter(tags=["health"])


@health.get("/healthz", dependencies=[public("health")])
async def get_health() -> dict[str, str]:
    """The process lives."""
    return {"status": "alive"}


@health.get("/metrics", dependencies=[public("metrics")])
async def get_metrics(request: Request) -> Response:
    metrics: Metrics = request.app.state.metrics
    return Response(await metrics.render(), media_type=CONTENT_TYPE_LATEST)


def readiness(watched: Collection[str]) -> APIRouter:
    """`/readyz` of a process that answers for the worker services in `watched`."""
    router = APIRouter(tags=["health"])

    @router.get("/readyz", dependencies=[public("health")])
    async def get_readiness(db: Db) -> JSONResponse:
        """200 where the work progresses, 503 with the problems where it doesn't."""
        found = await check_ready(db, watched)
        return JSONResponse(found.document(), status_code=200 if found.ready else 503)

    return router


def create_app(
    settings: Settings,
    db: Database,
    wake: Wake,
    *,
    views: ViewCache | None = None,
    services: Collection[str] = WEB,
    watched: Collection[str] = (),
    process: str = "web",
    others: Others | None = None,
) -> FastAPI:
    """An application with the routers of `services`. Raises RouteWithoutPolicy for a route that nobody judged.

    `watched`: worker services whose standstill makes this process not ready, as under `caravan up`. `process` is its
    name in the metrics, `others` brings the figures of processes without an address of their own.
    """
    app = FastAPI(
        title="Caravan",
        summary="What is paid for is delivered.",
        version=settings.build,
        docs_url=None,
        redoc_url=None,
    )
    app.state.settings, app.state.db, app.state.wake, app.state.views = settings, db, wake, views
    app.state.gateway = gateway = Gateway(db, wake)
    app.state.metrics = Metrics(
        db,
        process,
        settings.build,
        unclaimed_after=timedelta(minutes=settings.unclaimed_minutes),
        gateway=gateway,
        others=others,
    )
    # What the operator's replay runs through.
    app.state.subscriptions = {each.group: each for each in subscribe(timedelta(hours=settings.notice_hours), views)}
    app.include_router(health)
    app.include_router(readiness(watched))
    for name in services:
        for module in SERVICES[name].routers:
            app.include_router(importlib.import_module(module).router)
    set_up(app, settings)
    check_routes(app)
    return app


class Server(uvicorn.Server):
    """uvicorn without its signal handlers: whoever runs it sets `should_exit`."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()


def make_server(app: Any, settings: Settings) -> Server:
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    return Server(
        uvicorn.Config(
            app,
            host=settings.host,
            port=settings.port,
            http=BoundedHttp,
            ws=WebSocketLine,
            ws_max_size=FRAME_BYTES_MAX,
            ws_per_message_deflate=False,
            lifespan="off",
            log_config=None,
            access_log=False,  # the Edge writes one line per request, without its query
            # Who isn't named is not believed: anybody can write such a header.
            proxy_headers=bool(settings.trusted_proxies),
            forwarded_allow_ips=list(settings.trusted_proxies),
            server_header=False,
            timeout_graceful_shutdown=GRACEFUL_SECONDS,
        )
    )


async def serve_web(
    platform: Platform,
    services: Collection[str],
    stop: asyncio.Event,
    *,
    listening: asyncio.Event | None = None,
    sockets: list[socket.socket] | None = None,
    watched: Collection[str] = (),
    process: str = "web",
    others: Others | None = None,
) -> None:
    """Answer until `stop`; a part that fails ends the process."""
    app = create_app(
        platform.settings,
        platform.db,
        platform.wake,
        views=platform.views,
        services=services,
        watched=watched,
        process=process,
        others=others,
    )
    server = make_server(app, platform.settings)
    if listening is not None:
        server.listening = listening
    gateway: Gateway = app.state.gateway
    async with asyncio.TaskGroup() as parts:
        serving = parts.create_task(server.serve(sockets), name="web")
        pushing = parts.create_task(gateway.run(stop), name="gateway")
        await stop.wait()
        server.should_exit = True
        await asyncio.wait({serving, pushing})


async def serve_health(
    platform: Platform,
    name: str,
    stop: asyncio.Event,
    *,
    listening: asyncio.Event,
    sockets: list[socket.socket],
) -> None:
    """The three health addresses of the process of service `name`, which has no other."""
    app = create_app(platform.settings, platform.db, platform.wake, services=(), watched=[name], process=name)
    server = make_server(app, platform.settings)
    server.listening = listening
    async with asyncio.TaskGroup() as parts:
        parts.create_task(server.serve(sockets))
        await stop.wait()
        server.should_exit = True


async def run_child(line: Line, settings: Settings, order: Order) -> None:
    """The web of `caravan up`: every HTTP service and the WebSockets, on the supervisor's socket."""
    async with exporting(settings.otlp_endpoint, "web", settings.build), open_platform(settings) as platform:
        listening = asyncio.Event()
        sockets = [socket.socket(fileno=int(order["fd"]))]
        async with asyncio.TaskGroup() as parts:
            parts.create_task(
                serve_web(
                    platform,
                    order["services"],
                    line.stop,
                    listening=listening,
                    sockets=sockets,
                    watched=WORKERS,
                    others=lambda: _ask_workers(DataFolder(settings.data_dir).control),
                )
            )
            await listening.wait()
            line.answer(order)
            listening_to_orders = parts.create_task(line.listen(_nothing_else))
            await line.stop.wait()
            listening_to_orders.cancel()


async def _ask_workers(door: Path) -> Families:
    """What the workers' process counted, by way of the supervisor, at whose door every other question is asked too."""
    with control.address(door) as name:
        reader, writer = await asyncio.open_unix_connection(name, limit=FIGURES_BYTES_MAX)
    try:
        writer.write(json.dumps({"command": "metrics"}).encode() + b"\n")
        said: Order = json.loads(await reader.readline())
    finally:
        writer.close()
    if not said["ok"]:
        raise OSError(said["error"])
    return said["families"]


async def _nothing_else(order: Order) -> dict[str, object]:
    raise ValueError(f"the web takes no order {order.get('do')}")
