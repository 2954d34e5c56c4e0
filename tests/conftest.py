"""Shared fixtures. Data sets and optional libraries are found once; what is skipped is named at the end of the run (-rs)."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

SPSW = Path(__file__).resolve().parents[2] / "shared" / "data" / "har_spsw_1s.npz"


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
