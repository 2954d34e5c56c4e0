"""The reference workloads W1, W2 and W3: a fresh model, an input, and which convolutions are adapted."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_edge.har.models import MobileNetV2, ResNet18, TResNet, pointwise


@dataclass(frozen=True)
class Workload:
    """One workload. ``input_shape`` is without the batch."""

    name: str
    title: str
    input_shape: tuple[int, ...]
    classes: int

    def model(self) -> nn.Module:
        """A fresh model with seeded random weights."""
        torch.manual_seed(0)
        if self.name == "W1":
            return TResNet(self.input_shape[0], self.classes)
        return MobileNetV2(self.classes) if self.name == "W2" else ResNet18(self.classes)

    def targets(self, model: nn.Module) -> list[str] | None:
        """``targets`` for :func:`lora_edge.adapt`."""
        return pointwise(model) if self.name == "W2" else None

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        """Seeded random inputs ``(size, *input_shape)`` and labels."""
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(size, *self.input_shape, generator=generator)
        return x, torch.randint(self.classes, (size,), generator=generator)


WORKLOADS = {
    w.name: w
    for w in (
        Workload("W1", "T-ResNet, 97 x 60", (97, 60), 17),
        Workload("W2", "MobileNetV2, 3 x 97 x 60, pointwise", (3, 97, 60), 17),
        Workload("W3", "ResNet-18, 3 x 32 x 32", (3, 32, 32), 10),
    )
}
