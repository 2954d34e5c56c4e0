"""Full fine-tuning with BatchNorm frozen as in LoRA-Edge: trains all other parameters. Shows what freezing BatchNorm costs."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lora_edge.methods.base import Method
from lora_edge.methods.parts.backbone import freeze_backbone, move_statistics, unfreeze_backbone
from lora_edge.nn.bn_statistics import restored_on_error


def prepare(model: nn.Module, rank: int, inputs: Tensor, labels: Tensor) -> list[nn.Parameter]:
    with restored_on_error(model):
        move_statistics(model, inputs)
        freeze_backbone(model)
    frozen = {id(p) for m in model.modules() if isinstance(m, _BatchNorm) for p in m.parameters(recurse=False)}
    trained = [p for p in model.parameters() if id(p) not in frozen]
    for parameter in trained:
        parameter.requires_grad_(True)
    return trained


METHOD = Method(
    "full_frozen_bn", "full fine-tuning, BN frozen", lr=1e-3, prepare=prepare, finish=unfreeze_backbone, starts_at_base=False
)
