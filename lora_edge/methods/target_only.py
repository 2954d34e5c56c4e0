"""Target only: trains the same network from random weights on the target's windows alone. Shows what the source is worth."""

from __future__ import annotations

from torch import Tensor, nn

from lora_edge.methods import full
from lora_edge.methods.base import Method, unchanged


def prepare(model: nn.Module, rank: int, inputs: Tensor, labels: Tensor) -> list[nn.Parameter]:
    for module in model.modules():
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
    return full.prepare(model, rank, inputs, labels)


METHOD = Method(
    "target_only", "target only, from random weights", lr=1e-3, prepare=prepare, finish=unchanged, starts_at_base=False
)
