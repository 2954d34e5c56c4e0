"""Cores that did not learn: training moved the others and not these, so the model's loss does not depend on them.

So it is where a model reads ``conv.weight`` and never calls the module, as Mamba's blocks do, or where no gradient comes
through. It is seen from the values, at no cost to a step: a core starts at zero, and one that still is all zero when another
one has moved got no gradient. It is said once for a model, and :func:`lora_edge.summary` always shows it.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from lora_edge.find import Adapted


def idle_cores(adapted: Adapted) -> list[str]:
    """Names of the layers whose core never moved, though something else of the model was trained; else an empty list."""
    moved = {name: _moved(layer.core) for name, layer in adapted.layers.items()}
    was_trained = any(moved.values()) or _head_moved(adapted)
    return [name for name, layer in adapted.layers.items() if was_trained and layer.core.requires_grad and not moved[name]]


def warn_of_idle_cores(adapted: Adapted) -> None:
    """Say once for a model which cores got no gradient."""
    if adapted.state is None or adapted.state.idle_was_said:
        return
    idle = idle_cores(adapted)
    if idle:
        adapted.state.idle_was_said = True
        warnings.warn(
            f"the core of {', '.join(name or 'the model' for name in idle)} got no gradient in training and did not learn: the "
            "loss does not depend on it, as where a model reads the weight itself; exclude it",
            UserWarning,
            stacklevel=3,
        )


def _moved(core: Tensor) -> bool:
    gradient = core.grad
    return bool(core.detach().count_nonzero()) or (gradient is not None and bool(gradient.count_nonzero()))


def _head_moved(adapted: Adapted) -> bool:
    """Whether the trained head is another than the base's."""
    state = adapted.state
    if state is None or state.head is None:
        return False
    parameters = adapted.model.get_submodule(state.head).named_parameters(state.head)
    return any(
        name in state.base_values and not torch.equal(p.detach().cpu(), state.base_values[name]) for name, p in parameters
    )
