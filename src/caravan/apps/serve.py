"""`caravan serve NAME`: one service in this process, until SIGTERM. It never starts a database."""

from __future__ import annotations

import asyncio
import signal
import sys

import psycopg
import structlog
import uvloop

from caravan import telemetry
from caravan.apps.bootstrap import Platform, open_platform
from caravan.apps.line import leaves
from caravan.apps.process import calm_collector
from caravan.apps.services import SERVICES
from caravan.db.migrate import SchemaProblem
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
    except (BadSettings, SchemaProblem, DomainError, psycopg.OperationalError, OSError) as error:
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
    async with exporting(settings.otlp_endpoint, name, settings.build), open_platform(settings) as platform:
        if SERVICES[name].routers:
            from caravan.apps.web import serve_web

            calm_collector()
            await serve_web(platform, [name], stop, process=name)
        else:
            await _serve_background(platform, name, stop)


async def _serve_background(platform: Platform, name: str, stop: asyncio.Event) -> None:
    """A worker; with CARAVAN_PORT it answers /healthz, /readyz and /metrics too."""
    from caravan.apps.worker import prepare_log, run_workers

    calm_collector()
    await prepare_log(platform, [name])
    async with asyncio.TaskGroup() as parts:
        parts.create_task(run_workers(platform, [name], stop))
        if "port" in platform.settings.model_fields_set:
            from caravan.apps.web import serve_health

            parts.create_task(serve_health(platform, name, stop))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
