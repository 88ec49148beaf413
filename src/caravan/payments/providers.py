"""Payment providers: the port, and the sandbox, which signs its webhooks as Standard Webhooks does.

The signature is checked here rather than by the `standardwebhooks` library: that one knows one secret and the machine's
own clock only, and raises anything at all for an odd header. The tests sign with the library.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Final, Protocol
from uuid import UUID

import msgspec

from caravan.errors import DomainError, Invalid
from caravan.ids import parse_uuid
from caravan.payments.books import Asked, Books, Said
from caravan.payments.model import SANDBOX, Checkout, Payment
from caravan.settings import Settings

SUCCEEDED: Final = "payment.succeeded"
FAILED: Final = "payment.failed"
REFUNDED: Final = "payment.refunded"
KNOWN_TYPES: Final = frozenset({SUCCEEDED, FAILED, REFUNDED})

YEAR_MIN, YEAR_MAX = 2000, 2200  # beyond its own calendar Python can't read back what PostgreSQL keeps
SIGNATURE_WINDOW: Final = timedelta(minutes=5)  # into the past and into the future


class SignatureInvalid(DomainError):
    """The webhook is not signed with our secret, or not at this time."""

    code = "SIGNATURE_INVALID"
    status = 401


class WebhookMalformed(Invalid):
    """The webhook is signed, but it doesn't say what such a webhook says."""

    code = "WEBHOOK_MALFORMED"


class UnknownProvider(DomainError):
    """No such payment provider is set up here."""

    code = "PROVIDER_UNKNOWN"
    status = 404


class ProviderOff(DomainError):
    """No payment provider is set up here: nothing can be sold for money."""

    code = "PROVIDER_OFF"
    status = 503


@dataclass(frozen=True, slots=True)
class ProviderEvent:
    """What a provider told us, checked. A type that is not in KNOWN_TYPES has no payment, amount or refund."""

    provider: str
    event_id: str
    type: str
    sent_at: datetime
    body: bytes
    payment_id: UUID | None = None
    amount_cents: int | None = None
    currency: str | None = None
    refund_id: str | None = None


@dataclass(frozen=True, slots=True)
class ProviderRecord:
    """Money that a provider says came or went back, with what we asked it for, where it keeps that."""

    event: ProviderEvent
    payment: Payment | None
    checkout: Checkout | None


class Provider(Protocol):
    """Whom we ask for money. Nothing but `list_records` may wait for the network: it is called inside transactions."""

    @property
    def name(self) -> str: ...

    def checkout(self, payment: Payment, terms: Checkout) -> dict[str, Any]:
        """What the client needs to pay: goes into the answer's `checkout`. The provider keeps the terms beside it."""
        ...

    def verify(self, headers: Mapping[str, str], body: bytes, now: datetime) -> ProviderEvent:
        """The event that a webhook is; header names in lower case. Raises SignatureInvalid, WebhookMalformed."""
        ...

    def refund(self, payment: Payment, amount_cents: int, refund_id: str) -> str:
        """Send money back; `refund_id` is ours. The provider's id of the refund, as its webhooks will call it."""
        ...

    @property
    def keeps_records(self) -> bool:
        """Whether `list_records` can tell anything here."""
        ...

    def list_records(self, since: datetime) -> Iterator[ProviderRecord]:
        """What came and what went back since then, oldest first. Called in a thread, outside of transactions."""
        ...


class _Data(msgspec.Struct, frozen=True, rename="camel"):
    payment_id: str
    amount_cents: Annotated[int, msgspec.Meta(ge=0, le=10**15)] | None = None
    currency: Annotated[str, msgspec.Meta(pattern=r"^[A-Z]{3}\Z")] | None = None
    refund_id: Annotated[str, msgspec.Meta(pattern=r"^[\x21-\x7e]{1,200}\Z")] | None = None


class _Body(msgspec.Struct, frozen=True):
    type: Annotated[str, msgspec.Meta(pattern=r"^[\x21-\x7e]{1,100}\Z")]
    timestamp: Annotated[datetime, msgspec.Meta(tz=True)] | None = None
    data: msgspec.Raw = msgspec.Raw(b"{}")


EVENT_ID: Final = re.compile(r"[\x21-\x7e]{1,255}")
SECONDS: Final = re.compile(r"[0-9]{1,11}")


class SandboxProvider:
    """Pretends to move money. The first of `secrets` signs, all are accepted, so that a secret can be changed.

    `books`: where it remembers that, apart from our database; None: nowhere.
    """

    name = SANDBOX

    def __init__(self, secrets: Sequence[str], books: Books | None = None) -> None:
        assert secrets, "a sandbox without a secret would believe anybody"
        self._books = books
        self._keys = [base64.b64decode(secret.removeprefix("whsec_"), validate=True) for secret in secrets]

    @property
    def keeps_records(self) -> bool:
        return self._books is not None

    def checkout(self, payment: Payment, terms: Checkout) -> dict[str, Any]:
        if self._books:
            self._books.append(Asked(payment, terms))
        return {"confirmUrl": f"/api/v1/payments/{payment.id}/confirm"}

    def refund(self, payment: Payment, amount_cents: int, refund_id: str) -> str:
        """The sandbox holds no money, so the refund is done when it is asked for; it keeps our id."""
        if self._books:
            now = datetime.now(UTC)  # the provider's clock
            type_, currency = REFUNDED, payment.captured_currency or payment.currency
            said = Said(f"refund_{refund_id}", type_, now, b"{}", payment.id, amount_cents, currency, refund_id)
            self._books.append(said)
        return refund_id

    def sign(self, event_id: str, sent_at: datetime, body: bytes) -> dict[str, str]:
        """The headers of a webhook, signed."""
        seconds = str(int(sent_at.timestamp()))
        return {
            "webhook-id": event_id,
            "webhook-timestamp": seconds,
            "webhook-signature": "v1," + _signature(self._keys[0], event_id, seconds, body),
        }

    def verify(self, headers: Mapping[str, str], body: bytes, now: datetime) -> ProviderEvent:
        event_id = headers.get("webhook-id", "")
        seconds = headers.get("webhook-timestamp", "")
        if not EVENT_ID.fullmatch(event_id) or not SECONDS.fullmatch(seconds):
            raise SignatureInvalid("webhook-id and webhook-timestamp (in seconds) are required.")
        if abs(int(seconds) - now.timestamp()) > SIGNATURE_WINDOW.total_seconds():
            raise SignatureInvalid("The webhook was signed too long ago, or in the future.")
        given = headers.get("webhook-signature", "").encode().split(b" ")
        # Every comparison is made, whatever matches: how long it takes says nothing.
        matches = [
            hmac.compare_digest(signature, b"v1," + _signature(key, event_id, seconds, body).encode())
            for key in self._keys
            for signature in given
        ]
        if not any(matches):
            raise SignatureInvalid
        event = _read(self.name, event_id, datetime.fromtimestamp(int(seconds), UTC), body)
        self._remember(event)
        return event

    def _remember(self, event: ProviderEvent) -> None:
        """What it has signed it knows."""
        if self._books and event.type in (SUCCEEDED, REFUNDED) and event.payment_id:
            assert event.amount_cents is not None
            assert event.currency is not None
            self._books.append(
                Said(
                    event.event_id,
                    event.type,
                    event.sent_at,
                    event.body,
                    event.payment_id,
                    event.amount_cents,
                    event.currency,
                    event.refund_id,
                )
            )

    def list_records(self, since: datetime) -> Iterator[ProviderRecord]:
        asked: dict[UUID, Asked] = {}
        for line in self._books.read() if self._books else ():
            if isinstance(line, Asked):
                asked[line.payment.id] = line
            elif line.sent_at >= since:
                known = asked.get(line.payment_id)
                event = ProviderEvent(
                    self.name,
                    line.event_id,
                    line.type,
                    line.sent_at,
                    line.body,
                    line.payment_id,
                    line.amount_cents,
                    line.currency,
                    line.refund_id,
                )
                yield ProviderRecord(event, known.payment if known else None, known.checkout if known else None)


def sandbox_body(type_: str, payment: Payment, now: datetime) -> bytes:
    """What the sandbox says of a payment that went as asked."""
    data = {"paymentId": payment.id, "amountCents": payment.amount_cents, "currency": payment.currency}
    return msgspec.json.encode({"type": type_, "timestamp": now, "data": data})


def _signature(key: bytes, event_id: str, seconds: str, body: bytes) -> str:
    """Over the bytes that came: re-encoded JSON would be another text."""
    signed = f"{event_id}.{seconds}.".encode() + body
    return base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()


def _read(provider: str, event_id: str, signed_at: datetime, body: bytes) -> ProviderEvent:
    try:
        message = msgspec.json.decode(body, type=_Body)
        sent_at = message.timestamp or signed_at
        if not YEAR_MIN <= sent_at.year <= YEAR_MAX:
            raise WebhookMalformed(f"A timestamp lies between {YEAR_MIN} and {YEAR_MAX}.")
        if message.type not in KNOWN_TYPES:
            return ProviderEvent(provider, event_id, message.type, sent_at, body)
        data = msgspec.json.decode(message.data, type=_Data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise WebhookMalformed(f"The webhook can't be read: {error}") from None
    payment_id = parse_uuid(data.payment_id)
    if payment_id is None:
        raise WebhookMalformed("data.paymentId is not a UUID.")
    if message.type != FAILED and (data.amount_cents is None or data.currency is None):
        raise WebhookMalformed(f"A {message.type} says data.amountCents and data.currency.")
    if message.type == REFUNDED and data.refund_id is None:
        raise WebhookMalformed("A payment.refunded says data.refundId.")
    return ProviderEvent(
        provider, event_id, message.type, sent_at, body, payment_id, data.amount_cents, data.currency, data.refund_id
    )


def list_providers(settings: Settings) -> dict[str, Provider]:
    """Who is set up, by name."""
    secret = settings.sandbox_webhook_secret
    books = Books(settings.sandbox_books) if settings.sandbox_books else None
    return {SANDBOX: SandboxProvider([secret], books)} if secret else {}


def get_provider(providers: Mapping[str, Provider], name: str) -> Provider:
    """Raises UnknownProvider."""
    if name not in providers:
        raise UnknownProvider
    return providers[name]
