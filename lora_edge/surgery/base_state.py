"""The base model's own values while it is adapted: what ``adapt`` remembers, and what has changed since.

Every tensor of the base's state dict has a digest. Those that may move in training also have a copy on the CPU, because
``disabled`` and the fingerprint need their base values: buffers of up to ``COPY_BYTES`` (statistics, counters, a spectral
norm's vectors), one-dimensional parameters (BatchNorm's scale and shift, biases) and the trained head. A tensor that has a copy
or is trained may change and is saved with the adapter. A frozen weight that changes is refused by name, unless it moved by
rounding alone (:mod:`lora_edge.surgery.rounding`); then the base's value stands for it.
"""

from __future__ import annotations

import ctypes
import hashlib
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lora_edge.environment.torch_private import non_persistent_buffers
from lora_edge.nn.bn_statistics import (
    STATISTICS,
    base_statistics,
    batch_norms,
    forget_statistics,
    is_batch_norm,
    remember_statistics,
)
from lora_edge.nn.frozen_bn import FrozenNorm
from lora_edge.nn.layers import LoRAEdgeConv
from lora_edge.nn.reparametrised import added_tensors
from lora_edge.surgery.adapted import AdaptState, adapt_state
from lora_edge.surgery.rounding import moved_by_rounding, sketch

COPY_BYTES = 64 * 1024  # of a buffer; a larger one, such as a memory bank, has only a digest


@dataclass
class Changes:
    """What training changed beside the cores.

    Attributes:
        values: current value of each changed tensor, under every name that it has in the state dict.
        unknown: names whose base value is not kept, or that the base does not have; :func:`lora_edge.disabled` would need them.
        gone: names in the base that no longer exist.
    """

    values: dict[str, Tensor] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)


def fingerprint_state(state: dict[str, Tensor]) -> str:
    """Return the SHA-256 over names, dtypes, shapes and values of a plain state dict, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name]
        if isinstance(value, Tensor):
            _update(digest, f"{name} ", value)
    return digest.hexdigest()


def fingerprint(model: nn.Module, without: Iterable[str] = ()) -> str:
    """Return the SHA-256 over names, dtypes, shapes and values of the base model's state, adapted or not.

    The update is left out; for whatever else may move (a trained head, buffers) the base's own values are used.

    Args:
        model: the model, adapted or not.
        without: names to leave out.
    """
    state = base_state(model)
    return fingerprint_state({name: value for name, value in state.items() if name not in set(without)})


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the base model's state dict: its own values where they are kept, otherwise the current ones."""
    state = _own_state(model)
    for name, module in model.named_modules(remove_duplicate=False):
        for key, value in base_statistics(module).items():
            state[join(name, key)] = value
    adapted = adapt_state(model)
    if adapted is None:
        return state
    known = adapted.digests.keys() or state.keys()  # what was added since, such as a buffer that was None, is not the base's
    return {name: value for name, value in {**state, **adapted.base_values}.items() if name in known}


def remember(model: nn.Module, state: AdaptState, keep: Iterable[str] = ()) -> None:
    """Store the model's current base values in ``state``: digests, copies and the fingerprint.

    Args:
        model: the base model.
        state: where they are stored.
        keep: names whose values are copied whatever their size and kind, such as the trained head's.
    """
    base, keep = base_state(model), set(keep)
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    state.digests = {name: _digest(value) for name, value in base.items()}
    state.base_values = {
        name: value.detach().cpu().clone()
        for name, value in base.items()
        if name in keep or (value.nbytes <= COPY_BYTES if name in buffers else value.dim() <= 1)
    }
    state.sketches = {
        name: sketch(value)
        for name, value in base.items()
        if name not in buffers and name not in state.base_values and value.is_floating_point() and value.layout == torch.strided
    }
    state.fingerprint = fingerprint_state(base)


def renew_base(model: nn.Module, state: AdaptState) -> None:
    """Take the current values as the base's if ``load_state_dict`` loaded another base's weights."""
    layers = [m for m in model.modules() if isinstance(m, LoRAEdgeConv)]
    if not any(layer.base_replaced for layer in layers):
        return
    for _, norm in batch_norms(model):
        if base_statistics(norm):
            forget_statistics(norm)
            remember_statistics(norm)
    state.base_values, state.replaced = {}, []
    remember(model, state, parameter_names(model, state.head))
    for layer in layers:
        layer.base_replaced = False


def other_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the persistent buffers that are neither a BatchNorm's nor added by a method, under each of their names."""
    own = _own_state(model)
    norms = {prefix for prefix, module in model.named_modules(remove_duplicate=False) if is_batch_norm(module)}
    return {
        name: buffer
        for name, buffer in model.named_buffers(remove_duplicate=False)
        if name in own and name.rpartition(".")[0] not in norms
    }


def parameter_names(model: nn.Module, module: str | None) -> list[str]:
    """Return every name in the model of the named module's parameters, including those under which other modules share them."""
    if module is None:
        return []
    own = {id(p) for p in model.get_submodule(module).parameters()}
    return [name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in own]


def changes(model: nn.Module, state: AdaptState) -> Changes:
    """Return what differs from the base beside the cores; it holds only what may change.

    Raises:
        RuntimeError: a frozen tensor was changed; the message names it.
    """
    found = Changes()
    rounded: list[str] = []
    own = _own_state(model)
    trained = {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    for name, value in own.items():
        was = state.digests.get(name)
        if was is not None and _digest(value) == was:
            continue
        may_move = name in buffers and (was is not None or _owner_stays(model, name, state))
        if not (may_move or name in trained or name in state.base_values):
            if was is not None and _is_rounding(value, was, state.sketches.get(name)):
                rounded.append(name)  # the base's value is used for it
                continue
            raise RuntimeError(f"{_how(name, value, was)}; keep it frozen, or merge and save the whole model")
        found.values[name] = value
        if name not in state.base_values and not (may_move and was is None):  # a buffer that the base did not have was None
            found.unknown.append(name)
    if rounded:
        warnings.warn(
            f"{len(rounded)} frozen tensors, such as {rounded[0]}, moved by rounding, as in an average of the weights; the "
            "adapter is saved for the base's own values",
            UserWarning,
            stacklevel=3,
        )
    strange = {name.rpartition(".")[0] for name in found.unknown}  # modules that were added since, or trained whole
    for name in found.values:
        if name not in found.unknown and name not in buffers and name.rpartition(".")[0] in strange:
            found.unknown.append(name)
    found.gone = [name for name in state.digests if name not in own]
    for name in found.gone:
        parent = name.rpartition(".")[0]
        if not any(other.startswith(f"{parent}.") if parent else other for other in found.unknown):
            raise RuntimeError(f"the frozen part of the model changed since adapt: {name} is missing; put it back, or merge")
    return found


@contextmanager
def on_base_values(model: nn.Module, state: AdaptState) -> Iterator[None]:
    """Give every tensor that may move the base's value inside; afterwards each is the same object as before.

    Raises:
        RuntimeError: something was changed whose base value is not kept; the message names it.
    """
    _check_known(model, state)
    buffers: dict[tuple[int, str], tuple[nn.Module, Tensor | None]] = {}
    absent = _absent_buffers(model, state)
    parameters: dict[int, tuple[nn.Parameter, Tensor]] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    try:
        for owner, key in absent:
            buffers[id(owner), key] = (owner, owner._buffers[key])
            owner._buffers[key] = None
        for name, base in state.base_values.items():
            prefix, _, key = name.rpartition(".")
            module = modules.get(prefix)
            if module is None:
                continue
            parameter = module._parameters.get(key)
            if parameter is not None:
                if id(parameter) not in parameters and not _equal(parameter, base):
                    parameters[id(parameter)] = (parameter, parameter.data)
                    parameter.data = base.to(parameter.device, parameter.dtype)
            elif key in module._buffers and (id(module), key) not in buffers:
                current = module._buffers[key]
                if isinstance(module, FrozenNorm) and current is not None and _equal(current, base):
                    continue  # it did not move, and what is cached for it stays valid
                buffers[id(module), key] = (module, current)
                # a copy, so that what a forward inside writes is discarded
                module._buffers[key] = _as(base, current, base.device if current is None else current.device).clone()
        yield
    finally:
        for (_, key), (module, current) in buffers.items():
            module._buffers[key] = current
        for parameter, data in parameters.values():
            parameter.data = data


def back_to_base(model: nn.Module, state: AdaptState) -> None:
    """Restore the base value of everything that moved, as far as it is kept."""
    for module, key in _absent_buffers(model, state):
        module._buffers[key] = None
    set_values(model, state.base_values)


def set_values(model: nn.Module, values: dict[str, Tensor]) -> None:
    """Write tensors by their names in the state dict, in place if shape and dtype agree; a buffer may get a new shape."""
    modules = dict(model.named_modules(remove_duplicate=False))
    with torch.no_grad():
        for name, value in values.items():
            prefix, _, key = name.rpartition(".")
            module = modules[prefix]
            own = module._parameters.get(key)
            if own is None:
                own = module._buffers[key]
            if own is not None and own.shape == value.shape and (own.dtype == value.dtype or key in module._parameters):
                own.copy_(value)
            else:
                device = next((t.device for t in module._buffers.values() if t is not None), value.device)
                module._buffers[key] = value.to(device, copy=True)


def why_not_settable(model: nn.Module, name: str, value: Tensor) -> str | None:
    """Return why :func:`set_values` cannot write ``value`` under a name, None if it can."""
    prefix, _, key = name.rpartition(".")
    module = dict(model.named_modules(remove_duplicate=False)).get(prefix)
    if module is not None and module._parameters.get(key) is not None:
        own: Tensor | None = module._parameters[key]
    elif module is not None and key in module._buffers:
        own = module._buffers[key]
        if own is None or key not in STATISTICS:  # an observer's or a lazily created buffer gets its shape when it runs
            return None
    else:
        return "does not exist"
    assert own is not None
    return None if own.shape == value.shape else f"has shape {tuple(own.shape)}"


def thawed_norms(model: nn.Module, state: AdaptState) -> dict[str, str]:
    """Return the current type name of each frozen BatchNorm that a tool replaced since ``adapt``, such as ``SyncBatchNorm``."""
    modules = dict(model.named_modules(remove_duplicate=False))
    return {
        name: type(modules[name]).__name__ if name in modules else "nothing"
        for name in state.frozen_norms
        if not isinstance(modules.get(name), FrozenNorm)
    }


def check_norms_are_frozen(model: nn.Module, state: AdaptState, name: str = "") -> None:
    """Raise RuntimeError if a tool replaced a frozen BatchNorm, as ``convert_sync_batchnorm`` does; ``name`` is the model's."""
    for norm, kind in thawed_norms(model, state).items():
        raise RuntimeError(
            f"{join(name, norm)} was a frozen BatchNorm at adapt and is a {kind} now, which would move its statistics; "
            "convert the model before adapt"
        )


def join(prefix: str, name: str) -> str:
    """Return the dotted name of ``name`` below ``prefix``, which may be empty."""
    return f"{prefix}.{name}" if prefix else name


def _own_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict's tensors without those that adapting added."""
    added = {name for name, _ in added_tensors(model)}
    for prefix, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, LoRAEdgeConv):
            added.update(join(prefix, key) for key in ("core", "suffix"))
    state = model.state_dict()
    return {name: value for name, value in state.items() if isinstance(value, Tensor) and name not in added}


def _owner_stays(model: nn.Module, name: str, state: AdaptState) -> bool:
    """Whether a buffer that the base did not have belongs to a module of the base, where it was None."""
    prefix = name.rpartition(".")[0]
    return prefix == "" or any(other.startswith(f"{prefix}.") for other in state.digests)


def _is_rounding(value: Tensor, was: str, sketched: Tensor | None) -> bool:
    same_form = was.startswith(f"{value.dtype} {tuple(value.shape)} ")
    return same_form and sketched is not None and moved_by_rounding(value, sketched)


def _absent_buffers(model: nn.Module, state: AdaptState) -> list[tuple[nn.Module, str]]:
    """Return the buffers that were None in the base, whatever they are now."""
    if not state.digests:
        return []
    return [
        (module, key)
        for prefix, module in model.named_modules()
        for key in module._buffers
        if key not in non_persistent_buffers(module) and join(prefix, key) not in state.digests
    ]


def _check_known(model: nn.Module, state: AdaptState) -> None:
    """Raise RuntimeError if something moved whose base value is not kept; cheap if there are no large buffers."""
    cores = {id(t) for m in model.modules() if isinstance(m, LoRAEdgeConv) for t in (m.core, m.suffix)}
    added = {id(value) for _, value in added_tensors(model)}
    for name, p in model.named_parameters(remove_duplicate=False):
        is_ours = id(p) in cores or id(p) in added or name in state.base_values or not state.digests
        if p.requires_grad and not is_ours and state.digests.get(name) != _digest(p):
            raise RuntimeError(f"{name} was added or trained since adapt, and its base value is not kept; keep it frozen")
    known = state.base_values.keys()
    for name in state.digests.keys() - known:
        prefix, _, key = name.rpartition(".")
        try:
            buffer = model.get_submodule(prefix)._buffers.get(key)
        except AttributeError:
            raise RuntimeError(f"{name} is missing, so the base model's own output is not known; put it back") from None
        if buffer is not None and _digest(buffer) != state.digests[name]:
            raise RuntimeError(f"{name} moved since adapt, and its base value is too large to be kept; merge, or reload it")


def _how(name: str, value: Tensor, was: str | None) -> str:
    """Return the beginning of an error message: which tensor differs from the one at ``adapt``."""
    start = "the frozen part of the model changed since adapt, so no base would fit the adapter: "
    now = f"{value.dtype} {tuple(value.shape)}"
    if was is None:
        return f"{start}{name} was added"
    before = was.rpartition(" ")[0]
    return f"{start}{name} " + ("has other values" if before == now else f"was {before} and is {now}")


def _digest(value: Tensor) -> str:
    digest = hashlib.sha256()
    _update(digest, "", value)
    return f"{value.dtype} {tuple(value.shape)} {digest.hexdigest()}"


def _update(digest: hashlib._Hash, start: str, value: Tensor) -> None:
    value = value.detach()
    if value.layout != torch.strided:
        value = value.to_dense()
    value = value.resolve_conj().resolve_neg().cpu().contiguous()
    digest.update(f"{start}{value.dtype} {tuple(value.shape)}\n".encode())
    if value.numel():  # Tensor.numpy would make the storage impossible to resize, which observers need
        digest.update((ctypes.c_char * value.nbytes).from_address(value.data_ptr()))


def _equal(tensor: Tensor, base: Tensor) -> bool:
    return torch.equal(tensor.detach().cpu(), _as(base, tensor, torch.device("cpu")))


def _as(base: Tensor, current: Tensor | None, device: torch.device) -> Tensor:
    """Return a base value in the floating-point dtype that the model was cast to since."""
    cast = current is not None and current.is_floating_point() and base.is_floating_point()
    return base.to(device, current.dtype if cast and current is not None else base.dtype)
