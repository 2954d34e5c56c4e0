"""Where only plain, differentiable torch ops will do: in ``torch.func`` transforms, forward-mode AD and ``torch.jit.trace``.

The layers' own autograd Functions save less, but have no rule for these. There the layers compute the same by torch's ops.
"""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

# private; in torch since 2.0, as torch.autograd.Function.apply asks it itself. Without it no transform is ever seen.
_transforms_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)


def plain_ops_only() -> bool:
    """Whether a transform of ``torch.func``, forward-mode AD or ``torch.jit.trace`` is active in this thread."""
    if torch.compiler.is_compiling():  # traces through the Functions, and cannot trace these questions
        return False
    return _transforms_active() or getattr(forward_ad, "_current_level", -1) >= 0 or torch.jit.is_tracing()
