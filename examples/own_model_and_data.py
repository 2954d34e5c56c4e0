"""Your network and your windows through ``lora-edge adapt``: four people, a phone and a watch, protocol B."""

import sys

import numpy as np
from torch import nn

from lora_edge.cli import main


def build(in_channels: int, num_classes: int) -> nn.Module:
    """The factory that ``--model own_model_and_data:build`` names."""
    return nn.Sequential(
        nn.Conv1d(in_channels, 16, 5, padding="same"),
        nn.BatchNorm1d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(16, num_classes),
    )


def write_windows(path: str) -> None:
    """The format of docs/har.md: each person does three activities on two devices, the second of which is turned."""
    rng = np.random.default_rng(0)
    people, per_class = 4, 60
    y = np.tile(np.repeat(np.arange(3), per_class), 2 * people)
    domain = np.tile(np.repeat([0, 1], 3 * per_class), people)
    subject = np.repeat(np.arange(1, people + 1), 6 * per_class)
    x = 0.3 * rng.normal(size=(len(y), 3, 30)) + np.stack([2 * y, -y, 0 * y], axis=1)[:, :, None]
    x[domain == 1] = x[domain == 1][:, [1, 0, 2]]  # worn another way round
    np.savez(
        path, X=x.astype(np.float32), y=y, subject=subject, domain=domain, channels=["ax", "ay", "az"],
        classes=["sit", "walk", "run"], domains=["phone", "watch"],
    )  # fmt: skip


if __name__ == "__main__":
    write_windows("windows.npz")
    arguments = [
        "adapt", "--data", "windows.npz", "--target-subject", "1", "--protocol", "B", "--target-domain", "watch",
        "--model", "own_model_and_data:build", "--steps", "20", "--epochs", "25", "--out", "adapted",
    ]  # fmt: skip
    sys.exit(main(arguments))
