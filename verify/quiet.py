"""The product logs every injected fault as the error that it would be; here they are on purpose."""

from __future__ import annotations

import logging

import structlog


def be_quiet() -> None:
    logging.disable(logging.CRITICAL)
    structlog.configure(processors=[_drop], cache_logger_on_first_use=False)


def _drop(*_line: object) -> dict[str, object]:
    raise structlog.DropEvent
