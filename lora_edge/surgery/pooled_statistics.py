"""Pool the mean and variance of every BatchNorm's input over many batches, independently of how the data are divided."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lora_edge.error_text import first_line
from lora_edge.nn.training_flags import in_evaluation

SETTLED = 1e-6  # of a standard deviation: less than float32's rounding changes a mean of many values


@dataclass
class Moments:
    """Count, mean ``(C,)`` and sum of squared deviations ``(C,)`` of all values of a channel, in float64 (float32 on MPS).

    ``calls`` is the number of batches they come from.
    """

    mean: Tensor
    squares: Tensor
    count: int = 0
    calls: int = 0

    def add(self, x: Tensor) -> None:
        """Add a batch ``(N, C, ...)`` by the pairwise rule of Chan, Golub and LeVeque (1979)."""
        count = x.numel() // x.shape[1] if x.shape[1] else 0
        if count == 0:
            return
        ways = [way for way in range(x.dim()) if way != 1]
        exact = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        variance, mean = (m.to(self.mean) for m in torch.var_mean(exact, ways, correction=0))
        total = self.count + count
        apart = mean - self.mean
        self.mean = self.mean + apart * (count / total)
        self.squares = self.squares + variance * count + apart.square() * (self.count * count / total)
        self.count, self.calls = total, self.calls + 1

    def write(self, bn: _BatchNorm, unbiased: bool) -> None:
        """Set a BatchNorm's running statistics; the variance is over ``count - 1``, as torch keeps it, if ``unbiased``."""
        assert bn.running_mean is not None
        assert bn.running_var is not None
        with torch.no_grad():
            bn.running_mean.copy_(self.mean)
            bn.running_var.copy_(self.squares / (self.count - 1 if unbiased else self.count))

    def far_from(self, other: Moments) -> bool:
        """Whether a channel's mean or variance differs by more than rounding."""
        variance, was = self.squares / self.count, other.squares / other.count
        tiny = torch.finfo(variance.dtype).tiny
        mean = (self.mean - other.mean).square() / variance.clamp_min(tiny)
        spread = (variance - was).abs() / variance.clamp_min(tiny)
        return bool((mean.sqrt() > SETTLED).any() | (spread > SETTLED).any())


def pool_statistics(
    model: nn.Module, norms: Mapping[str, _BatchNorm], batches: Iterable[Any]
) -> tuple[dict[str, Moments], int]:
    """Return the moments of every BatchNorm's input, while all BatchNorms before it use the moments that are returned.

    The running statistics are overwritten on the way, with variances over ``count``. The model runs in evaluation mode and
    without gradients.

    Args:
        model: the model.
        norms: BatchNorm layers of the model by name.
        batches: see :func:`lora_edge.calibrate_bn`.

    Returns:
        The moments of each layer that was reached, and the number of samples.

    Raises:
        TypeError, ValueError: as :func:`lora_edge.calibrate_bn`.
    """
    try:
        if iter(batches) is batches:
            batches = list(batches)
    except TypeError as error:
        raise TypeError(f"calibrate_bn: batches is a {type(batches).__name__} ({error}); give an iterable of batches") from None
    pooled, parts, samples = _pass(model, norms, batches, None)
    if samples == 0:
        raise ValueError(
            "calibrate_bn: batches is empty, or its iterator was already used up; give at least one batch of inputs"
        )
    if parts == 1 and all(moments.calls == 1 for moments in pooled.values()):
        return pooled, samples  # each already used the statistics of all its values
    for _ in norms:
        again, _, _ = _pass(model, norms, batches, pooled)
        is_settled = again.keys() == pooled.keys() and not any(again[name].far_from(pooled[name]) for name in again)
        pooled = again
        if is_settled:
            break
    return pooled, samples


def _pass(
    model: nn.Module, norms: Mapping[str, _BatchNorm], batches: Iterable[Any], known: dict[str, Moments] | None
) -> tuple[dict[str, Moments], int, int]:
    """Make one pass over the batches; return moments by name, and the numbers of non-empty batches and of samples.

    Every BatchNorm uses its ``known`` moments, or in the first pass what it has seen so far.
    """
    found: dict[str, Moments] = {}
    for name, moments in (known or {}).items():
        moments.write(norms[name], unbiased=False)
    hooks = [bn.register_forward_pre_hook(_Reader(name, found, known is None), with_kwargs=True) for name, bn in norms.items()]
    parts = samples = 0
    try:
        with torch.no_grad(), in_evaluation(model):
            for number, batch in enumerate(batches):
                args, kwargs, size = _inputs(model, batch, number)
                if size == 0:
                    continue
                try:
                    model(*args, **kwargs)
                except (RuntimeError, ValueError, TypeError, IndexError) as error:
                    raise ValueError(f"calibrate_bn: the model does not accept batch {number}: {first_line(error)}") from error
                parts, samples = parts + 1, samples + size
    finally:
        for hook in hooks:
            hook.remove()
    for name, moments in found.items():
        if not bool((torch.isfinite(moments.mean) & torch.isfinite(moments.squares)).all()):
            raise ValueError(f"calibrate_bn: the statistics of {name} came out as NaN or Inf; give finite inputs")
    return found, parts, samples


class _Reader:
    """A forward pre-hook that adds a BatchNorm's input to its moments."""

    def __init__(self, name: str, found: dict[str, Moments], is_first: bool) -> None:
        self.name, self.found, self.is_first = name, found, is_first

    def __call__(self, bn: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        assert isinstance(bn, _BatchNorm)
        x = inputs[0] if inputs else named["input"]
        moments = self.found.get(self.name)
        if moments is None:
            dtype = torch.float32 if x.device.type == "mps" else torch.float64
            zeros = torch.zeros(x.shape[1], dtype=dtype, device=x.device)
            moments = Moments(zeros, zeros)
        moments.add(x)
        if moments.count:
            self.found[self.name] = moments
            if self.is_first:
                moments.write(bn, unbiased=False)


def _inputs(model: nn.Module, batch: Any, number: int) -> tuple[tuple[Any, ...], dict[str, Any], int]:
    """Return the arguments that the model is called with for a batch, and its number of samples."""
    if isinstance(batch, Mapping):
        kwargs = _known_entries(model, batch)
        first = next((value for value in kwargs.values() if isinstance(value, Tensor) and value.dim()), None)
        if first is None:
            keys = ", ".join(map(repr, batch))
            raise ValueError(
                f"calibrate_bn: batch {number} is a dict of {keys}, of which model.forward accepts no tensor; give x or (x, y)"
            )
        return (), kwargs, len(first)
    x = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if isinstance(x, Mapping):
        return _inputs(model, x, number)
    if not isinstance(x, Tensor) or x.dim() == 0:
        what = f"{type(batch).__name__} that starts with a {type(x).__name__}" if x is not batch else type(batch).__name__
        raise ValueError(f"calibrate_bn: batch {number} is a {what}; give x (N, ...), (x, y), or a dict of forward's arguments")
    return (x,), {}, len(x)


def _known_entries(model: nn.Module, batch: Mapping[Any, Any]) -> dict[str, Any]:
    parameters = inspect.signature(model.forward).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return {str(key): value for key, value in batch.items()}
    return {key: value for key, value in batch.items() if key in parameters}
