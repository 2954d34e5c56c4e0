"""BatchNorm statistics that move: calibrate_bn, and the base model's own statistics kept aside for the way back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lora_edge.surgery.find import unwrap
from lora_edge.surgery.pooling import pool_statistics
from lora_edge.surgery.training_flags import in_evaluation

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def batch_norms(model: nn.Module) -> Iterator[tuple[str, _BatchNorm]]:
    """Name and module of every BatchNorm in the model that has running statistics."""
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            yield name, module


def is_batch_norm(module: nn.Module) -> bool:
    """Whether it is a BatchNorm with running statistics."""
    return isinstance(module, _BatchNorm) and module.running_mean is not None


def remember_statistics(bn: _BatchNorm, statistics: dict[str, Tensor] | None = None) -> None:
    """Keep the base model's statistics of ``bn``, its present ones unless given, on the CPU; only the first call counts."""
    if not base_statistics(bn):
        kept = statistics or {name: getattr(bn, name) for name in STATISTICS}
        bn._base_statistics = {name: value.detach().cpu().clone() for name, value in kept.items()}  # type: ignore


def base_statistics(bn: nn.Module) -> dict[str, Tensor]:
    """The base model's statistics as far as they were remembered, else an empty dict."""
    return bn.__dict__.get("_base_statistics", {})


def is_moved(bn: nn.Module) -> bool:
    """Whether the current statistics are others than the base model's."""
    return any(not torch.equal(value, getattr(bn, name).cpu()) for name, value in base_statistics(bn).items())


def forget_statistics(bn: nn.Module) -> None:
    """The current statistics are the model's own from now on."""
    bn.__dict__.pop("_base_statistics", None)


@contextmanager
def on_base_statistics(model: nn.Module) -> Iterator[None]:
    """Every BatchNorm runs on the base model's statistics inside, on its current ones again afterwards."""
    current: list[tuple[_BatchNorm, dict[str, Tensor]]] = []
    try:
        for _, bn in batch_norms(model):
            base = base_statistics(bn)
            if base:
                current.append((bn, {name: bn._buffers[name] for name in STATISTICS}))  # type: ignore[misc]
                for name, value in base.items():
                    bn._buffers[name] = value.to(bn._buffers[name].device, copy=True)  # type: ignore[union-attr]
        yield
    finally:
        for bn, buffers in current:
            bn._buffers.update(buffers)


@contextmanager
def on_batch_statistics(model: nn.Module) -> Iterator[None]:
    """Inside, every BatchNorm normalises by the batch's own statistics and its running ones stay; all else is in evaluation."""
    norms = [bn for _, bn in batch_norms(model)]
    tracks = [bn.track_running_stats for bn in norms]
    with in_evaluation(model):
        try:
            for bn in norms:
                bn.training, bn.track_running_stats = True, False
            yield
        finally:
            for bn, track in zip(norms, tracks, strict=True):
                bn.training, bn.track_running_stats = False, track


def calibrate_bn(model: nn.Module, batches: Iterable[Any], *, source_samples: float = 0) -> nn.Module:
    """Re-estimate the BatchNorm statistics on target data, in place: those of all samples together.

    However the data are cut into batches, the result is the same but for rounding: that of one batch of all samples in training
    mode. One batch takes one pass. Several take more, because what a BatchNorm reads depends on the statistics of those before
    it: passes are made until nothing moves, at most as many as there are BatchNorm layers and one.

    Works before :func:`lora_edge.adapt` and after it, and on a module that holds adapted models. The base statistics are
    remembered for :func:`lora_edge.disabled`, and the adapter file holds the new ones. A BatchNorm that no batch reaches keeps
    its statistics.

    Args:
        model: any model with BatchNorm layers; its training flags are left as they were.
        batches: as a DataLoader gives them: inputs ``x (N, ...)``; tuples and lists that start with one; or dicts, of which the
            entries are used that ``model.forward`` has a parameter for. No labels are needed. An iterator is read into a list
            first, anything else is gone through once a pass.
        source_samples: the base model's own statistics count as so many samples beside those of ``batches``; 16 serve where
            these are few and it is not known how far they are from the source (Schneider et al. 2020, arXiv 2006.16971).

    Returns:
        The model.

    Raises:
        TypeError, ValueError: ``source_samples`` is no finite number of 0 or more.
        TypeError: ``batches`` cannot be iterated over.
        ValueError: the model has no BatchNorm with running statistics, there are no batches, one has another form or is not
            taken by the model, a BatchNorm saw one value per channel only, or the statistics came out as NaN or Inf. The model
            is left as it was then.
    """
    if isinstance(source_samples, bool) or not isinstance(source_samples, (int, float)):
        raise TypeError(f"calibrate_bn: source_samples is {source_samples!r}; give a finite number of 0 or more")
    if not 0 <= source_samples < float("inf"):
        raise ValueError(f"calibrate_bn: source_samples is {source_samples}; give a finite number of 0 or more")
    outer, model = model, unwrap(model)
    norms = dict(batch_norms(model))
    if not norms:
        raise ValueError("calibrate_bn: the model has no BatchNorm with running statistics; there is nothing to calibrate")
    before = {name: {key: getattr(bn, key).clone() for key in STATISTICS} for name, bn in norms.items()}
    try:
        pooled, samples = pool_statistics(model, norms, batches)
        for name, moments in pooled.items():
            if moments.count < 2:
                raise ValueError(f"calibrate_bn: {name} saw one value per channel; give more samples")
            moments.write(norms[name], unbiased=True)
            norms[name].num_batches_tracked.fill_(moments.calls)  # type: ignore[union-attr, operator]
    except BaseException:
        for name, statistics in before.items():
            for key, value in statistics.items():
                getattr(norms[name], key).copy_(value)
        raise
    for name in pooled:
        bn = norms[name]
        remember_statistics(bn, before[name])
        if source_samples:
            for key in ("running_mean", "running_var"):
                current = getattr(bn, key)
                current.lerp_(base_statistics(bn)[key].to(current), source_samples / (source_samples + samples))
    return outer
