"""Run the ``lora-edge`` command inside the process of the test, in a folder as a user has it."""

from __future__ import annotations

import sys

import pytest

from helpers.windows import own
from lora_edge.cli import main

FACTORY = """
from torch import nn

def build(in_channels, num_classes):
    return nn.Sequential(
        nn.Conv1d(in_channels, 8, 5, padding="same"), nn.BatchNorm1d(8), nn.ReLU(),
        nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, num_classes),
    )

def fixed():
    return nn.Conv1d(9, 8, 3)

def nothing():
    return 3

def odd(num_classes):
    return nn.Sequential(nn.Conv1d(4, 8, 3), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, num_classes + 1))
"""


def adapt_arguments(**change):
    options = {
        "--data": "own.npz", "--target-subject": "1", "--protocol": "B", "--target-domain": "watch",
        "--model": "mymodels:build", "--rank": "2", "--steps": "8", "--epochs": "3", "--out": "out", **change,
    }  # fmt: skip
    return ["adapt", *[part for key, value in options.items() if value is not None for part in (key, value)]]


def exit_code(arguments: list[str]) -> int:
    try:
        return main(arguments)
    except SystemExit as stop:  # argparse
        return int(stop.code or 0)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with data and a model factory of the user's own."""
    own(tmp_path / "own.npz")
    (tmp_path / "mymodels.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "mymodels", raising=False)
    return tmp_path
