"""The command line of the proof and of the benchmarks: which part, how much of it, with which seed."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Iterable
from types import FrameType
from typing import NoReturn

SEED_MAX = 2**63 - 1
EXIT_USAGE = 2


class Parser(argparse.ArgumentParser):
    """Refuses in one line."""

    def __init__(self, name: str, description: str, parts: Iterable[str]) -> None:
        super().__init__(prog=name, description=description)
        names = [*parts, "all"]
        self.add_argument("--part", choices=names, default="all", metavar="|".join(names))
        self.add_argument("--scale", choices=("small", "full"), default="small", metavar="small|full")
        self.add_argument("--seed", type=_seed, default=1, help="a whole number; the same seed does the same")

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}", file=sys.stderr)
        raise SystemExit(EXIT_USAGE)


def _seed(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) > SEED_MAX:
        raise argparse.ArgumentTypeError(f"{text!r} is no seed: give a whole number from 0")
    return int(text)


def run(main: Callable[[], int]) -> NoReturn:
    """Exit with what `main` answers; the servers that it started end with it, also at SIGTERM and Ctrl-C."""
    signal.signal(signal.SIGTERM, _end)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def _end(_signal: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + signal.SIGTERM)
