"""What every method provides, and what several of them need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from lora_edge import calibration, lean


def _nothing_to_do(model: nn.Module) -> nn.Module:
    return model


@dataclass(frozen=True)
class Method:
    """One way to adapt a model.

    Attributes:
        name: for the command line and the result rows.
        title: for tables and pictures.
        lr: Adam's rate where none is asked for.
        prepare: ``prepare(model, rank, inputs)`` freezes and changes ``model`` in place and returns the parameters to
            train. ``inputs (N, ...)`` are the target's unlabelled adaptation windows; ``rank`` is ignored by most.
        finish: ``finish(model)`` returns the plain model, with the base's module types, after training.
    """

    name: str
    title: str
    lr: float
    prepare: Callable[[nn.Module, int, Tensor], list[nn.Parameter]]
    finish: Callable[[nn.Module], nn.Module] = _nothing_to_do


def freeze_backbone(model: nn.Module) -> None:
    """No parameter is trained and BatchNorm stays on its running statistics."""
    model.requires_grad_(False)
    for _, norm in calibration.batch_norms(model):
        if lean.why_not_frozen(norm) is None:
            lean.freeze_bn(norm)


def unfreeze_backbone(model: nn.Module) -> nn.Module:
    """Undo :func:`freeze_backbone` on the BatchNorm layers; every parameter is trainable again."""
    for module in list(model.modules()):
        if isinstance(module, lean.FrozenBatchNorm):
            lean.unfreeze_bn(module)
    return model.requires_grad_(True)
