"""Convolutions that share a weight: they share a core and a suffix too, so that the weight has one update.

A weight is shared if two modules hold the same Parameter, or Parameters on the same memory. A module under two names is not
such a case: it is adapted once.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from lora_edge.nn.layers import LoRAEdgeConv


def tied_groups(model: nn.Module, names: Iterable[str]) -> list[list[str]]:
    """Group the names of convolutions by the weight they hold; most groups have one name.

    Raises:
        ValueError: a weight is also used by something that is not in ``names``, or overlaps another tensor's memory, so the
            update would reach only one of the two; the message names both.
    """
    names = list(names)
    modules = {name: model.get_submodule(name) for name in names}
    ours = {id(module): name for name, module in modules.items()}
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, module in modules.items():
        groups.setdefault(_place(module.weight), []).append(name)  # type: ignore[arg-type]
    spans: list[tuple[int, int, str, bool, Tensor]] = []
    for prefix, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                is_ours = id(module) in ours and key == "weight"
                spans.append((*_span(parameter), f"{prefix}.{key}" if prefix else key, is_ours, parameter))
    spans.sort(key=lambda span: span[:2])
    widest: tuple[int, int, str, bool, Tensor] | None = None  # of those seen, the one with the highest end address
    for span in spans:
        if widest is not None and span[0] < widest[1] and span[1] > span[0]:
            _check_pair(widest, span)
        if widest is None or span[1] > widest[1]:
            widest = span
    return list(groups.values())


def _check_pair(one: tuple[int, int, str, bool, Tensor], two: tuple[int, int, str, bool, Tensor]) -> None:
    (*_, name, is_ours, tensor), (*_, other, is_ours_too, other_tensor) = one, two
    same = _place(tensor) == _place(other_tensor)
    if not (is_ours or is_ours_too) or (is_ours and is_ours_too and same):
        return
    if not is_ours:
        name, other = other, name
    how = "is the same memory as" if same else "overlaps"
    raise ValueError(f"{name} {how} {other}, which its update would not reach; adapt both or neither, or untie them")


def share(layers: list[LoRAEdgeConv]) -> None:
    """Give layers that share a weight the first one's core and suffix."""
    first = layers[0]
    for layer in layers[1:]:
        layer._parameters.update(core=first.core, suffix=first.suffix)


def _place(weight: Tensor) -> tuple[object, ...]:
    """Return a key that tensors on the same memory have in common."""
    return (str(weight.device), weight.data_ptr(), tuple(weight.shape), weight.stride())


def _span(tensor: Tensor) -> tuple[int, int]:
    """Return a tensor's address range, from its first element to past its last."""
    if tensor.numel() == 0 or tensor.is_meta:
        return (0, 0)
    extent = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return (tensor.data_ptr(), tensor.data_ptr() + extent * tensor.element_size())
