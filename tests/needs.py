"""What a test needs and a machine may lack: on a user's machine it skips with one line, with CI=true it fails."""

from __future__ import annotations

import os
import shutil
from typing import NoReturn

import pytest

CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome")


def missing(what: str) -> NoReturn:
    """`what` says what is missing and how to get it."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"CI must have it: {what}", pytrace=False)
    pytest.skip(what)


def chromium() -> str:
    """The path of the system's Chromium, for playwright's `executable_path`."""
    for name in CHROMIUM_NAMES:
        if path := shutil.which(name):
            return path
    missing("needs Chromium (Debian: apt-get install chromium)")


def root() -> None:
    """For what only root can try (other users' files); on a user's machine that is no lack, so never a failure."""
    if os.geteuid() != 0:
        pytest.skip("only root can try this")
