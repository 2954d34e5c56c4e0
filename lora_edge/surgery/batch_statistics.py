"""Check whether a batch has statistics that BatchNorm can normalise by."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lora_edge.nn.bn_statistics import batch_norms
from lora_edge.nn.training_flags import in_evaluation


def has_statistics(model: nn.Module, x: Tensor) -> bool:
    """Whether every BatchNorm gets more than one value per channel from the batch ``x (N, ...)``.

    One value has no variance: torch raises an error for it, and a variance of 0 would inflate the output. It happens for a
    single window if a BatchNorm follows the pooling over time. The model runs once, in evaluation mode and without gradients.
    """
    smallest = [2]

    def look(norm: nn.Module, inputs: tuple[Any, ...]) -> None:
        if inputs and isinstance(inputs[0], Tensor) and inputs[0].dim() > 1:
            smallest.append(inputs[0].numel() // max(1, inputs[0].shape[1]))

    hooks = [norm.register_forward_pre_hook(look) for _, norm in batch_norms(model)]
    try:
        with torch.no_grad(), in_evaluation(model):
            model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return min(smallest) > 1
