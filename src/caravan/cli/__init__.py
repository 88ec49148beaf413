"""The command line: `caravan up`, and what the runbooks' scripts did, through the workers' own code."""

from __future__ import annotations

import sys


def main() -> int:
    """The entry point; the exit code (0 fine, 1 failed, 2 usage, 6 finished and found problems)."""
    from typer import Abort
    from typer._click import ClickException  # pyright: ignore[reportPrivateUsage] - typer keeps its own copy of click

    from caravan.cli.app import app
    from caravan.cli.options import show_error

    try:
        return int(app(standalone_mode=False) or 0)
    except ClickException as error:
        error.show()
        if "--json" in sys.argv:  # the command line was not understood, so nobody else knows
            show_error("USAGE", error.format_message())
        return error.exit_code
    except Abort:
        return 1
    except SystemExit as ended:
        return int(ended.code or 0) if not isinstance(ended.code, str) else 1
    except BrokenPipeError:  # `caravan workers | head`
        sys.stderr.close()
        return 0
