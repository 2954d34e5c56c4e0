"""Target only: trains the same network from random weights on the target's windows alone. Shows what the source is worth."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lora_edge.methods import full
from lora_edge.methods.base import Method, NotApplicableError, unchanged


def prepare(model: nn.Module, rank: int, inputs: Tensor, labels: Tensor) -> list[nn.Parameter]:
    """Draw every parameter anew. A model with one that nothing draws, as a weight-normalised layer's, is refused unchanged."""
    before = {name: value.detach().clone() for name, value in model.state_dict().items()}
    versions = {name: p._version for name, p in model.named_parameters()}
    for module in model.modules():
        reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)  # attention's
        if callable(reset):
            reset()
    for name, p in model.named_parameters():
        if p._version == versions[name] and torch.equal(p, before[name]):
            model.load_state_dict(before)
            raise NotApplicableError(f"target only: nothing draws random values for {name}; use another method")
    return full.prepare(model, rank, inputs, labels)


METHOD = Method(
    "target_only", "target only, from random weights", lr=1e-3, prepare=prepare, finish=unchanged, starts_at_base=False
)
