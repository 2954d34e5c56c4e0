"""The interface of a method: :class:`Method`, and the two ways in which most methods prepare a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lora_edge.adapt import adapt, inner_model, trainable_parameters
from lora_edge.merge import merge
from lora_edge.methods.parts.backbone import SOURCE_SAMPLES, check_norms, freeze_backbone, move_statistics
from lora_edge.methods.training import Training, as_training
from lora_edge.nn.bn_statistics import restored_on_error
from lora_edge.nn.branch import Branch, add_branch
from lora_edge.nn.layers import check_adaptable
from lora_edge.nn.reparametrised import Reparametrisation, reparametrise, share
from lora_edge.subspaces.choose import FROM_BATCHES, naming_layer
from lora_edge.surgery.adapted import AdaptState, refuse_adapted
from lora_edge.surgery.base_state import COPY_BYTES, fingerprint, other_buffers
from lora_edge.surgery.selection import select
from lora_edge.tt import check_rank

Prepare = Callable[[nn.Module, int, Tensor, Tensor], "list[nn.Parameter] | Training"]
PrepareList = Callable[[nn.Module, int, Tensor, Tensor], list[nn.Parameter]]
Make = Callable[[nn.Module, dict[str, _ConvNd], int, Tensor, Tensor], Mapping[str, Reparametrisation | Branch]]


class NotApplicableError(ValueError):
    """A method has nothing to train in this model; a comparison continues without it."""


@dataclass(frozen=True)
class Method:
    """One way to adapt a model.

    Attributes:
        name: used on the command line and in result rows.
        title: used in tables and pictures.
        lr: the default learning rate.
        prepare: ``prepare(model, rank, inputs, labels)`` freezes and changes ``model`` in place and returns the parameters to
            train, or a :class:`Training`. ``inputs (N, ...)`` and ``labels (N,)`` are the target's adaptation windows, which
            most methods ignore. ``rank`` is the method's own measure of its size.
        finish: ``finish(model)`` returns the plain model, with the base's module types, after training.
        turns: whether the target's sensor axes are first turned to the orientation of the source's; see
            :mod:`lora_edge.har.frame`.
        starts_at_base: whether the prepared model computes what the base model does, up to rounding.
        merges: whether ``finish`` gives a model of the base's architecture; otherwise inference costs more than the base's.
        needs_labels: whether it uses the target's labels at all. A method that does not is given None for them.
        source: the paper, as "arXiv 2106.09685"; empty for a baseline without one.
    """

    name: str
    title: str
    lr: float
    prepare: Prepare
    finish: Callable[[nn.Module], nn.Module] = merge
    turns: bool = False
    starts_at_base: bool = True
    merges: bool = True
    needs_labels: bool = True
    source: str = ""

    def begin(self, model: nn.Module, rank: int, inputs: Tensor, labels: Tensor) -> Training:
        """Call ``prepare``, without labels for a method that needs none, and return what it trains as a :class:`Training`.

        Raises:
            TypeError: ``inputs`` is not a tensor.
            RuntimeError: the model is already adapted: baselines would freeze or train the other method's parameters; or it is
                called inside ``torch.inference_mode``.
        """
        refuse_adapted(model)
        if not isinstance(inputs, Tensor):
            raise TypeError(f"inputs is a {type(inputs).__name__}; give the target's windows as a tensor (N, ...)")
        if torch.is_inference_mode_enabled():
            raise RuntimeError(f"{self.name}: tensors made in torch.inference_mode cannot be trained; call it outside")
        return as_training(self.prepare(model, rank, inputs, labels if self.needs_labels else None))  # type: ignore[arg-type]


def unchanged(model: nn.Module) -> nn.Module:
    """The ``finish`` of a method that trains the model's own parameters and changes nothing else."""
    return model


def adapted(*, source_samples: float | None = SOURCE_SAMPLES, **options: Any) -> PrepareList:
    """Return ``prepare`` for a form of LoRA-Edge.

    Args:
        source_samples: for :func:`lora_edge.calibrate_bn` on the target's windows; None keeps the source's statistics.
        options: for :func:`lora_edge.adapt`, which gets the target's windows as ``batches`` if the options need them.
    """

    needs_batches = "params" in options or options.get("subspace") in FROM_BATCHES

    def prepare(model: nn.Module, rank: int, inputs: Tensor, labels: Tensor) -> list[nn.Parameter]:
        batches = [(inputs, labels)]
        refuse_adapted(model)
        with restored_on_error(model):
            if source_samples is not None:
                move_statistics(model, inputs, source_samples)
            return list(trainable_parameters(adapt(model, rank, batches=batches if needs_batches else None, **options)))

    return prepare


def reparametrised(
    kind: Callable[[_ConvNd, int], Reparametrisation], shared: Callable[[list[_ConvNd], int], nn.Module] | None = None
) -> PrepareList:
    """Return ``prepare`` for a method that trains ``kind(conv, rank)`` in every convolution of a frozen backbone.

    Args:
        kind: makes a layer's reparametrisation. A layer that it refuses by ValueError is named in the message; nothing is
            changed then.
        shared: ``shared(convs, rank)`` makes the module of tensors that all layers share, which each finds as ``self.shared``;
            None if they share nothing.
    """

    def make(
        model: nn.Module, convs: dict[str, _ConvNd], rank: int, inputs: Tensor, labels: Tensor
    ) -> dict[str, Reparametrisation]:
        made = {}
        for name, conv in convs.items():
            with naming_layer(name):
                made[name] = kind(conv, rank)
        if shared is not None:
            share(made.values(), shared(list(convs.values()), rank))
        return made

    return jointly(make)


def adaptable(model: nn.Module) -> dict[str, _ConvNd]:
    """Return the convolutions that a method may adapt, by dotted name, in a model whose BatchNorm can be frozen.

    Raises:
        ValueError: there are none, or a convolution or BatchNorm is not supported; the message names it.
    """
    convs: dict[str, _ConvNd] = {}
    for name in select(model, None, None):
        conv: _ConvNd = model.get_submodule(name)  # type: ignore[assignment]
        with naming_layer(name):
            check_adaptable(conv)
        convs[name] = conv
    check_norms(model)
    return convs


def jointly(make: Make) -> PrepareList:
    """Return ``prepare`` for a method whose layers are made together: shared bases and vectors, pairs, budgets, gradients.

    Args:
        make: ``make(model, convs, rank, inputs, labels)`` returns a reparametrisation or a branch for some or all of the
            convolutions of ``convs``, by dotted name; the others stay frozen. It changes nothing. Facts about the base that
            need a forward or a backward are in :mod:`lora_edge.methods.parts.facts`; tensors that layers share go through
            :func:`lora_edge.nn.reparametrised.share`.

    The model's BatchNorm is frozen on its statistics. In a wrapper, such as ``DataParallel``, the inner model is prepared. A
    layer that ``adapt`` refuses, and a BatchNorm that cannot be frozen, raise ValueError with the name.
    """

    def prepare(model: nn.Module, rank: int, inputs: Tensor, labels: Tensor) -> list[nn.Parameter]:
        rank, model = check_rank(rank), inner_model(model)
        convs = adaptable(model)
        made = make(model, convs, rank, inputs, labels)
        requires_grad = {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}
        state = AdaptState("frozen", "none", fingerprint(model), requires_grad)
        state.base_values = {
            name: buffer.detach().cpu().clone() for name, buffer in other_buffers(model).items() if buffer.nbytes <= COPY_BYTES
        }
        freeze_backbone(model)
        for name, added in made.items():
            added.belongs_to_adapted = True
            if isinstance(added, Branch):
                add_branch(convs[name], added)
            else:
                reparametrise(convs[name], added)
        model._lora_edge = state  # type: ignore[assignment]
        return [p for p in model.parameters() if p.requires_grad]

    return prepare
