"""Twins of one base model, adapted with and without fused blocks, that take the same steps and must agree in everything.

A step sets the same seeds, calls both twins with equal arguments and runs both backward passes. Compared are: the exception or
the outputs (structure, dtype, values, strides, ``requires_grad``), what was done to the inputs, the gradients of inputs and
cores, every parameter and buffer, every plain attribute of every module, and the state of the generators.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from enum import Enum
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import lora_edge
from lora_edge.nn.layers import LoRAEdgeConv

# Lean layers save bits instead of their outputs, so they allow some in-place writes that stock layers refuse to differentiate.
SAVED_WAS_WRITTEN = "has been modified by an inplace operation"
_OURS = ("_lean_plans", "_lean_plans_made", "_lora_edge", "lean", "requested_mode", "backend")
_OF_TORCH = ("_parameters", "_buffers", "_modules")


class Mismatch(AssertionError):  # noqa: N818  # reads better where it is raised
    """The twins differ."""


@dataclass
class Twins:
    """Two adapted copies of one base model: ``ours`` with fused blocks, ``stock`` without."""

    ours: nn.Module
    stock: nn.Module

    def __iter__(self):
        return iter((self.ours, self.stock))


def twins(model: nn.Module, twin: nn.Module | None = None, **options: Any) -> Twins:
    """Adapt a model and its copy (or a twin that was built alike), with the same random cores."""
    stock = copy.deepcopy(model) if twin is None else twin
    lora_edge.adapt(model, 2, **options)
    lora_edge.adapt(stock, 2, lean=False, **options)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for ours, theirs in zip(lora_edge.trainable_parameters(model), lora_edge.trainable_parameters(stock), strict=True):
            value = torch.randn(ours.shape, generator=generator, dtype=torch.float64) * 0.3
            ours.copy_(value)
            theirs.copy_(value)
    return Twins(model, stock)


def seed(number: int) -> None:
    """Seed all global generators."""
    random.seed(number)
    np.random.seed(number)
    torch.default_generator.manual_seed(number)  # what torch.manual_seed does on a CPU, without its traceback


def generators() -> tuple[Any, ...]:
    """The state of all global generators, comparable by ``==``."""
    kind, keys, at, has_gauss, gauss = np.random.get_state(legacy=True)
    return random.getstate(), kind, keys.tobytes(), at, has_gauss, gauss, torch.get_rng_state().numpy().tobytes()


@dataclass
class Outcome:
    """What one twin did in one step."""

    raised: BaseException | None
    output: Any
    inputs: list[Any]
    gradients: list[Tensor | None]
    generators: tuple[Any, ...]


def take_step(
    model: nn.Module, call: Callable[[nn.Module], tuple[Any, list[Tensor]]], number: int, backward: bool = True
) -> Outcome:
    """Take one step with one twin; ``call`` makes fresh inputs, calls the model and returns its output and the inputs."""
    seed(number)
    cores = [p for p in model.parameters() if p.requires_grad]
    raised, output, inputs = None, None, []
    gradients: list[Tensor | None] = []
    try:
        output, inputs = call(model)
        if backward and (outputs := [t for t in leaves(output) if t.requires_grad and t.is_floating_point()]):
            generator = torch.Generator().manual_seed(number)
            total = torch.zeros((), dtype=torch.float64)
            for k, t in enumerate(outputs):
                if k % 2:
                    total = total + t.double().sum() * 0.5  # its gradient is expanded from one number
                else:
                    total = total + (t.double() * torch.randn(t.shape, generator=generator, dtype=torch.float64)).sum()
            wanted = [*cores, *(t for t in inputs if t.requires_grad and t.is_leaf)]
            gradients = list(torch.autograd.grad(total, wanted, allow_unused=True)) if wanted else []
    except Exception as error:
        raised = error
    return Outcome(raised, output, inputs, gradients, generators())


def leaves(value: Any) -> list[Tensor]:
    """All tensors in an output."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for item in value.values() for t in leaves(item)]
    if isinstance(value, (list, tuple)):
        return [t for item in value for t in leaves(item)]
    return []


def compare_steps(pair: Twins, ours: Outcome, stock: Outcome, tolerance: float) -> None:
    """Raise :class:`Mismatch` unless both twins did the same."""
    if (ours.raised is None) != (stock.raised is None):
        if stock.raised is not None and SAVED_WAS_WRITTEN in str(stock.raised):
            return
        raise Mismatch(f"ours raised {ours.raised!r}, stock raised {stock.raised!r}") from (ours.raised or stock.raised)
    # where several layers refuse a dtype, a block raises what its last layer raises
    both_refuse = all(isinstance(raised, (RuntimeError, TypeError)) for raised in (ours.raised, stock.raised))
    if ours.raised is not None and type(ours.raised) is not type(stock.raised) and not both_refuse:
        raise Mismatch(f"ours raised {ours.raised!r}, stock raised {stock.raised!r}") from ours.raised
    same(ours.output, stock.output, tolerance, "output", least=_scale(leaves(stock.output)))
    same(ours.inputs, stock.inputs, tolerance, "input after the step")
    if len(ours.gradients) != len(stock.gradients):
        raise Mismatch(f"{len(ours.gradients)} gradients, stock {len(stock.gradients)}")
    least = _scale([w for w in stock.gradients if w is not None])
    for k, (g, w) in enumerate(zip(ours.gradients, stock.gradients, strict=True)):
        if (g is None) != (w is None):
            raise Mismatch(f"gradient {k} is {g if g is None else tuple(g.shape)}, stock {w if w is None else tuple(w.shape)}")
        if g is not None and w is not None:
            close(g, w, tolerance, f"gradient {k}", least)
    if ours.generators != stock.generators:
        raise Mismatch("the generators are in other states")
    compare_models(pair, tolerance)


def _scale(tensors: list[Tensor]) -> float:
    """A lower bound for the reference of relative errors: a value that is zero up to rounding is no reference."""
    largest = max([float(t.detach().abs().max()) for t in tensors if t.numel() and t.is_floating_point()], default=0.0)
    return max(0.05 * largest, 1e-3) if largest < float("inf") else 1e-3


def compare_models(pair: Twins, tolerance: float) -> None:
    """Compare parameters, buffers and plain attributes of every module."""
    theirs = dict(pair.stock.named_modules(remove_duplicate=False))
    for name, module in pair.ours.named_modules(remove_duplicate=False):
        other = theirs[name]
        for kind in ("_parameters", "_buffers"):
            mine, its = module.__dict__[kind], other.__dict__[kind]
            if list(mine) != list(its):
                raise Mismatch(f"{name}{kind} holds {list(mine)}, stock {list(its)}")
            for key, tensor in mine.items():
                same(tensor, its[key], tolerance, f"{kind} {name}.{key}", strides=False)
        if isinstance(module, LoRAEdgeConv) or type(module).__module__.startswith("torch.nn"):
            continue
        mine, its = plain(module), plain(other)
        if list(mine) != list(its):
            raise Mismatch(f"{name} has the attributes {list(mine)}, stock {list(its)}")
        same(mine, its, tolerance, f"attributes of {name}", strides=False)


def plain(module: nn.Module) -> dict[str, Any]:
    """A module's own attributes, without those of this library and of torch."""
    return {key: value for key, value in module.__dict__.items() if key not in (*_OURS, *_OF_TORCH) and "hook" not in key}


def same(ours: Any, stock: Any, tolerance: float, what: str, strides: bool = True, least: float = 0.0) -> None:
    """Raise :class:`Mismatch` unless two structures are the same, with close tensors and equal values."""
    if isinstance(stock, Tensor) and isinstance(ours, Tensor):
        if (ours.dtype, ours.shape, ours.requires_grad) != (stock.dtype, stock.shape, stock.requires_grad):
            raise Mismatch(f"{what} is {_about(ours)}, stock {_about(stock)}")
        if strides and _strides(ours) != _strides(stock):
            raise Mismatch(f"{what} has strides {ours.stride()}, stock {stock.stride()}, shape {tuple(stock.shape)}")
        close(ours, stock, tolerance, what, least)
    elif isinstance(stock, dict) and isinstance(ours, dict):
        if list(ours) != list(stock):
            raise Mismatch(f"{what} has keys {list(ours)}, stock {list(stock)}")
        for key in stock:
            same(ours[key], stock[key], tolerance, f"{what}[{key!r}]", strides, least)
    elif isinstance(stock, (list, tuple)) and type(ours) is type(stock):
        if len(ours) != len(stock):
            raise Mismatch(f"{what} has {len(ours)} elements, stock {len(stock)}")
        for k, (a, b) in enumerate(zip(ours, stock, strict=True)):
            same(a, b, tolerance, f"{what}[{k}]", strides, least)
    elif isinstance(stock, torch.Generator):
        if not torch.equal(ours.get_state(), stock.get_state()):
            raise Mismatch(f"{what} is in another state")
    elif isinstance(stock, random.Random):
        if ours.getstate() != stock.getstate():
            raise Mismatch(f"{what} is in another state")
    elif isinstance(stock, np.random.Generator):
        if ours.bit_generator.state != stock.bit_generator.state:
            raise Mismatch(f"{what} is in another state")
    elif isinstance(stock, (SimpleNamespace,)) or (is_dataclass(stock) and not isinstance(stock, type)):
        same(vars(ours), vars(stock), tolerance, what, strides)
    elif isinstance(stock, Enum):
        if str(ours) != str(stock):
            raise Mismatch(f"{what} is {ours!r}, stock {stock!r}")
    elif isinstance(stock, (int, float, str, bytes, bool, type(None), torch.dtype, torch.device, torch.Size)):
        equal = ours == stock or (isinstance(stock, float) and isinstance(ours, float) and ours != ours and stock != stock)
        if type(ours) is not type(stock) or not equal:
            raise Mismatch(f"{what} is {ours!r}, stock {stock!r}")
    elif isinstance(stock, nn.Module) or callable(stock):
        pass
    elif type(ours).__name__ != type(stock).__name__:
        raise Mismatch(f"{what} is {ours!r}, stock {stock!r}")


def close(ours: Tensor, stock: Tensor, tolerance: float, what: str, least: float = 0.0) -> None:
    """Raise :class:`Mismatch` unless integers, NaN and infinities are equal and the rest within the tolerance.

    The tolerance is relative to the largest value, which counts as ``least`` where it is smaller.
    """
    ours, stock = ours.detach(), stock.detach()
    if not stock.is_floating_point():
        if not torch.equal(ours, stock):
            raise Mismatch(f"{what} differs")
        return
    finite = stock.isfinite()
    if not torch.equal(finite, ours.isfinite()) or not torch.equal(ours[~finite].nan_to_num(7), stock[~finite].nan_to_num(7)):
        raise Mismatch(f"{what} is finite elsewhere")
    if stock.numel() and bool(finite.any()):
        error = float((ours[finite].double() - stock[finite].double()).abs().max())
        largest = float(stock[finite].double().abs().max())
        if error > tolerance * max(largest, least, 1e-12):
            raise Mismatch(f"{what} differs by {error:.3g}, its largest value is {largest:.3g}, shape {tuple(stock.shape)}")


def _strides(tensor: Tensor) -> tuple[int, ...]:
    """The strides of axes with more than one element."""
    if not tensor.numel():
        return ()
    return tuple(stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1)


def _about(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)} requires_grad={tensor.requires_grad}"
