"""Bias only: trains every bias, including BatchNorm's shift and the head's bias; all else is frozen.

Source: BitFit, Ben-Zaken et al. 2021 (arXiv 2106.10199).
"""

from __future__ import annotations

from torch import Tensor, nn

from lora_edge.methods.base import Method, NotApplicableError
from lora_edge.methods.parts.backbone import freeze_backbone, unfreeze_backbone


def prepare(model: nn.Module, rank: int, inputs: Tensor, labels: Tensor) -> list[nn.Parameter]:
    """Train the existing biases. A convolution without one gets none: the shift of its BatchNorm serves, at the same cost."""
    biases = [p for name, p in model.named_parameters() if name.rpartition(".")[2].startswith("bias")]
    if not biases:
        raise NotApplicableError("bias only: the model has no bias; choose another method")
    freeze_backbone(model)
    for parameter in biases:
        parameter.requires_grad_(True)
    return biases


METHOD = Method("bias_only", "bias only", lr=1e-2, prepare=prepare, finish=unfreeze_backbone, source="arXiv 2106.10199")
