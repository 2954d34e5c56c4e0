"""``python -m benchmarks.study``."""

import sys

from . import check_requirements

if __name__ == "__main__":
    try:
        check_requirements()
    except RuntimeError as error:
        print(f"study: error: {error}", file=sys.stderr)
        sys.exit(2)
    from .command import main

    sys.exit(main())
