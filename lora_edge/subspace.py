"""Which frozen suffix a layer adapts in: the rows of ``S`` span the directions that the update may use.

One function a subspace. Each returns the frozen cores ``[G2, ..., Gd]`` of one layer in float32 on the CPU (float64 for a
float64 weight), scaled already.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_edge.tt import contract_suffix, tt_svd

SCALINGS = ("balanced", "paper")


def weight_suffix(weight: Tensor, rank: int, scaling: str = "balanced") -> list[Tensor]:
    """Frozen cores from the TT-SVD of the pre-trained weight: the paper's subspace.

    Args:
        weight: pre-trained kernel ``(O, I/g, *K)``.
        rank: cap of every bond.
        scaling: ``"paper"`` leaves the singular values in the rows, so the row norms are the singular values;
            ``"balanced"`` gives the rows one common norm, their root mean square, which keeps the norm of ``S``.

    Returns:
        ``[G2 (r1, I/g, r2), ..., Gd (r_{d-1}, K_last, 1)]``.
    """
    if scaling not in SCALINGS:
        raise ValueError(f"scaling is {scaling!r}; give one of {', '.join(map(repr, SCALINGS))}")
    exact = weight.detach().cpu().to(torch.float64)
    cores = tt_svd(exact, rank)[1:]
    if scaling == "balanced":
        cores = balance(cores)
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return [core.to(dtype) for core in cores]


def balance(cores: list[Tensor]) -> list[Tensor]:
    """Scale the first bond of ``G2`` so that every row of the suffix has the root-mean-square row norm.

    A row that is zero to float32 precision (a rank-deficient weight) has no direction of its own and stays as it is.
    """
    rows = contract_suffix(cores).flatten(1).norm(dim=1)
    live = rows > rows.max() * torch.finfo(torch.float32).eps
    common = rows[live].square().mean().sqrt() if bool(live.any()) else rows.max()
    factor = torch.where(live, common / rows.clamp_min(torch.finfo(rows.dtype).tiny), torch.ones_like(rows))
    return [cores[0] * factor[:, None, None], *cores[1:]]
