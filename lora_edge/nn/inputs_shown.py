"""Show a model's layers what they read, in forwards that leave the model as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lora_edge.nn.training_flags import in_evaluation


@contextmanager
def inputs_shown(model: nn.Module, see: Mapping[nn.Module, Callable[[Tensor], None]]) -> Iterator[None]:
    """Inside, each call of a layer in ``see`` first hands its input over; the model evaluates, without gradients."""

    def hook(layer: nn.Module, given: tuple[Any, ...]) -> None:
        see[layer](given[0])

    hooks = [layer.register_forward_pre_hook(hook) for layer in see]
    try:
        with torch.no_grad(), in_evaluation(model):
            yield
    finally:
        for handle in hooks:
            handle.remove()
