"""A million strange inputs for what reads the outside world: only the documented refusals ever come out.

A `Parser` makes an input from chance and reads it; `read` raises Wrong where an answer is not what it must be. Inputs
are mostly almost right (a good one, bent in a few places), because pure noise stops at the first character.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import io
import json
import random
import re
import string
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urljoin, urlsplit
from uuid import UUID

import typer
from typer.exceptions import TyperException

from caravan.calendar import InvalidSlot, format_slot, parse_slot
from caravan.cli.app import app as cli
from caravan.eventlog.codec import Envelope, Unreadable, decode_envelope, encode_envelope
from caravan.events import BY_TYPE
from caravan.ids import parse_uuid
from caravan.payments.providers import KNOWN_TYPES, ProviderEvent, SandboxProvider, SignatureInvalid, WebhookMalformed
from caravan.realtime.protocol import FrameRefused, parse_resume
from caravan.settings import BadSettings, load_settings
from caravan.student_views.cursor import Cursor, CursorInvalid
from caravan.telemetry.tracing import TRACEPARENT
from caravan.web.auth import InvalidEmail, normalise_email
from caravan.web.idempotency import KEY
from caravan.web.pages import safe_next

Dice = random.Random


class Wrong(Exception):
    """What was read is not what it must be."""


@dataclass(frozen=True, slots=True)
class Parser:
    """`share`: how many of a hundred inputs it gets; `read` is True where the input was taken as good."""

    name: str
    share: float
    make: Callable[[Dice], Any]
    read: Callable[[Any], bool]
    refusals: tuple[type[Exception], ...]


# ------------------------------------------------------------------ bending

ODD = (
    "", "\x00", "\ud800", "\udfff", "\u202e", "\u2028", "\ufeff", "é", "é", "١٢", "²", "𝟙", "😀", " ", "\t", "\r\n",
    "\x1b[2J", "%00", "%s", "{{7*7}}", "${x}", "'", '"', "\\", "../", "//", "<script>", "null", "true", "NaN",
    "Infinity", "-0", "1e999", "9" * 25, "0x10", "1_000", "+1", "-1", "[", "]", "{", "}", ",", ":", "=",
)  # fmt: skip
PRINTABLE = string.printable


def bend(dice: Dice, text: str) -> str:
    """The text with a few mistakes in it; sometimes none."""
    for _ in range(dice.choice((0, 1, 1, 1, 2, 3, 6))):
        at = dice.randrange(len(text) + 1)
        match dice.randrange(7):
            case 0:
                text = text[:at] + text[at + 1 :]
            case 1:
                text = text[:at] + dice.choice(ODD) + text[at:]
            case 2:
                text = text[:at] + dice.choice(PRINTABLE) + text[at + 1 :]
            case 3:
                text = text[:at]
            case 4:
                text = text[:at] + text[at : at + 8] * dice.choice((2, 3, 50)) + text[at + 8 :]
            case 5:
                text = text[:at] + chr(dice.choice((dice.randrange(128), dice.randrange(0x3000)))) + text[at:]
            case _:
                text = text.swapcase() if dice.random() < 0.5 else text[::-1]
    return text[:20_000]


def odd_value(dice: Dice, depth: int = 0) -> Any:
    """A JSON value that nobody asked for."""
    match dice.randrange(12 if depth < 3 else 8):
        case 0:
            return None
        case 1:
            return dice.random() < 0.5
        case 2:
            return dice.choice((0, -1, 1, 2**31, 2**63 - 1, 2**63, -(2**63) - 1, 10**30, 0.5, 1e308))
        case 3 | 4:
            return dice.choice(ODD)
        case 5:
            return str(UUID(int=dice.getrandbits(128)))
        case 6:
            return dice.choice(("2026-01-09T06:00:00Z", "0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00"))
        case 7:
            return "x" * dice.choice((1, 300, 5000))
        case 8 | 9:
            return [odd_value(dice, depth + 1) for _ in range(dice.randrange(4))]
        case _:
            return {dice.choice(ODD): odd_value(dice, depth + 1) for _ in range(dice.randrange(4))}


DEPTHS = (10, 900, 1500, 5000)


def bend_document(dice: Dice, document: dict[str, Any]) -> str:
    """JSON text of the document with fields replaced, dropped or added; now and then broken as text, or very deep."""
    document = dict(document)
    for _ in range(dice.choice((0, 1, 1, 2))):
        name = dice.choice([*document, "x"])
        if dice.random() < 0.2:
            document.pop(name, None)
        elif isinstance(document.get(name), dict) and dice.random() < 0.7:
            inner = dict(document[name])
            inner[dice.choice([*inner, "x"])] = odd_value(dice)
            document[name] = inner
        else:
            document[name] = odd_value(dice)
    text = json.dumps(document, ensure_ascii=dice.random() < 0.5)
    kind = dice.random()
    if kind < 0.01:
        depth = dice.choice(DEPTHS)
        name = dice.choice([*document, "x"])
        return text[:-1] + f', "{name}": ' + "[" * depth + "]" * depth + "}"
    return bend(dice, text) if kind < 0.3 else text


def to_bytes(dice: Dice, text: str) -> bytes:
    """As bytes, which needn't be UTF-8."""
    body = text.encode(errors="surrogatepass")
    if dice.random() < 0.1:
        at = dice.randrange(len(body) + 1)
        body = body[:at] + bytes([dice.randrange(256)]) + body[at + 1 :]
    return body


def uuid(dice: Dice) -> str:
    return str(UUID(int=dice.getrandbits(128)))


# ------------------------------------------------------------------ webhooks

NOW = datetime(2026, 1, 9, 6, 0, tzinfo=UTC)
KEYS = (b"the first key of the proof, 32 by", b"the second key of the proof, 32 b")
PROVIDER = SandboxProvider(["whsec_" + base64.b64encode(key).decode() for key in KEYS])
CENTS_MAX = 10**15

Signed = tuple[dict[str, str], bytes]


def webhook(dice: Dice) -> dict[str, Any]:
    data = {"paymentId": uuid(dice), "amountCents": 360_000, "currency": "INR", "refundId": "re_1"}
    return {
        "type": dice.choice((*sorted(KNOWN_TYPES), "payment.other")),
        "timestamp": "2026-01-09T06:00:00Z",
        "data": data,
    }


def make_signature(dice: Dice) -> Signed:
    """A signed webhook, then bent in its headers or its body."""
    body = json.dumps(webhook(dice)).encode()
    at = NOW + timedelta(seconds=dice.choice((0, 1, -299, 299, 301, -301, -86400, 86400 * 365)))
    headers = PROVIDER.sign(f"msg_{dice.getrandbits(32)}", at, body)
    match dice.randrange(6):
        case 0:
            name = dice.choice(list(headers))
            headers[name] = bend(dice, headers[name])
        case 1:
            del headers[dice.choice(list(headers))]
        case 2:
            body = to_bytes(dice, bend(dice, body.decode()))
        case 3:
            noise = base64.b64encode(dice.randbytes(32)).decode()
            signatures = [f"v1,{noise}", "v1,", "v1a,x", "v2," + headers["webhook-signature"][3:], ""]
            headers["webhook-signature"] = (
                dice.choice(("", headers["webhook-signature"])) + " " + dice.choice(signatures)
            )
        case 4:
            headers["webhook-timestamp"] = dice.choice((*ODD, headers["webhook-timestamp"] + ".0", "-1"))
        case _:
            pass
    # A header is bytes, which the server reads as Latin-1.
    return {name: text.encode("latin-1", "replace").decode("latin-1") for name, text in headers.items()}, body


def is_signed(headers: dict[str, str], body: bytes) -> bool:
    """Our own reading of Standard Webhooks."""
    name, seconds = headers.get("webhook-id", ""), headers.get("webhook-timestamp", "")
    if not re.fullmatch("[0-9]{1,11}", seconds) or abs(int(seconds) - NOW.timestamp()) > 300:
        return False
    signed = f"{name}.{seconds}.".encode(errors="surrogatepass") + body
    wanted = {"v1," + base64.b64encode(hmac.digest(key, signed, hashlib.sha256)).decode() for key in KEYS}
    return not wanted.isdisjoint(headers.get("webhook-signature", "").split(" "))


def read_signature(signed: Signed) -> bool:
    headers, body = signed
    good = is_signed(headers, body)
    try:
        event = PROVIDER.verify(headers, body, NOW)
    except SignatureInvalid:
        if good and re.fullmatch(r"[\x21-\x7e]{1,255}", headers["webhook-id"]):
            raise Wrong("a good signature was refused") from None
        raise
    except WebhookMalformed:
        if not good:
            raise Wrong("the body was looked at before the signature") from None
        raise
    if not good:
        raise Wrong("a bad signature was accepted")
    check_event(event)
    return True


def make_webhook(dice: Dice) -> Signed:
    body = to_bytes(dice, bend_document(dice, webhook(dice)))
    return PROVIDER.sign("msg_1", NOW, body), body


def read_webhook(signed: Signed) -> bool:
    check_event(PROVIDER.verify(*signed, NOW))
    return True


def check_event(event: ProviderEvent) -> None:
    """It can be stored, and money is money."""
    for text in (event.event_id, event.type, event.currency, event.refund_id):
        if text is not None and not (text.isascii() and text.isprintable()):
            raise Wrong(f"unstorable text {text!r}")
    if event.amount_cents is not None and not 0 <= event.amount_cents <= CENTS_MAX:
        raise Wrong(f"amount {event.amount_cents}")
    if event.sent_at.tzinfo is None or not 2000 <= event.sent_at.year <= 2200:
        raise Wrong(f"an instant that can't be kept: {event.sent_at}")
    if event.type in KNOWN_TYPES and event.payment_id is None:
        raise Wrong("no payment")


# ------------------------------------------------------------------ events, frames, cursors

TYPES = sorted(str(kind) for kind in BY_TYPE)
# What the events' fields are called and hold; one event has some of them, and doesn't mind the others.
IDS = (
    "paymentId", "studentId", "courseId", "purchaseId", "checkoutId", "allocationId", "bookingId", "trainerId",
    "refundId",
)  # fmt: skip
FIELDS: dict[str, Any] = {
    "sessionCount": 30, "firstStartsAt": "2026-01-09T06:00:00Z", "lastEndsAt": "2026-02-09T06:00:00Z", "seqs": [1, 2],
    "status": "cancelled", "stage": "paid", "reason": "NO_TRAINER_AVAILABLE", "amountCents": 1, "currency": "INR",
    "full": False, "sessions": 1, "sessionSeqs": [1], "changed": ["name"],
}  # fmt: skip


def make_envelope(dice: Dice) -> bytes | str:
    document = {
        "specversion": "1.0",
        "id": uuid(dice),
        "source": "payment-service",
        "type": dice.choice((*TYPES, "OTHER")),
        "subject": "payment/1",
        "time": "2026-01-09T06:00:00Z",
        "partitionkey": uuid(dice),
        "correlationid": uuid(dice),
        "dataversion": dice.choice((1, 1, 1, 2, 0, -1)),
        "data": FIELDS | {name: uuid(dice) for name in IDS},
    }
    text = bend_document(dice, document)
    return text if dice.random() < 0.3 else to_bytes(dice, text)


def read_envelope(document: bytes | str) -> bool:
    envelope: Envelope = decode_envelope(document)
    if decode_envelope(encode_envelope(envelope)) != envelope:
        raise Wrong("an envelope that was read is another when it is written and read again")
    envelope.event()
    return True


FAMILY = [UUID(int=1), UUID(int=2)]


def make_frame(dice: Dice) -> str | None:
    if dice.random() < 0.01:
        return None
    after: Any = dice.choice((0, 5, {str(FAMILY[0]): 3}, {uuid(dice): 3}, odd_value(dice)))
    frame: dict[str, Any] = {"type": dice.choice(("resume", "resume", "ping")), "after": after}
    if dice.random() < 0.6:
        frame["studentId"] = dice.choice((str(dice.choice(FAMILY)), uuid(dice)))
    return bend_document(dice, frame)


def read_frame(text: str | None) -> bool:
    asked = parse_resume(text, FAMILY)
    if not asked.keys() <= set(FAMILY) or any(not 0 <= seq < 2**63 for seq in asked.values()):
        raise Wrong(f"was allowed {asked}")
    return True


def make_cursor(dice: Dice) -> str:
    if dice.random() < 0.3:
        return bend(dice, Cursor(NOW, UUID(int=dice.getrandbits(128))).encode())
    text = json.dumps([odd_value(dice) if dice.random() < 0.3 else "2026-01-09T06:00:00Z", uuid(dice)])
    return base64.urlsafe_b64encode(to_bytes(dice, text)).decode().rstrip("=")


def read_cursor(text: str) -> bool:
    cursor = Cursor.decode(text)
    if cursor.starts_at.tzinfo is None:
        raise Wrong("a cursor without a zone")
    if Cursor.decode(cursor.encode()) != cursor:
        raise Wrong("a cursor that was read is another when it is written and read again")
    return True


# ------------------------------------------------------------------ small texts

SLOTS = ("6:00 AM", "6 AM", "06:00", "18:00-19:00", "6-7 PM", "11:30 PM - 12:30 AM", "6:00\u202fAM", "23:59")


def read_slot(text: str) -> bool:
    slot = parse_slot(text)
    if parse_slot(format_slot(slot.start)).start != slot.start or (slot.minutes is not None and slot.minutes <= 0):
        raise Wrong(f"{slot}")
    return True


def read_uuid(text: str) -> bool:
    value = parse_uuid(text)
    if value is not None and str(value) != text.lower():
        raise Wrong(f"{text!r} was taken for {value}")
    return value is not None


def read_key(text: str) -> bool:
    taken = KEY.fullmatch(text) is not None
    if taken != (1 <= len(text) <= 255 and all(0x21 <= ord(character) <= 0x7E for character in text)):
        raise Wrong(f"{text!r}: taken {taken}")
    return taken


def read_trace(text: str) -> bool:
    taken = TRACEPARENT.fullmatch(text) is not None
    if taken and not (len(text) == 55 and text.isascii()):
        raise Wrong(f"{text!r} was taken for a trace")
    return taken


HERE = "https://caravan.example"
PATHS = ("/home", "/admin/purchases?q=x", "//evil.example", "/\\evil.example", "https://evil.example", "/%2f/evil", "")


def read_next(text: str) -> bool:
    wanted = safe_next(text)
    if wanted is None:
        return False
    # Browsers take backslashes for slashes and leave out tabs and line ends.
    seen = re.sub(r"[\t\r\n]", "", wanted).replace("\\", "/")
    if urlsplit(urljoin(HERE, seen)).netloc != "caravan.example" or not wanted.isprintable():
        raise Wrong(f"{text!r} leads away from here")
    return True


def read_email(text: str) -> bool:
    email = normalise_email(text)
    if email.count("@") != 1 or re.search(r"[\s\x00\ud800-\udfff]", email):
        raise Wrong(f"{email!r} was taken for an e-mail address")
    return True


def bent(*good: str) -> Callable[[Dice], str]:
    return lambda dice: bend(dice, dice.choice(good))


# ------------------------------------------------------------------ settings and the command line

HUSH = "whsec_" + base64.b64encode(b"hush! nobody may ever read these").decode()
ENVIRONMENT = {
    "POSTGRES_URL": "postgresql://caravan:hush!@db/caravan",
    "CARAVAN_POSTGRES_DIRECT_URL": "postgresql://caravan:hush!@db/caravan",
    "CARAVAN_SANDBOX_WEBHOOK_SECRET": HUSH,
    "CARAVAN_PORT": "8080",
    "CARAVAN_HOST": "127.0.0.1",
    "CARAVAN_NOTICE_HOURS": "12",
    "CARAVAN_START_HORIZON_DAYS": "90",
    "CARAVAN_COIN_VALUE_CENTS": "100",
    "CARAVAN_CHECKOUT_MINUTES": "30",
    "CARAVAN_ORIGINS": "https://app.example.com,http://localhost:3000",
    "CARAVAN_LOG_JSON": "true",
    "CARAVAN_DEMO": "false",
    "CARAVAN_DATA_DIR": "/srv/caravan",
    "CARAVAN_WORKER_NAME": "one",
    "CARAVAN_BUILD": "1",
    "REDIS_URL": "",
}


def make_settings(dice: Dice) -> dict[str, str]:
    names = dice.sample(list(ENVIRONMENT), dice.randrange(1, 6))
    environment = {name: ENVIRONMENT[name] for name in names}
    name = dice.choice(names)
    environment[name] = bend(dice, environment[name])
    if dice.random() < 0.05:
        environment["CARAVAN_" + bend(dice, "PORT")] = "1"
    return environment


def read_settings(environment: dict[str, str]) -> bool:
    try:
        load_settings(environment)
    except BadSettings as refusal:
        if "\n" in str(refusal):
            raise Wrong(f"more than one line: {refusal}") from None
        if "hush!" in str(refusal) or HUSH[6:20] in str(refusal):
            raise Wrong(f"a secret is told: {refusal}") from None
        raise
    return True


COMMANDS = (
    "up --demo --port 8123", "serve purchase-worker", "migrate --json", "doctor --data DIR", "demo", "workers", "lag",
    "diagnose 00000000-0000-0000-0000-000000000001 00000000-0000-0000-0000-000000000002", "repair --all --limit 5",
    "repair --payment 00000000-0000-0000-0000-000000000001 --dry-run --note why", "dead-letters list --all",
    "create-purchase 00000000-0000-0000-0000-000000000001", "clear-cache 00000000-0000-0000-0000-000000000001",
    "dead-letters discard 00000000-0000-0000-0000-000000000001 --note why", "trigger-allocation 1 2", "emit-events x",
)  # fmt: skip
COMMAND = typer.main.get_command(cli)


def make_line(dice: Dice) -> list[str]:
    words: list[str] = [*dice.choice(COMMANDS).split()]
    match dice.randrange(5):
        case 0:
            at = dice.randrange(len(words))
            words[at] = bend(dice, words[at])
        case 1:
            words.insert(
                dice.randrange(len(words) + 1), dice.choice((*ODD, "--json", "--note", "--", "-x", "--limit=x"))
            )
        case 2:
            del words[dice.randrange(len(words))]
        case _:
            pass
    return words


def read_line(words: list[str]) -> bool:
    """Parse only: the innermost command's context is made, nothing is run."""
    command: Any = COMMAND
    rest, parent = list(words), None
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        while True:
            context = command.make_context(command.name, rest, parent=parent)
            if not hasattr(command, "resolve_command"):
                return True
            rest = [*getattr(context, "_protected_args", []), *context.args]
            _, command, rest = command.resolve_command(context, rest)
            parent = context


TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
PARSERS: tuple[Parser, ...] = (
    Parser("signatures", 10, make_signature, read_signature, (SignatureInvalid, WebhookMalformed)),
    Parser("webhook bodies", 12, make_webhook, read_webhook, (WebhookMalformed,)),
    Parser("envelopes", 13, make_envelope, read_envelope, (Unreadable,)),
    Parser("frames", 13, make_frame, read_frame, (FrameRefused,)),
    Parser("cursors", 11, make_cursor, read_cursor, (CursorInvalid,)),
    Parser("slots", 12, bent(*SLOTS), read_slot, (InvalidSlot,)),
    Parser("uuids", 8, bent("9e16d892-4324-4568-be60-163aa1665683"), read_uuid, ()),
    Parser("idempotency keys", 6, bent("order-1", "k" * 254), read_key, ()),
    Parser("traceparents", 5, bent(TRACE), read_trace, ()),
    Parser("next addresses", 5, bent(*PATHS), read_next, ()),
    Parser("e-mail addresses", 4, bent("asha@example.com"), read_email, (InvalidEmail,)),
    Parser("settings", 0.5, make_settings, read_settings, (BadSettings,)),
    Parser("command lines", 0.5, make_line, read_line, (TyperException, typer.Exit)),
)
