"""One purchase is one trace: from the family's request through every group's handling to the frame on the socket."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import structlog
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from structlog.testing import capture_logs

from caravan.db import Database
from caravan.db.wake import Wake
from caravan.payments import routes
from caravan.realtime.access import Visitor
from caravan.realtime.gateway import Gateway
from caravan.telemetry import tracing
from caravan.web.auth import Role
from tests import builders
from tests.clients import an_account, bearer, client_of, make_app
from tests.shop import SETTINGS, Shop, open_shop

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = "00f067aa0ba902b7"
WALK = ["PURCHASE_CONFIRMED", "PURCHASE_CREATED", "TRAINER_ALLOCATED", "SESSIONS_SCHEDULED"]


@pytest.fixture
def spans() -> Iterator[InMemorySpanExporter]:
    provider, exporter = TracerProvider(shutdown_on_exit=False), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracing.use(provider)
    yield exporter
    tracing.use(None)
    provider.shutdown()


@pytest.fixture
async def shop(db: Database) -> Shop:
    return await open_shop(db)


async def confirm(shop: Shop, traceparent: str) -> None:
    """The family's browser pays, over HTTP."""
    payment = await shop.buy()
    actor = await an_account(shop.db, "asha@example.com", Role.ADMIN)
    async with client_of(make_app(shop.db, routes.router, settings=SETTINGS)) as client:
        headers = await bearer(shop.db, actor) | {"traceparent": traceparent}
        answer = await client.post(f"/api/v1/payments/{payment}/confirm", json={}, headers=headers)
    assert answer.status_code == 200, answer.text


async def listen(shop: Shop, frames: int) -> None:
    """A socket that hears the student's whole feed."""
    gateway = Gateway(shop.db, Wake(shop.db.url))
    socket = gateway.join(Visitor(b"token", {shop.student: 0}))
    stirred = asyncio.Event()
    socket.stirred = stirred.set
    gateway.resume(socket, {shop.student: 0})
    stop = asyncio.Event()
    running = asyncio.create_task(gateway.run(stop))
    async with asyncio.timeout(20):
        while gateway.frames_sent < frames:
            await stirred.wait()
            stirred.clear()
    stop.set()
    await running


def span_id(span: ReadableSpan) -> int:
    assert span.context is not None
    return span.context.span_id


async def test_a_purchase_is_one_trace_from_the_request_to_the_frame(shop: Shop, spans: InMemorySpanExporter) -> None:
    await confirm(shop, f"00-{TRACE}-{PARENT}-01")
    await shop.work()
    await listen(shop, frames=5)

    finished = spans.get_finished_spans()
    assert {f"{span.context.trace_id:032x}" for span in finished if span.context} == {TRACE}
    names = [span.name for span in finished]
    assert "POST /api/v1/payments/{payment_id}/confirm" in names
    for event in WALK:
        assert names.count(f"send {event}") == 1
        assert names.count(f"push {event}") == 1
    for event in WALK[:3]:
        assert f"process {event}" in names

    # Each span hangs on the one before it; the first on what the browser sent.
    by_id = {span_id(span): span for span in finished}
    last: Any = next(span for span in finished if span.name == "push SESSIONS_SCHEDULED")
    way: list[str] = []
    parent: Any = None
    while last is not None:
        way.append(last.name)
        parent = last.parent
        last = by_id.get(parent.span_id)
    assert parent.span_id == int(PARENT, 16)
    assert list(reversed(way)) == [
        "POST /api/v1/payments/{payment_id}/confirm",
        "send PURCHASE_CONFIRMED",
        "process PURCHASE_CONFIRMED",
        "send PURCHASE_CREATED",
        "process PURCHASE_CREATED",
        "send TRAINER_ALLOCATED",
        "process TRAINER_ALLOCATED",
        "send SESSIONS_SCHEDULED",
        "push SESSIONS_SCHEDULED",
    ]


async def test_a_batch_has_a_span_of_its_own_linked_with_each_events(shop: Shop, spans: InMemorySpanExporter) -> None:
    students = [shop.student]
    async with shop.db.transaction() as tx:
        students += [await builders.a_student(tx) for _ in range(2)]
    for student in students:
        await shop.bought(student=student)
    spans.clear()
    await shop.work("purchase-worker")
    finished = spans.get_finished_spans()
    [batch] = [span for span in finished if span.name == "process purchase-creation-workers"]
    each = [span for span in finished if span.name == "process PURCHASE_CONFIRMED"]
    assert len(each) == 3
    assert batch.attributes is not None
    assert batch.attributes["messaging.batch.message_count"] == 3
    assert all([link.context.span_id for link in span.links] == [span_id(batch)] for span in each)


async def test_nothing_of_a_person_is_in_a_span(shop: Shop, spans: InMemorySpanExporter) -> None:
    await confirm(shop, f"00-{TRACE}-{PARENT}-01")
    await shop.work()
    told = "".join(span.to_json() for span in spans.get_finished_spans())
    for secret in ("asha", "Asha", "28.6139", "77.209", "Bearer"):
        assert secret not in told


async def test_every_line_about_a_payment_names_it(shop: Shop) -> None:
    """The words that the guides search for, each with the payment: alone by its id, in a batch among the others."""
    with capture_logs(processors=[structlog.contextvars.merge_contextvars]) as lines:
        first = await shop.bought()
        await shop.work()
        async with shop.db.transaction() as tx:
            student = await builders.a_student(tx)
        batch = [await shop.bought(slot="7:00 AM"), await shop.bought(student=student, slot="8:00 AM")]
        await shop.work()

    def naming(words: str) -> list[str]:
        named = [line.get("correlation_id", line.get("correlation_ids")) for line in lines if words in line["event"]]
        assert None not in named, words
        return named

    for words in (
        "[PurchaseWorker] Processing PURCHASE_CONFIRMED event",
        "Purchase created successfully",
        "PURCHASE_CREATED event emitted",
        "Allocation verified in database",
        "Sessions created successfully",
    ):
        assert naming(words)[0] == str(first)
        assert {one for text in naming(words)[1:] for one in text.split()} == {str(payment) for payment in batch}


async def test_without_an_exporter_the_trace_is_the_same(shop: Shop) -> None:
    await confirm(shop, f"00-{TRACE}-{PARENT}-01")
    await shop.work()
    rows = await shop.rows("select traceparent from outbox where correlation_id is not null")
    assert {row["traceparent"].split("-")[1] for row in rows} == {TRACE}


@pytest.mark.usefixtures("spans")
async def test_a_trace_context_that_is_none_harms_nobody(shop: Shop) -> None:
    await confirm(shop, "00-hunter2-x")
    await shop.run("update outbox set traceparent = 'nonsense'")
    await shop.work()
    assert await shop.rows("select * from undelivered") == []


async def test_spans_go_out_over_otlp_and_a_collector_that_is_away_holds_nothing_up() -> None:
    heard: list[bytes] = []

    async def collect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length"))
        heard.append(head.split(b"\r\n")[0] + await reader.readexactly(int(length.split(b":")[1])))
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(collect, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with tracing.exporting(f"http://127.0.0.1:{port}", "purchase-worker", "b1"):
        assert tracing.active()
        tracing.said("PURCHASE_CREATED", f"00-{TRACE}-{PARENT}-01")
    assert not tracing.active()
    assert heard[0].startswith(b"POST /v1/traces HTTP/1.1")
    assert b"send PURCHASE_CREATED" in heard[0]
    assert b"purchase-worker" in heard[0]
    server.close()

    started = asyncio.get_running_loop().time()
    async with tracing.exporting("http://127.0.0.1:1", "purchase-worker", "b1"):
        tracing.said("PURCHASE_CREATED", f"00-{TRACE}-{PARENT}-01")
    assert asyncio.get_running_loop().time() - started < 3
