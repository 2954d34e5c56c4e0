"""A convolution whose weight is computed from its frozen weight and a few trained parameters: what the LoRA family shares.

A :class:`Reparametrisation` gives ``W'`` from ``W``; ``torch.nn.utils.parametrize`` puts it in place of ``conv.weight``. The
frozen ``W`` stays beside it as ``conv.parametrizations.weight.original``, so the model can be merged or disabled at any time.
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

    A subclass makes its parameters in ``__init__(conv, rank)`` and defines ``delta``, or ``adapted`` where ``W'`` is no sum.
    """

    enabled = True  # False inside lora_edge.disabled: the base weight

    def delta(self) -> Tensor:
        """``ΔW`` in any shape that views as the weight's ``(O, I/g, *K)``."""
        raise NotImplementedError

    def adapted(self, weight: Tensor) -> Tensor:
        """``W'`` from the base weight ``(O, I/g, *K)``, both in float32 or float64."""
        return weight + self.delta().view(weight.shape)

    def forward(self, weight: Tensor) -> Tensor:
        if not self.enabled:
            return weight
        with torch.autocast(weight.device.type, enabled=False):  # so that a merged weight is the one that was trained
            return self.adapted(weight.to(exact_dtype(weight))).to(weight.dtype)


def exact_dtype(weight: Tensor) -> torch.dtype:
    """What parameters beside ``weight`` are kept and combined in."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def parameter(conv: _ConvNd, value: Tensor) -> nn.Parameter:
    """``value`` as a parameter on the convolution's device."""
    return nn.Parameter(value.to(conv.weight.device, exact_dtype(conv.weight)))


def zeros(conv: _ConvNd, *shape: int) -> nn.Parameter:
    """A factor that starts at zero, usually the output side's, so that the model starts as the base model."""
    return parameter(conv, torch.zeros(shape))


def random(conv: _ConvNd, *shape: int) -> nn.Parameter:
    """A factor from ``U(-1/√fan_in, 1/√fan_in)``, as loralib and PEFT draw ``A``; ``fan_in`` is the elements of a row.

    Drawn on the CPU, so that ``torch.manual_seed`` gives the same on every device.
    """
    return parameter(conv, nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5)))


def attach(conv: _ConvNd, reparametrisation: Reparametrisation) -> None:
    """Let ``conv.weight`` be computed by ``reparametrisation`` from now on, in place."""
    parametrize.register_parametrization(conv, "weight", reparametrisation)


def detach(conv: _ConvNd) -> None:
    """Undo :func:`attach`: the stock class and the base weight, in their old places."""
    # deepcopy shares the class between the copies, and removing takes the property off it
    cls = type(conv)
    conv.__class__ = type(cls.__name__, cls.__bases__, dict(cls.__dict__))
    parametrize.remove_parametrizations(conv, "weight", leave_parametrized=False)
    for name in [name for name in conv._parameters if name != "weight"]:
        conv._parameters[name] = conv._parameters.pop(name)


def reparametrised_layers(model: nn.Module) -> dict[_ConvNd, Reparametrisation]:
    """Every convolution that :func:`attach` changed, once, and what computes its weight."""
    found = {}
    for conv in model.modules():
        if isinstance(conv, _ConvNd) and parametrize.is_parametrized(conv, "weight"):
            first = conv.parametrizations["weight"][0]  # type: ignore[index, union-attr]
            if isinstance(first, Reparametrisation):  # not weight_norm and the like
                found[conv] = first
    return found


def bake(model: nn.Module) -> None:
    """Write every computed weight into its convolution, which is the stock one again."""
    with torch.no_grad():
        weights = {conv: conv.weight.detach() for conv in reparametrised_layers(model)}
        for conv in weights:
            detach(conv)
        set_weights(weights)


def added_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of all that :func:`attach` added, under every name of a module that has several."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Reparametrisation):
            yield from ((f"{prefix}.{name}", value) for name, value in module.state_dict(keep_vars=True).items())
