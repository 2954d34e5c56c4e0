"""Warn about cores that do not learn, because the loss does not depend on them and they get no gradient.

This happens if a model reads ``conv.weight`` and never calls the module, as Mamba's blocks do, or if no gradient reaches the
layer. The warning comes once per model and names the layers: in training, after two steps without a gradient (:func:`watch`),
or otherwise at ``save_adapter`` and ``merge``, where it goes by the values: a core that is still all zero although something
else was trained got no gradient. :func:`lora_edge.summary` always shows these layers.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lora_edge.nn.layers import LoRAEdgeConv
from lora_edge.nn.per_module import PerModule
from lora_edge.surgery.adapted import Adapted, AdaptState

STEPS = 2  # without a gradient, before the warning


class _Watch:
    """The cores that have had no gradient yet. It holds the parameters' hooks only, so it keeps no parameter alive.

    Each hook is removed once its parameter has had a gradient; only the first one stays to count the steps up to ``STEPS``.
    After that a step costs nothing.
    """

    def __init__(self, state: AdaptState) -> None:
        self.state = state
        self.waiting: dict[str, RemovableHandle] = {}
        self.cores: set[str] = set()
        self.first: str | None = None
        self.steps = 0

    def add(self, name: str, parameter: nn.Parameter, is_core: bool) -> None:
        if is_core:
            self.cores.add(name)
        self.waiting[name] = parameter.register_post_accumulate_grad_hook(lambda _: self._got(name))

    def _got(self, name: str) -> None:
        if self.first is None:
            self.first = name
        elif name != self.first:
            self.waiting.pop(name).remove()
            return
        self.steps += 1
        if self.steps > STEPS:
            idle = [name for name in self.waiting if name in self.cores and name != self.first]
            self.stop()
            _warn(self.state, idle)

    def stop(self) -> None:
        for handle in self.waiting.values():
            handle.remove()
        self.waiting.clear()


_watches: PerModule[_Watch] = PerModule()


def watch(model: nn.Module, state: AdaptState, layers: dict[str, LoRAEdgeConv]) -> None:
    """Start watching for cores without a gradient; copies and pickles of the model are not watched."""
    watched = _Watch(state)
    seen: set[int] = set()
    named = [(name, layer.core, True) for name, layer in layers.items()]
    if state.head is not None:
        named += [(f"{state.head}.{key}", p, False) for key, p in model.get_submodule(state.head).named_parameters()]
    for name, parameter, is_core in named:
        if parameter.requires_grad and id(parameter) not in seen:
            watched.add(name, parameter, is_core)
            seen.add(id(parameter))
    _watches.put(model, watched)


def end_watch(model: nn.Module) -> None:
    """Undo :func:`watch`."""
    watched = _watches.get(model)
    if watched is not None:
        watched.stop()
        _watches.drop(model)


def idle_cores(adapted: Adapted) -> list[str]:
    """Return the names of the layers whose core never moved although something else in the model was trained."""
    moved = {name: _moved(layer.core) for name, layer in adapted.layers.items()}
    was_trained = any(moved.values()) or _head_moved(adapted)
    return [name for name, layer in adapted.layers.items() if was_trained and layer.core.requires_grad and not moved[name]]


def warn_of_idle_cores(adapted: Adapted) -> None:
    """Warn which cores got no gradient, once per model."""
    if adapted.state is not None and not adapted.state.warned_of_idle:
        _warn(adapted.state, idle_cores(adapted))


def _warn(state: AdaptState, idle: list[str]) -> None:
    if idle and not state.warned_of_idle:
        state.warned_of_idle = True
        names = ", ".join(name or "the model" for name in idle)
        warnings.warn(
            f"the core of {names} got no gradient in training and does not learn: the loss does not depend on it, as when a "
            "model reads the weight itself; exclude it",
            UserWarning,
            stacklevel=4,
        )


def _moved(core: Tensor) -> bool:
    gradient = core.grad
    return bool(core.detach().count_nonzero()) or (gradient is not None and bool(gradient.count_nonzero()))


def _head_moved(adapted: Adapted) -> bool:
    """Whether the trained head differs from the base's."""
    state = adapted.state
    if state is None or state.head is None:
        return False
    named = adapted.model.get_submodule(state.head).named_parameters(state.head)
    base = state.base_values
    return any(name in base and not torch.equal(p.detach().cpu(), base[name]) for name, p in named)
