"""Bounds that follow from the size of the values and the arithmetic, so that they hold on every processor.

A sum of n terms in any order is off by about sqrt(n) roundings of the terms' size; what comes of a network adds up its layers'
in the same way, where BatchNorm keeps the maps at one size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rounding(layers: int, terms: int, dtype: torch.dtype = torch.float32) -> float:
    """Relative to the largest value, how far two networks of so many layers, each of sums of so many terms, may differ.

    Three times the standard deviation of the difference of two random walks.
    """
    return 3 * math.sqrt(2 * layers * terms) * torch.finfo(dtype).eps


def assert_near(got: Tensor, want: Tensor, layers: int, terms: int) -> None:
    """Assert that two outputs of the same network are equal but for rounding."""
    torch.testing.assert_close(got, want, rtol=0, atol=rounding(layers, terms, want.dtype) * float(want.detach().abs().max()))


# relative error ||a - b|| / ||b||: docs/design.md, section 4
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 3e-2}


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    if b.numel() == 0:
        assert a.shape == b.shape
        return 0.0
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm().clamp_min(1e-300))
