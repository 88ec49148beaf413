"""`python -m verify`: run one part, or all, and say what was found."""

from __future__ import annotations

import argparse
import asyncio
import faulthandler
import sys
import time

from harness.command import Parser, run
from harness.postgres import sweep
from verify.parts import Context, list_parts, load_part
from verify.quiet import be_quiet
from verify.report import REPORT, PartResult, merge_report, table
from verify.scratch import PREFIX, ScratchServer

EXIT_FOUND = 1
STUCK_SECONDS = {"small": 600, "full": 3600}  # then a part ends with every thread's stack, whatever it waits for


def read_arguments() -> argparse.Namespace:
    parser = Parser("verify", "Prove what Caravan promises.", list_parts())
    parser.add_argument("--case", help="one case of one part, as a failure names it")
    chosen = parser.parse_args()
    if chosen.case and chosen.part == "all":
        parser.error("--case needs --part: a case is one part's")
    return chosen


def run_part(name: str, scale: str, seed: int, case: str | None) -> PartResult:
    """One part on a server of its own."""
    started = time.monotonic()
    faulthandler.dump_traceback_later(STUCK_SECONDS[scale], exit=True)
    with ScratchServer() as server:
        context = Context(name, scale, seed, server, case)
        result = asyncio.run(_run(context))
    faulthandler.cancel_dump_traceback_later()
    result.seconds = time.monotonic() - started
    return result


async def _run(context: Context) -> PartResult:
    return await load_part(context.part)(context)


def main() -> int:
    chosen = read_arguments()
    be_quiet()
    sweep(PREFIX)
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
    run(main)
