"""A process of a peer: `python -m bench.peers.station NAME prepare|work`, its order on standard input as one JSON line.

A worker answers `ready`, begins when the next line comes, and is killed when what counts is in the database.
"""

from __future__ import annotations

import asyncio
import json
import sys
from importlib import import_module
from typing import cast
from uuid import UUID

from bench.peers.adapter import Adapter


def main() -> None:
    name, what = sys.argv[1:]
    order = json.loads(sys.stdin.readline())
    adapter = cast(Adapter, import_module(f"bench.peers.{name}"))
    if what == "prepare":
        payments = [UUID(text) for text in order["payments"]]
        asyncio.run(adapter.prepare(order["url"], payments, order["way"], order["redis"]))
    else:
        adapter.work(order["url"], order["way"], order["redis"], _wait_for_start)


def _wait_for_start() -> None:
    print("ready", flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    main()
