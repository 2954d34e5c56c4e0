"""Hadamard matrices of many orders, and the fast Walsh-Hadamard transform by them."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor


def hadamard_order(terms: int) -> int:
    """Return ``terms`` if :func:`transform` has a Hadamard matrix of that order, otherwise the next power of two."""
    return terms if _core_order(terms) else 1 << (terms - 1).bit_length()


def transform(rows: Tensor) -> Tensor:
    """Return ``rows Hᵀ`` over the last dimension, of an order from :func:`hadamard_order`.

    ``H``, of entries ±1 with ``H Hᵀ = n I``, is Sylvester's matrix of a power of two, times (Kronecker) Paley's of the rest of
    the order. It is not symmetric where that rest is more than 1. The powers of two take additions only, ``n log n`` per row.
    """
    order = _core_order(rows.shape[-1])
    if not order:
        raise ValueError(f"transform: there is no Hadamard matrix of order {rows.shape[-1]} here; use hadamard_order")
    blocks = rows.unflatten(-1, (-1, order))
    if order > 1:
        blocks = blocks @ _paley(order).to(rows).T
    width = 1
    while width < blocks.shape[-2]:
        first, second = blocks.unflatten(-2, (-1, 2, width)).unbind(-3)
        blocks = torch.stack([first + second, first - second], dim=-3).flatten(-4, -2)
        width *= 2
    return blocks.flatten(-2)


@cache
def _core_order(order: int) -> int:
    """Return 1 for a power of two, else the least ``4k`` with ``4k - 1`` prime that a power of two takes to the order, or 0."""
    rest = order & -order  # the largest power of two in it
    if rest == order:
        return 1
    candidate = 4 * (order // rest)
    while order % candidate == 0:
        if all((candidate - 1) % divisor for divisor in range(2, math.isqrt(candidate - 1) + 1)):
            return candidate
        candidate *= 2
    return 0


@cache
def _paley(order: int) -> Tensor:
    """Return Paley's first Hadamard matrix, of order ``q + 1`` for a prime ``q`` of the form ``4k - 1``."""
    q = order - 1
    characters = torch.full((q,), -1.0, dtype=torch.float64)
    characters[torch.arange(1, q) ** 2 % q] = 1.0
    characters[0] = 0.0
    matrix = torch.eye(order, dtype=torch.float64)
    matrix[0, 1:], matrix[1:, 0] = 1.0, -1.0
    matrix[1:, 1:] += characters[(torch.arange(q)[:, None] - torch.arange(q)) % q]
    return matrix
