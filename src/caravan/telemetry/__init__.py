"""Logs and metrics. One chain for our own loggers and the libraries': correlated, redacted, JSON or readable.

Loggers are made at import time (`log = structlog.get_logger()`); `configure_logging` decides once per process how
their lines look. `correlate` puts a correlation id (the payment's id, where there is one) on every line of a block.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Generator, MutableMapping
from contextlib import contextmanager
from typing import Any, TextIO, cast

import structlog
from structlog.typing import Processor

HIDDEN = "[hidden]"
# Names of things that a log must not hold, wherever in a name they stand.
SECRET_NAMES = re.compile(
    r"passw|secret|token|ticket|authorization|cookie|credential|api_?key|latitude|longitude|coordinates|\blat\b|\b(lng|lon)\b",
    re.IGNORECASE,
)
# A password inside a URL, whoever printed it (drivers do).
URL_PASSWORD = re.compile(r"(://[^:/@\s]*:)[^@\s]+@")
# What PostgreSQL tells of a broken constraint: the whole row, with names and places.
ROW = re.compile(r"(Failing row contains \().*?\)\.?(?=\n|$)", re.DOTALL)
DEPTH_MAX = 6


def redact(_logger: Any, _method: str, line: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """A structlog processor: hides values by their name, passwords inside URLs, and rows that PostgreSQL refused."""
    for name, value in line.items():
        line[name] = _redacted(name, value, 0)
    return line


def _redacted(name: str, value: Any, depth: int) -> Any:
    if SECRET_NAMES.search(name) and value is not None:
        return HIDDEN
    if isinstance(value, str):
        return ROW.sub(rf"\1{HIDDEN})", URL_PASSWORD.sub(rf"\1{HIDDEN}@", value))
    if depth < DEPTH_MAX:
        if isinstance(value, dict):
            fields = cast("dict[Any, Any]", value)
            return {key: _redacted(str(key), inner, depth + 1) for key, inner in fields.items()}
        if isinstance(value, list | tuple):
            items = cast("list[Any]", value)
            return [_redacted("", inner, depth + 1) for inner in items]
    return value


def _show_no_locals() -> None:
    """Where nobody configures (a benchmark, a test, a script), structlog would draw tracebacks with local variables.

    Those are pages of rows, with names and places.
    """
    if not structlog.is_configured():
        structlog.configure(
            processors=[
                structlog.contextvars.merge_contextvars,
                structlog.processors.add_log_level,
                structlog.processors.StackInfoRenderer(),
                structlog.dev.set_exc_info,
                structlog.processors.TimeStamper(fmt="%Y-%m-%d %H:%M:%S", utc=False),
                structlog.processors.format_exc_info,
                redact,
                structlog.dev.ConsoleRenderer(colors=False),
            ]
        )


_show_no_locals()


def configure_logging(*, json: bool | None = None, stream: TextIO | None = None, level: str = "INFO") -> None:
    """Send every log line of this process to `stream` (standard output). `json` None: readable on a terminal."""
    target = stream or cast("TextIO", sys.stdout)
    as_json = not target.isatty() if json is None else json
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.PositionalArgumentsFormatter(),
        structlog.processors.TimeStamper(fmt="iso" if as_json else "%H:%M:%S", utc=as_json),
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level]),
        cache_logger_on_first_use=True,
    )
    last: list[Processor] = [structlog.stdlib.ProcessorFormatter.remove_processors_meta]
    if as_json:
        # The traceback becomes text before the redaction, which reads texts.
        last += [structlog.processors.format_exc_info, redact, structlog.processors.JSONRenderer(default=str)]
    else:
        last += [structlog.processors.format_exc_info, redact, structlog.dev.ConsoleRenderer(colors=target.isatty())]
    handler = logging.StreamHandler(target)
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processors=last))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)


@contextmanager
def correlate(*correlation_ids: str | None) -> Generator[None]:
    """Every line logged inside carries `correlation_id`; of a batch, `correlation_ids` in one text."""
    known = list(dict.fromkeys(each for each in correlation_ids if each))
    named = {"correlation_id": known[0]} if len(known) == 1 else {"correlation_ids": " ".join(known)} if known else {}
    with structlog.contextvars.bound_contextvars(**named):
        yield
