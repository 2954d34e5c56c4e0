"""How many elements each method trains at rank 2, from the papers' shapes: a line per method."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from lora_edge.har.models import TResNetBlock

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


def _qwha(layer: Layer) -> int:
    return min(_lora(layer), layer.out * layer.n)


def _core(layer: Layer) -> int:
    return RANK * layer.out


def _behind(layer: Layer) -> int:
    return 2 * min(RANK, layer.out // layer.groups) * layer.out


def _salt(layer: Layer) -> int:
    scaled = max(1, layer.m // 10)
    return 2 * scaled + 2 * RANK * (layer.m - scaled)


def _kernel(layer: Layer) -> int:
    return layer.out * min(RANK, layer.into) * math.prod(layer.kernel)


def _wara(layer: Layer) -> int:
    paired = layer.into if layer.into > 1 else layer.n  # the axis that is transformed beside the output's
    return RANK * ((layer.out + 1) // 2 + (paired + 1) // 2 * (layer.n // paired))


# of methods that train every convolution on its own: the elements of one
PER_LAYER: dict[str, Callable[[Layer], int]] = {
    "block_lora": lambda c: RANK // 2 * c.n + RANK * c.out,
    "conv_lora": _lora,
    "kernel_core": _kernel,
    "memflora": _kernel,
    "memflora_balanced": _kernel,
    "memflora_sg": lambda c: _kernel(c) + min(RANK, c.into) * c.into,
    "paca": _kernel,
    "dora": lambda c: _lora(c) + c.out,
    "hydra": lambda c: _lora(c) + _behind(c),
    "hydra_sequential": _behind,
    "lora_c": lambda c: RANK * c.kernel[-1] * (c.into * c.groups * c.kernel[-1] + c.out // c.groups * math.prod(c.kernel[:-1])),
    "lora_c_factors": lambda c: RANK * (c.into * c.kernel[-1] + c.out * math.prod(c.kernel[:-1])),
    "lora_fa": _core,
    "matryoshka": _lora,
    "loldu": lambda c: min(RANK, c.m),
    "loldu_full": lambda c: c.m,
    "lora_ga": _lora,
    "lora_sb": lambda c: min(RANK, c.m) ** 2,
    "lora_xs": lambda c: min(RANK, c.m) ** 2,
    "one_bit": _lora,
    "one_bit_2": _lora,
    "one_bit_4": _lora,
    "one_bit_8": _lora,
    "pissa": _lora,
    "rslora": _lora,
    "tera": lambda c: sum(min(size, RANK) for size in (c.out, c.into, *c.kernel)),
    "vera": lambda c: RANK + c.out,
    "salt": _salt,
    "salt_linear": _salt,
    "randlora": lambda c: math.ceil(c.m / RANK) * (RANK + c.m),
    **dict.fromkeys(("shira", "shira_grad", "shira_snip", "shira_struct", "shira_wm"), _core),
    "pissa_4bit": _lora,
    "pissa_fast": _lora,
    "qwha": _qwha,
    "qwha_2bit": _qwha,
    "qwha_3bit": _qwha,
    "qwha_8bit": _qwha,
    "snell": _lora,
    "wara": _wara,
    "wara_per_subband": lambda c: 4 * _wara(c),
    **dict.fromkeys(("unilora", "unilora_exact"), _core),  # in one vector
}
# of the others: the elements of a model with these convolutions
OF_MODEL: dict[str, Callable[[nn.Module, list[Layer]], int]] = {
    "full": lambda model, _: sum(p.numel() for p in model.parameters()),
    "target_only": lambda model, _: sum(p.numel() for p in model.parameters()),
    "full_frozen_bn": lambda model, _: sum(p.numel() for p in model.parameters()) - 2 * _maps(model),
    "bn_only": lambda model, _: 2 * _maps(model),
    "bias_only": lambda model, _: sum(m.bias.numel() for m in model.modules() if getattr(m, "bias", None) is not None),
    "s2ft": lambda model, layers: _s2ft(model, layers, rows=True, columns=True),
    "s2ft_columns": lambda model, layers: _s2ft(model, layers, columns=True),
    "s2ft_rows": lambda model, layers: _s2ft(model, layers, rows=True),
    "head_only": lambda model, _: (_head(model).in_features + 1) * _head(model).out_features,
    "one_for_all": lambda _, layers: sum(map(_lora, [*layers[:1], *layers[1:][-1:]])),
    "s2_lora": lambda _, layers: RANK * (_largest_lora(layers) + len(layers)),
}


def expected_trainable(model: nn.Module, name: str) -> int:
    """The number of elements that a method trains at rank 2, in a model whose weights attain that rank."""
    name = name.removesuffix("_turned")
    layers = [Layer(m.out_channels, m.in_channels // m.groups, m.kernel_size, m.groups) for m in convolutions(model)]
    if name in OF_MODEL:
        return OF_MODEL[name](model, layers)
    return sum(map(_core if name.startswith("lora_edge") else PER_LAYER[name], layers))


def _s2ft(model: nn.Module, layers: list[Layer], rows: bool = False, columns: bool = False) -> int:
    """One more hidden channel for each pair in turn, the cheapest first, within ``RANK`` elements per output channel."""
    chains = [convolutions(block)[:3] for block in model.children() if isinstance(block, TResNetBlock)] or [convolutions(model)]
    costs = []
    for chain in chains:
        for producer, consumer in itertools.pairwise(chain):
            costs.append(rows * producer.weight[0].numel() + columns * consumer.weight[:, 0].numel())
    total, budget = 0, RANK * sum(layer.out for layer in layers)
    while any(total + cost <= budget for cost in costs):
        for cost in sorted(costs):
            total += cost if total + cost <= budget else 0
    return total or min(costs)


def convolutions(model: nn.Module) -> list[_ConvNd]:
    return [m for m in model.modules() if isinstance(m, _ConvNd)]


def _largest_lora(layers: list[Layer]) -> int:
    """The elements of one component of a pair of factors that fits every layer."""
    kernel = [max(sizes) for sizes in zip(*(c.kernel for c in layers), strict=True)]
    return max(c.out for c in layers) + max(c.into for c in layers) * math.prod(kernel)


def _maps(model: nn.Module) -> int:
    return sum(m.num_features for m in model.modules() if isinstance(m, _BatchNorm))


def _head(model: nn.Module) -> nn.Linear:
    return [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
