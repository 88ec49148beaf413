"""What the person who typed `caravan up` sees: a few calm lines on a terminal, JSON lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any


class Progress:
    """One step at a time; each line says how long it took."""

    def __init__(self, *, json_lines: bool | None = None) -> None:
        self._json = not sys.stdout.isatty() if json_lines is None else json_lines
        self._what = ""
        self._since = 0.0
        self._open = False
        self._log: Any = None
        if self._json:
            import structlog

            from caravan import telemetry

            telemetry.configure_logging(json=True)
            self._log = structlog.get_logger()

    def begin(self, what: str) -> None:
        self._what, self._since = what, time.monotonic()
        if not self._json:
            self._write(f"  {what} ... ", end="")
            self._open = True

    def done(self, how: str) -> None:
        seconds = time.monotonic() - self._since
        if self._json:
            self._log.info(f"{self._what}: {how}", seconds=round(seconds, 2))
        else:
            self._write(f"{how} ({seconds:.1f} s)")
            self._open = False

    def ready(self, url: str, seconds: float, where: dict[str, str]) -> None:
        if self._json:
            self._log.info("Caravan is ready", url=url, seconds=round(seconds, 2), **where)
            return
        self._write(f"\n  Caravan is ready after {seconds:.1f} s: {url}\n")
        for name, path in where.items():
            self._write(f"    {name:<9} {path}")
        self._write("\n  Ctrl-C stops it.")

    def warn(self, what: str, **facts: object) -> None:
        if self._json:
            self._log.warning(what, **facts)
        else:
            told = ", ".join(f"{name} {value}" for name, value in facts.items())
            self._write(f"  {what}: {told}" if told else f"  {what}")

    def stopping(self) -> None:
        if not self._json:
            self._write("\n  Stopping ... ", end="")
            self._open = True

    def stopped(self) -> None:
        if self._json:
            self._log.info("Caravan has stopped")
        else:
            self._write("stopped.")

    def _write(self, text: str, end: str = "\n") -> None:
        if self._open and end == "\n" and text.startswith("  "):
            text = "\n" + text
            self._open = False
        sys.stdout.write(text + end)
        sys.stdout.flush()
