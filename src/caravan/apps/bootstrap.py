"""From settings to running parts: the only place that makes adapters."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from hashlib import sha256

import structlog

from caravan.apps.subscriptions import subscribe
from caravan.db import Database
from caravan.db.migrate import check_schema
from caravan.db.reach import wait_until_reachable
from caravan.db.redis import Redis
from caravan.db.wake import Wake
from caravan.eventlog.carrier import register_relay
from caravan.eventlog.rebase import rebase_if_moved
from caravan.eventlog.subscription import Subscription, register_groups
from caravan.settings import BadSettings, Settings
from caravan.student_views.cache import ViewCache
from caravan.web import audit

CONNECTIONS_MAX = 12

log: structlog.stdlib.BoundLogger = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Platform:
    """What every service stands on."""

    settings: Settings
    db: Database
    wake: Wake
    subscriptions: tuple[Subscription, ...]
    views: ViewCache | None = None  # where there is a Redis


@asynccontextmanager
async def open_platform(settings: Settings) -> AsyncGenerator[Platform]:
    """The database behind `settings.postgres_url`, its schema checked and the consumer groups registered."""
    if settings.postgres_url is None:
        raise BadSettings("POSTGRES_URL: there is no database to work with; set it, or use `caravan up`.")
    audit.use_build(settings.build)
    await wait_until_reachable(settings.postgres_url, "POSTGRES_URL", waiting=log.warning)
    if settings.postgres_direct_url:
        await wait_until_reachable(settings.postgres_direct_url, "CARAVAN_POSTGRES_DIRECT_URL", waiting=log.warning)
    await check_schema(settings.postgres_url)
    redis = Redis(settings.redis_url) if settings.redis_url else None
    views = ViewCache(redis) if redis else None
    subscriptions = subscribe(timedelta(hours=settings.notice_hours), views)
    wake = Wake(settings.postgres_direct_url or settings.postgres_url, redis)
    async with Database(
        settings.postgres_url,
        max_connections=CONNECTIONS_MAX,
        on_hints=wake.send,
        pooled=settings.postgres_direct_url is not None,
    ) as db:
        await rebase_if_moved(db)
        async with db.transaction() as tx:
            await register_groups(tx, subscriptions)
            if settings.kafka_broker:
                await register_relay(tx)
        if redis:
            redis.open()
        await wake.start()
        try:
            yield Platform(settings, db, wake, subscriptions, views)
        finally:
            await wake.stop()
            if redis:
                await redis.close()


def worker_name(settings: Settings, service: str, *, own_process: bool) -> str:
    """A worker's name, under which it takes its work back at once after a restart.

    Of one machine's `caravan up` there is one per data folder. Of services run one by one there may be several: they
    need their process id, or a CARAVAN_WORKER_NAME each.
    """
    if settings.worker_name:
        return f"{service}@{settings.worker_name}"
    host = socket.gethostname()
    if own_process:
        return f"{service}@{host}-{os.getpid()}"
    folder = sha256(str(settings.data_dir.absolute()).encode()).hexdigest()[:6]
    return f"{service}@{host}-{folder}"
