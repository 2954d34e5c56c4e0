"""``python -m benchmarks.orin``."""

import sys

from .table import main

if __name__ == "__main__":  # the worker processes import the table, not this
    sys.exit(main())
