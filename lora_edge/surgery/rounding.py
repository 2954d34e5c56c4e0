"""Tell whether a tensor of which no copy is kept moved by rounding alone: 16 random sums of it show how far it moved.

An average of the weights over the steps, such as timm's ``ModelEma``, computes ``d * w + (1 - d) * w`` of a frozen weight,
which differs from ``w`` in the last bits. The sums are of float64 products with fixed random numbers, so the mean of their
squared changes estimates the squared norm of the tensor's change to about a third.
"""

from __future__ import annotations

import torch
from torch import Tensor

SUMS = 16
ROUNDING = 1e-4  # of the tensor's norm; timm's averages at decays up to 0.9999 stay below half of it (3,000 steps, float32)
_COLUMNS = 256


def sketch(tensor: Tensor) -> Tensor:
    """Return a sketch ``(17,)`` in float64 on the CPU: the random sums and the norm."""
    flat = tensor.detach().cpu().reshape(-1).to(torch.float64)
    rows = -(-flat.numel() // _COLUMNS)
    generator = torch.Generator().manual_seed(0)
    across = torch.randn(_COLUMNS, SUMS, generator=generator, dtype=torch.float64)
    down = torch.randn(rows, SUMS, generator=generator, dtype=torch.float64)
    padded = torch.nn.functional.pad(flat, (0, rows * _COLUMNS - flat.numel())).view(rows, _COLUMNS)
    return torch.cat([(padded @ across * down).sum(dim=0), flat.norm()[None]])


def moved_by_rounding(tensor: Tensor, was: Tensor) -> bool:
    """Whether ``tensor`` is as close to the tensor that ``was`` is a sketch of as an average of the latter would be."""
    now = sketch(tensor)
    apart = (now[:SUMS] - was[:SUMS]).square().mean().sqrt()
    allowed = max(ROUNDING, float(torch.finfo(tensor.dtype).eps)) if tensor.is_floating_point() else 0.0
    return bool(apart <= allowed * was[SUMS])
