"""``python -m benchmarks.study.phone_watch har_spsw_1s.npz OUT.npz``: the phone and watch set in this project's own format.

Keeps windows of which at least 60 % are one class, 8,359 in all. ``domain`` is the device, ``session`` the execution: a person
adapts on the first executions and is tested on the last, and none is cut. Then, with ``OUT`` instead of ``watch``, for example

    python -m benchmarks.study --data OUT.npz --protocol B --target-domain watch
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

PURITY = 0.6


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study.phone_watch", description=__doc__.split("\n")[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    try:
        with np.load(options.source, allow_pickle=False) as raw:
            keep = raw["purity"] >= PURITY
            columns = {"X": "X", "y": "y", "subject": "subject", "domain": "device", "session": "execution"}
            names = {"classes": "classes", "channels": "channels", "domains": "devices"}
            data = {own: raw[theirs][keep] for own, theirs in columns.items()}
            data |= {own: raw[theirs] for own, theirs in names.items()}
        np.savez_compressed(options.out, **data)
    except (OSError, ValueError, KeyError) as error:
        print(f"phone_watch: error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    print(f"{keep.sum():,} windows in {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
