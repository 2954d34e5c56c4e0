"""``calibrate_bn``: re-estimate BatchNorm statistics on target data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from lora_edge.nn.bn_statistics import STATISTICS, base_statistics, batch_norms, remember_statistics
from lora_edge.surgery.adapted import unwrap
from lora_edge.surgery.pooled_statistics import pool_statistics


def calibrate_bn(model: nn.Module, batches: Iterable[Any], *, source_samples: float = 0) -> nn.Module:
    """Re-estimate the BatchNorm statistics on target data, in place: those of all samples together.

    The result does not depend on how the data are divided into batches, up to rounding: it is that of one batch of all samples
    in training mode. One batch takes one pass. Several batches take more, because the input of a BatchNorm depends on the
    statistics of those before it: passes are repeated until nothing moves, at most one more than there are BatchNorm layers.

    Works before and after :func:`lora_edge.adapt`, and on a module that holds adapted models. The base statistics are
    remembered for :func:`lora_edge.disabled`, and the adapter file holds the new ones. A BatchNorm that no batch reaches keeps
    its statistics.

    Args:
        model: any model with BatchNorm layers; its training flags are not changed.
        batches: as from a DataLoader: inputs ``x (N, ...)``; tuples or lists that start with one; or dicts, of which the
            entries are used that are parameters of ``model.forward``. Labels are not needed. An iterator is first read into a
            list; anything else is iterated over once per pass.
        source_samples: weight of the base model's own statistics, as a number of samples beside those of ``batches``; 16 works
            where there are few samples and their distance from the source is unknown (Schneider et al. 2020, arXiv
            2006.16971).

    Returns:
        The model.

    Raises:
        TypeError: ``source_samples`` is not a number, or ``batches`` is not iterable.
        ValueError: ``source_samples`` is negative or infinite; the model has no BatchNorm with running statistics; there are no
            batches, or one has another form or is not accepted by the model; a BatchNorm saw only one value per channel; or the
            statistics are NaN or Inf. The model is then left unchanged.
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
