"""`python -m verify`: run one part, or all, and say what was found."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import time
from types import FrameType
from typing import NoReturn

from verify.parts import Context, list_parts, load_part
from verify.quiet import be_quiet
from verify.report import REPORT, PartResult, merge_report, table
from verify.scratch import ScratchServer, sweep

SCALES = ("small", "full")
SEED_MAX = 2**63 - 1
EXIT_FOUND = 1
EXIT_USAGE = 2


class Parser(argparse.ArgumentParser):
    """Refuses in one line."""

    def error(self, message: str) -> NoReturn:
        print(f"verify: {message}", file=sys.stderr)
        raise SystemExit(EXIT_USAGE)


def read_arguments(arguments: list[str]) -> argparse.Namespace:
    parts = list_parts()
    parser = Parser(prog="verify", description="Prove what Caravan promises.")
    parser.add_argument("--part", choices=[*parts, "all"], default="all", metavar="|".join([*parts, "all"]))
    parser.add_argument("--scale", choices=SCALES, default="small", metavar="small|full")
    parser.add_argument("--seed", type=seed, default=1, help="a whole number; the same seed does the same")
    parser.add_argument("--case", help="one case of one part, as a failure names it")
    chosen = parser.parse_args(arguments)
    if chosen.case and chosen.part == "all":
        parser.error("--case needs --part: a case is one part's")
    return chosen


def seed(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) > SEED_MAX:
        raise argparse.ArgumentTypeError(f"{text!r} is no seed: give a whole number from 0")
    return int(text)


def run_part(name: str, scale: str, seed: int, case: str | None) -> PartResult:
    """One part on a server of its own."""
    started = time.monotonic()
    with ScratchServer() as server:
        context = Context(name, scale, seed, server, case)
        result = asyncio.run(_run(context))
    result.seconds = time.monotonic() - started
    return result


async def _run(context: Context) -> PartResult:
    return await load_part(context.part)(context)


def _end(_signal: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + signal.SIGTERM)


def main(arguments: list[str] | None = None) -> int:
    chosen = read_arguments(sys.argv[1:] if arguments is None else arguments)
    signal.signal(signal.SIGTERM, _end)  # so that the scratch server ends with us
    be_quiet()
    sweep()
    results: list[PartResult] = []
    for name in list_parts() if chosen.part == "all" else [chosen.part]:
        print(f"{name} ...", file=sys.stderr, flush=True)
        results.append(run_part(name, chosen.scale, chosen.seed, chosen.case))
        if not chosen.case:
            merge_report(results[-1:])
    print(table(results))
    if not chosen.case:
        print(f"written to {REPORT}")
    return 0 if all(result.passed for result in results) else EXIT_FOUND


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
