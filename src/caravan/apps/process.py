"""What every process of ours does once it has imported what it needs."""

from __future__ import annotations

import gc

COLLECT_AFTER_OBJECTS = 10_000  # Python's own: 700, which a page of events makes many hundred times over


def calm_collector() -> None:
    """Let Python look for cycles of garbage less often, and never again through what was imported.

    Our code makes hardly any cycles, but many objects: a quarter of a worker's time went into looking for them.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(COLLECT_AFTER_OBJECTS, 10, 10)
