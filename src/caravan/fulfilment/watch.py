"""Somebody watching: looks every few seconds, tells a webhook when an alert begins or ends, a monitor that it lives.

Runs beside the reconciler, in tasks of its own: a long repair delays no alert, and a webhook that doesn't answer delays
nothing at all. The dead-man's signal goes out every minute for as long as watching works; that it stops is the message,
and whoever is outside misses it, whatever it is that died.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import threading
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import msgspec
import structlog

from caravan.db import Database, Tx
from caravan.errors import is_transient
from caravan.eventlog.consumer import describe
from caravan.fulfilment import alerts
from caravan.fulfilment.alerts import Alert
from caravan.ids import new_id
from caravan.settings import Settings

SOURCE = "reconciler"
LOOK_SECONDS = 5.0
SEND_SECONDS = 1.0  # between looks for messages that are due
HEARTBEAT_SECONDS = 60.0
PURGE_SECONDS = 3600.0
ANSWER_SECONDS_MAX = 5.0
NOTICES_AT_ONCE = 10
RETRY_SECONDS, RETRY_SECONDS_MAX = 5, 3600  # doubled from one attempt to the next
NOTICE_AGE_MAX = timedelta(days=3)
# While watching works: a look has succeeded lately, the reconciler turns, and what was to be told could be told.
LOOKED_SECONDS_MAX = 60.0
TURNED_SECONDS_MAX = 300.0
UNTOLD_AGE_MAX = timedelta(minutes=10)

log: structlog.stdlib.BoundLogger = structlog.get_logger()

TRY_LOCK = "select pg_try_advisory_xact_lock(hashtextextended('alerts', 20260109))"


class Watch:
    """The same face as every long-running part: config, `run` until told to stop, one turn of each task."""

    def __init__(self, db: Database, settings: Settings) -> None:
        self.db = db
        self.unclaimed_after = timedelta(minutes=settings.unclaimed_minutes)
        self.build = settings.build
        self.webhook_url = settings.alert_webhook_url
        self.webhook_key = _key(settings.alert_webhook_secret)
        self.heartbeat_url = settings.heartbeat_url
        self._looked_at: float | None = None
        self._reconciling = False
        self._purge_at = 0.0

    async def run(self, stop: asyncio.Event) -> None:
        """Until `stop`; trouble with the database or the network is waited out."""
        parts = [self._forever(stop, LOOK_SECONDS, self.look)]
        if self.webhook_url:
            parts.append(self._forever(stop, SEND_SECONDS, self.send))
        if self.heartbeat_url:
            parts.append(self._beat_forever(stop))
        async with asyncio.TaskGroup() as tasks:
            for part in parts:
                tasks.create_task(part)

    async def _beat_forever(self, stop: asyncio.Event) -> None:
        """From the first look on: a restart must not cost a minute of silence."""
        while self._looked_at is None and not stop.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), 0.1)
        await self._forever(stop, HEARTBEAT_SECONDS, self.beat)

    async def _forever(self, stop: asyncio.Event, seconds: float, turn: Callable[[], Awaitable[object]]) -> None:
        while not stop.is_set():
            working = asyncio.ensure_future(turn())
            stopped = asyncio.create_task(stop.wait())
            try:
                await asyncio.wait({working, stopped}, return_when=asyncio.FIRST_COMPLETED)
                if not working.done():
                    working.cancel()
                await working
            except asyncio.CancelledError:
                if not stop.is_set():
                    raise
            except Exception as error:
                told = log.warning if is_transient(error) else log.error
                told("[Watch] not done, trying again", error=describe(error))
            finally:
                working.cancel()
                stopped.cancel()
            with suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), seconds)

    # -------------------------------------------------------------- looking

    async def look(self) -> list[Alert]:
        """Write down what is so; the alerts that began or ended. Where several watch, one of them does it."""
        async with self.db.transaction(SOURCE) as tx:
            if not await tx.value(TRY_LOCK):
                self._looked()
                return []
            found, looked = await alerts.look(tx, self.unclaimed_after)
            raised, ended = await alerts.record(tx, found)
            if self.webhook_url:
                await _note(tx, raised, ended, self.build)
            if self._clock() >= self._purge_at:
                await alerts.purge(tx)
        self._purge_at = self._clock() + PURGE_SECONDS if self._clock() >= self._purge_at else self._purge_at
        self._reconciling = any(
            worker.service == SOURCE and worker.alive and worker.progress_age_seconds < TURNED_SECONDS_MAX
            for worker in looked.workers
        )
        self._looked()
        for alert in raised:
            log.warning(
                "alert begins", alert=alert.name, subject=alert.subject, severity=alert.severity, said=alert.said
            )
        for alert in ended:
            log.info("alert ends", alert=alert.name, subject=alert.subject)
        return [*raised, *ended]

    def _looked(self) -> None:
        self._looked_at = self._clock()

    def _clock(self) -> float:
        return asyncio.get_running_loop().time()

    # -------------------------------------------------------------- telling

    async def send(self) -> int:
        """Messages that are due, each signed and posted; how many arrived. What fails is tried again, later."""
        assert self.webhook_url is not None
        async with self.db.transaction(SOURCE) as tx:
            due = await _claim(tx)
        sent = 0
        for notice in due:
            error = await self._post(notice)
            sent += error is None
            async with self.db.transaction(SOURCE) as tx:
                await tx.execute(RESOLVE_NOTICE, {"id": notice.id, "now": tx.now, "error": error})
            if error is not None:
                log.warning("alert not told, trying again", attempt=notice.attempts, error=error)
        return sent

    async def _post(self, notice: Notice) -> str | None:
        """None where it arrived, else what went wrong."""
        assert self.webhook_url is not None
        body = msgspec.json.encode(notice.body)
        return await call(self.webhook_url, body, sign(self.webhook_key, f"msg_{notice.id}", notice.now, body))

    # -------------------------------------------------------------- living

    async def beat(self) -> str | None:
        """The dead-man's signal; or the reason why it is withheld."""
        assert self.heartbeat_url is not None
        why = await self.why_not_well()
        if why is None:
            why = await call(self.heartbeat_url, None, {})
        if why is not None:
            log.warning("[Watch] the dead-man's signal did not go out", reason=why)
        return why

    async def why_not_well(self) -> str | None:
        """None while watching works."""
        if self._looked_at is None or self._clock() - self._looked_at > LOOKED_SECONDS_MAX:
            return "the alerts could not be looked at"
        if not self._reconciling:
            return "the reconciler does not turn"
        async with self.db.transaction(SOURCE, read_only=True) as tx:
            untold = await tx.value(COUNT_UNTOLD, {"before": tx.now - UNTOLD_AGE_MAX, "since": tx.now - NOTICE_AGE_MAX})
        return f"{untold} alert messages could not be delivered" if untold and self.webhook_url else None


# ------------------------------------------------------------------ messages


@dataclass(frozen=True, slots=True)
class Notice:
    """A message whose turn it is; `attempts` counts this one."""

    id: UUID
    body: dict[str, Any]
    attempts: int
    now: datetime


INSERT_NOTICES = """
insert into alert_notices (id, alert_id, body, created_at, due_at)
select id, alert_id, body::jsonb, %(now)s, %(now)s
from unnest(%(ids)b::uuid[], %(alert_ids)b::uuid[], %(bodies)b::text[]) as n(id, alert_id, body)
"""


async def _note(tx: Tx, raised: Sequence[Alert], ended: Sequence[Alert], build: str) -> None:
    """Messages, in the transaction that they tell of. A retried one says the same."""
    told = [("alert.began", alert) for alert in raised] + [("alert.ended", alert) for alert in ended]
    if told:
        named = {
            "ids": [new_id() for _ in told],
            "alert_ids": [alert.id for _type, alert in told],
            "bodies": [msgspec.json.encode(_body(kind, alert, tx.now, build)).decode() for kind, alert in told],
        }
        await tx.execute(INSERT_NOTICES, {**named, "now": tx.now})


def _body(kind: str, alert: Alert, now: datetime, build: str) -> dict[str, Any]:
    over = " (over)" if kind == "alert.ended" else ""
    return {
        "type": kind,
        "timestamp": now,
        "text": f"Caravan, {alert.severity}{over}: {alert.said}",  # what chat programs show of a posted document
        "data": {
            "id": alert.id,
            "name": alert.name,
            "subject": alert.subject,
            "severity": alert.severity,
            "said": alert.said,
            "facts": alert.facts,
            "beganAt": alert.began_at,
            "endedAt": alert.ended_at,
            "build": build,
        },
    }


# Take what is due; whoever fails to tell it finds it due again after a pause that doubles.
CLAIM_NOTICES = """
update alert_notices n set attempts = n.attempts + 1,
  due_at = %(now)s + make_interval(secs => least(%(most)s::int, %(pause)s::int * 2 ^ least(n.attempts, 20)))
where n.id in (select d.id from alert_notices d
               where d.sent_at is null and d.due_at <= %(now)s and d.created_at > %(since)s
               order by d.id limit %(limit)s for update skip locked)
returning n.id, n.body, n.attempts, %(now)s as now
"""


async def _claim(tx: Tx) -> list[Notice]:
    named = {"now": tx.now, "since": tx.now - NOTICE_AGE_MAX, "limit": NOTICES_AT_ONCE}
    pauses = {"pause": RETRY_SECONDS, "most": RETRY_SECONDS_MAX}
    return sorted(await tx.all(CLAIM_NOTICES, named | pauses, into=Notice), key=lambda notice: notice.id)


RESOLVE_NOTICE = """
update alert_notices set last_error = %(error)s,
  sent_at = case when %(error)s::text is null then %(now)s::timestamptz end
where id = %(id)s
"""

COUNT_UNTOLD = """
select count(*) from alert_notices where sent_at is null and created_at < %(before)s and created_at > %(since)s
"""


# ------------------------------------------------------------------ the network


def _key(secret: str | None) -> bytes:
    return base64.b64decode(secret.removeprefix("whsec_")) if secret else b""


def sign(key: bytes, message_id: str, at: datetime, body: bytes) -> dict[str, str]:
    """The headers of Standard Webhooks."""
    timestamp = str(int(at.timestamp()))
    digest = hmac.digest(key, f"{message_id}.{timestamp}.".encode() + body, hashlib.sha256)
    return {
        "content-type": "application/json",
        "webhook-id": message_id,
        "webhook-timestamp": timestamp,
        "webhook-signature": f"v1,{base64.b64encode(digest).decode()}",
    }


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A receiver that has moved is a receiver that the operator must hear of."""

    def redirect_request(self, *_given: Any, **_named: Any) -> None:
        return None


async def call(url: str, body: bytes | None, headers: Mapping[str, str]) -> str | None:
    """POST `body`, or GET without one; None for a 2xx in time, else what went wrong, without the address.

    In a thread that nobody waits for longer than the limit: neither names that don't resolve nor a server that says
    nothing holds anything up, not even the end of this process.
    """
    loop = asyncio.get_running_loop()
    answered: asyncio.Future[str | None] = loop.create_future()

    def tell(outcome: str | None) -> None:
        if not answered.done():
            answered.set_result(outcome)

    def work() -> None:
        outcome = _call(url, body, headers)
        with suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(tell, outcome)

    threading.Thread(target=work, name="caravan alert", daemon=True).start()
    try:
        async with asyncio.timeout(ANSWER_SECONDS_MAX):
            return await answered
    except TimeoutError:
        return f"no answer within {ANSWER_SECONDS_MAX:.0f} s"


def _call(url: str, body: bytes | None, headers: Mapping[str, str]) -> str | None:
    try:
        sent = {"user-agent": "caravan", **headers}
        request = urllib.request.Request(url, data=body, headers=sent)  # noqa: S310 - settings judged the scheme
        opener = urllib.request.build_opener(_NoRedirects)
        with opener.open(request, timeout=ANSWER_SECONDS_MAX) as answer:
            answer.read(1000)
    except urllib.error.HTTPError as error:
        error.close()
        return f"the receiver answered {error.code}"
    except urllib.error.URLError as error:
        return f"the receiver is not reached ({type(error.reason).__name__})"
    except (OSError, ValueError) as error:
        return f"the receiver is not reached ({type(error).__name__})"
    return None
