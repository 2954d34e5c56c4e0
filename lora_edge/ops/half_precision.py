"""``h`` in half precision between forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor


def narrowed(h: Tensor, dtype: torch.dtype) -> Tensor:
    """``h`` in ``dtype``.

    Raises:
        RuntimeError: a finite value overflows float16, whose largest value is 65,504. Checked on the CPU only: on a device the
            check would have to wait for the result; there ``save_adapter`` and ``merge`` reject the cores that result.
    """
    kept = h.to(dtype)
    if dtype == torch.float16 and h.dtype != dtype and kept.is_cpu and not torch.compiler.is_compiling():
        refuse_overflow(h, kept)
    return kept


def refuse_overflow(h: Tensor, kept: Tensor) -> None:
    """Raise RuntimeError where a finite value of ``h`` is infinite in ``kept``."""
    if not bool(kept.isfinite().all()) and bool(h.isfinite().all()):
        largest = float(h.detach().abs().max())
        raise RuntimeError(
            f'saved_dtype="float16" overflows: h reaches {largest:.3g}, float16 at most 65504; '
            'use saved_dtype="bfloat16" or None, or scale the input'
        )
