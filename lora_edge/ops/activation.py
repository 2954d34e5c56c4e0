"""Activations whose derivative has two values: one saved bit per element, exactly.

A stock ReLU saves its whole output, 32 times as much.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_edge.ops.bits import memory_format, pack, unpack
from lora_edge.ops.once import linear_once_differentiable


class Activation(NamedTuple):
    """An activation by name, with its numbers; hashable, so that a plan can hold it.

    ``relu``, ``relu6``, ``hardtanh (low, high)``, ``leaky_relu (slope)``, ``hardsigmoid``.
    """

    name: str
    numbers: tuple[float, ...] = ()


class _Rule(NamedTuple):
    forward: Callable[..., Tensor]
    forward_: Callable[..., Tensor]
    inside: Callable[..., Tensor]  # from the input: where the derivative is `slopes(...)[0]`
    slopes: Callable[..., tuple[float, float]]


_SIXTH = torch.tensor(1 / 6, dtype=torch.float32).item()  # torch's backward uses this rounding in every dtype

_NUMBERS = {"hardtanh": ("low", "high"), "leaky_relu": ("slope",)}
# "not below or equal" instead of "above": a NaN passes its gradient on, as in torch's own backward
_RULES = {
    "relu": _Rule(F.relu, F.relu_, lambda x: x.le(0).logical_not_(), lambda: (1.0, 0.0)),
    "relu6": _Rule(F.relu6, lambda x: F.relu6(x, inplace=True), lambda x: _between(x, 0.0, 6.0), lambda: (1.0, 0.0)),
    "hardtanh": _Rule(F.hardtanh, F.hardtanh_, lambda x, low, high: _between(x, low, high), lambda low, high: (1.0, 0.0)),
    "leaky_relu": _Rule(F.leaky_relu, F.leaky_relu_, lambda x, slope: x.gt(0), lambda slope: (1.0, slope)),
    "hardsigmoid": _Rule(
        F.hardsigmoid, lambda x: F.hardsigmoid(x, inplace=True), lambda x: x.gt(-3).logical_and_(x.lt(3)), lambda: (_SIXTH, 0.0)
    ),
}


def check_activation(activation: Activation | str | None, op: str) -> Activation | None:
    """Return the activation as an :class:`Activation`; ValueError if it has no lean form or the wrong count of numbers."""
    if activation is None:
        return None
    if isinstance(activation, str):
        activation = Activation(activation)
    if activation.name not in _RULES:
        raise ValueError(f"{op}: activation is {activation.name!r}; give None or one of {', '.join(map(repr, _RULES))}")
    numbers = _NUMBERS.get(activation.name, ())
    if len(activation.numbers) != len(numbers):
        raise ValueError(f"{op}: activation is {activation}; give Activation({activation.name!r}, ({', '.join(numbers)}))")
    return activation


def activate(x: Tensor, activation: Activation, inplace: bool = False) -> Tensor:
    """The activation's value, bit-identical to torch's; saves one bit per element where ``x`` requires grad."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _Activate.apply(x, activation, inplace)
    return apply(x, activation, inplace)


def apply(x: Tensor, activation: Activation, inplace: bool) -> Tensor:
    """The value alone."""
    rule = _RULES[activation.name]
    return (rule.forward_ if inplace else rule.forward)(x, *activation.numbers)


def inside(x: Tensor, activation: Activation) -> Tensor:
    """Bool mask from the activation's input: True where the derivative has its first value."""
    return _RULES[activation.name].inside(x, *activation.numbers)


def masked(dy: Tensor, mask: Tensor, activation: Activation, out: Tensor | None = None) -> Tensor:
    """``dy`` times the derivative; ``dy`` is never written to."""
    first, second = _RULES[activation.name].slopes(*activation.numbers)
    if second != 0.0:
        return (
            torch.where(mask, dy * first, dy * second, out=out)
            if out is not None
            else torch.where(mask, dy * first, dy * second)
        )
    result = torch.mul(dy, mask, out=out)
    return result if first == 1.0 else result.mul_(first)


class _Activate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: Activation, inplace: bool) -> Tensor:
        mask = inside(x, activation)
        ctx.activation, ctx.shape, ctx.format = activation, x.shape, memory_format(mask)
        ctx.save_for_backward(pack(mask))
        if inplace:
            ctx.mark_dirty(x)
        return apply(x, activation, inplace)

    @staticmethod
    @linear_once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        mask = unpack(ctx.saved_tensors[0], ctx.shape, ctx.format)
        return masked(dy, mask, ctx.activation), None, None


def _between(x: Tensor, low: float, high: float) -> Tensor:
    x = x.float() if x.dtype.itemsize == 2 else x  # as torch does; a bound such as 0.7 has no half-precision value
    return x.le(low).logical_or_(x.ge(high)).logical_not_()
