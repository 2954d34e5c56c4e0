"""Uni-LoRA: the LoRA factors of all layers are a fixed isometric projection of one trained vector.

Source: Uni-LoRA, Li et al. 2025 (arXiv 2506.00799). Read in peft's ``tuners/unilora``: the projection, its seed, the order of
the factors, the start, no scale. Inferred: the unfolded weight of a convolution; the vector's length, LoRA-Edge's ``r·ΣO``, so
that it grows with the rank (the paper's is free); the exact start of ``unilora_exact``.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lora_edge.methods.base import Method, PrepareList, jointly
from lora_edge.nn.reparametrised import Reparametrisation, parameter, share

SEED = 42  # of the projection: peft's default
BOUND = 0.02


def projection(elements: int, length: int) -> Tensor:
    """Return which entry of the vector each of the factors' elements is, ``(elements,)`` int64, as peft's ``generate_index``.

    Each entry is used ``elements // length`` times or once more.
    """
    generator = np.random.default_rng(SEED)
    index = np.repeat(np.arange(length), elements // length)
    index = np.concatenate([index, generator.choice(length, size=elements % length, replace=False)])
    generator.shuffle(index)
    return torch.from_numpy(index).long()


class Vector(nn.Module):
    """``theta (d,)``, which all layers share, and the projection ``P (D, d)`` to the ``D`` elements of their factors.

    Row ``e`` of ``P`` has ``1/√n`` at ``index[e]``, an entry that ``n`` elements use, so ``PᵀP = I``. ``index`` and ``scale``
    are made again from the seed instead of being saved, because they have ``D`` elements. numpy promises no equal draws between
    versions, so the seed and a checksum of ``index`` are saved, and a file of another projection is refused.
    """

    index: Tensor
    scale: Tensor
    projection: Tensor
    start: Tensor | None

    def __init__(self, conv: _ConvNd, elements: int, length: int, exact_start: bool) -> None:
        super().__init__()
        self.theta: nn.Parameter = parameter(conv, torch.empty(length).uniform_(-BOUND, BOUND))
        self.register_buffer("start", self.theta.detach().clone() if exact_start else None)
        index = projection(elements, length)
        scale = index.bincount(minlength=length)[index].to(self.theta.dtype).rsqrt()
        self.register_buffer("index", index.to(self.theta.device), persistent=False)
        self.register_buffer("scale", scale.to(self.theta.device), persistent=False)
        self.register_buffer("projection", torch.tensor([SEED, zlib.crc32(index.numpy().tobytes())]))

    def project(self, vector: Tensor, part: slice) -> Tensor:
        """Return this part of ``P · vector``."""
        return vector.index_select(0, self.index[part]) * self.scale[part]

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        metadata: Any,
        strict: bool,
        missing: Any,
        unexpected: Any,
        errors: list[str],
    ) -> None:
        there = state_dict.get(f"{prefix}projection", self.projection)
        if there.tolist() != self.projection.tolist():
            what = f"seed and checksum of the projection are {there.tolist()} in the file and {self.projection.tolist()} here"
            errors.append(f"unilora: {what}; use the version of numpy that it was trained with")
            return
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)


class UniLoRA(Reparametrisation):
    """``ΔW = B A`` over the unfolded weight ``(O, J)``; ``A (r, I/g, *K)``, then ``B (O, r)``, are a part of ``P·theta``.

    Both factors start at random, so the prepared model is not quite the base. A start at ``theta = 0`` has no gradient;
    ``shared.start`` instead subtracts the first update, ``ΔW = B A - B0 A0``, as PiSSA does.
    """

    def __init__(self, conv: _ConvNd, rank: int, offset: int) -> None:
        super().__init__()
        self.shape_a, self.shape_b = (rank, *conv.weight.shape[1:]), (conv.out_channels, rank)
        middle = offset + rank * conv.weight[0].numel()
        self.part_a, self.part_b = slice(offset, middle), slice(middle, middle + rank * conv.out_channels)

    def factors(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``B (O, r)`` and ``A (r, I/g, *K)`` of a vector ``(d,)``."""
        shared: Vector = self.shared  # type: ignore[assignment]
        return shared.project(vector, self.part_b).view(self.shape_b), shared.project(vector, self.part_a).view(self.shape_a)

    def delta(self) -> Tensor:
        shared: Vector = self.shared  # type: ignore[assignment]
        b, a = self.factors(shared.theta)
        if shared.start is None:
            return b @ a.flatten(1)
        b0, a0 = self.factors(shared.start)
        return b @ a.flatten(1) - b0 @ a0.flatten(1)

    def low_rank(self) -> tuple[Tensor, Tensor, float] | None:
        """With an exact start, plain LoRA of rank ``2r``: ``[B, -B0]`` and ``[A; A0]``."""
        shared: Vector = self.shared  # type: ignore[assignment]
        b, a = self.factors(shared.theta)
        if shared.start is None:
            return b, a, 1.0
        b0, a0 = self.factors(shared.start)
        return torch.cat([b, -b0], dim=1), torch.cat([a, a0]), 1.0


def from_one_vector(length: int | None = None, exact_start: bool = False) -> PrepareList:
    """Return ``prepare`` for Uni-LoRA with ``length`` trained elements in all; None for ``r·ΣO``."""

    def make(
        model: nn.Module, convs: dict[str, _ConvNd], rank: int, inputs: Tensor, labels: Tensor
    ) -> dict[str, Reparametrisation]:
        made: dict[str, Reparametrisation] = {}
        elements = 0
        for name, conv in convs.items():
            made[name] = UniLoRA(conv, rank, elements)
            elements += rank * (conv.out_channels + conv.weight[0].numel())
        entries = length or rank * sum(conv.out_channels for conv in convs.values())
        if entries > elements:
            raise ValueError(f"unilora: length is {entries:,}; give at most {elements:,}, the elements of the factors")
        share(made.values(), Vector(next(iter(convs.values())), elements, entries, exact_start))
        return made

    return jointly(make)


METHODS = [
    Method("unilora", "Uni-LoRA", lr=3e-2, prepare=from_one_vector(), starts_at_base=False, source="arXiv 2506.00799"),
    Method(
        "unilora_exact", "Uni-LoRA, exact start", lr=3e-2, prepare=from_one_vector(exact_start=True), source="arXiv 2506.00799"
    ),
]
