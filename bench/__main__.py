"""`python -m bench`: run one part, or all; write build/bench.json and tell the terminal."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import traceback
from typing import Any

import structlog

from bench.check import Wrong
from bench.machine import Steal, describe_machine
from bench.parts import Context, Result, list_parts, load_part
from bench.report import REPORT, judge, merge_report
from bench.server import PREFIX
from harness.command import Parser, run
from harness.postgres import sweep

STEAL_PERCENT_MAX = 5
EXIT_WRONG = 1


def main() -> int:
    chosen = Parser("bench", "Measure what Caravan carries.", list_parts()).parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    sweep(PREFIX)
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


def _say_machine(machine: dict[str, Any]) -> None:
    build = f"{machine['build']}{' and changes' if machine['changed_since_build'] else ''}"
    print(f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB")
    print(f"PostgreSQL {machine['postgres']}, Python {machine['python']}, build {build}")
    print(f"{machine['fdatasync_per_second']} fdatasync/s; load before: {machine['load_before']}")
    print("settings: " + ", ".join(f"{k}={v}" for k, v in machine["postgres_settings"].items()))


if __name__ == "__main__":
    run(main)
