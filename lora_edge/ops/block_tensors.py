"""The tensors of one call of ``tt_block`` or ``tt_conv``, as dispatch hands them to an engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from lora_edge.tt import contracted


def suffix_of(factors: Sequence[Tensor]) -> Tensor:
    """Return the contracted suffix of :attr:`BlockTensors.factors`, which are not empty."""
    return factors[0] if len(factors) == 1 else contracted(factors)


class BlockTensors(NamedTuple):
    """Forward's tensors.

    Attributes:
        x: ``(N, I, *L)``.
        weight: ``(O, I/g, *K)``.
        core: ``(O, r1)``, None for a convolution that is not adapted.
        bias: ``(O,)`` or None.
        residual: the shape of ``y``, or None.
        factors: the contracted suffix as a list of one, or the frozen cores; empty where there is no core.
        a, b: scale and shift ``(O,)`` of a frozen BatchNorm, or None.
        residual_a, residual_b: the same for the residual.
    """

    x: Tensor
    weight: Tensor
    core: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    factors: list[Tensor]
    a: Tensor | None = None
    b: Tensor | None = None
    residual_a: Tensor | None = None
    residual_b: Tensor | None = None


class BackwardTensors(NamedTuple):
    """Backward's tensors: the gradient of ``y``, the buffer that forward saved (None where that is empty), the layer's own."""

    dy: Tensor
    saved: Tensor | None
    weight: Tensor
    core: Tensor | None
    factors: list[Tensor]
    a: Tensor | None = None
    residual_a: Tensor | None = None
