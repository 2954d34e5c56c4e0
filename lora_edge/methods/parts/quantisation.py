"""Round-to-nearest quantisation of a weight by groups of an output channel's terms, for methods that adapt a quantised base.

Asymmetric: the range of a group is its own, widened to include 0, which stays exact.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def quantise(weight: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Round each row to ``2^bits`` evenly spaced levels per group of terms.

    Args:
        weight: ``(O, n)``, floating point; computed in float64.
        bits: of a code, 1 to 8.
        group: terms of a row that share a scale; the last group of a row may be shorter.

    Returns:
        Codes ``(O, n)`` uint8; scales ``(O, ⌈n/group⌉)`` in float32, or float64 for a float64 weight; zero points, the codes
        of 0, ``(O, ⌈n/group⌉)`` uint8; for :func:`dequantise`. No error exceeds half a scale, but for the scale's own rounding.

    Raises:
        ValueError: ``bits`` or ``group`` is out of range.
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"quantise: bits is {bits}; give 1 to 8")
    if group < 1:
        raise ValueError(f"quantise: group is {group}; give at least 1 term")
    exact = torch.promote_types(weight.dtype, torch.float32)
    grouped = _grouped(weight.double(), group)
    low, high = grouped.amin(dim=2).clamp_max(0), grouped.amax(dim=2).clamp_min(0)
    scale = ((high - low) / (2**bits - 1)).to(exact)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))  # a group of zeros
    zero = (-low / scale.double()).round().clamp(0, 2**bits - 1)
    codes = ((grouped / scale.double()[..., None]).round() + zero[..., None]).clamp(0, 2**bits - 1)
    codes = codes.flatten(1)[:, : weight.shape[1]]
    return codes.to(torch.uint8).contiguous(), scale, zero.to(torch.uint8)


def dequantise(codes: Tensor, scale: Tensor, zero: Tensor, group: int) -> Tensor:
    """Return ``scale · (codes - zero) (O, n)``, in the dtype of ``scale``, for what :func:`quantise` returned."""
    offset = _grouped(codes.to(scale.dtype), group) - zero.to(scale.dtype)[..., None]
    return (scale[..., None] * offset).flatten(1)[:, : codes.shape[1]]


def _grouped(rows: Tensor, group: int) -> Tensor:
    """Return ``rows (O, n)`` as ``(O, ⌈n/group⌉, group)``, with zeros in what a row lacks."""
    count = math.ceil(rows.shape[1] / group)
    return F.pad(rows, (0, count * group - rows.shape[1])).unflatten(1, (count, group))
