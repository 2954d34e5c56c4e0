"""``tt_fuse``: the dense weight with its update, ``W' = W + s * B S``; backward computes the gradient to ``B`` alone."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lora_edge.ops import dispatch
from lora_edge.ops.checks import check_factors


def tt_fuse(
    weight: Tensor, core: Tensor, suffix: Tensor | Sequence[Tensor], scale: float = 1.0, *, backend: str = "auto"
) -> Tensor:
    """Fuse the update into the dense weight: ``W'[o,i,k] = W[o,i,k] + scale * sum_q core[o,q] suffix[q,i,k]``.

    Args:
        weight: ``(O, I/g, *K)``, 1 to 3 kernel dimensions; float32, float16, bfloat16 or float64.
        core: ``(O, r1)``, the trained output-side core; or a trained kernel ``(O, r, *K)`` as in ``tt_conv``.
        suffix: ``(r1, I/g, *K)``, or the frozen cores ``[G2, ..., Gd]`` that contract to it.
        scale: factor of the update.
        backend: "auto", "torch", "cpu", "cuda" or "triton"; see :mod:`lora_edge.ops.backends`.

    Returns:
        The fused weight, shape and dtype of ``weight``; summed in float32 (float64 for float64), cast once.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or device; the message names it.
        RuntimeError: the named backend does not work here or does not support this call; the message says why.
    """
    check_factors(weight, core, suffix, "tt_fuse")
    return dispatch.fuse(backend, weight, core, dispatch.factors_of(suffix), float(scale))
