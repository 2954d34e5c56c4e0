"""Select the convolutions to adapt, and say which layers are left alone and why."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Sequence

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from lora_edge.nn import lean
from lora_edge.nn.frozen_bn import unfreezable, why_not_frozen
from lora_edge.nn.layers import ADAPTED_CLASS
from lora_edge.surgery.adapted import refuse_adapted


def select(
    model: nn.Module,
    targets: Sequence[str] | str | None,
    exclude: Sequence[str] | str | None,
    bn: str = "batch",
) -> list[str]:
    """Return the names of the convolutions that ``targets`` and ``exclude`` choose, in registration order.

    With ``bn="frozen"``, a BatchNorm that cannot be frozen is refused unless ``exclude`` names it.

    Raises:
        TypeError: ``model`` is not a module.
        RuntimeError: the model or a part of it is already adapted.
        ValueError: there is no convolution, a pattern matches nothing, nothing is left, or a BatchNorm cannot be frozen.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"adapt: model is a {type(model).__name__}; give a torch.nn.Module")
    refuse_adapted(model)
    names = [name for name, module in model.named_modules() if type(module) in ADAPTED_CLASS and "weight" in module._parameters]
    if not names:
        raise ValueError("the model has no nn.Conv1d, nn.Conv2d or nn.Conv3d; there is nothing to adapt")
    chosen = names if targets is None else _match("targets", targets, names)
    loose = unfreezable(model) if bn == "frozen" else {}
    left_out = [] if exclude is None else _match("exclude", exclude, [*names, *loose])
    for name, why in loose.items():
        if name not in left_out:
            raise ValueError(f'{name}: {why}; put {name!r} in exclude to leave it as it is, or use bn="batch"')
    chosen = [name for name in chosen if name not in left_out]
    if not chosen:
        raise ValueError(f"exclude={exclude!r} leaves no convolution to adapt; exclude fewer")
    return chosen


def left_alone(model: nn.Module, bn: str) -> dict[str, str]:
    """Return the name of every layer that ``adapt`` does not adapt or freeze, with the reason."""
    reasons: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, _ConvNd) and type(module) not in ADAPTED_CLASS:
            reasons[name] = f"{type(module).__name__} is not exactly nn.Conv1d, nn.Conv2d or nn.Conv3d, left alone"
        elif type(module) in ADAPTED_CLASS and "weight" not in module._parameters:
            reasons[name] = lean.COMPUTED_WEIGHT
        elif isinstance(module, _BatchNorm) and bn == "frozen" and (why := why_not_frozen(module)):
            reasons[name] = why
    return reasons


def _match(option: str, patterns: Sequence[str] | str, names: list[str]) -> list[str]:
    wanted = [patterns] if isinstance(patterns, str) else list(patterns)
    hits: set[str] = set()
    for pattern in wanted:
        found = [pattern] if pattern in names else fnmatch.filter(names, pattern)
        if not found:
            close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.0)
            raise ValueError(f"{option}: {pattern!r} matches no convolution; the closest are {', '.join(map(repr, close))}")
        hits.update(found)
    if not wanted:
        raise ValueError(f"{option} is empty; name at least one convolution, or leave it out")
    return [name for name in names if name in hits]
