"""The interface of a method, and the parts that several methods share."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from lora_edge.adapt import adapt, trainable_parameters
from lora_edge.calibration import calibrate_bn
from lora_edge.nn import bn_statistics, frozen_bn
from lora_edge.nn.layers import LoRAEdgeConv, check_adaptable
from lora_edge.nn.reparametrised import Reparametrisation, added_tensors, reparametrise
from lora_edge.subspaces.choose import FROM_BATCHES
from lora_edge.surgery.adapted import AdaptState
from lora_edge.surgery.base_state import fingerprint
from lora_edge.surgery.batch_statistics import has_statistics
from lora_edge.surgery.selection import select
from lora_edge.tt import check_rank

SOURCE_SAMPLES = 16  # weight of the source's BatchNorm statistics, counted in windows of the target
TARGET_SAMPLES = 64  # most of the target's windows that are read for it: needs no more memory than a training step
Prepare = Callable[[nn.Module, int, Tensor, Tensor], list[nn.Parameter]]


class NotApplicableError(ValueError):
    """A method has nothing to train in this model; a comparison continues without it."""


class StepSkipped(UserWarning):
    """An optional step of a method does not apply to this model or these windows and was skipped."""


def _nothing_to_do(model: nn.Module) -> nn.Module:
    return model


@dataclass(frozen=True)
class Method:
    """One way to adapt a model.

    Attributes:
        name: used on the command line and in result rows.
        title: used in tables and pictures.
        lr: the default learning rate of Adam.
        prepare: ``prepare(model, rank, inputs, labels)`` freezes and changes ``model`` in place and returns the parameters
            to train. ``inputs (N, ...)`` and ``labels (N,)`` are the target's adaptation windows, which most methods ignore.
        finish: ``finish(model)`` returns the plain model, with the base's module types, after training.
        turns: whether the target's sensor axes are first turned to the orientation of the source's; see
            :mod:`lora_edge.har.frame`.
    """

    name: str
    title: str
    lr: float
    prepare: Prepare
    finish: Callable[[nn.Module], nn.Module] = _nothing_to_do
    turns: bool = False


def freeze_backbone(model: nn.Module) -> None:
    """Freeze every parameter and keep BatchNorm on its running statistics."""
    model.requires_grad_(False)
    for _, norm in bn_statistics.batch_norms(model):
        if frozen_bn.why_not_frozen(norm) is None:
            frozen_bn.freeze_bn(norm)


def unfreeze_backbone(model: nn.Module) -> nn.Module:
    """Unfreeze every parameter and the BatchNorm layers, which keep their statistics; returns ``model``."""
    for module in list(model.modules()):
        if isinstance(module, frozen_bn.FrozenNorm):
            bn_statistics.forget_statistics(module)
            frozen_bn.unfreeze_bn(module)
    return model.requires_grad_(True)


def move_statistics(model: nn.Module, inputs: Tensor, source_samples: float = SOURCE_SAMPLES) -> None:
    """Move BatchNorm's statistics, if the model has any, to the target's windows; see :func:`lora_edge.calibrate_bn`.

    Reads one batch, evenly spread over the windows because neighbours overlap. If a BatchNorm would get a single value per
    channel, which has no variance, all of them keep their statistics and a :class:`StepSkipped` warning says so.
    """
    if next(bn_statistics.batch_norms(model), None) is not None:
        spread = torch.linspace(0, len(inputs) - 1, min(len(inputs), TARGET_SAMPLES)).round().long()
        if len(spread) == 1 and not has_statistics(model, inputs[spread]):
            what = "BatchNorm keeps the source's statistics: one window gives it a single value per channel"
            warnings.warn(what, StepSkipped, stacklevel=2)
            return
        calibrate_bn(model, [inputs[spread]], source_samples=source_samples)


def adapted(*, source_samples: float | None = SOURCE_SAMPLES, **options: Any) -> Prepare:
    """Return ``prepare`` for a form of LoRA-Edge; its ``finish`` is :func:`lora_edge.merge`.

    Args:
        source_samples: for :func:`lora_edge.calibrate_bn` on the target's windows; None keeps the source's statistics.
        options: for :func:`lora_edge.adapt`, which gets the target's windows as ``batches`` if the options need them.
    """

    needs_batches = "params" in options or options.get("subspace") in FROM_BATCHES

    def prepare(model: nn.Module, rank: int, inputs: Tensor, labels: Tensor) -> list[nn.Parameter]:
        batches = [(inputs, labels)]
        if source_samples is not None:
            move_statistics(model, inputs, source_samples)
        return list(trainable_parameters(adapt(model, rank, batches=batches if needs_batches else None, **options)))

    return prepare


def reparametrised(kind: Callable[[_ConvNd, int], Reparametrisation]) -> Prepare:
    """Return ``prepare`` for a method that trains ``kind(conv, rank)`` in every convolution of a frozen backbone.

    Its ``finish`` is :func:`lora_edge.merge`. A layer that ``adapt`` refuses raises ValueError with the layer's name before
    anything is changed.
    """

    def prepare(model: nn.Module, rank: int, inputs: Tensor, labels: Tensor) -> list[nn.Parameter]:
        rank = check_rank(rank)
        made: list[tuple[_ConvNd, Reparametrisation]] = []
        for name in select(model, None, None):
            conv: _ConvNd = model.get_submodule(name)  # type: ignore[assignment]
            try:
                check_adaptable(conv)
                made.append((conv, kind(conv, rank)))
            except ValueError as error:
                raise ValueError(f"{name or 'model'}: {error}") from None
        requires_grad = {name: p.requires_grad for name, p in model.named_parameters()}
        state = AdaptState("frozen", "none", fingerprint(model), requires_grad)
        freeze_backbone(model)
        for conv, reparametrisation in made:
            reparametrise(conv, reparametrisation)
        model._lora_edge = state  # type: ignore[assignment]
        return [p for p in model.parameters() if p.requires_grad]

    return prepare


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the tensors that a method added to the base model or trains in it, by their names in ``state_dict``.

    They are the trainable parameters, all factors and suffixes, frozen ones too, and the statistics of each BatchNorm that
    is not frozen or was calibrated. A shared tensor appears under each of its names.
    """
    own = {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    own.update(name for name, _ in added_tensors(model))
    for prefix, module in model.named_modules(remove_duplicate=False):
        start = f"{prefix}." if prefix else ""
        if isinstance(module, LoRAEdgeConv):
            own.add(f"{start}suffix")
        is_frozen = isinstance(module, frozen_bn.FrozenNorm) and not bn_statistics.base_statistics(module)
        if isinstance(module, _BatchNorm) and not is_frozen:
            own.update(f"{start}{name}" for name in bn_statistics.STATISTICS)
    return {name: value.detach().clone() for name, value in model.state_dict().items() if name in own}
