"""Tests of the Triton kernels in Triton's interpreter. It is chosen before triton is imported, so they need their own process.

test_triton.py runs them. By hand: ``TRITON_INTERPRET=1 pytest tests/engines/interpreted``. Of the large tables every
:data:`STEP`-th case runs and slow tests are left out; with LORA_EDGE_TEST_ALL=1 (``make test-all``) everything runs.
"""

from __future__ import annotations

import os
from pathlib import Path

HERE = Path(__file__).parent
STEP = 5  # coprime to the numbers of units and of ops in the table
TABLES = ("test_on_the_interpreter", "test_matrix")
SLOW = ("test_a_network_trains_as_on_torch[2-D]",)
collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


def pytest_collection_modifyitems(config, items):
    if os.environ.get("LORA_EDGE_TEST_ALL") == "1":
        return
    here = [item for item in items if item.path.parent == HERE]  # the hook also gets those of other folders
    tables = [item for item in here if item.originalname in TABLES]
    left_out = [item for i, item in enumerate(tables) if i % STEP] + [item for item in here if item.name in SLOW]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in set(left_out)]
