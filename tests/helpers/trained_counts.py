"""How many elements each method trains at rank 2, from the papers' shapes: a line per method."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

RANK = 2


class Layer(NamedTuple):
    """The sizes of a convolution's weight ``(O, I/g, *K)``."""

    out: int
    into: int  # I/g
    kernel: tuple[int, ...]
    groups: int

    @property
    def n(self) -> int:
        """Terms of an output: ``(I/g)·ΠK``."""
        return self.into * math.prod(self.kernel)

    @property
    def m(self) -> int:
        """The largest rank of the unfolded weight."""
        return min(self.out, self.n)


def _lora(layer: Layer) -> int:
    return RANK * (layer.n + layer.out)


def _core(layer: Layer) -> int:
    return RANK * layer.out


def _kernel(layer: Layer) -> int:
    return layer.out * min(RANK, layer.into) * math.prod(layer.kernel)


# of methods that train every convolution on its own: the elements of one
PER_LAYER: dict[str, Callable[[Layer], int]] = {
    "conv_lora": _lora,
    "kernel_core": _kernel,
    "memflora": _kernel,
    "memflora_balanced": _kernel,
    "memflora_sg": lambda c: _kernel(c) + min(RANK, c.into) * c.into,
    "paca": _kernel,
    "dora": lambda c: _lora(c) + c.out,
    "lora_c": lambda c: RANK * c.kernel[-1] * (c.into * c.groups * c.kernel[-1] + c.out // c.groups * math.prod(c.kernel[:-1])),
    "lora_c_factors": lambda c: RANK * (c.into * c.kernel[-1] + c.out * math.prod(c.kernel[:-1])),
    "lora_fa": _core,
    "pissa": _lora,
}
# of the others: the elements of a model with these convolutions
OF_MODEL: dict[str, Callable[[nn.Module, list[Layer]], int]] = {
    "full": lambda model, _: sum(p.numel() for p in model.parameters()),
    "target_only": lambda model, _: sum(p.numel() for p in model.parameters()),
    "full_frozen_bn": lambda model, _: sum(p.numel() for p in model.parameters()) - 2 * _maps(model),
    "bn_only": lambda model, _: 2 * _maps(model),
    "bias_only": lambda model, _: sum(m.bias.numel() for m in model.modules() if getattr(m, "bias", None) is not None),
    "head_only": lambda model, _: (_head(model).in_features + 1) * _head(model).out_features,
}


def expected_trainable(model: nn.Module, name: str) -> int:
    """The number of elements that a method trains at rank 2, in a model whose weights attain that rank."""
    name = name.removesuffix("_turned")
    layers = [Layer(m.out_channels, m.in_channels // m.groups, m.kernel_size, m.groups) for m in convolutions(model)]
    if name in OF_MODEL:
        return OF_MODEL[name](model, layers)
    return sum(map(_core if name.startswith("lora_edge") else PER_LAYER[name], layers))


def convolutions(model: nn.Module) -> list[_ConvNd]:
    return [m for m in model.modules() if isinstance(m, _ConvNd)]


def _maps(model: nn.Module) -> int:
    return sum(m.num_features for m in model.modules() if isinstance(m, _BatchNorm))


def _head(model: nn.Module) -> nn.Linear:
    return [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
