"""`python -m caravan`, the same as the command `caravan`."""

import sys

from caravan.cli import main

if __name__ == "__main__":
    sys.exit(main())
