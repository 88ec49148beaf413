"""Commands about the installation itself: migrate, doctor."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import psycopg

from caravan import telemetry
from caravan.cli.options import database_settings, fail, fail_for_lack_of_database
from caravan.cli.output import show
from caravan.db.migrate import SchemaProblem
from caravan.db.migrate import migrate as apply_migrations


def migrate(data: Path | None, *, as_json: bool) -> int:
    settings = database_settings(data)
    assert settings.postgres_url is not None
    telemetry.configure_logging(json=settings.log_json, stream=sys.stderr, level="WARNING")
    try:
        # Its lock is a session's: not through a pooler in transaction mode.
        applied = asyncio.run(apply_migrations(settings.postgres_direct_url or settings.postgres_url))
    except SchemaProblem as error:
        fail(str(error))
    except psycopg.OperationalError as error:
        fail_for_lack_of_database(data, error)
    show({"applied": applied}, as_json=as_json, text=", ".join(applied) or "The schema is up to date.")
    return 0
