"""`python -m bench`: run one part, or all; write build/bench.json and tell the terminal."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import signal
import sys
import time
import traceback
from types import FrameType
from typing import Any, NoReturn

import structlog

from bench.check import Wrong
from bench.machine import Steal, describe_machine
from bench.parts import Context, Result, list_parts, load_part
from bench.report import REPORT, judge, merge_report
from bench.server import sweep

SCALES = ("small", "full")
STEAL_PERCENT_MAX = 5
EXIT_WRONG = 1
EXIT_USAGE = 2


class Parser(argparse.ArgumentParser):
    """Refuses in one line."""

    def error(self, message: str) -> NoReturn:
        print(f"bench: {message}", file=sys.stderr)
        raise SystemExit(EXIT_USAGE)


def read_arguments(arguments: list[str]) -> argparse.Namespace:
    parts = list_parts()
    parser = Parser(prog="bench", description="Measure what Caravan carries.")
    parser.add_argument("--part", choices=[*parts, "all"], default="all", metavar="|".join([*parts, "all"]))
    parser.add_argument("--scale", choices=SCALES, default="small", metavar="small|full")
    parser.add_argument("--seed", type=int, default=1, help="a whole number; the same seed makes the same marketplace")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    chosen = read_arguments(sys.argv[1:] if arguments is None else arguments)
    signal.signal(signal.SIGTERM, _end)  # so that the servers end with us
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    sweep()
    machine = describe_machine()
    _say_machine(machine)
    failed = 0
    for name in list_parts() if chosen.part == "all" else [chosen.part]:
        print(f"\n{name} ({chosen.scale}) ...", flush=True)
        began = time.monotonic()
        try:
            with Steal() as steal:
                result = asyncio.run(_run(Context(name, chosen.scale, chosen.seed)))
        except Wrong as wrong:
            print(f"  no figure: {wrong}")
            failed += 1
            continue
        except Exception:  # one part's trouble is not the others'
            traceback.print_exc()
            failed += 1
            continue
        result.figures |= {"seconds": round(time.monotonic() - began, 1), "steal_percent": steal.percent}
        merge_report(name, chosen.scale, chosen.seed, result, machine)
        print("\n".join(f"  {line}" for line in result.lines))
        if steal.percent is not None and steal.percent > STEAL_PERCENT_MAX:
            print(f"  BEWARE: other machines took {steal.percent} % of the processors' time meanwhile")
    print("\n" + "\n".join(judge(json.loads(REPORT.read_text())["ratios"])) if REPORT.exists() else "")
    print(f"written to {REPORT}")
    return EXIT_WRONG if failed else 0


async def _run(context: Context) -> Result:
    return await load_part(context.part)(context)


def _end(_signal: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + signal.SIGTERM)


def _say_machine(machine: dict[str, Any]) -> None:
    build = f"{machine['build']}{' and changes' if machine['changed_since_build'] else ''}"
    print(f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB")
    print(f"PostgreSQL {machine['postgres']}, Python {machine['python']}, build {build}")
    print(f"{machine['fdatasync_per_second']} fdatasync/s; load before: {machine['load_before']}")
    print("settings: " + ", ".join(f"{k}={v}" for k, v in machine["postgres_settings"].items()))

if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
