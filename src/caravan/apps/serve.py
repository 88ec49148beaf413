"""`caravan serve NAME`: one service in this process, until SIGTERM. It never starts a database."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from contextlib import ExitStack

import psycopg
import structlog
import uvloop

from caravan import telemetry
from caravan.apps.bootstrap import Platform, open_platform
from caravan.apps.line import leaves
from caravan.apps.port import PortRefused, address, bind
from caravan.apps.process import calm_collector, ended_if_frozen
from caravan.apps.services import SERVICES
from caravan.db.migrate import SchemaProblem
from caravan.db.reach import where
from caravan.errors import DomainError
from caravan.eventlog.member import Hopeless
from caravan.eventlog.workers import Superseded
from caravan.settings import BadSettings, Settings
from caravan.telemetry.tracing import exporting

log: structlog.stdlib.BoundLogger = structlog.get_logger()


def serve(settings: Settings, name: str) -> int:
    """The exit code: 0 after a clean stop, 1 with one line where it cannot start or a part of it failed."""
    telemetry.configure_logging(json=settings.log_json)
    try:
        uvloop.run(_serve(settings, name))
    except (BadSettings, PortRefused, SchemaProblem, DomainError, psycopg.OperationalError, OSError) as error:
        print(f"caravan: {name} cannot start: {_first_line(error)}", file=sys.stderr)  # noqa: T201 - its one line
        return 1
    except Exception as error:
        for inner in leaves(error):
            # Topics that were changed while we ran, a name that is taken over, a watchdog: one line says it all.
            known = isinstance(inner, BadSettings | Superseded | Hopeless)
            log.error(f"{name} ends: {type(inner).__name__}: {inner}", exc_info=None if known else inner)
        return 1
    return 0


async def _serve(settings: Settings, name: str) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    web = bool(SERVICES[name].routers)
    with ExitStack() as ports:
        answers = web or "port" in settings.model_fields_set
        sockets = [ports.enter_context(bind(settings.host, settings.port))] if answers else []
        async with (
            ended_if_frozen(),
            exporting(settings.otlp_endpoint, name, settings.build),
            open_platform(settings) as platform,
        ):
            await (_serve_web if web else _serve_background)(platform, name, stop, sockets)
    log.info("Service stopped", service=name)


async def _serve_web(platform: Platform, name: str, stop: asyncio.Event, sockets: list[socket.socket]) -> None:
    from caravan.apps.web import serve_web

    calm_collector()
    listening = asyncio.Event()
    async with asyncio.TaskGroup() as parts:
        parts.create_task(serve_web(platform, [name], stop, listening=listening, sockets=sockets, process=name))
        await listening.wait()
        _tell_ready(platform.settings, name, sockets)


async def _serve_background(platform: Platform, name: str, stop: asyncio.Event, sockets: list[socket.socket]) -> None:
    """A worker; with CARAVAN_PORT it answers /healthz, /readyz and /metrics too."""
    from caravan.apps.worker import prepare_log, run_workers

    calm_collector()
    await prepare_log(platform, [name])
    listening = asyncio.Event()
    async with asyncio.TaskGroup() as parts:
        parts.create_task(run_workers(platform, [name], stop))
        if sockets:
            from caravan.apps.web import serve_health

            parts.create_task(serve_health(platform, name, stop, listening=listening, sockets=sockets))
            await listening.wait()
        _tell_ready(platform.settings, name, sockets)


def _tell_ready(settings: Settings, name: str, sockets: list[socket.socket]) -> None:
    database = where(settings.postgres_url or "")
    told = {"address": address(settings.host, settings.port)} if sockets else {}
    log.info("Service is ready", service=name, **told, database=database)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
