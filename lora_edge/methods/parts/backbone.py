"""What methods do to the model around their parameters: freeze and unfreeze it, move BatchNorm's statistics to the target."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from lora_edge.calibration import calibrate_bn
from lora_edge.nn import bn_statistics, frozen_bn
from lora_edge.surgery.batch_statistics import has_statistics

SOURCE_SAMPLES = 16  # weight of the source's BatchNorm statistics, counted in windows of the target
TARGET_SAMPLES = 64  # most of the target's windows that are read before training: needs no more memory than a training step


class StepSkipped(UserWarning):
    """An optional step of a method does not apply to this model or these windows and was skipped."""


def freeze_backbone(model: nn.Module) -> None:
    """Freeze every parameter and keep BatchNorm on its running statistics; :func:`check_norms` says what it refuses."""
    check_norms(model)
    model.requires_grad_(False)
    for _, norm in bn_statistics.batch_norms(model):
        if frozen_bn.why_not_frozen(norm) is None:
            frozen_bn.freeze_bn(norm)


def check_norms(model: nn.Module) -> None:
    """Raise ValueError for a BatchNorm subclass that would move its statistics although frozen; the message names it."""
    for name, why in frozen_bn.unfreezable(model).items():
        raise ValueError(f"{name or 'the model'}: {why}; use a method that leaves BatchNorm in batch mode, such as full")


def unfreeze_backbone(model: nn.Module) -> nn.Module:
    """Unfreeze every parameter and the BatchNorm layers, which keep their statistics; returns ``model``."""
    for module in list(model.modules()):
        if isinstance(module, frozen_bn.FrozenNorm):
            bn_statistics.forget_statistics(module)
            frozen_bn.unfreeze_bn(module)
    return model.requires_grad_(True)


def spread(count: int) -> Tensor:
    """Return at most 64 indices, evenly spread over ``count`` windows because neighbours overlap."""
    return torch.linspace(0, count - 1, min(count, TARGET_SAMPLES)).round().long()


def move_statistics(model: nn.Module, inputs: Tensor, source_samples: float = SOURCE_SAMPLES) -> None:
    """Move BatchNorm's statistics, if the model has any, to the target's windows; see :func:`lora_edge.calibrate_bn`.

    Reads one batch, the windows of :func:`spread`. If a BatchNorm would get a single value per channel, which has no variance,
    all of them keep their statistics and a :class:`StepSkipped` warning says so.
    """
    if next(bn_statistics.batch_norms(model), None) is not None:
        read = inputs[spread(len(inputs))]
        if len(read) == 1 and not has_statistics(model, read):
            what = "BatchNorm keeps the source's statistics: one window gives it a single value per channel"
            warnings.warn(what, StepSkipped, stacklevel=2)
            return
        calibrate_bn(model, [read], source_samples=source_samples)
