"""The frozen suffix of a layer: the rows of ``S`` span the directions that the update may use.

There is one function per subspace. Each returns the frozen cores ``[G2, ..., Gd]`` of one layer, already scaled, in float32 on
the CPU (float64 for a float64 weight).

No row of a suffix is zero, because its column of the core could then never learn. If the weight has no direction left (it is
all zero, as the last layer of a branch often is at the start, or its rank is below the requested one), the row is a random
direction orthogonal to the others: the same one for every weight of that shape, with the norm of :func:`common_norm` in either
scaling.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lora_edge.tt import contract_suffix, tt_svd

SCALINGS = ("balanced", "paper")
FRESH_NORM = 3**-0.5  # of a filter as torch initialises it: fan-in entries from U(-1/sqrt(fan-in), 1/sqrt(fan-in))
FILL = 1e-5  # size of filling rows relative to the others: above float32's noise, too small to rotate them


def weight_suffix(weight: Tensor, rank: int, scaling: str = "balanced") -> list[Tensor]:
    """Return the frozen cores from the TT-SVD of the pre-trained weight: the paper's subspace.

    Args:
        weight: pre-trained weight ``(O, I/g, *K)``.
        rank: cap of every bond.
        scaling: ``"paper"`` leaves the singular values in the rows, so the row norms are the singular values, except for rows
            beyond the weight's rank; ``"balanced"`` gives all rows the norm of :func:`common_norm`, so that one learning rate
            works for every layer and rank.

    Returns:
        ``[G2 (r1, I/g, r2), ..., Gd (r_{d-1}, K_last, 1)]``.
    """
    if scaling not in SCALINGS:
        raise ValueError(f"scaling is {scaling!r}; give one of {', '.join(map(repr, SCALINGS))}")
    exact = weight.detach().cpu().to(torch.float64)
    cores = tt_svd(exact, rank)[1:]
    live = _live(cores)
    if not bool(live.all()):
        cores = _filled(cores, live, rank)
    norm = common_norm(exact, cores[0].shape[0])
    every = scaling == "balanced" or _is_zero(exact)
    cores = balance(cores, norm, torch.ones_like(live) if every else ~live)
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return [core.to(dtype) for core in cores]


def gradient_suffix(weight: Tensor, gradient: Tensor, rank: int, scaling: str = "balanced") -> list[Tensor]:
    """Return the frozen cores from the TT-SVD of the dense weight gradient: its leading right singular directions.

    If the gradient's rank is below the requested one, as after a pooled layer with few classes, the weight's leading directions
    fill the remaining rows.

    Args:
        weight: pre-trained weight ``(O, I/g, *K)``.
        gradient: ``dW``, or ``Q^T dW (q, I/g, *K)`` of :func:`lora_edge.subspaces.gradient.leading_gradients`, which has the
            same suffix.
        rank, scaling: as for :func:`weight_suffix`.

    Returns:
        ``[G2 (r1, I/g, r2), ..., Gd (r_{d-1}, K_last, 1)]``.

    Raises:
        ValueError: the gradient is zero.
    """
    if not 0 < float(gradient.abs().max()) < float("inf"):
        raise ValueError(
            'the batches yield no gradient for it, so it has no such directions; exclude it, or use subspace="weight"'
        )
    return suffix_along(weight, gradient, rank, scaling)


def suffix_along(weight: Tensor, rows: Tensor, rank: int, scaling: str = "balanced") -> list[Tensor]:
    """Return the frozen cores from the TT-SVD of given rows instead of the weight, such as those of
    :func:`lora_edge.subspaces.inputs.leading_inputs`.

    The weight's leading directions fill what the rows leave, because a column of the core without a direction could not learn.
    The suffix has the norm of the weight's own suffix, so that the learning rate does not depend on the size of the rows.

    Args:
        weight: pre-trained weight ``(O, I/g, *K)``.
        rows: ``(q, I/g, *K)``, finite; if all are zero the suffix is the weight's own.
        rank, scaling: as for :func:`weight_suffix`.

    Returns:
        ``[G2 (r1, I/g, r2), ..., Gd (r_{d-1}, K_last, 1)]``.
    """
    if not bool(rows.count_nonzero()):
        return weight_suffix(weight, rank, scaling)
    exact = rows.to(torch.float64)
    exact = exact / exact.abs().max()
    own = contract_suffix(weight_suffix(weight.detach().cpu().to(torch.float64), rank, scaling))
    size = own.norm()
    rows = torch.cat([exact / exact.norm(), FILL * own / size])
    if len(rows) > len(weight):  # a bond is at most O
        _, energy, directions = torch.linalg.svd(rows.flatten(1), full_matrices=False)
        rows = (energy[:, None] * directions)[: len(weight)].unflatten(1, rows.shape[1:])
    cores = weight_suffix(rows, rank, scaling)
    factor = size / contract_suffix(cores).norm()
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return [(core if k else core * factor).to(dtype) for k, core in enumerate(cores)]


def kernel_suffix(weight: Tensor, rank: int, scaling: str = "balanced") -> Tensor:
    """Return the rows ``(r, I/g)`` that a trained kernel ``(O, r, *K)`` reads the input through.

    They are the leading right singular directions of the weight's input side: of the matrix ``(O·ΠK, I/g)`` whose rows are the
    weight's filters tap by tap.

    Args:
        weight: pre-trained weight ``(O, I/g, *K)``.
        rank: cap of ``r``, which is at most ``I/g`` and ``O·ΠK``.
        scaling: as for :func:`weight_suffix`; the balanced norm is :func:`kernel_norm`.
    """
    (rows,) = weight_suffix(weight.movedim(1, -1).flatten(0, -2), rank, scaling)
    return scaled_rows(weight, rows.squeeze(-1)) if scaling == "balanced" else rows.squeeze(-1)


def scaled_rows(weight: Tensor, rows: Tensor) -> Tensor:
    """Return rows ``(r, I/g)`` of any lengths with the norm of :func:`kernel_norm`, on the CPU in their own dtype."""
    return rows * (kernel_norm(weight, len(rows)) / rows.norm(dim=1, keepdim=True))


def kernel_norm(weight: Tensor, rank: int) -> float:
    """Return the norm of a balanced row under a trained kernel: :func:`common_norm` over ``√ΠK``.

    Adam's first step moves all ``r·ΠK`` entries of an output channel, at each of the ``ΠK`` taps along the same rows, so the
    update of that channel is again ``rate / √2`` of the layer's usual filter norm.
    """
    exact = weight.detach().cpu().to(torch.float64)
    return common_norm(exact, rank) / math.prod(weight.shape[2:]) ** 0.5


def row_energies(tensor: Tensor, rank: int) -> Tensor:
    """Return the energy ``(r1,)`` of each suffix row of a weight or gradient ``(O, I/g, *K)``: its squared norm, in float64."""
    rows = contract_suffix(tt_svd(tensor.detach().cpu().to(torch.float64), rank)[1:])
    return rows.flatten(1).square().sum(dim=1)


def weight_energies(weight: Tensor, rank: int) -> Tensor:
    """As :func:`row_energies`; a weight of zeros counts as a freshly initialised one, evenly in all directions."""
    energies = row_energies(weight, rank)
    if bool(energies.count_nonzero()):
        return energies
    count = len(weight)
    return torch.full_like(energies, count * FRESH_NORM**2 / min(count, weight[0].numel()))


def common_norm(weight: Tensor, rank: int) -> float:
    """Return the norm of a balanced suffix row: the root-mean-square filter norm ``|W| / sqrt(O)``, divided by ``sqrt(2 r1)``.

    A weight of zeros counts as a freshly initialised one, with the filter norm of torch's own initialisation.

    Adam's first step moves each entry of the core by the learning rate. The rows of a TT-SVD are orthogonal (apart from what
    the later bonds truncate), so the norm of an output channel's update is ``rate * sqrt(r1)`` times a row's norm: with this
    norm, ``rate / sqrt(2)`` of the layer's usual filter norm, whatever its width, kernel size, fan-in and rank. The 2 only sets
    the unit of the rate: at rank 2 a row has half a filter's norm. (Source: after muP, Yang et al. 2022, arXiv 2203.03466, for
    the core alone. If the rows' responses all added up, the law would be ``1 / r1``; the rates by rank in the results show that
    they do not.)

    A step of SGD is ``dW`` projected on the unit rows, times the rate and the square of this norm: fine-tuning's own step in
    the subspace at ``|W|^2 / (2 O r1)`` of its rate. So with SGD a rate does not transfer between layers and ranks.
    """
    filter_norm = float(weight.norm()) / weight.shape[0] ** 0.5
    return (FRESH_NORM if _is_zero(weight) else filter_norm) / (2 * rank) ** 0.5


def _is_zero(weight: Tensor) -> bool:
    """Whether a weight is zero to float32 precision, compared with one that torch initialises."""
    return float(weight.norm()) < torch.finfo(torch.float32).eps * FRESH_NORM * weight.shape[0] ** 0.5


def balance(cores: list[Tensor], norm: float, which: Tensor) -> list[Tensor]:
    """Scale the first bond of ``G2`` so that each suffix row for which ``which (r1,)`` is true has the given norm."""
    rows = contract_suffix(cores).flatten(1).norm(dim=1)
    factor = torch.where(which, norm / rows, torch.ones_like(rows))
    return [cores[0] * factor[:, None, None], *cores[1:]]


def _live(cores: list[Tensor]) -> Tensor:
    """Return which rows ``(r1,)`` of the suffix have a direction: a norm above float32's rounding of the largest one."""
    rows = contract_suffix(cores).flatten(1).norm(dim=1)
    return rows > rows.max() * torch.finfo(torch.float32).eps


def _filled(cores: list[Tensor], live: Tensor, rank: int) -> list[Tensor]:
    """Fill the rows without a direction with random ones, orthogonal to the others as far as the later bonds allow."""
    rows = contract_suffix(cores)
    flat = rows.flatten(1).clone()
    generator = torch.Generator().manual_seed(0)  # a separate one: torch's own belongs to the user
    random = torch.randn(flat.shape[1], int((~live).sum()), generator=generator, dtype=flat.dtype)
    own = torch.linalg.qr(flat[live].T)[0]
    directions = torch.linalg.qr(random - own @ (own.T @ random))[0]
    least = float(flat[live].norm(dim=1).min()) if bool(live.any()) else 1.0
    flat[~live] = FILL * least * directions.T  # small, so that the later bonds keep what the weight's own rows need
    first, *rest = tt_svd(flat.reshape(-1, *rows.shape[2:]), rank)
    return [first.reshape(*rows.shape[:2], -1), *rest]
