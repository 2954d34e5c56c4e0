"""Shared fixtures. Data sets and optional libraries are found once; what is skipped is named at the end of the run (-rs)."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path

import pytest
import torch

SPSW = Path(__file__).resolve().parents[2] / "shared" / "data" / "har_spsw_1s.npz"


def pytest_addoption(parser):
    parser.addoption("--every", type=int, default=1, metavar="N", help="every N-th case of each test, for emulated machines")


def pytest_configure(config):
    config.addinivalue_line("markers", "other_python: starts another Python, which an emulated machine cannot")


def pytest_collection_modifyitems(config, items):
    every, cases = config.getoption("--every"), Counter()
    if every == 1:
        return
    kept, left = [], []
    for item in items:
        test = item.nodeid.partition("[")[0]
        (left if cases[test] % every else kept).append(item)
        cases[test] += 1
    config.hook.pytest_deselected(items=left)
    items[:] = kept


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def watch():
    if importlib.util.find_spec("seglearn") is None:
        pytest.skip('seglearn is not installed: pip install "lora_edge[har]"')
    from lora_edge.har.data import load_watch

    return load_watch()


@pytest.fixture
def spsw_path():
    if not SPSW.is_file():
        pytest.skip(f"{SPSW} is not there")
    return SPSW
