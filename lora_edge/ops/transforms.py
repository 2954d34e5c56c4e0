"""Where only plain, differentiable torch ops will do: in ``torch.func`` transforms, forward-mode AD and ``torch.jit.trace``.

The layers' own autograd Functions save less, but have no rule for these. There the layers compute the same by torch's ops.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from lora_edge.environment.torch_private import is_transformed


def plain_ops_only() -> bool:
    """Whether a transform of ``torch.func``, forward-mode AD or ``torch.jit.trace`` is active in this thread."""
    if torch.compiler.is_compiling():  # traces through the Functions, and cannot trace these questions
        return False
    return is_transformed() or torch.jit.is_tracing()


def refuse_proxy(input: Any) -> None:
    """Called with what is no tensor: a layer whose forward asks for values cannot be traced by ``torch.fx``.

    Raises:
        RuntimeError: it is one of ``torch.fx``'s proxies.
    """
    if isinstance(input, fx.Proxy):
        raise RuntimeError(
            "torch.fx cannot trace an adapted model; call lora_edge.merge(model) first, or capture it with torch.export"
        )
