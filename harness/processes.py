"""Servers in processes of their own on this machine, to be stopped, killed, frozen and started again."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import IO, Self

PR_SET_PDEATHSIG = 1
STOP_SECONDS_MAX = 20.0


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == 1:
        os._exit(1)


# For subprocess.Popen(preexec_fn=...): what we start ends with us, also where we are killed. Linux alone can.
end_with_parent = _end_with_parent if sys.platform == "linux" else None


def free_ports(number: int) -> list[int]:
    probes = [socket.socket() for _ in range(number)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def free_port() -> int:
    return free_ports(1)[0]


class ServerProcess:
    """One server on `port` of loopback. A kind of its own says how to `start` it, and when it answers."""

    port: int
    _process: subprocess.Popen[bytes] | None = None

    def start(self) -> Self:
        raise NotImplementedError

    def _answers(self) -> bool:
        """Whether it does its work; here: somebody listens."""
        with socket.socket() as probe:
            return not probe.connect_ex(("127.0.0.1", self.port))

    def _launch(self, command: Sequence[str], output: IO[bytes] | int = subprocess.DEVNULL) -> None:
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for who started it, and ends it
            preexec_fn=end_with_parent,
        )

    def _answers_within(self, seconds: float, every_seconds: float = 0.005) -> bool:
        """False where it ended, or the time did."""
        deadline = time.monotonic() + seconds
        while not self._answers():
            if self._process is None or self._process.poll() is not None or time.monotonic() > deadline:
                return False
            time.sleep(every_seconds)
        return True

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def stop(self) -> None:
        """Cleanly: it hands over, flushes and ends."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """As a power cut does."""
        self._end(signal.SIGKILL)

    def freeze(self) -> None:
        """It keeps its connections and answers nothing; `thaw` ends that."""
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def _end(self, number: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(number)
        process.send_signal(signal.SIGCONT)
        try:
            process.wait(STOP_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()
