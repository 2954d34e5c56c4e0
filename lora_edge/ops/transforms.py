"""When only plain, differentiable torch ops work: in ``torch.func`` transforms, forward-mode AD and ``torch.jit.trace``.

The layers' own autograd Functions have no rules for these, so there the layers compute the same by torch's ops.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from lora_edge.environment.torch_private import is_transformed


def plain_ops_only() -> bool:
    """Whether a transform of ``torch.func``, forward-mode AD or ``torch.jit.trace`` is active in this thread."""
    if torch.compiler.is_compiling():  # it traces through the Functions, and cannot trace these calls
        return False
    return is_transformed() or torch.jit.is_tracing()


def refuse_proxy(input: Any) -> None:
    """Reject a proxy of ``torch.fx``, which cannot trace a layer whose forward reads values. Called with non-tensors.

    Raises:
        RuntimeError: the input is a proxy.
    """
    if isinstance(input, fx.Proxy):
        raise RuntimeError(
            "torch.fx cannot trace an adapted model; call lora_edge.merge(model) first, or capture it with torch.export"
        )
