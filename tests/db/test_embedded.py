"""The embedded PostgreSQL, for real: every test here starts one of its own."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from caravan.db import embedded, embedded_binaries
from caravan.db.embedded import (
    EmbeddedPostgres,
    FolderInUse,
    FolderNotUsable,
    NoBinaries,
    NotInitialised,
    StartFailed,
    VersionMismatch,
    embedded_url,
)
from tests import needs

SOURCE = Path(embedded.__file__).parents[2]
# Starts the cluster in argv[1], says so, and waits for the end of its input.
# A shell starts what it runs in the background with the keyboard's interrupt ignored, and children inherit that.
SUPERVISOR = """
import signal
import sys
from pathlib import Path
from caravan.db.embedded import EmbeddedPostgres
signal.signal(signal.SIGINT, signal.default_int_handler)
cluster = EmbeddedPostgres(Path(sys.argv[1]))
print(cluster.start(), flush=True)
sys.stdin.read()
cluster.stop()
"""


@pytest.fixture
def cluster(data_dir: Path) -> Iterator[EmbeddedPostgres]:
    cluster = EmbeddedPostgres(data_dir)
    yield cluster
    cluster.stop()


@pytest.fixture
def supervisor(data_dir: Path) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Starts a process that runs the cluster, as `caravan up` does; returns when the server is up."""
    started: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", SUPERVISOR, str(data_dir)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        assert process.stdout
        assert process.stdout.readline().startswith("postgresql://")
        return process

    yield start
    for process in started:
        with process:
            pass  # closes its input and waits
    left = EmbeddedPostgres(data_dir)  # by one that was killed
    if left.is_running():
        left.start()
        left.stop()


@pytest.fixture
def program_dir() -> Iterator[Path]:
    """A folder for programs, which everybody may enter."""
    folder = Path(tempfile.mkdtemp(prefix="caravan-test-"))
    folder.chmod(0o711)
    yield folder
    shutil.rmtree(folder)


def ask(url: str, query: str) -> object:
    with psycopg.connect(url, autocommit=True) as connection:
        cursor = connection.execute(query.encode())
        row = cursor.fetchone() if cursor.description else None
    return row[0] if row else None


def postmaster_pid(cluster: EmbeddedPostgres) -> int:
    return int((cluster.home / "data" / "postmaster.pid").read_text().splitlines()[0])


def test_start_query_stop_and_start_again_keeps_data(cluster: EmbeddedPostgres) -> None:
    url = cluster.start()
    ask(url, "create table kept as select 42 as answer")
    assert cluster.is_running()
    assert embedded_url(cluster.data_dir) == url == cluster.url
    cluster.stop()

    assert not cluster.is_running()
    assert embedded_url(cluster.data_dir) is None
    assert cluster.url == url
    cluster.stop()  # again changes nothing

    assert cluster.start() == url
    assert ask(url, "select answer from kept") == 42


def test_is_safe_by_default(cluster: EmbeddedPostgres) -> None:
    url = cluster.start()
    for setting, value in {
        "fsync": "on",
        "synchronous_commit": "on",
        "data_checksums": "on",
        "listen_addresses": "",
        "TimeZone": "UTC",
        "server_encoding": "UTF8",
    }.items():
        assert ask(url, f"show {setting}") == value, setting
    password = cluster.home / "password"
    assert stat.S_IMODE(password.stat().st_mode) == 0o600
    wrong = url.replace(password.read_text(), "guess")
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(wrong)


def test_its_log_keeps_no_values(cluster: EmbeddedPostgres) -> None:
    url = cluster.start()
    ask(url, "create table seen (phone text unique)")
    ask(url, "insert into seen values ('98450-12345')")
    with pytest.raises(psycopg.errors.UniqueViolation):
        ask(url, "insert into seen values ('98450-12345')")
    assert "duplicate key" in cluster.log_path.read_text()
    assert "98450" not in cluster.log_path.read_text()


def test_nothing_there_yet(data_dir: Path) -> None:
    with pytest.raises(NotInitialised, match="run `caravan up` first"):
        _ = EmbeddedPostgres(data_dir).url
    assert embedded_url(data_dir / "missing") is None


def test_survives_kill_of_its_supervisor_and_is_taken_over(
    cluster: EmbeddedPostgres, supervisor: Callable[[], subprocess.Popen[str]]
) -> None:
    first = supervisor()
    pid = postmaster_pid(cluster)
    ask(cluster.url, "create table kept as select 1")
    first.kill()
    first.wait()
    assert ask(cluster.url, "select count(*) from kept") == 1

    url = cluster.start()
    assert postmaster_pid(cluster) == pid
    assert ask(url, "select count(*) from kept") == 1
    cluster.stop()
    assert not embedded._runs_in(pid, cluster.home / "data")


def test_interrupt_at_the_keyboard_does_not_reach_it(
    cluster: EmbeddedPostgres, supervisor: Callable[[], subprocess.Popen[str]]
) -> None:
    process = supervisor()
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does to its foreground group
    process.wait()
    assert ask(cluster.url, "select 1") == 1


def test_second_supervisor_on_one_folder_is_refused(
    cluster: EmbeddedPostgres, supervisor: Callable[[], subprocess.Popen[str]]
) -> None:
    first = supervisor()
    with pytest.raises(FolderInUse) as refusal:
        cluster.start()
    assert str(refusal.value) == (
        f"{cluster.data_dir} is in use by another caravan (process {first.pid}): stop that one,"
        " or choose another folder with --data."
    )
    cluster.stop()  # of one that was refused leaves the other's server alone
    assert ask(cluster.url, "select 1") == 1


def test_server_that_was_killed_recovers(cluster: EmbeddedPostgres) -> None:
    url = cluster.start()
    ask(url, "create table kept as select 1")
    os.kill(postmaster_pid(cluster), signal.SIGKILL)
    wait_until(lambda: not cluster.is_running())
    cluster.stop()
    assert ask(cluster.start(), "select count(*) from kept") == 1


def test_old_pid_file_with_a_number_that_is_now_somebody_elses(cluster: EmbeddedPostgres) -> None:
    cluster.start()
    pid_file = cluster.home / "data" / "postmaster.pid"
    old = pid_file.read_text()
    cluster.stop()
    owner = (cluster.home / "data").stat()
    with subprocess.Popen(["sleep", "60"], user=owner.st_uid if os.geteuid() == 0 else None) as bystander:
        socket_dir = cluster._socket_dir()
        socket_dir.mkdir(mode=0o700)
        for left in (pid_file, socket_dir / ".s.PGSQL.5432.lock"):
            left.write_text(old.replace(old.splitlines()[0], str(bystander.pid), 1))
        for left in (pid_file, socket_dir, *socket_dir.iterdir()):
            shutil.chown(left, owner.st_uid, owner.st_gid)
        try:
            assert not cluster.is_running()
            assert ask(cluster.start(), "select 1") == 1
            cluster.stop()
            assert bystander.poll() is None
        finally:
            bystander.kill()


def test_folder_removed_under_a_live_server_and_made_anew(
    data_dir: Path, supervisor: Callable[[], subprocess.Popen[str]]
) -> None:
    first = supervisor()
    orphan = postmaster_pid(EmbeddedPostgres(data_dir))
    socket_dir = EmbeddedPostgres(data_dir)._socket_dir()
    first.kill()
    first.wait()
    for part in data_dir.iterdir():
        shutil.rmtree(part)
    try:
        supervisor()  # the old server finds out by itself, within a minute
    finally:
        os.kill(orphan, signal.SIGQUIT)
        wait_until(lambda: not list(socket_dir.iterdir()))
        socket_dir.rmdir()


def test_half_made_cluster_of_a_killed_start_is_made_anew(cluster: EmbeddedPostgres) -> None:
    left_over = cluster.data_dir / "postgres" / "data.new"
    left_over.mkdir(parents=True)
    (left_over / "PG_VERSION").write_text("18\n")
    assert ask(cluster.start(), "select 1") == 1
    assert not left_over.exists()


def test_cluster_of_another_version_is_refused(cluster: EmbeddedPostgres) -> None:
    cluster.start()
    cluster.stop()
    (cluster.home / "data" / "PG_VERSION").write_text("99\n")
    with pytest.raises(VersionMismatch, match=r"of PostgreSQL 99, the programs here are \d+: set CARAVAN_POSTGRES_BIN"):
        cluster.start()


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (None, "No such file or directory"),
        ("#!/bin/sh\necho 'postgres (PostgreSQL) 14.9'\n", "PostgreSQL 14 in .* is too old"),
        ("#!/bin/sh\necho 'wrong libc' >&2; exit 1\n", "do not run as user .* \\(wrong libc\\)"),
    ],
)
def test_programs_that_do_not_serve(
    cluster: EmbeddedPostgres, program_dir: Path, monkeypatch: pytest.MonkeyPatch, program: str | None, message: str
) -> None:
    for name in ("postgres", "initdb") if program else ():
        (program_dir / name).write_text(program or "")
        (program_dir / name).chmod(0o755)
    monkeypatch.setenv(embedded_binaries.BIN_VARIABLE, str(program_dir))
    with pytest.raises(NoBinaries, match=message):
        cluster.start()


def test_start_that_fails_says_why_in_one_line(cluster: EmbeddedPostgres) -> None:
    cluster.start()
    cluster.stop()
    broken = EmbeddedPostgres(cluster.data_dir, extra_settings={"shared_buffers": "much"})
    with pytest.raises(StartFailed, match='invalid value for parameter "shared_buffers": "much"') as failure:
        broken.start()
    assert "\n" not in str(failure.value)
    assert ask(cluster.start(), "select 1") == 1  # the failed one let go of the folder


def test_folder_that_is_a_file(data_dir: Path) -> None:
    (data_dir / "file").touch()
    with pytest.raises(FolderNotUsable, match="file"):
        EmbeddedPostgres(data_dir / "file").start()


def test_socket_folder_laid_by_somebody_else_is_refused(cluster: EmbeddedPostgres) -> None:
    cluster.start()
    cluster.stop()
    folder = cluster._socket_dir()
    folder.mkdir()
    folder.chmod(0o777)
    try:
        with pytest.raises(FolderNotUsable, match="is not a private folder"):
            cluster.start()
    finally:
        folder.rmdir()


def test_long_folder_names_still_give_a_short_socket(data_dir: Path) -> None:
    cluster = EmbeddedPostgres(data_dir / ("long-" * 40) / ("name-" * 40))
    try:
        assert ask(cluster.start(), "select 1") == 1
    finally:
        cluster.stop()


def test_as_root_in_a_folder_that_nobody_else_may_enter(tmp_path: Path) -> None:
    needs.root()
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    cluster = EmbeddedPostgres(private / "data")
    try:
        ask(cluster.start(), "create table kept as select 1")
        assert cluster.home.parent == embedded_binaries.ROOT_HOME / "clusters"
        assert str(cluster.home) in (private / "data" / "postgres-is-elsewhere").read_text()
        assert stat.S_IMODE(private.stat().st_mode) == 0o700
        assert (cluster.home / "data").owner() in embedded_binaries.USERS_TO_RUN_AS
        cluster.stop()
        assert ask(cluster.start(), "select count(*) from kept") == 1
    finally:
        cluster.stop()
        if cluster.home.is_relative_to(embedded_binaries.ROOT_HOME):
            shutil.rmtree(cluster.home)


def test_programs_are_copied_where_everybody_may_enter(program_dir: Path) -> None:
    copy = embedded_binaries.copy_of_wheel(program_dir)
    initdb = embedded_binaries._in_wheel(copy) / "initdb"
    output = subprocess.run([initdb, "--version"], check=True, stdout=subprocess.PIPE).stdout
    assert output.startswith(b"initdb (PostgreSQL)")
    assert all(path.stat().st_mode & 0o005 == 0o005 for path in copy.rglob("*") if path.is_dir())
    assert embedded_binaries.copy_of_wheel(program_dir) == copy
    assert [path.name for path in program_dir.iterdir()] == [copy.name]  # no scratch left


def test_as_an_ordinary_user(program_dir: Path) -> None:
    """Root's test run repeats the start as `nobody`, everything in that user's own folder."""
    needs.root()
    nobody = pwd.getpwnam("nobody")
    own = program_dir / "own"
    own.mkdir()
    # The virtual environment may lie where nobody can't go: hand over copies of what the launcher imports.
    library = program_dir / "library"
    for package in ("psycopg", "psycopg_binary", "psycopg_binary.libs", "typing_extensions.py"):
        found = Path(psycopg.__file__).parents[1] / package
        if found.is_dir():
            shutil.copytree(found, library / package)
        elif found.exists():
            shutil.copy(found, library / package)
    for name in ("__init__.py", "errors.py", "db/embedded.py", "db/embedded_binaries.py"):
        (library / "caravan" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(SOURCE / "caravan" / name, library / "caravan" / name)
    (library / "caravan" / "db" / "__init__.py").touch()
    programs = embedded_binaries._in_wheel(embedded_binaries.copy_of_wheel(program_dir))
    shutil.chown(own, nobody.pw_uid, nobody.pw_gid)
    script = """
import os, sys
from pathlib import Path
from caravan.db.embedded import EmbeddedPostgres, embedded_url
cluster = EmbeddedPostgres(Path("data"))
url = cluster.start()
assert embedded_url(Path("data")) == url
assert cluster.home == Path.cwd() / "data" / "postgres", cluster.home
assert cluster.home.stat().st_uid == os.geteuid() != 0
cluster.stop()
assert not cluster.is_running()
print("started and stopped")
"""
    python = shutil.which("python3.11", path="/usr/bin:/usr/local/bin") or needs.missing("needs a Python for everybody")
    result = subprocess.run(
        [python, "-c", script],
        user=nobody.pw_uid,
        group=nobody.pw_gid,
        extra_groups=[],
        cwd=own,
        env={"PYTHONPATH": str(library), "HOME": str(own), "TMPDIR": str(own), "CARAVAN_POSTGRES_BIN": str(programs)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout == "started and stopped\n", result.stderr


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.01)
