"""`caravan demo`: the rehearsal, told as it goes."""

from __future__ import annotations

import sys
from pathlib import Path

from caravan.apps.control import NotRunning
from caravan.apps.folder import DataFolder
from caravan.apps.rehearsal import Rehearsal, Telling, rehearse
from caravan.apps.stage import NotAsExpected, Stage
from caravan.cli.database import run
from caravan.cli.options import FINE, FOUND_PROBLEMS, fail, settings_of
from caravan.cli.output import show
from caravan.db import Database
from caravan.settings import Settings


def demo(data: Path | None, *, as_json: bool) -> int:
    folder = DataFolder(settings_of(data).data_dir)
    document = folder.read_demo()
    if "rehearsal" not in document:
        fail(f"{folder.demo} is not there: start the demo with `caravan up --demo`.")

    async def work(db: Database, _settings: Settings) -> Rehearsal:
        stage = Stage(db, document, folder.control)
        return await rehearse(stage, (lambda _telling: None) if as_json else _tell)

    try:
        rehearsal = run(data, work)
    except (NotAsExpected, NotRunning) as error:
        fail(str(error))
    good = sum(each.ok for each in rehearsal.incidents)
    show(
        {
            "run": rehearsal.run,
            "ok": rehearsal.ok,
            "seconds": round(rehearsal.seconds, 2),
            "incidents": rehearsal.incidents,
        },
        as_json=as_json,
        text=f"\n{good} of {len(rehearsal.incidents)} incidents ended as they should, in {rehearsal.seconds:.1f} s.",
    )
    return FINE if rehearsal.ok else FOUND_PROBLEMS


def _tell(telling: Telling) -> None:
    mark = "ok    " if telling.ok else "FAILED"
    lines = [f"\n{mark}  {telling.title} (report {telling.report}): {telling.outcome} after {telling.seconds:.1f} s"]
    lines.append(f"        payment {telling.payment_id}")
    lines += [f"        - {step}" for step in telling.steps]
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()
