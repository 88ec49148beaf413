"""The workers: a consumer per subscription and the reconciler, as tasks of one process."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from types import TracebackType

import structlog

from caravan.apps.bootstrap import Platform, open_platform, worker_name
from caravan.apps.line import Line, Order
from caravan.apps.metrics import Metrics
from caravan.apps.services import RELAY
from caravan.eventlog.carrier import RELAY_GROUP, forget_relay
from caravan.eventlog.consumer import Consumer
from caravan.eventlog.member import Member
from caravan.eventlog.workers import Worker
from caravan.fulfilment.reconciler import Reconciler
from caravan.fulfilment.watch import Watch
from caravan.settings import BadSettings, Settings
from caravan.telemetry.tracing import exporting

KAFKA_LOOK_SECONDS = 2.0  # at the start; a broker that shows itself later is fine

log: structlog.stdlib.BoundLogger = structlog.get_logger()


class Workers:
    """Services that run in the background of this process; each can be stopped and started alone.

    Use as a context: a service that fails ends them all, and the process with it.
    """

    def __init__(self, platform: Platform, *, own_process: bool) -> None:
        self._platform = platform
        self._own_process = own_process
        self._running: dict[str, tuple[asyncio.Event, list[asyncio.Task[None]]]] = {}
        self._tasks = asyncio.TaskGroup()

    async def __aenter__(self) -> Workers:
        await self._tasks.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for stop, _tasks in self._running.values():
            stop.set()
        await self._tasks.__aexit__(kind, error, trace)

    def start(self, service: str) -> None:
        """Begin the service's loops; nothing where they run."""
        if service in self._running:
            return
        stop = asyncio.Event()
        if service == "reconciler":
            db, settings = self._platform.db, self._platform.settings
            loops = [Reconciler(db, settings).run(stop), Watch(db, settings).run(stop)]
        else:
            loops = [member.run(stop) for member in self._members(service)]
        tasks = [self._tasks.create_task(loop, name=service) for loop in loops]
        self._running[service] = stop, tasks

    async def stop(self, service: str) -> None:
        """End the service's loops after the batch they are in; nothing where they don't run."""
        stop, tasks = self._running.pop(service, (asyncio.Event(), []))
        stop.set()
        if tasks:
            await asyncio.wait(tasks)

    def _members(self, service: str) -> list[Member]:
        """Of the service's groups, on the log that this installation has."""
        platform, settings = self._platform, self._platform.settings
        if service == RELAY:
            from caravan.eventlog.kafka_client import Kafka
            from caravan.eventlog.relay import Relay

            return [Relay(platform.db, self._worker(service, RELAY_GROUP), Kafka(settings), wake=platform.wake)]
        heard = [each for each in platform.subscriptions if each.service == service]
        workers = [(each, self._worker(service, each.group)) for each in heard]
        if settings.kafka_broker is None:
            return [Consumer(platform.db, each, worker, wake=platform.wake) for each, worker in workers]
        from caravan.eventlog.kafka_client import Kafka
        from caravan.eventlog.kafka_log import KafkaConsumer

        kafka = Kafka(settings)
        return [KafkaConsumer(platform.db, each, worker, kafka, wake=platform.wake) for each, worker in workers]

    def _worker(self, service: str, group: str) -> Worker:
        settings = self._platform.settings
        name = worker_name(settings, service, own_process=self._own_process)
        return Worker(service=service, group=group, build=settings.build, name=name)


async def prepare_log(platform: Platform, services: Collection[str]) -> None:
    """With Kafka: make its topics or check them. A broker that does not answer is waited for by the workers themselves.

    Raises BadSettings for topics that contradict the settings, and for a relay without Kafka.
    """
    if platform.settings.kafka_broker is None:
        if RELAY in services:
            raise BadSettings("KAFKA_BROKER: is not set, so the event log lives in PostgreSQL and needs no relay.")
        async with platform.db.transaction() as tx:
            await forget_relay(tx)
        return
    from caravan.eventlog.kafka_client import Kafka, KafkaUnavailable

    try:
        await asyncio.to_thread(Kafka(platform.settings).ensure_topics, KAFKA_LOOK_SECONDS)
    except KafkaUnavailable as error:
        log.warning(f"{error}; the workers wait for it")


async def run_workers(platform: Platform, services: Collection[str], stop: asyncio.Event) -> None:
    """Run `services` until `stop`; one that fails ends the process."""
    async with Workers(platform, own_process=True) as workers:
        for service in services:
            workers.start(service)
        await stop.wait()


async def run_child(line: Line, settings: Settings, order: Order) -> None:
    """The workers of `caravan up`, and before them the demo's data."""
    async with exporting(settings.otlp_endpoint, "workers", settings.build), open_platform(settings) as platform:
        if settings.demo:
            from caravan.apps.demo_data import ensure_demo

            await ensure_demo(platform.db, settings, order["url"])
        await prepare_log(platform, order["services"])
        figures = Metrics(platform.db, "workers", settings.build)
        async with Workers(platform, own_process=False) as workers:

            async def do(asked: Order) -> dict[str, object]:
                if asked["do"] == "metrics":
                    return {"families": [family for family in figures.own() if family["samples"]]}
                if asked["do"] == "start":
                    workers.start(asked["name"])
                elif asked["do"] == "stop":
                    await workers.stop(asked["name"])
                else:
                    raise ValueError(f"the workers take no order {asked['do']}")
                return {}

            for service in order["services"]:
                if service not in order["off"]:
                    workers.start(service)
            line.answer(order)
            listening = asyncio.create_task(line.listen(do))
            await line.stop.wait()
            listening.cancel()
