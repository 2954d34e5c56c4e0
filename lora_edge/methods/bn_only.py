"""BN only: trains the scale and shift of every BatchNorm, with statistics in batch mode; all else is frozen."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lora_edge.methods.base import Method, NotApplicableError
from lora_edge.methods.parts.backbone import unfreeze_backbone


def prepare(model: nn.Module, rank: int, inputs: Tensor, labels: Tensor) -> list[nn.Parameter]:
    affine = [p for m in model.modules() if isinstance(m, _BatchNorm) for p in m.parameters(recurse=False)]
    if not affine:
        raise NotApplicableError("BN only: the model has no BatchNorm with scale and shift; choose another method")
    model.requires_grad_(False)
    for parameter in affine:
        parameter.requires_grad_(True)
    return affine


METHOD = Method("bn_only", "BN only", lr=1e-2, prepare=prepare, finish=unfreeze_backbone)
