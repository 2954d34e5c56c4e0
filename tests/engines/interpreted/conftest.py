"""Tests of the Triton kernels in Triton's interpreter, which is chosen before triton is imported: a process of their own.

test_triton.py runs them. By hand: ``TRITON_INTERPRET=1 pytest tests/engines/interpreted``. Of the large tables every
:data:`STEP`-th case is run and what is slow left out; with LORA_EDGE_TEST_ALL=1 (``make test-all``) everything is run.
"""

from __future__ import annotations

import os
from pathlib import Path

HERE = Path(__file__).parent
STEP = 5  # has no factor in common with the units of the table, nor with its ops
TABLES = ("test_on_the_interpreter", "test_matrix")
SLOW = ("test_a_network_trains_as_on_torch[2-D]",)
collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


def pytest_collection_modifyitems(config, items):
    if os.environ.get("LORA_EDGE_TEST_ALL") == "1":
        return
    here = [item for item in items if item.path.parent == HERE]  # the hook is given those of other folders too
    tables = [item for item in here if item.originalname in TABLES]
    left_out = [item for i, item in enumerate(tables) if i % STEP] + [item for item in here if item.name in SLOW]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in set(left_out)]
