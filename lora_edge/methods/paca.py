"""PaCA: trains a few randomly chosen input channels of the weight itself.

Source: PaCA, Woo et al. 2025 (arXiv 2503.01905), and its code (``peft/tuners/paca/layer.py``). Read: ``randperm(in)[:r]``, the
slice of the weight in place of factors, no bias trained. Inferred: the form for convolutions, with the same channels in each
group. Theirs trains ``p = W[:, idx]·r/alpha``; here its change is trained, which is the same at ``alpha = r``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_edge.methods.base import Method
from lora_edge.methods.memflora import trained_kernel


def channels(weight: Tensor, rank: int) -> Tensor:
    """A one-hot ``P (r, I/g)``: the trained kernel is then the change of ``weight[:, idx]`` and its gradient that of those.

    The channels are drawn once and kept, without a look at the windows: a channel that a ReLU leaves dead learns nothing. The
    whole layer is trained where ``rank`` is ``I/g`` or more, as in a depthwise layer.
    """
    width = weight.shape[1]
    return torch.eye(width)[torch.randperm(width)[:rank]]


METHOD = Method("paca", "PaCA", lr=1e-2, prepare=trained_kernel(channels), source="arXiv 2503.01905")
