"""A trained kernel ``(O, r, *K)`` in the place of a core ``(O, r1)``: what its forward saves, and the gradients from that.

    forward    q = P x, a pointwise convolution by the rows of the suffix (r, I/g, 1, ...), in every group
    backward   dU = s * the weight gradient of a convolution of q by dy        dq = s * conv^T(dy, U)        dP = sum of dq x^T

All else is the convolution with the fused weight, as for a core. ``q`` has ``g * r`` channels at the input's positions.

``dP`` needs ``x``, which is not saved. Inside :func:`recorded`, backward leaves ``dq`` behind, so that ``dP`` can be had from a
second forward.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_edge.ops.conv_args import ConvArgs, conv_input_grad, conv_weight_grad


@dataclass
class Call:
    """One call of an op with a trained kernel.

    Attributes:
        suffix: its suffix, by which the layer is found.
        dq: ``(N, g * r, *L)``; None until backward has run.
    """

    suffix: Tensor
    dq: Tensor | None = None


_records: dict[int, list[Call]] = {}  # by thread


@contextmanager
def recorded() -> Iterator[list[Call]]:
    """Yield a list to which every call of this thread inside is appended, in order; their ``dq`` follow in backward."""
    here = threading.get_ident()
    before = _records.get(here)
    calls: list[Call] = []
    _records[here] = calls
    try:
        yield calls
    finally:
        if before is None:
            del _records[here]
        else:
            _records[here] = before


def record(suffix: Tensor) -> Call | None:
    """Return the record of a call, if it is recorded."""
    if torch.compiler.is_compiling() or not _records or (calls := _records.get(threading.get_ident())) is None:
        return None
    calls.append(Call(suffix))
    return calls[-1]


def projected(x: Tensor, suffix: Tensor, groups: int) -> Tensor:
    """``q (N, g * r, *L)`` of ``x (N, I, *L)``, by a matrix product: oneDNN would first copy a channels-last ``x``."""
    grouped = x.unflatten(1, (groups, -1)).flatten(3)
    q = torch.einsum("ngil,qi->ngql", grouped, suffix.to(x.dtype).flatten(1))
    return q.reshape(x.shape[0], groups * suffix.shape[0], *x.shape[2:])


def kernel_grad(dy: Tensor, q: Tensor, core: Tensor, args: ConvArgs, scale: float) -> Tensor:
    """``dU (O, r, *K)`` from the gradient ``dy (N, O, *L')`` of the convolution's output."""
    dw = conv_weight_grad(dy, q.to(dy.dtype), core.to(dy.dtype), args)
    return scale * dw.to(torch.promote_types(core.dtype, torch.float32)).to(core.dtype)


def projected_grad(dy: Tensor, core: Tensor, size: torch.Size, args: ConvArgs, scale: float) -> Tensor:
    """``dq (N, g * r, *L)``, ``size`` being ``L``."""
    return scale * conv_input_grad(dy, core.to(dy.dtype), size, args)


def projection_grad(dq: Tensor, x: Tensor, suffix: Tensor, groups: int) -> Tensor:
    """``dP``, in the suffix's shape: the groups share it."""
    rows = x.new_empty(groups * suffix.shape[0], *suffix.shape[1:])
    dw = conv_weight_grad(dq, x, rows, _pointwise(suffix, groups))
    exact = torch.float64 if suffix.dtype == torch.float64 else torch.float32
    return dw.reshape(groups, *suffix.shape).sum(dim=0, dtype=exact).to(suffix.dtype)


def _pointwise(suffix: Tensor, groups: int) -> ConvArgs:
    dims = suffix.dim() - 2
    return ConvArgs((1,) * dims, (0,) * dims, (1,) * dims, groups)
