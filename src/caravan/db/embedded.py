"""The embedded PostgreSQL: one cluster in a folder, for a machine without a database server.

    DIR/postgres/lock           held by the supervisor, for as long as it lives
    DIR/postgres/data           the cluster (PGDATA)
    DIR/postgres/password       of the one user, mode 0600
    DIR/postgres/postgres.log   what the server says
    DIR/postgres-is-elsewhere   where PostgreSQL's user can't enter DIR (root's home): the path of DIR/postgres instead

It listens on a Unix socket only, in a private folder with a short path (a socket's path has at most 107 bytes). It
outlives a supervisor that is killed, and the next one takes it over.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import psycopg
from psycopg import errors as pg

from caravan.db.embedded_binaries import (
    ROOT_HOME,
    Binaries,
    EmbeddedPostgresError,
    FolderNotUsable,
    NoBinaries,
    RunAs,
    find_binaries,
    make_open_folder,
    run_as,
)

__all__ = [
    "EmbeddedPostgres",
    "EmbeddedPostgresError",
    "FolderInUse",
    "FolderNotUsable",
    "NoBinaries",
    "NotInitialised",
    "StartFailed",
    "VersionMismatch",
    "embedded_url",
]

DATABASE = USER = "caravan"
PORT = 5432  # only a part of the socket's name: each cluster has a socket folder of its own
SOCKET_PATH_BYTES_MAX = 107
LOG_BYTES_MAX = 10_000_000
START_SECONDS_MAX = 300  # recovery after a crash can take minutes
STOP_SECONDS_MAX = 30
POLL_SECONDS = 0.01

# For a small machine with much idle time. fsync and synchronous_commit stay on.
SETTINGS = {
    "listen_addresses": "",
    "unix_socket_permissions": "0700",
    "max_connections": "60",
    "shared_buffers": "128MB",
    "jit": "off",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "max_wal_size": "512MB",
    "log_checkpoints": "off",
    # The log must not keep what people typed: no values of a broken constraint (DETAIL), no statements.
    "log_error_verbosity": "terse",
    "log_min_error_statement": "panic",
}
SETTINGS_FROM_18 = {"io_workers": "2"}


class NotInitialised(EmbeddedPostgresError):
    """There is no database in this folder yet."""

    code = "EMBEDDED_POSTGRES_NOT_INITIALISED"


class FolderInUse(EmbeddedPostgresError):
    """Another caravan runs on this folder."""

    code = "EMBEDDED_POSTGRES_FOLDER_IN_USE"


class VersionMismatch(EmbeddedPostgresError):
    """The cluster was made by another major version."""

    code = "EMBEDDED_POSTGRES_VERSION"


class StartFailed(EmbeddedPostgresError):
    """PostgreSQL did not start."""

    code = "EMBEDDED_POSTGRES_START_FAILED"


@dataclass(frozen=True, slots=True)
class Postmaster:
    """The live server of a cluster, as its postmaster.pid tells."""

    pid: int
    socket_dir: str
    status: str


class EmbeddedPostgres:
    """One PostgreSQL cluster in DIR, started by us. Synchronous; use from one thread.

    `extra_settings` win over ours: tests run without fsync.
    """

    def __init__(self, data_dir: Path, *, extra_settings: dict[str, str] | None = None) -> None:
        self.data_dir = data_dir.absolute()
        self._extra_settings = extra_settings or {}
        self._lock: int | None = None
        self._process: subprocess.Popen[bytes] | None = None

    # -- what is there -------------------------------------------------------------------------------------------

    @property
    def home(self) -> Path:
        """The folder of the cluster: in DIR, or where the pointer in DIR says."""
        try:
            return Path(self._pointer.read_text().splitlines()[0])
        except FileNotFoundError:
            return self.data_dir / "postgres"
        except PermissionError as error:
            raise self._not_ours(self.data_dir) from error

    @property
    def log_path(self) -> Path:
        return self.home / "postgres.log"

    @property
    def url(self) -> str:
        """Of an existing cluster, running or not. Raises NotInitialised."""
        try:
            password = (self.home / "password").read_text()
            (self._cluster / "PG_VERSION").stat()
        except FileNotFoundError as error:
            raise NotInitialised(f"There is no database in {self.data_dir} yet: run `caravan up` first.") from error
        except PermissionError as error:
            raise self._not_ours(self.home) from error
        postmaster = self._find_postmaster()
        socket_dir = postmaster.socket_dir if postmaster else str(self._socket_dir())
        return f"postgresql://{USER}:{password}@/{DATABASE}?host={quote(socket_dir, safe='')}&port={PORT}"

    def is_running(self) -> bool:
        """Whether the server of this folder accepts connections, whoever started it."""
        postmaster = self._find_postmaster()
        return postmaster is not None and postmaster.status == "ready"

    # -- start and stop ------------------------------------------------------------------------------------------

    def start(self) -> str:
        """Take the folder, make the cluster where there is none, run its server or take over the one that runs.

        Returns the URL. The folder stays ours until stop(), or until this process ends, however it ends; programs that
        we start don't inherit it. Raises EmbeddedPostgresError in one line that says what to do.
        """
        try:
            user = self._prepare_home()
            self._take_lock()
            if not self._take_over():
                binaries = find_binaries(user)
                if (self._cluster / "PG_VERSION").exists():
                    self._check_version(binaries)
                else:
                    self._initialise(binaries, user)
                self._launch(binaries, user)
            self._ensure_database()
            return self.url
        except BaseException as error:
            if not isinstance(error, FolderInUse):
                self.stop()
            if isinstance(error, OSError):
                raise FolderNotUsable(
                    f"{error.filename or self.data_dir}: {error.strerror}. Make it writable and give it room,"
                    " or choose another folder with --data."
                ) from error
            raise

    def stop(self) -> None:
        """Fast shutdown: open transactions are rolled back, committed ones are safe. Does nothing where not started."""
        if self._lock is None:
            return
        postmaster = self._find_postmaster()
        pid = postmaster.pid if postmaster else None
        if self._process is not None and self._process.poll() is None:
            pid = self._process.pid
        if pid is not None:
            for how in (signal.SIGINT, signal.SIGQUIT):  # fast; then at once, with recovery at the next start
                if self._signal_and_wait(pid, how):
                    break
        if postmaster is not None:
            try:
                os.rmdir(postmaster.socket_dir)
            except OSError:
                pass  # not empty: a server that we could not stop
        self._process = None
        os.close(self._lock)
        self._lock = None

    # -- the folder ----------------------------------------------------------------------------------------------

    @property
    def _cluster(self) -> Path:
        return self.home / "data"

    @property
    def _pointer(self) -> Path:
        return self.data_dir / "postgres-is-elsewhere"

    def _not_ours(self, path: Path) -> FolderNotUsable:
        return FolderNotUsable(f"{path} belongs to another user: run as that user, or choose another folder (--data).")

    def _prepare_home(self) -> RunAs:
        self.data_dir.mkdir(parents=True, exist_ok=True)
        try:
            owner = self._cluster.stat().st_uid
        except FileNotFoundError:
            owner = None
        except PermissionError as error:
            raise self._not_ours(self.home) from error
        user = run_as(owner)
        if owner not in (None, user.uid):
            raise self._not_ours(self._cluster)
        if owner is None and not user.can_enter(self.data_dir):
            self._go_elsewhere(user)
        # Root keeps this folder, so that PostgreSQL's user can't lay links for root to follow.
        if user.switch:
            make_open_folder(self.home)
        else:
            self.home.mkdir(mode=0o700, exist_ok=True)
        return user

    def _go_elsewhere(self, user: RunAs) -> None:
        if self._pointer.exists():
            return
        # A new name each time: whoever removed DIR and makes it anew doesn't expect the old data. We delete none.
        name = hashlib.sha256(os.fsencode(self.data_dir.resolve())).hexdigest()[:12] + "-" + secrets.token_hex(4)
        self._pointer.write_text(
            f"{ROOT_HOME / 'clusters' / name}\nThe user {user.name}, as whom PostgreSQL runs, cannot enter"
            f" {self.data_dir}: its database is in the folder above. Move or remove both, or none.\n"
        )

    def _take_lock(self) -> None:
        if self._lock is not None:
            raise FolderInUse(f"{self.data_dir} is already started by this process.")
        lock = os.open(self.home / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(lock, 20).decode() or "unknown"
            os.close(lock)
            raise FolderInUse(
                f"{self.data_dir} is in use by another caravan (process {holder}): stop that one,"
                " or choose another folder with --data."
            ) from error
        os.ftruncate(lock, 0)
        os.write(lock, str(os.getpid()).encode())
        self._lock = lock

    def _check_version(self, binaries: Binaries) -> None:
        made_by = (self._cluster / "PG_VERSION").read_text().strip()
        if made_by != str(binaries.major):
            raise VersionMismatch(
                f"The database in {self.data_dir} is of PostgreSQL {made_by}, the programs here are"
                f" {binaries.major}: set CARAVAN_POSTGRES_BIN to the bin folder of a PostgreSQL {made_by} (and pg_dump"
                " with it to move), or choose another folder with --data."
            )

    def _socket_dir(self) -> Path:
        # The password makes it this cluster's alone: the server of a folder that was removed lives on for a minute.
        identity = os.fsencode(self.home.resolve()) + b"\0" + (self.home / "password").read_bytes()
        name = "caravan-" + hashlib.sha256(identity).hexdigest()[:12]
        folder = Path(tempfile.gettempdir()) / name
        # macOS and CI have long ones; root's own temporary folder may be closed to PostgreSQL's user.
        too_long = len(os.fsencode(folder / f".s.PGSQL.{PORT}.lock")) > SOCKET_PATH_BYTES_MAX
        return Path("/tmp", name) if too_long or os.geteuid() == 0 else folder  # noqa: S108 - checked by _make_socket_dir

    def _make_socket_dir(self, user: RunAs) -> Path:
        """Private to PostgreSQL's user; a folder that somebody else laid there first is refused.

        Called where no server of this cluster lives, so what a killed one left is removed: its lock file holds a
        process number that may be anybody's by now.
        """
        folder = self._socket_dir()
        try:
            folder.mkdir(mode=0o700)
            if user.switch:
                os.chown(folder, user.uid, user.gid, follow_symlinks=False)
        except FileExistsError:
            pass
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != user.uid or found.st_mode & 0o077:
            raise FolderNotUsable(f"{folder} is not a private folder of user {user.name}: remove it and try again.")
        for left in folder.glob(".s.PGSQL.*"):
            left.unlink()
        return folder

    # -- the cluster ---------------------------------------------------------------------------------------------

    def _initialise(self, binaries: Binaries, user: RunAs) -> None:
        """Make the cluster beside its place and move it there whole: a killed initdb leaves nothing that counts."""
        password = self.home / "password"
        descriptor = os.open(password, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        os.write(descriptor, secrets.token_urlsafe(24).encode())
        scratch = self.home / "data.new"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(mode=0o700)
        if user.switch:
            os.fchown(descriptor, user.uid, user.gid)
            os.chown(scratch, user.uid, user.gid)
        os.close(descriptor)
        # From 17 the provider inside PostgreSQL sorts alike on every system; C does for older ones.
        locale = ["--locale-provider=builtin", "--builtin-locale=C.UTF-8"] if binaries.major >= 17 else []
        code, output = user.run(
            [
                binaries.program("initdb"),
                *("--pgdata", str(scratch), "--username", USER, "--pwfile", str(password)),
                *("--auth", "scram-sha-256", "--encoding", "UTF8", "--locale", "C", *locale, "--data-checksums"),
            ]
        )
        if code != 0:
            shutil.rmtree(scratch, ignore_errors=True)
            raise StartFailed(
                f"PostgreSQL could not make a database in {self.home} ({_relevant_line(output)}):"
                " mend that, or choose another folder with --data."
            )
        scratch.rename(self._cluster)

    def _launch(self, binaries: Binaries, user: RunAs) -> None:
        socket_dir = self._make_socket_dir(user)
        self._forget_reused_pid()
        settings = SETTINGS | (SETTINGS_FROM_18 if binaries.major >= 18 else {}) | self._extra_settings
        settings |= {"port": str(PORT), "unix_socket_directories": str(socket_dir)}
        command = [binaries.program("postgres"), "-D", str(self._cluster)]
        for name, value in settings.items():
            command += ["-c", f"{name}={value}"]
        deadline = time.monotonic() + START_SECONDS_MAX
        while True:
            log_start = self._start_process(command, user)
            if self._wait_until_ready(deadline):
                return
            said = self._log_since(log_start)
            # The children of a server that was killed take a moment to notice.
            if "shared memory block" in said and time.monotonic() < deadline - START_SECONDS_MAX + 10:
                time.sleep(0.1)
                continue
            raise StartFailed(
                f"PostgreSQL did not start in {self.data_dir} ({_relevant_line(said)}): see {self.log_path}."
            )

    def _start_process(self, command: list[str], user: RunAs) -> int:
        """Returns where in the log this start begins."""
        if self.log_path.exists() and self.log_path.stat().st_size > LOG_BYTES_MAX:
            self.log_path.replace(self.log_path.with_suffix(".log.1"))
        log = os.open(self.log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
        try:
            start = os.fstat(log).st_size  # before the process may have said something
            self._process = user.popen(command, stdout=log, stderr=log, new_session=True)
            return start
        finally:
            os.close(log)

    def _wait_until_ready(self, deadline: float) -> bool:
        assert self._process is not None
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                self._process = None
                return False
            if self.is_running():
                return True
            time.sleep(POLL_SECONDS)
        return False

    def _take_over(self) -> bool:
        """Adopt the live server of this folder; False where there is none, or it ends while we look."""
        deadline = time.monotonic() + START_SECONDS_MAX
        while time.monotonic() < deadline:
            postmaster = self._find_postmaster()
            if postmaster is None:
                return False
            if postmaster.status == "ready":
                return True
            time.sleep(POLL_SECONDS)
        raise StartFailed(f"The PostgreSQL that runs in {self.data_dir} does not get ready: see {self.log_path}.")

    def _ensure_database(self) -> None:
        """Connect once; the first time the cluster has no database of ours yet."""
        try:
            psycopg.connect(self.url, connect_timeout=10).close()
        except psycopg.OperationalError as error:
            if "does not exist" not in str(error):
                raise StartFailed(
                    f"PostgreSQL in {self.data_dir} runs but refuses us ({_relevant_line(str(error))}):"
                    f" see {self.log_path}."
                ) from error
            with psycopg.connect(self.url, dbname="postgres", autocommit=True, connect_timeout=10) as connection:
                try:
                    connection.execute(f"create database {DATABASE}")
                except pg.DuplicateDatabase:
                    pass  # a start that was killed here had just made it

    # -- the process ---------------------------------------------------------------------------------------------

    def _find_postmaster(self) -> Postmaster | None:
        """The live server of this cluster. A pid file alone proves nothing: after a crash its number may be reused."""
        try:
            lines = [line.strip() for line in (self._cluster / "postmaster.pid").read_text().splitlines()]
        except FileNotFoundError:
            return None
        except PermissionError as error:
            raise self._not_ours(self.home) from error
        if not lines or not lines[0].isdigit() or not _runs_in(int(lines[0]), self._cluster):
            return None
        lines += [""] * (8 - len(lines))  # a server that is just starting has not written all
        return Postmaster(int(lines[0]), lines[4], lines[7])

    def _forget_reused_pid(self) -> None:
        """PostgreSQL takes any live process with the number in its old pid file for itself, and would not start.

        Our own number it ignores (we are its parent). The rest of the file stays: it guards the shared memory.
        """
        pid_file = self._cluster / "postmaster.pid"
        if pid_file.exists():
            _, _, rest = pid_file.read_text().partition("\n")
            with pid_file.open("r+") as file:  # in place, so that it stays with its owner
                file.write(f"{os.getpid()}\n{rest}")
                file.truncate()

    def _signal_and_wait(self, pid: int, how: signal.Signals) -> bool:
        try:
            os.kill(pid, how)
        except ProcessLookupError:
            pass
        deadline = time.monotonic() + STOP_SECONDS_MAX
        while time.monotonic() < deadline:
            if self._process is not None and self._process.pid == pid:
                if self._process.poll() is not None:
                    return True
            elif not _runs_in(pid, self._cluster):
                return True
            time.sleep(POLL_SECONDS)
        return False

    def _log_since(self, start: int) -> str:
        with self.log_path.open("rb") as log:
            log.seek(start)
            return log.read().decode(errors="replace")


def embedded_url(data_dir: Path) -> str | None:
    """The URL of the database that lives in DIR and runs now, for commands; None where there is none."""
    cluster = EmbeddedPostgres(data_dir)
    try:
        return cluster.url if cluster.is_running() else None
    except NotInitialised:
        return None


def _runs_in(pid: int, cluster: Path) -> bool:
    """Whether this process is alive and is the server of this cluster, which makes the cluster its working folder."""
    if sys.platform == "linux":
        try:
            return os.path.samefile(f"/proc/{pid}/cwd", cluster)
        except OSError:  # gone, a zombie, or another user's
            return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return False
    return True


def _relevant_line(said: str) -> str:
    """What went wrong, out of what a PostgreSQL program printed."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    for mark in ("PANIC:", "FATAL:", "error:", "ERROR:"):
        for line in lines:
            if mark in line:
                return line.partition(mark)[2].strip()
    return lines[-1] if lines else "it said nothing"
