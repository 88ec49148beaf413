"""Makes .venv and keeps it equal to requirements/: `setup.py run|dev|screens|bench`.

Runs on a bare Python (standard library only). Where nothing has changed it compares one hash and is done;
otherwise it shows its steps and keeps pip's noise in build/setup.log. Two at once wait for each other.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from threading import Event, Thread

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
LOG = ROOT / "build" / "setup.log"
REQUIREMENTS = {"run": "run.txt", "dev": "dev.txt", "screens": "dev.txt", "bench": "dev.txt"}
PIP_INSTALL = [str(PYTHON), "-m", "pip", "--disable-pip-version-check", "--no-input", "install", "--no-deps"]
CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome")


class SetupFailed(Exception):
    pass


def fingerprint(name: str) -> str:
    """Changes when an installed environment no longer fits: other locks, another entry point, a moved clone."""
    project = (ROOT / "pyproject.toml").read_text().partition("[tool.")[0]
    locked = (ROOT / "requirements" / name).read_bytes()
    return hashlib.sha256(b"\0".join([str(ROOT).encode(), project.encode(), locked])).hexdigest()


def stamp(name: str) -> Path:
    return VENV / f".installed-{name}"


def is_current(name: str) -> bool:
    try:
        return stamp(name).read_text() == fingerprint(name) and PYTHON.exists()
    except FileNotFoundError:
        return False


class Steps:
    """`[1/3] Python environment ... 12 s`, counting on a terminal, one finished line elsewhere."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.number = 0

    def run(self, title: str, *commands: list[str]) -> None:
        self.number += 1
        head = f"[{self.number}/{self.total}] {title} ..."
        started = time.monotonic()
        finished = Event()

        def count() -> None:
            while not finished.wait(1):
                print(f"\r{head} {time.monotonic() - started:.0f} s", end="", flush=True)

        print(head, end="", flush=True)
        counter = Thread(target=count, daemon=True)
        if sys.stdout.isatty():
            counter.start()
        try:
            for command in commands:
                self._execute(command)
        except SetupFailed:
            print(" failed", flush=True)
            raise
        finally:
            finished.set()
        if sys.stdout.isatty():
            counter.join()
            print(f"\r{head}", end="")
        print(f" {time.monotonic() - started:.0f} s", flush=True)

    def _execute(self, command: list[str]) -> None:
        with LOG.open("a") as log:
            log.write(f"\n$ {' '.join(command)}\n")
            log.flush()
            result = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=ROOT, check=False)
        if result.returncode != 0:
            raise SetupFailed


def apt_get_install(package: str) -> list[list[str]]:
    quiet = ["env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-q", "-y"]
    return [[*quiet, "update"], [*quiet, "install", "--no-install-recommends", package]]


def can_apt_get() -> bool:
    return os.geteuid() == 0 and shutil.which("apt-get") is not None


def base_python() -> str:
    """The interpreter behind this one, when we run inside the environment that is to be replaced."""
    return getattr(sys, "_base_executable", None) or sys.executable


def venv_is_usable() -> bool:
    """A moved clone leaves scripts that point to the old place; a removed Python leaves a dead link."""
    pip = VENV / "bin" / "pip"
    return PYTHON.exists() and pip.exists() and str(VENV).encode() in pip.read_bytes()[:300]


def has_venv_module(python: str) -> bool:
    return subprocess.run([python, "-c", "import ensurepip, venv"], capture_output=True, check=False).returncode == 0


def install(name: str) -> None:
    python = base_python()
    make_venv = not venv_is_usable()
    needs_debian = make_venv and not has_venv_module(python)
    if needs_debian and not can_apt_get():
        raise SystemExit("This Python cannot make virtual environments: install python3-venv and try again.")
    steps = Steps(2 + make_venv + needs_debian)
    if needs_debian:
        steps.run("Debian's python3-venv", *apt_get_install("python3-venv"))
    if make_venv:
        steps.run("Python environment", [python, "-m", "venv", "--clear", str(VENV)])
    count = (ROOT / "requirements" / name).read_text().count("==")
    steps.run(f"{count} packages", [*PIP_INSTALL, "--require-hashes", "-r", f"requirements/{name}"])
    steps.run("Caravan", [*PIP_INSTALL, "--no-build-isolation", "-e", "."])
    stamp(name).write_text(fingerprint(name))
    if name == "dev.txt":  # it holds all of run.txt
        stamp("run.txt").write_text(fingerprint("run.txt"))


def install_debian(package: str, *programs: str) -> None:
    """What some tests need besides Python. Where we may not or cannot, they say what is missing."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin"
    if any(shutil.which(program, path=path) for program in programs) or not can_apt_get():
        return
    try:
        Steps(1).run(f"Debian's {package}", *apt_get_install(package))
    except SetupFailed:
        print(f"Could not install {package}; see {LOG.relative_to(ROOT)}.", file=sys.stderr)


def install_promtool() -> None:
    """Prometheus' checker of rules, out of Debian's package: installing that would start a server."""
    target = VENV / "bin"
    fetch = f"""set -e
        folder=$(mktemp -d); trap 'rm -r "$folder"' EXIT; cd "$folder"
        apt-get -q download prometheus
        dpkg-deb --fsys-tarfile prometheus_*.deb | tar -x --strip-components=3 -C '{target}' ./usr/bin/promtool"""
    if shutil.which("promtool") or (target / "promtool").exists() or not can_apt_get():
        return
    try:
        Steps(1).run("Debian's promtool", apt_get_install("prometheus")[0], ["sh", "-c", fetch])
    except SetupFailed:
        print(f"Could not fetch promtool; see {LOG.relative_to(ROOT)}.", file=sys.stderr)


def install_peers() -> None:
    """What `make bench` compares with, on top of dev.txt. One that can't be installed is absent from its table."""
    steps: list[tuple[str, list[list[str]]]] = []
    if not is_current("bench.txt"):
        steps.append(("Peers", [[*PIP_INSTALL, "--require-hashes", "-r", "requirements/bench.txt"]]))
    if not shutil.which("redis-server") and can_apt_get():
        steps.append(("Debian's redis-server", apt_get_install("redis-server")))
    progress = Steps(len(steps))
    for title, commands in steps:
        try:
            progress.run(title, *commands)
            if title == "Peers":
                stamp("bench.txt").write_text(fingerprint("bench.txt"))
        except SetupFailed:
            print(f"Going on without; see {LOG.relative_to(ROOT)}.", file=sys.stderr)


def main() -> int:
    target = sys.argv[1]
    name = REQUIREMENTS[target]
    if is_current(name) and target not in ("screens", "bench"):
        return 0
    LOG.parent.mkdir(exist_ok=True)
    with (LOG.parent / "setup.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            if not is_current(name):  # another make may just have done it
                LOG.write_text("")
                install(name)
                if target == "dev":
                    install_debian("maven", "mvn")  # brings a Java, and fetches Kafka's jars (tests/kafka/server.py)
                    install_debian("pgbouncer", "pgbouncer")
                    install_promtool()
            if target == "screens":
                install_debian("chromium", *CHROMIUM_NAMES)
            if target == "bench":
                install_peers()
        except SetupFailed:
            tail = LOG.read_text().splitlines()[-15:]
            print("\n".join(tail), f"\nSetting up failed; all of it is in {LOG.relative_to(ROOT)}.", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
