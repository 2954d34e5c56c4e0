"""Bounds that follow from the size of the values and from the arithmetic, so that they hold on every processor.

The error of a sum of n terms in any order is about sqrt(n) roundings of the terms' size. The errors of a network's layers add
up in the same way, where BatchNorm keeps the maps at one size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rounding(layers: int, terms: int, dtype: torch.dtype = torch.float32) -> float:
    """How far two networks may differ relative to the largest value; ``terms`` is the length of the sums of each layer.

    Three times the standard deviation of the difference of two random walks.
    """
    return 3 * math.sqrt(2 * layers * terms) * torch.finfo(dtype).eps


def assert_near(got: Tensor, want: Tensor, layers: int, terms: int) -> None:
    """Assert that two outputs of the same network are equal up to rounding."""
    torch.testing.assert_close(got, want, rtol=0, atol=rounding(layers, terms, want.dtype) * float(want.detach().abs().max()))


# relative error ||a - b|| / ||b||: docs/design.md, section 4
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 3e-2}


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    if b.numel() == 0:
        assert a.shape == b.shape
        return 0.0
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm().clamp_min(1e-300))
