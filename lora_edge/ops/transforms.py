"""Where only plain, differentiable torch ops will do: in ``torch.func`` transforms, forward-mode AD and ``torch.jit.trace``.

The layers' own autograd Functions save less, but have no rule for these. There the layers compute the same by torch's ops.
"""

from __future__ import annotations

import torch

from lora_edge.torch_private import is_transformed


def plain_ops_only() -> bool:
    """Whether a transform of ``torch.func``, forward-mode AD or ``torch.jit.trace`` is active in this thread."""
    if torch.compiler.is_compiling():  # traces through the Functions, and cannot trace these questions
        return False
    return is_transformed() or torch.jit.is_tracing()
