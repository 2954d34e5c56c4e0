"""``once_differentiable`` for this library's Functions: a second derivative is an error, never a missing term.

Torch's own decorator accepts ``create_graph=True`` silently where the incoming gradient requires no gradient. But the gradient
of an adapted convolution depends on its core and on its input too, so a penalty on it would pass no gradient to them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

Backward = Callable[..., Any]


def once_differentiable(backward: Backward) -> Backward:
    """Decorate a ``backward`` whose results shall raise RuntimeError when they are differentiated again."""
    return _once(backward, lambda ctx, grads: True)


def linear_once_differentiable(backward: Backward) -> Backward:
    """:func:`once_differentiable` for a ``backward`` that depends on nothing differentiable but the incoming gradients."""
    return _once(backward, lambda ctx, grads: any(isinstance(g, Tensor) and g.requires_grad for g in grads))


def _once(backward: Backward, has_second: Callable[[Any, tuple[Any, ...]], bool]) -> Backward:
    @functools.wraps(backward)
    def wrapper(ctx: Any, *grads: Any) -> Any:
        with torch.no_grad():
            outputs = backward(ctx, *grads)
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not has_second(ctx, grads):
            return outputs
        made = outputs if isinstance(outputs, tuple) else (outputs,)
        made = tuple(None if y is None else _NotTwice.apply(y.detach().requires_grad_()) for y in made)
        return made if isinstance(outputs, tuple) else made[0]

    return wrapper


class _NotTwice(torch.autograd.Function):
    """The identity, for a result that cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.clone()  # not a view, which could not be written in place

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> NoReturn:  # type: ignore[override]
        raise RuntimeError(
            "the gradients of adapted and lean layers cannot be differentiated again (create_graph=True); use torch.func, "
            "whose transforms can be nested, or call lora_edge.merge(model) first"
        )
