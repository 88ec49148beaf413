"""POSTGRES_URL that leads nowhere, or whose server doesn't let us in: one line, and patience where it can help."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from time import monotonic

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from caravan.settings import BadSettings, load_settings
from harness.processes import free_port
from tests.apps.running import caravan, environment, until

WRONG: dict[str, Callable[[str], str]] = {
    "password": lambda url: make_conninfo(url, password="hunter2"),
    "no password": lambda url: " ".join(f"{k}={v}" for k, v in conninfo_to_dict(url).items() if k != "password"),
    "user": lambda url: make_conninfo(url, user="nobody", password="hunter2"),
    "database": lambda url: make_conninfo(url, dbname="nowhere"),
}


@pytest.mark.parametrize(
    ("command", "wrong"),
    [
        *((["serve", "purchase-worker"], wrong) for wrong in WRONG),
        (["serve", "payment-service"], "password"),
        (["up"], "password"),
        (["lag"], "password"),
    ],
)
def test_what_no_waiting_helps_is_one_line_at_once(
    database_url: str, tmp_path: Path, command: list[str], wrong: str
) -> None:
    started = monotonic()
    data = [] if command[0] == "lag" else ["--port", str(free_port())]
    refused = caravan(*command, "--data", tmp_path / "data", *data, POSTGRES_URL=WRONG[wrong](database_url))

    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1), refused.stderr
    assert "POSTGRES_URL: the database does not answer (" in refused.stderr
    assert "trying again" not in refused.stdout
    told = refused.stdout + refused.stderr
    assert "hunter2" not in told
    assert "Traceback" not in told
    assert monotonic() - started < 30


def test_a_service_waits_for_a_database_that_is_not_there_yet(database_url: str, tmp_path: Path) -> None:
    name = sql.Identifier(str(conninfo_to_dict(database_url)["dbname"]))
    log = tmp_path / "log"
    with psycopg.connect(make_conninfo(database_url, dbname="postgres"), autocommit=True) as elsewhere:
        elsewhere.execute(sql.SQL("alter database {} allow_connections false").format(name))
        with log.open("w") as output:
            served = subprocess.Popen(
                [sys.executable, "-m", "caravan", "serve", "purchase-worker"],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment(POSTGRES_URL=database_url),
            )
        try:
            until(lambda: "trying again for" in log.read_text(), "it says what it waits for")
            elsewhere.execute(sql.SQL("alter database {} allow_connections true").format(name))
            until(lambda: "[PurchaseWorker] Started" in log.read_text(), "it goes on by itself")
        finally:
            served.terminate()
            assert served.wait(10) == 0
    assert log.read_text().count("POSTGRES_URL: the database does not answer") == 1


@pytest.mark.parametrize(
    "url", ["postgresql://u:hunter2 x@h/db", "postgresql://u:hunter2%zz@h/db", "host=h password=hunter2 port"]
)
def test_an_address_that_cannot_be_one_is_refused_without_showing_its_password(url: str) -> None:
    with pytest.raises(BadSettings, match="POSTGRES_URL: must look like") as refused:
        load_settings({"POSTGRES_URL": url})
    assert "hunter2" not in str(refused.value)
