"""The root of the repository, and a Python in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def python(*arguments: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run this Python in a clean environment; stdout holds stderr too."""
    clean = {key: value for key, value in os.environ.items() if key not in ("MAX_JOBS", "TORCH_CUDA_ARCH_LIST", "PYTHONPATH")}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=clean | {"OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
