"""The base class of forward cases: a module that is trained for four steps beside its stock twin, and compared with it."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import nn

from helpers.twins import compare_steps, take_step, twins
from lora_edge.nn import fused_block

EXACT = 1e-10  # of the largest value, in float64: some ten roundings per layer
ROUGH = 0.1  # under autocast: the same in bfloat16
CASES: dict[str, list[type[Case]]] = defaultdict(list)  # by the module that defines them
every_option = pytest.mark.parametrize("options", [{}, {"backend": "torch"}, {"bn": "batch"}], ids=["lean", "torch", "batch"])


class Case(nn.Module):
    """What the cases share: two convolutions, what follows them, and what happens between the steps."""

    requires_grad = True  # of the inputs
    count = 1  # of inputs
    autocast = False

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.again, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.act, self.drop = nn.ReLU(), nn.Dropout(0.5)
        self.more()

    def more(self) -> None:
        """Further layers and attributes."""

    def block(self, x):
        return self.act(self.bn(self.conv(x)))

    def change(self, step: int) -> None:
        """What happens before a step."""

    def layout(self, x):
        """An input in the memory layout of the case."""
        return x


class Opaque(nn.Module):
    """A module whose forward the fuser does not follow."""

    def forward(self, x):
        try:
            return x * 1
        except ValueError:
            return x


def case(cls: type[Case]) -> type[Case]:
    """Register a case of the module that defines it."""
    CASES[cls.__module__].append(cls)
    return cls


def every_case(module: str):
    """Parametrise a test over a module's cases."""
    return pytest.mark.parametrize("cls", CASES[module], ids=lambda cls: cls.__name__)


def overwrite_maps_of_every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let blocks overwrite maps that they would leave alone for being small."""
    monkeypatch.setattr(fused_block, "OVERWRITE_BYTES", 0)


def run(cls: type[Case], **options: Any) -> None:
    """Run four steps of a case's twins, in both modes."""
    torch.manual_seed(0)
    base = cls().double()
    for module in base.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    pair = twins(base, **options)
    for step in range(4):
        inputs = [base.layout(torch.randn(2, 8, 6, 6, dtype=torch.float64)) for _ in range(cls.count)]
        outcomes = []
        for model in pair:
            model.train(step % 2 == 0)
            model.change(step)
            own = [x.clone(memory_format=torch.preserve_format).requires_grad_(cls.requires_grad) for x in inputs]
            with torch.autocast("cpu", torch.bfloat16, enabled=cls.autocast):
                outcomes.append(take_step(model, lambda m, own=own: (m(*own), own), step))
        compare_steps(pair, *outcomes, tolerance=ROUGH if cls.autocast else EXACT)
