"""What every process of ours does once it has imported what it needs."""

from __future__ import annotations

import asyncio
import faulthandler
import gc
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

COLLECT_AFTER_OBJECTS = 10_000  # Python's own: 700, which a page of events makes many hundred times over
AWAKE_SECONDS = 5.0
FROZEN_SECONDS = 60.0


def calm_collector() -> None:
    """Let Python look for cycles of garbage less often, and never again through what was imported.

    Our code makes hardly any cycles, but many objects: a quarter of a worker's time went into looking for them.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(COLLECT_AFTER_OBJECTS, 10, 10)


@asynccontextmanager
async def ended_if_frozen() -> AsyncGenerator[None]:
    """End this process, with every thread's stack on stderr, once its loop has not come round for a minute.

    The one who watches is no Python: it also acts where a library waits for ever and holds the interpreter, so that
    nothing of ours runs any more, while its other threads go on telling Kafka that all is well (see kafka_reader).
    """

    async def stay_awake() -> None:
        while True:
            faulthandler.dump_traceback_later(FROZEN_SECONDS, exit=True)
            await asyncio.sleep(AWAKE_SECONDS)

    staying = asyncio.create_task(stay_awake(), name="stay awake")
    try:
        yield
    finally:
        staying.cancel()
        faulthandler.cancel_dump_traceback_later()
