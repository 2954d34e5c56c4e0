"""Head only: trains the last linear layer on the frozen backbone's features (a linear probe)."""

from __future__ import annotations

from torch import Tensor, nn

from lora_edge.methods.base import Method, NotApplicableError
from lora_edge.methods.parts.backbone import freeze_backbone, unfreeze_backbone
from lora_edge.surgery.head import find_head


def prepare(model: nn.Module, rank: int, inputs: Tensor, labels: Tensor) -> list[nn.Parameter]:
    if not any(isinstance(module, nn.Linear) for module in model.modules()):
        raise NotApplicableError("head only: the model has no nn.Linear; choose another method")
    freeze_backbone(model)
    return list(model.get_submodule(find_head(model)).requires_grad_(True).parameters())


METHOD = Method("head_only", "head only", lr=1e-2, prepare=prepare, finish=unfreeze_backbone)
