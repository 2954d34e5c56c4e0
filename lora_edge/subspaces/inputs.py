"""The principal directions of a convolution's input, from one forward pass over a few unlabelled batches.

The update of a layer depends on its input only through ``h = conv(x, S)``. The rows ``S`` that capture the most are the leading
eigenvectors of the covariance of the patches (for linear layers: EVA, Paischer et al. 2024, arXiv 2410.07170)

    M = sum over positions of (p - mean) (p - mean)^T        p (I/g, *K): the patch that an output reads, in its group

``M`` itself is never formed, only its product with a few random rows ``R``: ``M R`` is the weight gradient of a convolution by
``R`` whose own output is used as the output gradient. It is a sum over positions, so one pass is enough for any number of
batches, and the leading eigenvectors follow from it and ``R`` (Tropp, Yurtsever, Udell and Cevher 2017, arXiv 1706.05736,
algorithm 3).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lora_edge.error_text import first_line
from lora_edge.nn.fused_block import layer_args
from lora_edge.nn.inputs_shown import inputs_shown
from lora_edge.ops.conv_args import conv, conv_weight_grad
from lora_edge.ops.padding import pad_by_mode

ROWS = 16  # a sketch has a multiple of this: the floats in a vector of the widest instruction set
OVERSAMPLING = 8  # at least so many rows beyond the requested rank
SLICE_BYTES = 4 << 20  # a batch is processed in slices whose sketch is no larger than this or than the batch itself


def leading_inputs(model: nn.Module, names: Sequence[str], rank: int, batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """Return the leading eigenvectors ``(q, I/g, *K)`` of each named convolution's ``M``, on the CPU.

    They are scaled by the roots of their eigenvalues, and ``q`` is slightly larger than ``rank``. The model runs in evaluation
    mode and without gradients; its training flags and hooks are not changed. A convolution whose input does not vary, or that
    is not reached, has rows of zero.

    Args:
        model: the base model.
        names: dotted names of stock convolutions.
        rank: number of directions that must be precise.
        batches: inputs ``(N, ...)``.

    Raises:
        ValueError: an input of a layer holds NaN or Inf, or the model does not accept a batch; the message names it.
    """
    generator = torch.Generator().manual_seed(0)  # a separate one: torch's own belongs to the user
    sketches = {name: _Sketch(model.get_submodule(name), rank, generator) for name in names}  # type: ignore[arg-type]
    with inputs_shown(model, {sketch.layer: sketch for sketch in sketches.values()}):
        for x in batches:
            try:
                model(x)
            except (RuntimeError, ValueError) as error:
                why = first_line(error)
                raise ValueError(f"batches: the model does not accept an input of {tuple(x.shape)}: {why}") from None
    found = {}
    for name, sketch in sketches.items():
        found[name] = sketch.eigenvectors()
        if not bool(torch.isfinite(found[name]).all()):
            raise ValueError(f"batches: the input of {name or 'the model'} holds NaN or Inf; give finite inputs")
    return found


def whole_rows(least: int) -> int:
    """Return the number of rows of a sketch: ``least``, rounded up to whole vectors."""
    return -(-least // ROWS) * ROWS


class _Sketch:
    """``R (q, D)`` with orthonormal rows, and the sums ``sum p p^T R`` and ``sum p``, to which each call of the layer adds."""

    def __init__(self, layer: _ConvNd, rank: int, generator: torch.Generator) -> None:
        weight = layer.weight
        self.layer = layer
        self.shape = weight.shape[1:]
        dtype = torch.promote_types(weight.dtype, torch.float32)
        size = self.shape.numel()
        count = min(whole_rows(rank + OVERSAMPLING + 1) - 1, size)  # one more row is for the sum of the patches
        random = torch.randn(size, count, generator=generator, dtype=torch.float64)
        self.rows = torch.linalg.qr(random)[0].T.contiguous()
        self.kernel = self.rows.to(weight.device, dtype).reshape(count, *self.shape)
        self.kernel = self.kernel.repeat(layer.groups, *[1] * (weight.dim() - 1))
        self.sums = torch.zeros(count + 1, *self.shape, dtype=torch.float64, device=weight.device)
        self.positions = 0

    def __call__(self, x: Tensor) -> None:
        x = x.to(self.kernel.dtype)
        if x.dim() < self.kernel.dim():
            x = x[None]
        args = layer_args(self.layer)
        x = pad_by_mode(self.layer, x)
        groups, rows = args.groups, len(self.rows) + 1
        positions = math.prod(args.output_size(x.shape[2:], self.shape[1:]))
        bytes_per_sample = groups * rows * positions * x.element_size()
        like = torch.empty(groups * rows, *self.shape, dtype=x.dtype, device=x.device)
        for part in x.split(max(1, max(SLICE_BYTES, x.numel() * x.element_size()) // max(1, bytes_per_sample))):
            h = conv(part, self.kernel, None, args)
            h = torch.cat([h.unflatten(1, (groups, -1)), h.new_ones(len(h), groups, 1, *h.shape[2:])], dim=2).flatten(1, 2)
            self.sums += conv_weight_grad(h, part, like, args).unflatten(0, (groups, rows)).sum(dim=0)
        self.positions += len(x) * groups * positions

    def eigenvectors(self) -> Tensor:
        """Return the eigenvectors ``(q, I/g, *K)`` scaled by the roots of their eigenvalues, on the CPU."""
        sums, total = self.sums.flatten(1).cpu().split([len(self.rows), 1])
        seen = sums - self.rows @ total.T @ total / max(1, self.positions)  # R M, centred on the mean
        size = float(seen.norm())
        if not 0 < size < float("inf"):
            return seen.reshape(-1, *self.shape).float()
        shift = size * torch.finfo(self.kernel.dtype).eps  # the rounding of the sums; subtracted again below
        seen = seen + shift * self.rows
        inner = seen @ self.rows.T
        values, vectors = torch.linalg.eigh((inner + inner.T) / 2)
        root = vectors / values.clamp_min(shift).sqrt()
        _, singular, directions = torch.linalg.svd(root.T @ seen, full_matrices=False)
        rows = (singular.square() - shift).clamp_min(0).sqrt()[:, None] * directions
        return rows.to(self.kernel.dtype).reshape(-1, *self.shape)
