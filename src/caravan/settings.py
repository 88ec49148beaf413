"""What this installation is told from outside: environment variables, read and judged once, at the start.

`POSTGRES_URL`, `KAFKA_BROKER` and `REDIS_URL` have no prefix; everything else starts with `CARAVAN_`. A bad value or an
unknown `CARAVAN_` name stops the process with one line. Nothing else in Caravan reads the environment, save the
embedded PostgreSQL, which looks for its programs (CARAVAN_POSTGRES_BIN) and their libraries.
"""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Mapping
from importlib import metadata
from ipaddress import ip_network
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import parse_qs, urlsplit

from psycopg import ProgrammingError
from psycopg.conninfo import conninfo_to_dict
from pydantic import AliasChoices, Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

PREFIX = "CARAVAN_"
UNPREFIXED = {
    "postgres_url": "POSTGRES_URL",
    "kafka_broker": "KAFKA_BROKER",
    "redis_url": "REDIS_URL",
    "otlp_endpoint": "OTEL_EXPORTER_OTLP_ENDPOINT",
}
SECRETS = frozenset(
    {
        "postgres_url",
        "postgres_direct_url",
        "kafka_password",
        "redis_url",
        "sandbox_webhook_secret",
        "alert_webhook_url",
        "alert_webhook_secret",
        "heartbeat_url",
    }
)
# How the providers that people use mark a key that moves real money (Stripe, Razorpay).
LIVE_KEY_MARKS = ("sk_live_", "rk_live_", "rzp_live_")


class BadSettings(Exception):
    """The environment says something that cannot be; the message is one line for the person who starts us."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))  # names and values may hold line ends


class Settings(BaseSettings):
    """One installation's settings. Frozen; pass it in, never look it up."""

    model_config = SettingsConfigDict(
        frozen=True, env_prefix=PREFIX, env_ignore_empty=True, extra="forbid", populate_by_name=True
    )

    postgres_url: str | None = Field(default=None, repr=False, validation_alias=AliasChoices("POSTGRES_URL"))
    postgres_direct_url: str | None = Field(default=None, repr=False)  # around a pooler, which POSTGRES_URL is then
    kafka_broker: str | None = Field(default=None, validation_alias=AliasChoices("KAFKA_BROKER"))  # host:port, ...
    redis_url: str | None = Field(default=None, repr=False, validation_alias=AliasChoices("REDIS_URL"))

    data_dir: Path = Path(".caravan")
    host: str = "127.0.0.1"
    port: int = Field(default=8080, ge=1, le=65535)
    origins: Annotated[tuple[str, ...], NoDecode] = ()  # of other sites that may open our WebSocket; comma-separated
    trusted_proxies: Annotated[tuple[str, ...], NoDecode] = ()  # whose X-Forwarded-For and -Proto we believe
    log_json: bool | None = None  # None: readable on a terminal, JSON elsewhere
    worker_name: str | None = Field(default=None, max_length=100)  # None: the machine's name
    build: str = Field(default_factory=lambda: find_build())
    demo: bool = False
    sandbox_webhook_secret: str | None = Field(default=None, repr=False)  # None: the sandbox provider is off

    sandbox_books: Path | None = None  # where the sandbox remembers what it took; `up` keeps them in the data folder

    notice_hours: int = Field(default=12, ge=0, le=24 * 30)
    start_horizon_days: int = Field(default=90, ge=1, le=730)
    coin_value_cents: int = Field(default=100, ge=1, le=1_000_000)
    checkout_minutes: int = Field(default=30, ge=1, le=24 * 60)
    unclaimed_minutes: int = Field(default=15, ge=1, le=24 * 60)
    kafka_prefix: str = Field(default="", max_length=60, pattern=r"^[a-zA-Z0-9._-]*$")  # of topics and groups
    kafka_partitions: int = Field(default=16, ge=1, le=1000)  # of every topic
    kafka_retention_hours: int = Field(default=7 * 24, ge=1, le=29 * 24)  # the outbox keeps 30 days
    kafka_group_protocol: Literal["consumer", "classic"] = "consumer"  # of brokers older than 4.0: classic
    kafka_security: Literal["plaintext", "ssl", "sasl_plaintext", "sasl_ssl"] = "plaintext"
    kafka_sasl: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = "SCRAM-SHA-512"
    kafka_username: str | None = None
    kafka_password: str | None = Field(default=None, repr=False)
    kafka_ca_file: Path | None = None  # None: the system's authorities
    alert_webhook_url: str | None = Field(default=None, repr=False)  # who is told when an alert begins or ends
    alert_webhook_secret: str | None = Field(default=None, repr=False)  # signs it, as Standard Webhooks does
    heartbeat_url: str | None = Field(default=None, repr=False)  # called every minute while watching works
    otlp_endpoint: str | None = Field(default=None, validation_alias=AliasChoices("OTEL_EXPORTER_OTLP_ENDPOINT"))
    postgres_bin: Path | None = None  # the bin folder of another PostgreSQL, read by caravan.db.embedded_binaries

    @field_validator("postgres_url", "postgres_direct_url")
    @classmethod
    def _is_postgres_url(cls, value: str | None) -> str | None:
        # libpq's other spelling, `host=db dbname=caravan`, is as good.
        if value is not None and not value.startswith(("postgresql://", "postgres://", "host=", "dbname=", "user=")):
            raise ValueError("must look like postgresql://user:password@host:5432/database")
        try:
            conninfo_to_dict(value or "")
        except ProgrammingError:  # its text would show the password
            raise ValueError(
                "must look like postgresql://user:password@host:5432/database, with other signs than letters and"
                " digits of user and password as %XX"
            ) from None
        return value

    @field_validator("kafka_broker")
    @classmethod
    def _are_brokers(cls, value: str | None) -> str | None:
        for broker in (value or "").split(",") if value is not None else ():
            host, _, port = broker.strip().rpartition(":")
            if not host or "/" in broker or not port.isdigit() or not 0 < int(port) < 65536:
                raise ValueError("must be host:port, or several with commas, such as kafka-1:9092,kafka-2:9092")
        return value

    @model_validator(mode="after")
    def _have_credentials(self) -> Settings:
        if (self.kafka_username is None) != (self.kafka_password is None):
            lacking = "CARAVAN_KAFKA_PASSWORD" if self.kafka_password is None else "CARAVAN_KAFKA_USERNAME"
            raise ValueError(f"{lacking}: set both CARAVAN_KAFKA_USERNAME and CARAVAN_KAFKA_PASSWORD, or neither")
        if self.kafka_security.startswith("sasl") != (self.kafka_username is not None):
            raise ValueError(
                f"CARAVAN_KAFKA_SECURITY: {self.kafka_security} goes"
                f" {'with' if self.kafka_username is None else 'without'} CARAVAN_KAFKA_USERNAME"
            )
        if self.kafka_ca_file is not None and not self.kafka_ca_file.is_file():
            raise ValueError(f"CARAVAN_KAFKA_CA_FILE: there is no file {self.kafka_ca_file}")
        return self

    @field_validator("redis_url")
    @classmethod
    def _is_redis_url(cls, value: str | None) -> str | None:
        if value is not None and not _is_redis_url(value):
            raise ValueError("must look like redis://user:password@host:6379/0 (or rediss://..., or unix:///path)")
        return value

    @field_validator("origins", "trusted_proxies", mode="before")
    @classmethod
    def _split_list(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("origins")
    @classmethod
    def _are_origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for origin in value:
            parts = urlsplit(origin)
            if (
                parts.scheme not in ("http", "https")
                or not parts.netloc
                or origin != f"{parts.scheme}://{parts.netloc}"
            ):
                raise ValueError(f"{origin} is not an origin such as https://app.example.com")
        return value

    @field_validator("trusted_proxies")
    @classmethod
    def _are_networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for network in value:
            try:
                ip_network(network)
            except ValueError:
                raise ValueError(f"{network} is neither an address nor a network such as 10.0.0.0/8") from None
        return value

    @field_validator("alert_webhook_url", "heartbeat_url", "otlp_endpoint")
    @classmethod
    def _is_web_address(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                parts = urlsplit(value)
                fine = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
            except ValueError:
                fine = False
            if not fine or not value.isascii() or not value.isprintable() or " " in value:
                raise ValueError("must be an address that starts with https:// or http://")
        return value

    @model_validator(mode="after")
    def _sign_alerts(self) -> Settings:
        if (self.alert_webhook_url is None) != (self.alert_webhook_secret is None):
            lacking = "SECRET" if self.alert_webhook_secret is None else "URL"
            raise ValueError(f"CARAVAN_ALERT_WEBHOOK_{lacking}: set both the address and the secret, or neither")
        return self

    @field_validator("sandbox_webhook_secret", "alert_webhook_secret")
    @classmethod
    def _is_webhook_secret(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                key = base64.b64decode(value.removeprefix("whsec_"), validate=True)
            except binascii.Error:
                key = b""
            if len(key) < 24:
                raise ValueError("must be whsec_ and the base64 of at least 24 random bytes")
        return value


# What a Redis address may say beside its place; everything else we decide (timeouts, for one).
REDIS_OPTIONS = frozenset({"db", "ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_cert_reqs"})


def _is_redis_url(value: str) -> bool:
    try:
        parts = urlsplit(value)
        port, options = parts.port, parse_qs(parts.query, strict_parsing=True) if parts.query else {}
    except ValueError:
        return False
    number = parts.path.strip("/") if parts.scheme != "unix" else ""
    if parts.fragment or port == 0 or not options.keys() <= REDIS_OPTIONS:
        return False
    if not all(said.isascii() and said.isdigit() for said in (*options.get("db", []), *filter(None, [number]))):
        return False
    if parts.scheme == "unix":
        return parts.path.startswith("/")
    return parts.scheme in ("redis", "rediss") and bool(parts.hostname)


def load_settings(environ: Mapping[str, str] | None = None, /, **given: object) -> Settings:
    """Settings from the environment; what is `given` (by the command line) and not None wins.

    Raises BadSettings with one line.
    """
    environ = os.environ if environ is None else environ
    _refuse_unknown_names(environ)
    by_name = {_variable(field).upper(): field for field in Settings.model_fields}
    values: dict[str, object] = {field: environ[name] for name, field in by_name.items() if environ.get(name, "") != ""}
    values |= {field: value for field, value in given.items() if value is not None}
    try:
        settings = Settings.model_validate(values)
    except ValidationError as error:
        raise BadSettings(_one_line(error)) from None
    if settings.demo:
        _refuse_live_keys(environ)
        if settings.host not in ("127.0.0.1", "::1", "localhost"):
            raise BadSettings(f"Demo mode listens on this machine only: leave out --host {settings.host}, or --demo.")
    return settings


def _variable(field: str) -> str:
    return UNPREFIXED.get(field, PREFIX + field.upper())


def _refuse_unknown_names(environ: Mapping[str, str]) -> None:
    known = {_variable(field) for field in Settings.model_fields}
    unknown = sorted(name for name in environ if name.startswith(PREFIX) and name not in known)
    if unknown:
        from difflib import get_close_matches

        near = get_close_matches(unknown[0], known, 1)
        hint = f"did you mean {near[0]}?" if near else "unset it, or look up the name in the README."
        raise BadSettings(f"{unknown[0]} is not a setting of this release: {hint}")


def _refuse_live_keys(environ: Mapping[str, str]) -> None:
    for name, value in environ.items():
        if value.startswith(LIVE_KEY_MARKS):
            raise BadSettings(f"{name} holds a live payment provider's key: unset it, or leave out --demo.")


def _one_line(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    place = str(first["loc"][0]) if first["loc"] else ""
    field = next((name for name in Settings.model_fields if place in (name, _variable(name))), place)
    said = first["msg"].removeprefix("Value error, ")
    if not place:
        return f"{said}."  # of several settings: it names them itself
    shown = "" if field in SECRETS or first["type"] == "missing" else f" (now: {str(first['input'])[:80]!r})"
    return f"{_variable(field)}: {said}{shown}."


def find_build() -> str:
    """What runs: the commit of the clone we were started from, else the package's version."""
    root = Path(__file__).parents[2] / ".git"
    try:
        head = (root / "HEAD").read_text().strip()
        if not head.startswith("ref: "):
            return head[:12]
        reference = head.removeprefix("ref: ")
        if (root / reference).exists():
            return (root / reference).read_text().strip()[:12]
        for line in (root / "packed-refs").read_text().splitlines():
            if line.endswith(" " + reference):
                return line[:12]
    except OSError:
        pass
    return metadata.version("caravan")
