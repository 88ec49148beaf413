"""A real `caravan up` in a process of its own, for tests: started, watched, and always ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from caravan.apps import control
from harness.processes import free_port

START_SECONDS_MAX = 60.0
POLL_SECONDS = 0.02


def until(condition: Callable[[], Any], what: str, seconds: float = 20.0) -> Any:
    """The first true answer of `condition`, or a failure after `seconds` that says what was waited for."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(POLL_SECONDS)
    return found


def environment(**more: str) -> dict[str, str]:
    """This one's, without what would steer Caravan."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("CARAVAN_", "POSTGRES_", "KAFKA_", "REDIS_"))}
    return kept | more


def caravan(*arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
    """A command that ends by itself."""
    return subprocess.run(
        [sys.executable, "-m", "caravan", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment(**env),
        check=False,
    )


class Up:
    """`caravan up` on a data folder. `log` has what it said, once it has ended."""

    def __init__(self, data: Path, *arguments: str, port: int | None = None, **env: str) -> None:
        self.data = data
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._log_path = data / f"up-{self.port}.log"
        with self._log_path.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "caravan", "up", *arguments, "--data", str(data), "--port", str(self.port)],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment(**env),
                start_new_session=True,
            )

    @property
    def log(self) -> str:
        return self._log_path.read_text()

    def wait_ready(self) -> Up:
        def ready() -> bool:
            assert self.process.poll() is None, self.log
            return "Caravan is ready" in self.log

        until(ready, "Caravan is ready", START_SECONDS_MAX)
        return self

    def get(self, path: str, token: str | None = None) -> tuple[int, Any]:
        """The status and the JSON of a GET; 0 where nobody answers."""
        return self.call("GET", path, token=token)

    def call(self, method: str, path: str, body: object = None, *, token: str | None = None) -> tuple[int, Any]:
        """The status and the JSON of a request; 0 where nobody answers."""
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
        request = Request(self.url + path, method=method, headers=headers)  # noqa: S310
        try:
            with urlopen(request, None if body is None else json.dumps(body).encode(), timeout=10) as answer:  # noqa: S310
                return answer.status, json.load(answer)
        except HTTPError as error:
            return error.code, json.load(error)
        except (URLError, OSError):
            return 0, None

    @property
    def demo(self) -> dict[str, Any]:
        """DIR/demo.json."""
        return json.loads((self.data / "demo.json").read_text())

    def sign_in(self, account: dict[str, str]) -> str:
        """The token of one of the demo's accounts."""
        named = {"email": account["email"], "password": account["password"]}
        status, said = self.call("POST", "/api/v1/auth/login", named)
        assert status == 200, said
        return said["token"]

    def buy(self, student: dict[str, str], slot: str, *, sessions: int = 10, mode: str = "online") -> str:
        """A paid payment of the demo's first course, for a student of demo.json; its id."""
        token = self.sign_in(student)
        order = {
            "studentId": student["id"],
            "courseId": self.demo["courses"][0]["id"],
            "sessionCount": sessions,
            "learningMode": mode,
            "groupSize": 1,
            "timeSlot": slot,
            "startDate": (datetime.now(UTC) + timedelta(days=4)).date().isoformat(),
        }
        status, payment = self.call("POST", "/api/v1/payments", order, token=token)
        assert status == 201, payment
        status, said = self.call("POST", f"/api/v1/payments/{payment['id']}/confirm", {}, token=token)
        assert status == 200, said
        return payment["id"]

    def ask(self, command: str, name: str | None = None) -> dict[str, Any]:
        """What the supervisor answers at its door."""
        return control.ask(self.data / "control.sock", command=command, name=name)

    def children(self) -> dict[str, int]:
        """Process ids of the web and the workers."""
        services = self.ask("status")["services"]
        return {"web": services["payment-service"]["pid"], "workers": services["purchase-worker"]["pid"]}

    def stop(self) -> float:
        """SIGTERM and wait; the seconds it took."""
        started = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(20)
        return time.monotonic() - started

    def kill(self) -> None:
        """End the supervisor as a power cut would."""
        self.process.kill()
        self.process.wait(10)


def lives(pid: int) -> bool:
    """Whether a process runs (a zombie doesn't)."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
