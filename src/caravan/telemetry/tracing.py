"""Spans of OpenTelemetry, where an exporter is set up; elsewhere the same trace contexts, and nothing else.

Every event carries a `traceparent`, with or without an exporter, so a trace is one from the checkout through the log to
the socket. Nothing of OpenTelemetry's SDK is loaded unless OTEL_EXPORTER_OTLP_ENDPOINT is set (0.1 s and 9 MB). Spans
hold ids, groups, routes and statuses: nothing of a person, no query, no text of an error.
"""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import AsyncGenerator, Generator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any, Literal
from uuid import UUID

if TYPE_CHECKING:
    from opentelemetry.trace import Span, SpanContext, Tracer, TracerProvider

FLUSH_SECONDS_MAX = 1.5  # of a stop; what is not out by then is lost

Kind = Literal["server", "producer", "consumer"]
Attributes = Mapping[str, str | int]

TRACEPARENT = re.compile(r"00-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})")

_tracer: Tracer | None = None


def active() -> bool:
    """Whether anybody wants spans."""
    return _tracer is not None


def use(provider: TracerProvider | None) -> None:
    """Spans go to `provider` from now on; None: nowhere."""
    global _tracer
    _tracer = provider.get_tracer("caravan") if provider else None


@asynccontextmanager
async def exporting(endpoint: str | None, service: str, build: str) -> AsyncGenerator[None]:
    """Send this process's spans to the OTLP collector at `endpoint` (HTTP), in the background; nothing without one.

    A collector that is away costs its spans, never work.
    """
    if endpoint is None:
        yield
        return
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    named = {"service.name": service, "service.namespace": "caravan", "service.version": build}
    provider = TracerProvider(resource=Resource.create(named), shutdown_on_exit=False)
    exporter = OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces")
    provider.add_span_processor(BatchSpanProcessor(exporter))
    use(provider)
    try:
        yield
    finally:
        use(None)
        await _shut_down(provider.shutdown)


async def _shut_down(shutdown: Any) -> None:
    """In a thread that nobody waits for for long: a collector that is away must not hold up the end of a process."""
    over = asyncio.Event()
    loop = asyncio.get_running_loop()

    def work() -> None:
        shutdown()
        try:
            loop.call_soon_threadsafe(over.set)
        except RuntimeError:
            pass  # the loop has ended meanwhile

    threading.Thread(target=work, name="caravan traces", daemon=True).start()
    try:
        async with asyncio.timeout(FLUSH_SECONDS_MAX):
            await over.wait()
    except TimeoutError:
        pass


# ------------------------------------------------------------------ what is traced


class Request:
    """The span of one HTTP request; its name and status are known at the end."""

    def __init__(self, parent: str | None, method: str) -> None:
        self._span = _start(method, "server", parent, {"http.request.method": method})
        self.traceparent = _told(self._span) if self._span else None

    def end(self, name: str, route: str, status: int) -> None:
        if self._span is not None:
            self._span.update_name(name)
            self._span.set_attributes({"http.route": route, "http.response.status_code": status})
            _end(self._span, failed=status >= 500 or status == 0)


def said(event_type: str, trace: str) -> str:
    """The trace context that an event is to carry: a child of what made somebody say it."""
    span = _start(f"send {event_type}", "producer", trace, {"messaging.operation.type": "send"})
    if span is None:
        return trace
    span.end()
    return _told(span)


@contextmanager
def handling(
    group: str, events: Sequence[tuple[UUID, str, str | None, str | None]]
) -> Generator[Mapping[UUID, str | None]]:
    """A group's handling of a batch of (id, type, correlation id, trace context); yields the contexts to go on with.

    Each event has a span in its own trace, as long as the batch; the batch has one in a trace of its own, linked.
    """
    if _tracer is None or not events:
        yield {event_id: trace for event_id, _type, _correlation, trace in events}
        return
    batch: Span | None = None
    if len(events) > 1:
        about = {"messaging.consumer.group.name": group, "messaging.batch.message_count": len(events)}
        batch = _start(f"process {group}", "consumer", None, about, links=[trace for *_event, trace in events])
    spans = [_handled(group, event, batch) for event in events]
    try:
        yield {event[0]: _told(span) for event, span in zip(events, spans, strict=True)}
    except BaseException:
        for span in (*spans, batch):
            _end(span, failed=True)
        raise
    for span in (*spans, batch):
        _end(span, failed=False)


def _handled(group: str, event: tuple[UUID, str, str | None, str | None], batch: Span | None) -> Span:
    event_id, event_type, correlation_id, trace = event
    about: dict[str, str | int] = {
        "messaging.operation.type": "process",
        "messaging.consumer.group.name": group,
        "messaging.message.id": str(event_id),
    }
    if correlation_id:
        about["messaging.message.conversation_id"] = correlation_id
    links = [_told(batch)] if batch else []
    span = _start(f"process {event_type}", "consumer", trace, about, links=links)
    assert span is not None
    return span


def pushed(event_type: str, event_id: str, trace: str, sockets: int) -> None:
    """A frame is on its way to `sockets` WebSockets."""
    about = {"messaging.operation.type": "send", "messaging.message.id": event_id, "caravan.sockets": sockets}
    _end(_start(f"push {event_type}", "producer", trace, about), failed=False)


# ------------------------------------------------------------------ OpenTelemetry's words


def _start(
    name: str, kind: Kind, parent: str | None, attributes: Attributes, *, links: Iterable[str | None] = ()
) -> Span | None:
    if _tracer is None:
        return None
    from opentelemetry import trace
    from opentelemetry.context import Context

    context = Context()
    if before := _read(parent):
        context = trace.set_span_in_context(trace.NonRecordingSpan(before), context)
    kinds = {"server": trace.SpanKind.SERVER, "producer": trace.SpanKind.PRODUCER, "consumer": trace.SpanKind.CONSUMER}
    linked = [trace.Link(other) for link in links if (other := _read(link))]
    return _tracer.start_span(name, context, kinds[kind], dict(attributes), linked)


def _end(span: Span | None, *, failed: bool) -> None:
    if span is None:
        return
    if failed:
        from opentelemetry.trace import Status, StatusCode

        span.set_status(Status(StatusCode.ERROR))
    span.end()


def _read(traceparent: str | None) -> SpanContext | None:
    """None for what is no trace context: a record that others wrote may hold anything."""
    from opentelemetry.trace import SpanContext, TraceFlags

    given = TRACEPARENT.fullmatch(traceparent or "")
    if given is None:
        return None
    trace_id, span_id, flags = (int(part, 16) for part in given.groups())
    return SpanContext(trace_id, span_id, is_remote=True, trace_flags=TraceFlags(flags))


def _told(span: Span) -> str:
    context = span.get_span_context()
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
