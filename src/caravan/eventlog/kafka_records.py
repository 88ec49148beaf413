"""Envelopes to Kafka's records and back: CloudEvents in binary mode, tolerant of the structured one. Pure."""

from __future__ import annotations

import base64
from collections.abc import Container, Mapping
from typing import Any
from uuid import NAMESPACE_URL, UUID, uuid5

import msgspec

from caravan.eventlog.codec import Envelope, Unreadable, decode_envelope
from caravan.ids import uuid_text

# Our fields' names are those of the attributes. The trace context travels under its own name, as tracers expect.
ATTRIBUTES = (
    "id",
    "source",
    "type",
    "subject",
    "time",
    "correlationid",
    "causationid",
    "partitionkey",
    "dataversion",
    "specversion",
)
HEADERS = tuple((name, f"ce_{name}") for name in ATTRIBUTES)
JSON = b"application/json"
STRUCTURED = b"application/cloudevents+json"
SHOWN_BYTES_MAX = 100_000  # of an unreadable record, in its dead letter


class Record(msgspec.Struct, frozen=True):
    """What a poll brought. `envelope` is None where the bytes are no event, then `wrong` says why; and where it is one
    that others hear."""

    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    headers: Mapping[str, bytes]
    envelope: Envelope | None = None
    wrong: str | None = None

    @property
    def others(self) -> bool:
        return self.envelope is None and self.wrong is None


def headers_of(envelope: Envelope) -> list[tuple[str, bytes]]:
    """An envelope's attributes as headers; its data is the record's value, `partitionkey` its key."""
    headers = [
        ("ce_id", uuid_text(envelope.id).encode()),
        ("ce_source", envelope.source.encode()),
        ("ce_type", envelope.type.encode()),
        ("ce_subject", envelope.subject.encode()),
        ("ce_time", msgspec.to_builtins(envelope.time).encode()),
        ("ce_partitionkey", envelope.partitionkey.encode()),
        ("ce_dataversion", b"%d" % envelope.dataversion),
        ("ce_specversion", envelope.specversion.encode()),
        ("content-type", JSON),
    ]
    if envelope.correlationid is not None:
        headers.append(("ce_correlationid", envelope.correlationid.encode()))
    if envelope.causationid is not None:
        headers.append(("ce_causationid", uuid_text(envelope.causationid).encode()))
    if envelope.traceparent:
        headers.append(("traceparent", envelope.traceparent.encode()))
    return headers


def value_of(envelope: Envelope) -> bytes:
    return msgspec.json.encode(envelope.data)


def read_record(
    topic: str,
    partition: int,
    offset: int,
    key: bytes | None,
    value: bytes | None,
    headers: list[tuple[str, bytes | None]] | None,
    others: Container[bytes | None] = (),
) -> Record:
    """Whatever stands there; never raises. `others`: types of events that are not worth opening here."""
    given = {name: content for name, content in headers or () if content is not None}
    if given.get("ce_type") in others:
        return Record(topic, partition, offset, key, value, given)
    try:
        envelope = _envelope(key, value or b"", given)
    except (Unreadable, UnicodeError, ValueError, RecursionError) as error:
        return Record(topic, partition, offset, key, value, given, wrong=str(error).replace("\x00", "")[:500])
    return Record(topic, partition, offset, key, value, given, envelope)


def _envelope(key: bytes | None, value: bytes, headers: Mapping[str, bytes]) -> Envelope:
    if b"\\u0000" in value or b"\x00" in b"".join(headers.values()):
        raise Unreadable("MALFORMED", "it holds a NUL character, which PostgreSQL's text cannot")
    if headers.get("content-type", b"").startswith(STRUCTURED):
        return decode_envelope(value)
    attributes: dict[str, Any] = {name: headers[header].decode() for name, header in HEADERS if header in headers}
    if not attributes:
        raise Unreadable("MALFORMED", "it has no ce_ headers: it is no CloudEvent")
    trace = headers.get("traceparent") or headers.get("ce_traceparent")
    attributes["traceparent"] = trace.decode() if trace else None
    attributes.setdefault("partitionkey", (key or b"").decode())
    attributes["data"] = msgspec.json.decode(value)
    return msgspec.convert(attributes, Envelope, strict=False)


def event_id_of(record: Record) -> UUID:
    """The id under which an unreadable record is parked: its own where it has one, else one made of its place."""
    try:
        return UUID(record.headers["ce_id"].decode())
    except (KeyError, ValueError):
        return uuid5(NAMESPACE_URL, f"kafka:{record.topic}/{record.partition}/{record.offset}")


def type_of(record: Record) -> str:
    """For the operator's list of dead letters."""
    return _text(record.headers.get("ce_type", b"unknown"))[:100]


def correlation_id_of(record: Record) -> str | None:
    """The payment that the record says it is of, whatever else of it can't be read."""
    return _text(record.headers.get("ce_correlationid", b""))[:200] or None


def shown(record: Record) -> str:
    """An unreadable record whole, as JSON that PostgreSQL takes: its bytes in base64."""
    value = record.value or b""
    return msgspec.json.encode(
        {
            "topic": record.topic,
            "partition": record.partition,
            "offset": record.offset,
            "headers": {_text(name.encode()): _text(content) for name, content in record.headers.items()},
            "key": base64.b64encode(record.key or b"").decode(),
            "value": base64.b64encode(value[:SHOWN_BYTES_MAX]).decode(),
            "bytes": len(value),
        }
    ).decode()


def _text(content: bytes) -> str:
    return content[:1000].decode(errors="backslashreplace").replace("\x00", "\\x00")
