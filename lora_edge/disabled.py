"""``disabled``: run an adapted model as its base model for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

from lora_edge.nn.bn_statistics import on_base_statistics
from lora_edge.nn.layers import LoRAEdgeConv
from lora_edge.nn.reparametrised import Added
from lora_edge.surgery.adapted import Adapted, require_adapted, require_whole_model
from lora_edge.surgery.base_state import on_base_values


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Make the model compute the base model's own output inside: no update, the base's head, base values of moved buffers.

    Every adapted model inside ``model`` is disabled.

    Raises:
        RuntimeError: nothing in the model is adapted; it is a part of an adapted model; or something whose base value is not
            kept was added or trained since ``adapt``, which the message names.
    """
    found = require_adapted(model)
    for one in found:
        require_whole_model(one, "disabled")
    with ExitStack() as stack:
        for one in found:
            if one.state is not None:
                stack.enter_context(on_base_values(one.model, one.state))
            stack.enter_context(on_base_statistics(one.model))
            stack.enter_context(_without_updates(one))
        yield model


@contextmanager
def _without_updates(one: Adapted) -> Iterator[None]:
    added = [module for module in one.model.modules() if isinstance(module, Added)]
    switches: list[LoRAEdgeConv | Added] = [*one.layers.values(), *added]
    enabled = [switch.enabled for switch in switches]
    try:
        for switch in switches:
            switch.enabled = False
        yield
    finally:
        for switch, was in zip(switches, enabled, strict=True):
            switch.enabled = was
