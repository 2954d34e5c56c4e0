"""Convolutions whose weight is computed from a frozen weight and a few trained parameters: the basis of the LoRA-like methods.

A :class:`Reparametrisation` computes ``W'`` from ``W``; ``torch.nn.utils.parametrize`` puts it in place of ``conv.weight``. The
frozen ``W`` stays as ``conv.parametrizations.weight.original``, so the model can be merged or disabled at any time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from lora_edge.nn.layers import set_values


class Added(nn.Module):
    """What a method adds to a convolution. ``enabled`` is False inside :func:`lora_edge.disabled`: the base layer."""

    enabled = True
    belongs_to_adapted = False  # prepared with a whole model, which holds the state


class Reparametrisation(Added):
    """The adapted weight ``W' = base(W) + delta()`` of one convolution, in float32 (or the weight's float64), cast once.

    A subclass creates its parameters in ``__init__`` and defines ``low_rank``, or ``delta`` if its update is no product of two
    factors, or ``adapted`` if ``W'`` is not a sum. What it computes in evaluation mode (``self.training`` is False) is what is
    merged; the form for training may differ.

    Attributes:
        ranks: the ranks it can be evaluated at, if there are several; see :func:`lora_edge.tools.at_rank`.
        active: the one of them that ``delta`` uses in evaluation mode; None for the largest.
        on_gradient: called in each backward with the dense gradient ``(O, I/g, *K)`` of the computed weight; None for nothing.
    """

    ranks: tuple[int, ...] = ()
    active: int | None = None
    on_gradient: Callable[[Tensor], None] | None = None
    _borrowed: tuple[nn.Module, ...] = ()  # a tuple hides a module from registration
    lent: nn.Module

    def delta(self) -> Tensor:
        """Return ``ΔW`` in any shape that can be viewed as the weight's ``(O, I/g, *K)``: by default ``low_rank``'s product."""
        factors = self.low_rank()
        if factors is None:
            raise NotImplementedError(f"{type(self).__name__} defines neither delta nor low_rank")
        return product(*factors)

    def base(self, weight: Tensor) -> Tensor:
        """Return what the update is added to, for the base weight ``(O, I/g, *K)``: a quantised weight, for example."""
        return weight

    def adapted(self, weight: Tensor) -> Tensor:
        """Return ``W'`` for the base weight ``(O, I/g, *K)``, both in float32 or float64."""
        return self.base(weight) + self.delta().view(weight.shape)

    def computed(self, weight: Tensor) -> Tensor:
        """Return ``W'`` in the weight's dtype; a kind whose op converts and casts by itself saves the float32 copy here."""
        return self.adapted(weight.to(exact_dtype(weight))).to(weight.dtype)

    def adapted_bias(self, bias: Tensor) -> Tensor:
        """Return the adapted bias ``(O,)`` for the base bias, both in float32 or float64."""
        return bias

    def low_rank(self) -> tuple[Tensor, Tensor, float] | None:
        """Return ``B (O, r)``, ``A (r, I/g, *K)`` and a scale with ``ΔW = scale · B A``; None if there are none."""
        return None

    @property
    def shared(self) -> nn.Module:
        """The module of tensors that :func:`share` gave to several layers."""
        return self._borrowed[0] if self._borrowed else self.lent

    def forward(self, weight: Tensor) -> Tensor:
        if not self.enabled:
            return weight
        with torch.autocast(weight.device.type, enabled=False):  # so that the merged weight is the trained one
            computed = self.computed(weight)
        if self.on_gradient is not None and computed.requires_grad:
            computed.register_hook(self.on_gradient)
        return computed


def product(b: Tensor, a: Tensor, scale: float) -> Tensor:
    """Return ``scale · B A``, ``(O, (I/g)·ΠK)``, of ``B (O, r)`` and ``A (r, I/g, *K)``."""
    return scale * (b @ a.flatten(1))


class _Bias(nn.Module):
    """Computes the bias by the reparametrisation of the same convolution's weight."""

    def __init__(self, of: Reparametrisation) -> None:
        super().__init__()
        self._of = (of,)  # registered beside the weight already

    def forward(self, bias: Tensor) -> Tensor:
        (of,) = self._of
        if not of.enabled:
            return bias
        with torch.autocast(bias.device.type, enabled=False):
            return of.adapted_bias(bias.to(exact_dtype(bias))).to(bias.dtype)


def share(kinds: Iterable[Reparametrisation], shared: nn.Module) -> None:
    """Give several layers one module of tensors, which each finds as ``self.shared``.

    The first registers it, so that its tensors are counted, moved and saved once; the others refer to it, also in a deepcopy.
    """
    for place, kind in enumerate(kinds):
        if place == 0:
            kind.lent = shared
        else:
            kind._borrowed = (shared,)


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
    """Let ``reparametrisation`` compute ``conv.weight`` from now on, and ``conv.bias`` if it changes that; in place."""
    parametrize.register_parametrization(conv, "weight", reparametrisation)
    changes_bias = type(reparametrisation).adapted_bias is not Reparametrisation.adapted_bias
    if changes_bias and conv.bias is not None:
        parametrize.register_parametrization(conv, "bias", _Bias(reparametrisation))


def restore_weight(conv: _ConvNd) -> None:
    """Undo :func:`reparametrise`: restore the stock class, the base weight and bias and the order of the parameters."""
    # copies made by deepcopy share the class, and removing the parametrization would delete its property
    cls = type(conv)
    conv.__class__ = type(cls.__name__, cls.__bases__, dict(cls.__dict__))
    computes_bias = _computes_bias(conv)
    parametrize.remove_parametrizations(conv, "weight", leave_parametrized=False)
    if computes_bias:
        parametrize.remove_parametrizations(conv, "bias", leave_parametrized=False)
    for name in dict.fromkeys(["weight", "bias", *conv._parameters]):
        if name in conv._parameters:
            conv._parameters[name] = conv._parameters.pop(name)


def _computes_bias(conv: nn.Module) -> bool:
    """Whether :func:`reparametrise` put a computed bias in place of the convolution's."""
    return parametrize.is_parametrized(conv, "bias") and isinstance(conv.parametrizations["bias"][0], _Bias)  # type: ignore


def reparametrised_layers(model: nn.Module) -> dict[_ConvNd, Reparametrisation]:
    """Return every reparametrised convolution, once, and what computes its weight."""
    found = {}
    for conv in model.modules():
        if isinstance(conv, _ConvNd) and parametrize.is_parametrized(conv, "weight"):
            first = conv.parametrizations["weight"][0]  # type: ignore[index, union-attr]
            if isinstance(first, Reparametrisation):  # not weight_norm and the like
                found[conv] = first
    return found


@contextmanager
def evaluated(model: nn.Module) -> Iterator[dict[_ConvNd, Reparametrisation]]:
    """Yield :func:`reparametrised_layers`, each in evaluation mode inside: the form that is merged."""
    layers = reparametrised_layers(model)
    was = [kind.training for kind in layers.values()]
    try:
        for kind in layers.values():
            kind.eval()
        yield layers
    finally:
        for kind, training in zip(layers.values(), was, strict=True):
            kind.train(training)


def computed_tensors(model: nn.Module) -> dict[str, dict[_ConvNd, Tensor]]:
    """Return every computed weight and every computed bias as they are merged, as ``{"weight": ..., "bias": ...}``."""
    with torch.no_grad(), evaluated(model) as layers:
        return {
            "weight": {conv: conv.weight.detach() for conv in layers},
            "bias": {conv: conv.bias.detach() for conv in layers if conv.bias is not None and _computes_bias(conv)},
        }


def bake(model: nn.Module) -> None:
    """Write every computed weight and bias into its convolution and make it the stock one again.

    A weight that other modules use too is not written to, because the update is not theirs; the convolution gets its own.
    """
    computed = computed_tensors(model)
    with torch.no_grad():
        for conv in computed["weight"]:
            restore_weight(conv)
        for name, values in computed.items():
            own = {id(conv) for conv in values}
            others = {
                p.data_ptr()
                for m in model.modules()
                for key, p in m._parameters.items()
                if p is not None and not (id(m) in own and key == name)
            }
            for conv in values:
                old: nn.Parameter = conv._parameters[name]  # type: ignore[assignment]
                if old.data_ptr() in others:
                    conv._parameters[name] = nn.Parameter(old.clone(), old.requires_grad)
        for name, values in computed.items():
            set_values(name, values)


def added_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield name and tensor of everything that a method added to convolutions, under each name of a module that has several."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Added):
            yield from ((f"{prefix}.{name}", value) for name, value in module.state_dict(keep_vars=True).items())
