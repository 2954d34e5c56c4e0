"""``python -m benchmarks.build``: time and memory of building the extension for Orin alone (sm_87 and its PTX) with one job.

Builds a fresh copy of the sources, writes ``results/<device>/build.csv`` and fails if a bound is missed. The memory is that of
the largest process; with one job no other large process runs beside it.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

from . import RESULTS, write_rows

ROOT = Path(__file__).resolve().parents[1]
MOST_SECONDS = 300
MOST_BYTES = 2e9
ARCHITECTURES = "8.7+PTX"


def measure() -> tuple[float, int]:
    """Seconds and peak bytes of one build."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "lora_edge")
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns("build", "dist", "demo", "*.egg-info", "*.so", ".*"))
        wanted = {"LORA_EDGE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": ARCHITECTURES, "MAX_JOBS": "1"}
        begin = time.monotonic()
        if subprocess.call([sys.executable, "setup.py", "-q", "build_ext"], cwd=copy, env=os.environ | wanted) != 0:
            sys.exit("the build failed, see above")
        return time.monotonic() - begin, 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.build", description=__doc__)
    parser.add_argument("--device", default="cpu", help="folder of the results")
    options = parser.parse_args()
    seconds, peak = measure()
    row = {
        "device": options.device,
        "date": date.today().isoformat(),
        "cores": os.cpu_count(),
        "architectures": ARCHITECTURES,
        "jobs": 1,
        "seconds": round(seconds, 1),
        "peak_bytes": peak,
    }
    path = RESULTS / options.device / "build.csv"
    write_rows(path, list(row), [row])
    print(f"{seconds:.0f} s (at most {MOST_SECONDS}), {peak / 1e9:.2f} GB (at most {MOST_BYTES / 1e9:.0f}); row in {path}")
    return 0 if seconds <= MOST_SECONDS and peak <= MOST_BYTES else 1


if __name__ == "__main__":
    sys.exit(main())
