"""Convolutions whose weight is computed from a frozen weight and a few trained parameters: the basis of the LoRA-like methods.

A :class:`Reparametrisation` computes ``W'`` from ``W``; ``torch.nn.utils.parametrize`` puts it in place of ``conv.weight``. The
frozen ``W`` stays as ``conv.parametrizations.weight.original``, so the model can be merged or disabled at any time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from lora_edge.nn.layers import set_weights


class Reparametrisation(nn.Module):
    """The adapted weight ``W' = W + delta()`` of one convolution, in float32 (or the weight's float64) with one final cast.

    A subclass creates its parameters in ``__init__(conv, rank)`` and defines ``delta``, or ``adapted`` if ``W'`` is not a sum.
    """

    enabled = True  # False inside lora_edge.disabled: the base weight

    def delta(self) -> Tensor:
        """Return ``ΔW`` in any shape that can be viewed as the weight's ``(O, I/g, *K)``."""
        raise NotImplementedError

    def adapted(self, weight: Tensor) -> Tensor:
        """Return ``W'`` for the base weight ``(O, I/g, *K)``, both in float32 or float64."""
        return weight + self.delta().view(weight.shape)

    def forward(self, weight: Tensor) -> Tensor:
        if not self.enabled:
            return weight
        with torch.autocast(weight.device.type, enabled=False):  # so that the merged weight is the trained one
            return self.adapted(weight.to(exact_dtype(weight))).to(weight.dtype)


def exact_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype in which the parameters beside ``weight`` are stored and combined."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def parameter(conv: _ConvNd, value: Tensor) -> nn.Parameter:
    """Return ``value`` as a parameter on the convolution's device."""
    return nn.Parameter(value.to(conv.weight.device, exact_dtype(conv.weight)))


def zeros(conv: _ConvNd, *shape: int) -> nn.Parameter:
    """Return a factor of zeros, usually the output side's, so that the model starts as the base model."""
    return parameter(conv, torch.zeros(shape))


def random(conv: _ConvNd, *shape: int) -> nn.Parameter:
    """Return a factor drawn from ``U(-1/√fan_in, 1/√fan_in)``, as loralib and PEFT draw ``A``; ``fan_in`` is the row length.

    It is drawn on the CPU, so that ``torch.manual_seed`` gives the same values on every device.
    """
    return parameter(conv, nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5)))


def reparametrise(conv: _ConvNd, reparametrisation: Reparametrisation) -> None:
    """Let ``reparametrisation`` compute ``conv.weight`` from now on, in place."""
    parametrize.register_parametrization(conv, "weight", reparametrisation)


def restore_weight(conv: _ConvNd) -> None:
    """Undo :func:`reparametrise`: restore the stock class, the base weight and the order of the parameters."""
    # copies made by deepcopy share the class, and removing the parametrization would delete its property
    cls = type(conv)
    conv.__class__ = type(cls.__name__, cls.__bases__, dict(cls.__dict__))
    parametrize.remove_parametrizations(conv, "weight", leave_parametrized=False)
    for name in [name for name in conv._parameters if name != "weight"]:
        conv._parameters[name] = conv._parameters.pop(name)


def reparametrised_layers(model: nn.Module) -> dict[_ConvNd, Reparametrisation]:
    """Return every reparametrised convolution, once, and what computes its weight."""
    found = {}
    for conv in model.modules():
        if isinstance(conv, _ConvNd) and parametrize.is_parametrized(conv, "weight"):
            first = conv.parametrizations["weight"][0]  # type: ignore[index, union-attr]
            if isinstance(first, Reparametrisation):  # not weight_norm and the like
                found[conv] = first
    return found


def bake(model: nn.Module) -> None:
    """Write every computed weight into its convolution and make it the stock one again."""
    with torch.no_grad():
        weights = {conv: conv.weight.detach() for conv in reparametrised_layers(model)}
        for conv in weights:
            restore_weight(conv)
        set_weights(weights)


def added_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield name and tensor of everything that :func:`reparametrise` added, under each name of a module that has several."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Reparametrisation):
            yield from ((f"{prefix}.{name}", value) for name, value in module.state_dict(keep_vars=True).items())
