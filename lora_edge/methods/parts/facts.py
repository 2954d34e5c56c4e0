"""Facts about the base model that some methods start from, gathered on a copy before anything is changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lora_edge.error_text import in_words
from lora_edge.methods.parts.backbone import spread
from lora_edge.nn.fused_block import layer_args
from lora_edge.nn.inputs_shown import inputs_shown
from lora_edge.ops.padding import pad_by_mode
from lora_edge.subspaces.gradient import twin


def dense_gradients(model: nn.Module, names: Iterable[str], inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Return the gradient ``(O, I/g, *K)`` of each named convolution's weight, on the CPU, in float32 or float64.

    It is that of the mean cross-entropy over at most 64 of the windows, evenly spread, with BatchNorm on its running
    statistics and dropout off. The model is not changed.

    Args:
        model: the base model.
        names: dotted names of convolutions.
        inputs: windows ``(N, ...)``.
        labels: their classes ``(N,)``.

    Raises:
        ValueError: a gradient holds NaN or Inf (the message names the layer), there are no windows, the model does not accept
            them, or the labels are not one class per window.
        RuntimeError: the model cannot be copied.
    """
    read = _windows(inputs)
    if not isinstance(labels, Tensor) or labels.shape[:1] != inputs.shape[:1]:
        there = tuple(labels.shape) if isinstance(labels, Tensor) else f"a {type(labels).__name__}"
        raise ValueError(f"labels: {there} for windows of {tuple(inputs.shape)}; give one class per window")
    copied = twin(model)
    copied.eval().requires_grad_(False)
    weights: dict[str, Tensor] = {
        name: copied.get_submodule(name).weight.requires_grad_(True)  # type: ignore[union-attr, operator, misc]
        for name in names
    }
    with torch.enable_grad():
        logits, classes = _forward(copied, read), labels[spread(len(labels))]
        try:
            loss = F.cross_entropy(logits, classes)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            what = f"no cross-entropy of output {tuple(logits.shape)} and {classes.dtype} {tuple(classes.shape)}"
            raise ValueError(f"labels: {what} ({in_words(error)}); give one class per window") from None
        found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    gradients = {}
    for (name, weight), gradient in zip(weights.items(), found, strict=True):
        exact = torch.promote_types(weight.dtype, torch.float32)
        gradients[name] = torch.zeros_like(weight, dtype=exact).cpu() if gradient is None else gradient.to(exact).cpu()
        if not bool(torch.isfinite(gradients[name]).all()):
            raise ValueError(f"{name or 'model'}: the gradient holds NaN or Inf; give finite windows")
    return gradients


def second_moments(model: nn.Module, names: Iterable[str], inputs: Tensor) -> dict[str, Tensor]:
    """Return ``XᵀX (g, n, n)`` in float64 on the CPU of each named convolution's inputs, ``n = (I/g)·ΠK``.

    The rows of ``X`` are the patches that the outputs of a group read, padding included, over at most 64 of the windows, evenly
    spread, in evaluation mode. The model is not changed.

    Args:
        model: the base model.
        names: dotted names of convolutions.
        inputs: windows ``(N, ...)``.
    """
    found: dict[str, Tensor] = {}

    def see(name: str, layer: _ConvNd, x: Tensor) -> None:
        rows = patches(layer, x).double()
        found[name] = found.get(name, 0) + (rows.transpose(1, 2) @ rows).cpu()

    _show_inputs(model, names, inputs, see)
    return found


def live_channels(model: nn.Module, names: Iterable[str], inputs: Tensor) -> dict[str, Tensor]:
    """Return the input channels of each named convolution, in order, that are not always zero, as those behind a dead ReLU are.

    Over at most 64 of the windows, evenly spread, in evaluation mode. The model is not changed.

    Args:
        model: the base model.
        names: dotted names of convolutions.
        inputs: windows ``(N, ...)``.
    """
    found: dict[str, Tensor] = {}

    def see(name: str, layer: _ConvNd, x: Tensor) -> None:
        channels = x if x.dim() == layer.weight.dim() - 1 else x.transpose(0, 1)
        found[name] = found.get(name, False) | (channels != 0).flatten(1).any(dim=1).cpu()

    _show_inputs(model, names, inputs, see)
    return {name: live.nonzero().flatten() for name, live in found.items()}


def _show_inputs(model: nn.Module, names: Iterable[str], inputs: Tensor, see: Callable[[str, _ConvNd, Tensor], None]) -> None:
    """Call ``see(name, conv, x)`` each time that a named convolution reads ``x`` in a forward of the windows, in evaluation."""
    convs: dict[str, Any] = {name: model.get_submodule(name) for name in names}
    with inputs_shown(model, {conv: partial(see, name, conv) for name, conv in convs.items()}):
        _forward(model, _windows(inputs))


def _windows(inputs: Tensor) -> Tensor:
    """The windows that are read: at most 64, evenly spread."""
    if inputs.dim() == 0 or len(inputs) == 0:
        raise ValueError(f"inputs: there are no windows in {tuple(inputs.shape)}; give at least one of the target's")
    return inputs[spread(len(inputs))]


def _forward(model: nn.Module, windows: Tensor) -> Tensor:
    try:
        return model(windows)  # type: ignore[no-any-return]
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        shape = f"{windows.dtype} {tuple(windows.shape)}"
        raise ValueError(f"inputs: the model does not accept windows of {shape} ({in_words(error)})") from None


def patches(conv: _ConvNd, x: Tensor) -> Tensor:
    """Return the patches ``(g, N·ΠL', (I/g)·ΠK)`` that a convolution's outputs read of ``x (N, I, *L)``, padding included.

    ``patches(conv, x)[k] @ weight_of_group_k.flatten(1).T`` is the group's output without bias, ``(N·ΠL', O/g)``.
    """
    if x.dim() == conv.weight.dim() - 1:
        x = x[None]
    sides = layer_args(conv).total_padding(conv.kernel_size)
    x = F.pad(pad_by_mode(conv, x), [amount for pair in reversed(sides) for amount in pair])
    spatial = x.dim() - 2
    for axis in range(spatial):
        span = (conv.kernel_size[axis] - 1) * conv.dilation[axis] + 1
        x = x.unfold(2 + axis, span, conv.stride[axis])[..., :: conv.dilation[axis]]
    x = x.unflatten(1, (conv.groups, -1))  # (N, g, I/g, *L', *K)
    x = x.movedim(2, 2 + spatial)  # (N, g, *L', I/g, *K)
    return x.transpose(0, 1).flatten(1, 1 + spatial).flatten(2)
