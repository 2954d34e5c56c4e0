"""The classifier's loss on labelled target samples, where this library itself needs one; bad batches are named in one line."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def summed_cross_entropy(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The cross-entropy, summed over the samples ``x (N, ...)`` of classes ``y (N,)``, in float32 or better.

    Raises:
        ValueError: the model's output is no tensor, does not go with ``y``, or the loss is NaN or Inf.
    """
    logits = model(x)
    if not isinstance(logits, Tensor):
        raise ValueError(f"batches: the model's output is a {type(logits).__name__}; the pass needs logits (N, C, ...)")
    try:
        loss = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), y, reduction="sum")
    except (RuntimeError, IndexError, ValueError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(
            f"batches: no cross-entropy of output {tuple(logits.shape)} and y {tuple(y.shape)} {y.dtype} ({why}); "
            "give pairs (x, y) of inputs and classes"
        ) from None
    if not bool(torch.isfinite(loss)):
        raise ValueError(f"batches: the loss is {float(loss.detach())}; give finite inputs, and a model whose output is finite")
    return loss
