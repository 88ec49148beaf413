"""How each worker stands, in a word and a sentence: idle with nothing waiting, behind, down, or not to be told.

A row in `workers` alone can't tell them apart: a silent worker whose group has nothing to do is another matter than one
for whom events wait. So rows and lag are looked at together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from caravan.eventlog.lag import GroupLag
from caravan.eventlog.workers import WorkerRow

STILL_SECONDS = 10.0  # idle, a worker comes round every second
RECONCILER = "reconciler"  # hears no events: nothing can wait for it


@dataclass(frozen=True, slots=True)
class Standing:
    """A worker, or (without one) a service that has none. `state`: idle, working, behind, failing, down, unknown."""

    service: str
    worker: WorkerRow | None
    state: str
    sentence: str


def stand(workers: Sequence[WorkerRow], lags: Sequence[GroupLag]) -> list[Standing]:
    """Every worker known, and every service that should have one and has none."""
    by_group = {lag.group: lag for lag in lags}
    alive = {worker.service for worker in workers if worker.alive}
    found = [
        Standing(worker.service, worker, *_of(worker, by_group, replaced=worker.service in alive)) for worker in workers
    ]
    known = {worker.service for worker in workers}
    found += [
        Standing(lag.service, None, "down" if lag.messages else "unknown", lag.sentence)
        for lag in lags
        if lag.service not in known
    ]
    if RECONCILER not in known:
        said = f"Unknown: no {RECONCILER} has told of itself. Start it: caravan serve {RECONCILER}"
        found.append(Standing(RECONCILER, None, "unknown", said))
    # Of a service, whoever is alive first: the others are history.
    return sorted(found, key=lambda each: (each.service, not (each.worker and each.worker.alive), _name(each)))


def _name(each: Standing) -> str:
    return each.worker.name if each.worker else ""


def _of(worker: WorkerRow, lags: Mapping[str, GroupLag], *, replaced: bool) -> tuple[str, str]:
    lag = lags.get(worker.consumer_group or "")
    if not worker.alive:
        unseen = f"not heard of for {worker.heartbeat_age_seconds:.0f} s"
        if replaced:
            return "gone", f"Gone: {unseen}; another {worker.service} has taken over."
        if lag is not None and lag.messages:
            return "down", f"Down? It was {unseen}, and {lag.waiting} for it. Start it: caravan serve {worker.service}"
        return "unknown", f"Unknown: {unseen}, and nothing waits for it that would show. Look at its log."
    if worker.failing_since:
        return "failing", f"Failing, and trying again: {worker.last_error}"
    if worker.progress_age_seconds > STILL_SECONDS:
        return "behind", f"Behind: it beats, but has not come round for {worker.progress_age_seconds:.0f} s."
    if lag is None:
        return "idle", f"Idle: it last came round {worker.progress_age_seconds:.0f} s ago."
    return lag.state, lag.sentence
