"""`caravan serve NAME`: one service in a process of its own, on a database that somebody else runs."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from caravan.apps.services import SERVICES, WEB
from harness.processes import free_port
from tests.apps.running import caravan, environment, until


class Served:
    """One `caravan serve NAME` with a port."""

    def __init__(self, name: str, database_url: str, log: Path) -> None:
        self.port = free_port()
        self.log = log
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "caravan", "serve", name, "--port", str(self.port)],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment(POSTGRES_URL=database_url),
            )

    def get(self, path: str) -> tuple[int, dict[str, str], str]:
        try:
            with urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as answer:
                return answer.status, dict(answer.headers), answer.read().decode()
        except HTTPError as error:
            return error.code, dict(error.headers), error.read().decode()
        except OSError:
            assert self.process.poll() is None, self.log.read_text()
            return 0, {}, ""

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(10)


@pytest.fixture
def serve(database_url: str, tmp_path: Path) -> Iterator[Callable[[str], Served]]:
    started: list[Served] = []

    def start(name: str) -> Served:
        served = Served(name, database_url, tmp_path / f"{name}.log")
        started.append(served)
        until(lambda: served.get("/healthz")[0] == 200, f"{name} answers")
        return served

    yield start
    for served in started:
        if served.process.poll() is None:
            served.stop()


@pytest.mark.parametrize(
    ("name", "its", "not_its"),
    [
        ("payment-service", "/api/v1/courses", "/api/v1/admin/overview"),
        ("admin-service", "/api/v1/admin/overview", "/api/v1/courses"),
    ],
)
def test_a_web_service_answers_for_its_own_addresses(
    serve: Callable[[str], Served], name: str, its: str, not_its: str
) -> None:
    served = serve(name)

    assert served.get("/readyz")[0] == 200  # the workers are not its business
    status, headers, _body = served.get(its)
    assert status in (200, 401)
    assert "server" not in {header.lower() for header in headers}
    assert served.get(not_its)[0] == 404
    document: dict[str, Any] = json.loads(served.get("/openapi.json")[2])
    assert its in document["paths"]
    assert not_its not in document["paths"]
    assert "caravan_lag_messages" in served.get("/metrics")[2]
    assert served.stop() == 0


def test_a_worker_shows_its_progress(serve: Callable[[str], Served], database_url: str) -> None:
    served = serve("purchase-worker")

    until(lambda: served.get("/readyz")[0] == 200, "it takes its work")
    with psycopg.connect(database_url) as connection:
        assert connection.execute("select service from workers").fetchall() == [("purchase-worker",)]
    assert served.get("/api/v1/courses")[0] == 404
    assert served.stop() == 0
    with psycopg.connect(database_url) as connection:
        assert connection.execute("select service from workers").fetchall() == []


@pytest.mark.parametrize("name", ["student-service", "session-worker", "reconciler"])
def test_it_says_where_it_answers_and_that_it_stopped(
    serve: Callable[[str], Served], name: str, database_url: str
) -> None:
    served = serve(name)
    until(lambda: "Service is ready" in served.log.read_text(), "its line")
    assert served.stop() == 0

    said = served.log.read_text()
    (ready,) = [line for line in said.splitlines() if "Service is ready" in line]
    host = conninfo_to_dict(database_url)
    assert name in ready
    assert f"http://127.0.0.1:{served.port}" in ready
    assert f"{host['host']}:{host['port']}/{host['dbname']}" in ready
    assert str(host["user"]) not in ready.replace(str(host["host"]), "")
    assert said.count("Service stopped") == 1
    assert ("[Reconciler] Stopped" in said) == (name == "reconciler")


@pytest.mark.parametrize("name", ["payment-service", "cache-worker"])
def test_a_port_that_is_taken_is_refused_as_up_does(
    serve: Callable[[str], Served], name: str, database_url: str
) -> None:
    port = serve("student-service").port

    refused = caravan("serve", name, "--port", port, POSTGRES_URL=database_url)

    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr == (
        f"caravan: {name} cannot start: Port {port} on 127.0.0.1 cannot be used (Address already in use):"
        " stop what runs there, or choose another one with --port.\n"
    )


def test_the_names_are_listed() -> None:
    without, helped = caravan("serve"), caravan("serve", "--help")

    assert (without.returncode, helped.returncode) == (2, 0)
    for name in SERVICES:
        assert name in " ".join(without.stderr.split())
        assert name in " ".join(helped.stdout.split())


def test_a_database_without_our_schema_is_one_line(postgres_url: str) -> None:
    refused = caravan("serve", "purchase-worker", POSTGRES_URL=postgres_url)

    assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (1, "", 1)
    assert "run `caravan migrate`" in refused.stderr


def test_every_route_belongs_to_one_service() -> None:
    named = [module for name in WEB for module in SERVICES[name].routers]

    assert len(named) == len(set(named))
