"""Envelopes and Kafka's records: CloudEvents in binary mode, and whatever else may stand in a topic."""

from __future__ import annotations

import random
from datetime import UTC, datetime
from uuid import UUID

import msgspec
import pytest

from caravan.eventlog.codec import Envelope, encode_envelope
from caravan.eventlog.kafka_records import Record, event_id_of, headers_of, read_record, shown, type_of, value_of
from caravan.ids import new_id


def envelope() -> Envelope:
    return Envelope(
        id=new_id(),
        source="payment-service",
        type="PURCHASE_CONFIRMED",
        subject="s",
        time=datetime(2026, 11, 21, 9, 30, tzinfo=UTC),
        data={"paymentId": str(new_id()), "n": 3, "list": [1, None, "₹"]},
        correlationid="c",
        causationid=new_id(),
        partitionkey="student",
        traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    )


def read(headers: list[tuple[str, bytes | None]], value: bytes | None, key: bytes | None = b"student") -> Record:
    return read_record("purchase-confirmed", 3, 14, key, value, headers)


def test_an_envelope_comes_back_as_it_went() -> None:
    said = envelope()
    headers = dict(headers_of(said))
    assert headers["ce_specversion"] == b"1.0"
    assert headers["ce_time"] == b"2026-11-21T09:30:00Z"
    assert headers["traceparent"] == (said.traceparent or "").encode()
    assert headers["content-type"] == b"application/json"
    assert msgspec.json.decode(value_of(said)) == said.data
    assert read([*headers_of(said)], value_of(said)).envelope == said


def test_the_structured_mode_is_read_too() -> None:
    said = envelope()
    assert read([("content-type", b"application/cloudevents+json")], encode_envelope(said).encode()).envelope == said


@pytest.mark.parametrize("lacking", ["ce_id", "ce_type", "ce_source", "ce_time", "ce_subject"])
def test_what_lacks_an_attribute_is_no_event(lacking: str) -> None:
    said = envelope()
    found = read([(name, content) for name, content in headers_of(said) if name != lacking], value_of(said))
    assert found.envelope is None
    assert lacking.removeprefix("ce_") in (found.wrong or "")


@pytest.mark.parametrize(
    "value", [None, b"", b"\xff\xfe", b"{", b"[" * 100_000, b"3", b'{"a": "\\u0000"}', b'{"a": "\\ud800"}']
)
def test_bytes_that_are_no_event_are_kept_whole(value: bytes | None) -> None:
    said = envelope()
    found = read([*headers_of(said)], value)
    assert found.envelope is None
    assert found.wrong
    assert event_id_of(found) == said.id
    assert type_of(found) == "PURCHASE_CONFIRMED"
    assert "\\u0000" not in shown(found)
    assert msgspec.json.decode(shown(found))["bytes"] == len(value or b"")


def test_what_only_others_hear_is_not_opened() -> None:
    said = envelope()
    for others, opened in ((frozenset({b"PURCHASE_CONFIRMED"}), False), (frozenset({b"PURCHASE_CREATED"}), True)):
        found = read_record("purchase-confirmed", 3, 14, b"student", value_of(said), [*headers_of(said)], others)
        assert found.others is not opened
        assert found.envelope == (said if opened else None)
        assert found.wrong is None
    unknown = read_record("purchase-confirmed", 3, 14, b"student", b"{}", [], frozenset({b"PURCHASE_CONFIRMED"}))
    assert unknown.wrong
    assert not unknown.others


def test_a_record_without_an_id_has_the_one_of_its_place() -> None:
    one, again, other = read([], b"x"), read([], b"y"), read_record("purchase-confirmed", 3, 15, None, b"x", None)
    assert event_id_of(one) == event_id_of(again) != event_id_of(other)
    assert isinstance(event_id_of(one), UUID)


def test_any_bytes_at_all_are_read() -> None:
    rng, said = random.Random(5), envelope()
    for _ in range(500):
        headers: list[tuple[str, bytes | None]] = [
            (name, rng.choice([content, rng.randbytes(rng.randint(0, 20)), None])) for name, content in headers_of(said)
        ]
        found = read(headers, rng.choice([value_of(said), rng.randbytes(30)]), rng.choice([None, b"k", b"\xff"]))
        assert (found.envelope is None) == (found.wrong is not None)
        assert "\x00" not in (found.wrong or "") + type_of(found)
        msgspec.json.decode(shown(found))
