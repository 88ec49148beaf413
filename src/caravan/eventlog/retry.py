"""How long to wait before trying again: pure functions."""

from __future__ import annotations

import random

POISON_ATTEMPTS = 3  # how often one event alone may fail with a bug before it is parked


def backoff_seconds(attempt: int, *, base: float = 0.05, cap: float = 5.0) -> float:
    """0 to min(cap, base * 2^attempt), full jitter: a fleet must not come back in step. Attempts count from 1."""
    return random.uniform(0, min(cap, base * 2.0 ** min(attempt, 16)))  # noqa: S311 - jitter
