"""The command line: `caravan up`, and what the runbooks' scripts did, through the workers' own code."""

from __future__ import annotations

import sys


def main() -> int:
    """The entry point; the exit code (0 fine, 1 failed, 2 usage, 6 finished and found problems)."""
    from caravan.cli.app import app

    try:
        code = app(standalone_mode=True)
    except SystemExit as ended:
        return int(ended.code or 0) if not isinstance(ended.code, str) else 1
    except BrokenPipeError:  # `caravan workers | head`
        sys.stderr.close()
        return 0
    return int(code or 0)
