"""Tensor-train (TT) maths on plain tensors: attainable ranks, TT-SVD and contraction.

Source: Oseledets, "Tensor-Train Decomposition" (SIAM J. Sci. Comput. 2011), algorithm 1, and LoRA-Edge
(arXiv 2511.03765), section III. Everything is computed in float64 and cast once at the end.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

SQUARE_SAFELY = 1e-3  # least ratio of squared singular values at which squaring costs at most three of sixteen digits


def check_rank(rank: object, name: str = "rank") -> int:
    """Return ``rank`` as an int of at least 1.

    Raises:
        TypeError: it is not an integer; bool is rejected.
        ValueError: it is below 1.
    """
    if isinstance(rank, bool):
        raise TypeError(f"{name} is {rank}, a bool; give an integer of at least 1")
    try:
        value = operator.index(rank)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} is {rank!r}, a {type(rank).__name__}; give an integer of at least 1") from None
    if value < 1:
        raise ValueError(f"{name} is {value}; give an integer of at least 1")
    return value


def attainable_ranks(shape: Sequence[int], rank: int) -> list[int]:
    """Return the bond ranks ``[r1, ..., r_{d-1}]`` that a cap of ``rank`` allows for a tensor of ``shape`` (d dimensions)."""
    rank = check_rank(rank)
    bonds: list[int] = []
    left = 1
    for way in range(len(shape) - 1):
        left = min(rank, left * shape[way], math.prod(shape[way + 1 :]))
        bonds.append(left)
    return bonds


def tt_svd(tensor: Tensor, rank: int) -> list[Tensor]:
    """Decompose a d-dimensional tensor into TT cores by successive truncated SVDs, in its native mode order.

    Args:
        tensor: shape ``(n1, ..., nd)``, d >= 1, real floating point; a convolution's weight is ``(O, I/g, *K)``.
        rank: cap of every bond, at least 1.

    Returns:
        Cores ``G_k`` of shape ``(r_{k-1}, n_k, r_k)`` with ``r_0 = r_d = 1``, in the dtype and on the device of
        ``tensor``. All but the last are left-orthogonal, so the singular values are in the suffix. The signs are fixed: the
        entry of largest magnitude in each left singular vector is positive.

    Raises:
        TypeError: ``tensor`` is not a real floating-point tensor, or ``rank`` is not an integer.
        ValueError: ``rank`` is below 1, or ``tensor`` is empty or holds NaN or Inf.
    """
    rank = check_rank(rank)
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"tt_svd: tensor is {kind}; give a real floating-point tensor")
    if tensor.dim() < 1 or tensor.numel() == 0:
        raise ValueError(f"tt_svd: tensor has shape {tuple(tensor.shape)}; give one with at least one element per dimension")
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError("tt_svd: tensor holds NaN or Inf; give finite values")
    rest = tensor.detach().to(torch.float64)
    bonds = attainable_ranks(tensor.shape, rank)
    cores: list[Tensor] = []
    left = 1
    for way, bond in enumerate(bonds):
        matrix = rest.reshape(left * tensor.shape[way], -1)
        u = _left_singular_vectors(matrix, bond)
        largest = u.gather(0, u.abs().argmax(dim=0, keepdim=True))
        u = u * torch.where(largest < 0, -1.0, 1.0).to(u.dtype)
        cores.append(u.reshape(left, tensor.shape[way], bond))
        rest = u.T @ matrix
        left = bond
    cores.append(rest.reshape(left, tensor.shape[-1], 1))
    return [core.to(tensor.dtype).contiguous() for core in cores]


def _left_singular_vectors(matrix: Tensor, count: int) -> Tensor:
    """Return the first ``count`` left singular vectors as orthonormal columns, by decreasing singular value.

    A wide matrix, as weights are, is first reduced to a square one: to ``M M^T``, whose eigenvectors they are, if the singular
    values are large enough to be squared, otherwise by QR, which is slower.
    """
    if matrix.shape[0] < matrix.shape[1]:
        square = matrix @ matrix.T
        if bool(torch.isfinite(square.diagonal()).all()):
            values, vectors = torch.linalg.eigh(square)
            if values[-count] > SQUARE_SAFELY * values[-1]:
                return vectors[:, -count:].flip(1)
        matrix = torch.linalg.qr(matrix.T, mode="r").R.T
    return torch.linalg.svd(matrix, full_matrices=False).U[:, :count]


def tt_contract(cores: Sequence[Tensor]) -> Tensor:
    """Contract TT cores ``[(1, n1, r1), ..., (r_{d-1}, nd, 1)]`` to the full tensor ``(n1, ..., nd)``.

    Raises:
        ValueError: a core is not 3-dimensional, neighbouring bonds do not match, or an outer bond is not 1.
    """
    check_cores(cores, "tt_contract")
    if cores[0].shape[0] != 1:
        raise ValueError(f"tt_contract: the first core has shape {tuple(cores[0].shape)}; its first bond must be 1")
    return _contract(cores)[0]


def contract_suffix(cores: Sequence[Tensor]) -> Tensor:
    """Contract the frozen cores ``[G2 (r1, I/g, r2), ..., Gd (r_{d-1}, K, 1)]`` to the suffix ``(r1, I/g, *K)``.

    Raises:
        ValueError: as for :func:`tt_contract`, except that the first bond may be any ``r1``.
    """
    check_cores(cores, "suffix")
    return _contract(cores)


def contracted(suffix: Tensor | Sequence[Tensor]) -> Tensor:
    """Return a suffix, given as one tensor or as the frozen cores, as one tensor."""
    return suffix if isinstance(suffix, Tensor) else contract_suffix(suffix)


def is_kernel(core: Tensor) -> bool:
    """Whether a core is a trained kernel ``(O, r, *K)``, with the suffix ``(r, I/g, 1, ...)``; otherwise it is ``(O, r1)``."""
    return core.dim() > 2


def update_of(core: Tensor, suffix: Tensor) -> Tensor:
    """Return the dense update, which can be viewed as ``(O, I/g, *K)``: ``core @ S``, or of a trained kernel
    ``Σ_q core[o,q,k] S[q,i]``.
    """
    if is_kernel(core):
        return torch.einsum("oqk,qi->oik", core.flatten(2), suffix.flatten(1))
    return core @ suffix.flatten(1)


def _contract(cores: Sequence[Tensor]) -> Tensor:
    dtype = cores[0].dtype
    out = cores[0].to(torch.float64)
    for core in cores[1:]:
        out = torch.tensordot(out, core.to(torch.float64), dims=1)
    return out.squeeze(-1).to(dtype)


def check_cores(cores: Sequence[Tensor], name: str) -> None:
    """Raise ValueError unless the cores are 3-dimensional, neighbouring bonds match and the last bond is 1."""
    if len(cores) == 0:
        raise ValueError(f"{name}: no cores; give at least one of shape (r_in, n, r_out)")
    for k, core in enumerate(cores):
        if core.dim() != 3:
            raise ValueError(f"{name}: core {k} has shape {tuple(core.shape)}; a TT core is (r_in, n, r_out)")
        if k and cores[k - 1].shape[2] != core.shape[0]:
            raise ValueError(
                f"{name}: core {k - 1} ends in bond {cores[k - 1].shape[2]} but core {k} starts with {core.shape[0]}; "
                "neighbouring bonds must match"
            )
    if cores[-1].shape[2] != 1:
        raise ValueError(f"{name}: the last core has shape {tuple(cores[-1].shape)}; its last bond must be 1")
