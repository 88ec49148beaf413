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
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import AliasChoices, Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

PREFIX = "CARAVAN_"
UNPREFIXED = {"postgres_url": "POSTGRES_URL", "kafka_broker": "KAFKA_BROKER", "redis_url": "REDIS_URL"}
SECRETS = frozenset({"postgres_url", "postgres_direct_url", "kafka_broker", "redis_url", "sandbox_webhook_secret"})
NOT_YET = {
    "kafka_broker": "this release has no Kafka yet; its event log lives in PostgreSQL",
    "redis_url": "this release has no Redis yet; views come straight from PostgreSQL",
}
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
    postgres_direct_url: str | None = Field(default=None, repr=False)  # around a pooler, for LISTEN
    kafka_broker: str | None = Field(default=None, repr=False, validation_alias=AliasChoices("KAFKA_BROKER"))
    redis_url: str | None = Field(default=None, repr=False, validation_alias=AliasChoices("REDIS_URL"))

    data_dir: Path = Path(".caravan")
    host: str = "127.0.0.1"
    port: int = Field(default=8080, ge=1, le=65535)
    origins: Annotated[tuple[str, ...], NoDecode] = ()  # of other sites that may open our WebSocket; comma-separated
    log_json: bool | None = None  # None: readable on a terminal, JSON elsewhere
    worker_name: str | None = Field(default=None, max_length=100)  # None: the machine's name
    build: str = Field(default_factory=lambda: find_build())
    demo: bool = False
    sandbox_webhook_secret: str | None = Field(default=None, repr=False)  # None: the sandbox provider is off

    notice_hours: int = Field(default=12, ge=0, le=24 * 30)
    start_horizon_days: int = Field(default=90, ge=1, le=730)
    coin_value_cents: int = Field(default=100, ge=1, le=1_000_000)
    checkout_minutes: int = Field(default=30, ge=1, le=24 * 60)
    unclaimed_minutes: int = Field(default=15, ge=1, le=24 * 60)
    postgres_bin: Path | None = None  # the bin folder of another PostgreSQL, read by caravan.db.embedded_binaries

    @field_validator("postgres_url", "postgres_direct_url")
    @classmethod
    def _is_postgres_url(cls, value: str | None) -> str | None:
        # libpq's other spelling, `host=db dbname=caravan`, is as good.
        if value is not None and not value.startswith(("postgresql://", "postgres://", "host=", "dbname=", "user=")):
            raise ValueError("must look like postgresql://user:password@host:5432/database")
        return value

    @field_validator("kafka_broker", "redis_url")
    @classmethod
    def _is_not_supported_yet(cls, value: str | None, info: Any) -> str | None:
        if value is not None:
            raise ValueError(f"{NOT_YET[info.field_name]}. Unset it to start")
        return value

    @field_validator("origins", mode="before")
    @classmethod
    def _split_origins(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("origins")
    @classmethod
    def _are_origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for origin in value:
            parts = urlsplit(origin)
            if parts.scheme not in ("http", "https") or not parts.netloc or origin != f"{parts.scheme}://{parts.netloc}":
                raise ValueError(f"{origin} is not an origin such as https://app.example.com")
        return value

    @field_validator("sandbox_webhook_secret")
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


def load_settings(environ: Mapping[str, str] | None = None, /, **given: object) -> Settings:
    """Settings from the environment; what is `given` (by the command line) and not None wins.

    Raises BadSettings with one line.
    """
    environ = os.environ if environ is None else environ
    _refuse_unknown_names(environ)
    by_name = {_variable(field).upper(): field for field in Settings.model_fields}
    values: dict[str, object] = {
        field: environ[name] for name, field in by_name.items() if environ.get(name, "") != ""
    }
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
