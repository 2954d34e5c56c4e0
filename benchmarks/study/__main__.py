"""``python -m benchmarks.study``."""

import sys

from .runs import main

if __name__ == "__main__":
    sys.exit(main())
