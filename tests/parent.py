"""Servers that tests start end with the process that started them, also where that is killed."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == 1:
        os._exit(1)


# For subprocess.Popen(preexec_fn=...). Linux alone can.
end_with_parent = _end_with_parent if sys.platform == "linux" else None
