"""`caravan up`, for real: start, stop, what is in the way, and what is killed."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.request import urlopen

import psycopg
import pytest

from caravan.apps import control
from caravan.apps.children import BACKOFF_SECONDS_MAX, Child
from caravan.db.embedded import EmbeddedPostgres
from harness.processes import free_port
from tests.apps.running import Up, caravan, lives, until

Start = Callable[..., Up]


@pytest.fixture
def start(data_dir: Path) -> Iterator[Start]:
    """Starts `caravan up` on the test's folder; whatever is left of it afterwards is ended."""
    started: list[Up] = []

    def start(*arguments: str, port: int | None = None, **env: str) -> Up:
        up = Up(data_dir, *arguments, port=port, **env)
        started.append(up)
        return up

    yield start
    for up in started:
        if up.process.poll() is None:
            up.stop()
    left = EmbeddedPostgres(data_dir)  # by one that was killed
    if left.is_running():
        left.start()
        left.stop()


def postmaster(data: Path) -> int:
    return int((EmbeddedPostgres(data).home / "data" / "postmaster.pid").read_text().split()[0])


def test_it_starts_from_nothing_and_stops_in_order_leaving_nothing(start: Start, data_dir: Path) -> None:
    up = start().wait_ready()
    assert up.get("/readyz") == (200, {"status": "ready", "problems": []})
    assert up.get("/healthz")[0] == 200
    assert oct((data_dir / "control.sock").stat().st_mode & 0o777) == "0o600"
    figures = urlopen(f"{up.url}/metrics", timeout=10).read().decode()  # noqa: S310
    assert 'caravan_build_info{build="' in figures
    assert all(f'process="{process}"' in figures for process in ("web", "workers"))
    everybody = [*up.children().values(), postmaster(data_dir)]

    seconds = up.stop()

    assert up.process.returncode == 0, up.log
    assert seconds < 5
    assert not [pid for pid in everybody if lives(pid)]
    assert "Traceback" not in up.log
    for label in ("PurchaseWorker", "AllocationWorker", "SessionWorker", "CacheWorker"):
        assert f"[{label}] Initialized" in up.log
        assert f"[{label}] Started" in up.log


def test_a_stop_in_the_middle_of_the_start_is_a_clean_stop(start: Start, data_dir: Path) -> None:
    up = start()
    until(lambda: (data_dir / "postgres").exists() or up.process.poll() is not None, "the start of the database")

    assert up.stop() < 5
    assert up.process.returncode == 0, up.log
    assert not EmbeddedPostgres(data_dir).is_running()


def test_a_taken_port_is_one_line_and_starts_nothing(data_dir: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]

        for folder in (data_dir, data_dir / "new"):
            refused = caravan("up", "--data", folder, "--port", port)

            assert (refused.returncode, refused.stdout) == (1, "")
            assert refused.stderr.count("\n") == 1
            assert f"Port {port} on 127.0.0.1 cannot be used" in refused.stderr

    assert not (data_dir / "postgres").exists()
    assert not (data_dir / "new").exists()


def test_a_process_that_cannot_start_says_why_in_one_line(data_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "uvicorn.py").write_text("raise RuntimeError('no server on this machine')")

    refused = caravan("up", "--data", data_dir, "--port", free_port(), PYTHONPATH=str(tmp_path))

    assert refused.returncode == 1
    assert refused.stderr.splitlines()[-1] == (
        "caravan: The services did not start: the process of the web ended (RuntimeError: no server on this machine)"
    )


def test_a_taken_folder_is_one_line_and_disturbs_nobody(start: Start, data_dir: Path) -> None:
    up = start().wait_ready()

    refused = caravan("up", "--data", data_dir, "--port", free_port())

    assert refused.returncode == 1
    assert refused.stderr == (
        f"caravan: {data_dir} is in use by another caravan (process {up.process.pid}):"
        " stop that one, or choose another folder with --data.\n"
    )
    assert up.get("/readyz")[0] == 200


def test_somebodys_own_postgresql_is_used_and_left_running(start: Start, data_dir: Path, database_url: str) -> None:
    up = start(POSTGRES_URL=database_url).wait_ready()

    assert up.get("/readyz")[0] == 200
    assert not (data_dir / "postgres").exists()
    assert up.stop() < 5
    with psycopg.connect(database_url) as connection:
        assert connection.execute("select count(*) from workers").fetchone() == (0,)


def test_a_database_that_does_not_answer_is_one_line(data_dir: Path) -> None:
    refused = caravan(
        "up", "--data", data_dir, "--port", free_port(), POSTGRES_URL="postgresql://u:hunter2@127.0.0.1:1/db"
    )

    assert refused.returncode == 1
    assert refused.stderr.startswith("caravan: POSTGRES_URL: the database does not answer")
    assert refused.stderr.count("\n") == 1
    assert "hunter2" not in refused.stderr + refused.stdout


def test_a_killed_supervisor_takes_its_children_along_and_its_database_is_adopted(start: Start, data_dir: Path) -> None:
    first = start().wait_ready()
    children, database = first.children(), postmaster(data_dir)

    first.kill()

    for role, pid in children.items():
        until(lambda pid=pid: not lives(pid), f"the end of the {role}")
    assert lives(database)

    second = start(port=first.port).wait_ready()

    assert postmaster(data_dir) == database
    second.stop()
    assert not lives(database)


def test_the_next_one_waits_for_the_children_of_a_killed_one(start: Start) -> None:
    first = start().wait_ready()
    first.kill()

    second = start(port=first.port).wait_ready()  # at once, on the same port and folder

    assert second.get("/readyz")[0] == 200


def test_a_killed_database_is_started_again_and_the_services_go_on(start: Start, data_dir: Path) -> None:
    up = start().wait_ready()
    killed, children = postmaster(data_dir), up.children()

    os.kill(killed, signal.SIGKILL)

    until(lambda: not lives(killed), "the end of the database")
    until(lambda: up.get("/readyz")[0] == 200 and postmaster(data_dir) != killed, "another database", 30)
    assert up.children() == children
    assert "the database ended, starting it again" in up.log


@pytest.mark.parametrize("role", ["web", "workers"])
def test_a_killed_child_is_started_again(start: Start, role: str) -> None:
    up = start().wait_ready()
    before = up.children()

    os.kill(before[role], signal.SIGKILL)

    def back() -> bool:
        pid = up.children()[role]
        return pid not in (None, before[role]) and up.get("/readyz")[0] == 200

    until(back, f"another {role}")
    assert "process ended, starting it again" in up.log


def test_a_worker_is_stopped_and_started_at_the_door_and_readyz_says_so(start: Start) -> None:
    up = start().wait_ready()

    assert up.ask("stop", "purchase-worker")["services"]["purchase-worker"]["state"] == "stopped"

    status, said = up.get("/readyz")
    assert status == 503
    assert said["problems"] == ["purchase-worker is not running; 0 events wait"]

    # A stopped one stays stopped when its process is started again.
    before = up.children()["workers"]
    os.kill(before, signal.SIGKILL)
    until(lambda: up.children()["workers"] not in (None, before), "other workers")
    assert up.ask("status")["services"]["purchase-worker"]["state"] == "stopped"

    up.ask("start", "purchase-worker")
    until(lambda: up.get("/readyz")[0] == 200, "readiness")


def test_the_door_refuses_what_it_does_not_know(start: Start) -> None:
    up = start().wait_ready()

    assert up.ask("stop", "web")["ok"] is False
    assert up.ask("explode")["ok"] is False
    assert up.get("/readyz")[0] == 200


def test_only_repeated_quick_crashes_are_made_to_wait() -> None:
    child = Child("web", pass_fds=(), output=None, report=lambda _what, _facts: None)
    pauses: list[float] = []
    for child._quick_crashes in range(12):
        pauses.append(child._pause_seconds())

    assert pauses[:5] == [0, 0, 0, 1, 2]
    assert pauses[-1] == BACKOFF_SECONDS_MAX


async def test_a_machine_that_can_start_no_process_for_a_moment_is_asked_again() -> None:
    spawned = asyncio.Event()

    class Unlucky(Child):
        tries = 0

        async def spawn(self) -> None:
            self.tries += 1
            if self.tries == 2:
                raise BlockingIOError("no more processes")
            await super().spawn()
            if self.tries == 3:
                spawned.set()

    child = Unlucky("web", pass_fds=(), output=None, report=lambda _what, _facts: None)
    await child.spawn()
    keeping = asyncio.create_task(child.keep(lambda: asyncio.sleep(0)))
    child.end()
    try:
        async with asyncio.timeout(10):
            await asyncio.wait({keeping, asyncio.create_task(spawned.wait())}, return_when=asyncio.FIRST_COMPLETED)
        assert spawned.is_set()
    finally:
        keeping.cancel()
        await child.stop(1)


def test_the_demo_leaves_somebodys_own_data_alone(start: Start, data_dir: Path) -> None:
    up = start().wait_ready()
    with psycopg.connect(EmbeddedPostgres(data_dir).url) as connection:
        connection.execute(
            "insert into courses (id, title, category, session_minutes) values (gen_random_uuid(), 'X', 'Y', 60)"
        )
    up.stop()

    refused = caravan("up", "--demo", "--data", data_dir, "--port", free_port())

    assert refused.returncode == 1
    assert refused.stderr == (
        "caravan: The services did not start: This database has data of its own: leave out --demo,"
        " or choose another with --data.\n"
    )
    assert not (data_dir / "demo.json").exists()


def test_a_long_folder_name_does_not_keep_the_door_shut(data_dir: Path) -> None:
    folder = data_dir / ("a" * 100)
    folder.mkdir()
    with control.listen(folder / "control.sock") as server:
        answering = threading.Thread(target=_answer_once, args=[server])
        answering.start()
        assert control.ask(folder / "control.sock", command="status") == {"ok": True}
        answering.join()


def _answer_once(server: socket.socket) -> None:
    client, _address = server.accept()
    with client:
        client.recv(1000)
        client.sendall(b'{"ok": true}\n')
