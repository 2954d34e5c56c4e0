"""Cores that do not learn: the loss does not depend on them, so they get no gradient.

So it is where a model reads ``conv.weight`` and never calls the module, as Mamba's blocks do, or where no gradient comes
through. It is said once for a model, by name: in training, when two steps went by without a gradient (:func:`watch`), or else
at ``save_adapter`` and ``merge``, by the values: a core starts at zero, and one that is still all zero when something else was
trained got none. :func:`lora_edge.summary` always shows it.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lora_edge.nn.layers import LoRAEdgeConv
from lora_edge.nn.staleness import Beside
from lora_edge.surgery.find import Adapted, AdaptState

STEPS = 2  # without a gradient, before it is said


class _Watch:
    """The cores that had no gradient yet. It knows parameters by their hooks alone, so it keeps nothing alive.

    Each hook ends when its parameter has had one gradient, but for that of the first one, which counts the steps until
    ``STEPS`` are over. After that a step costs nothing.
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
            _say(self.state, idle)

    def stop(self) -> None:
        for handle in self.waiting.values():
            handle.remove()
        self.waiting.clear()


_watches: Beside[_Watch] = Beside()


def watch(model: nn.Module, state: AdaptState, layers: dict[str, LoRAEdgeConv]) -> None:
    """Begin to look for cores without a gradient; copies and pickles of the model are not looked at."""
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
    """Names of the layers whose core never moved, though something else of the model was trained; else an empty list."""
    moved = {name: _moved(layer.core) for name, layer in adapted.layers.items()}
    was_trained = any(moved.values()) or _head_moved(adapted)
    return [name for name, layer in adapted.layers.items() if was_trained and layer.core.requires_grad and not moved[name]]


def warn_of_idle_cores(adapted: Adapted) -> None:
    """Say once for a model which cores got no gradient."""
    if adapted.state is not None and not adapted.state.idle_was_said:
        _say(adapted.state, idle_cores(adapted))


def _say(state: AdaptState, idle: list[str]) -> None:
    if idle and not state.idle_was_said:
        state.idle_was_said = True
        names = ", ".join(name or "the model" for name in idle)
        warnings.warn(
            f"the core of {names} got no gradient in training and does not learn: the loss does not depend on it, as where a "
            "model reads the weight itself; exclude it",
            UserWarning,
            stacklevel=4,
        )


def _moved(core: Tensor) -> bool:
    gradient = core.grad
    return bool(core.detach().count_nonzero()) or (gradient is not None and bool(gradient.count_nonzero()))


def _head_moved(adapted: Adapted) -> bool:
    """Whether the trained head is another than the base's."""
    state = adapted.state
    if state is None or state.head is None:
        return False
    named = adapted.model.get_submodule(state.head).named_parameters(state.head)
    base = state.base_values
    return any(name in base and not torch.equal(p.detach().cpu(), base[name]) for name, p in named)
