"""``dora_fuse``: the dense weight of DoRA, ``W' = m / ‖W + s B A‖ * (W + s B A)`` by rows, and the norms by themselves."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_edge.ops import dispatch
from lora_edge.ops.checks import check_factors, check_rows, check_weight
from lora_edge.ops.engines.torch import dora_fuse as of_torch
from lora_edge.ops.engines.torch.tt_fuse import exact_of


def dora_fuse(
    weight: Tensor,
    core: Tensor,
    suffix: Tensor,
    magnitude: Tensor,
    scale: float = 1.0,
    *,
    weight_squares: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Fuse DoRA's update into the dense weight, each row ``o`` scaled to the norm ``magnitude[o]``.

    The norm of a row is a constant in backward (DoRA, arXiv 2402.09353, section 4.3) and counts as at least 1e-12. On torch it
    is found from the factors ("Scaling DoRA", arXiv 2603.22276), without a second dense weight; a row that all but cancels,
    ``s B A ≈ -W``, loses digits of its norm there: the square is exact to rounding of ``‖W‖²``. Kernels compute row and norm in
    one pass over the weight.

    Args:
        weight: ``(O, I/g, *K)``, 1 to 3 kernel dimensions; float32, float16, bfloat16 or float64.
        core: ``(O, r)``, DoRA's ``B``.
        suffix: ``(r, I/g, *K)``, DoRA's ``A``; groups share it.
        magnitude: ``(O,)``, DoRA's ``m``.
        scale: factor of the update.
        weight_squares: :func:`row_squares` of the weight, where the caller keeps them: that saves torch a pass over a frozen
            weight.
        backend: "auto", "torch", "cpu", "cuda" or "triton"; see :mod:`lora_edge.ops.backends`.

    Returns:
        The fused weight, shape and dtype of ``weight``; computed in float32 (float64 for float64), cast once. Gradients reach
        weight, core, suffix and magnitude.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or device; the message names it.
        RuntimeError: the named backend does not work here or does not support this call; the message says why.
    """
    _check(weight, core, suffix, weight_squares, "dora_fuse")
    check_rows(magnitude, weight, "magnitude", "dora_fuse")
    return dispatch.dora(backend, weight, core, suffix, magnitude, float(scale), weight_squares)


def dora_norm(
    weight: Tensor, core: Tensor, suffix: Tensor, scale: float = 1.0, *, weight_squares: Tensor | None = None
) -> Tensor:
    """The norms ``‖W + scale * core @ S‖`` of the rows, ``(O,)``, as :func:`dora_fuse` finds them, without a gradient.

    Float32, or float64 if an operand is. Arguments and errors as in :func:`dora_fuse`.
    """
    _check(weight, core, suffix, weight_squares, "dora_norm")
    with torch.no_grad():
        return of_torch.row_norms(weight, core, suffix, float(scale), weight_squares)


def row_squares(weight: Tensor) -> Tensor:
    """The squared norms ``‖W‖²`` of a weight's rows, ``(O,)``, without a gradient; float32, or float64 for a float64 weight.

    Raises:
        TypeError, ValueError: the weight has the wrong type or shape; the message names it.
    """
    check_weight(weight, "row_squares")
    with torch.no_grad():
        return of_torch.row_squares(weight, exact_of(weight))


def _check(weight: Tensor, core: Tensor, suffix: Tensor, squares: Tensor | None, op: str) -> None:
    if not isinstance(suffix, Tensor):
        raise TypeError(f"{op}: suffix is a {type(suffix).__name__}; give a tensor")
    check_factors(weight, core, suffix, op)
    if squares is not None:
        check_rows(squares, weight, "weight_squares", op)
