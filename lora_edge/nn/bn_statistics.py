"""BatchNorm's running statistics: which layers have them, and the base model's own values, kept aside while they move."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lora_edge.nn.training_flags import in_evaluation

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def batch_norms(model: nn.Module) -> Iterator[tuple[str, _BatchNorm]]:
    """Yield name and module of every BatchNorm in the model that has running statistics."""
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            yield name, module


def is_batch_norm(module: nn.Module) -> bool:
    """Whether a module is a BatchNorm with running statistics."""
    return isinstance(module, _BatchNorm) and module.running_mean is not None


def remember_statistics(bn: _BatchNorm, statistics: dict[str, Tensor] | None = None) -> None:
    """Keep the base model's statistics of ``bn`` (its current ones unless given) on the CPU; later calls have no effect."""
    if not base_statistics(bn):
        kept = statistics or {name: getattr(bn, name) for name in STATISTICS}
        bn._base_statistics = {name: value.detach().cpu().clone() for name, value in kept.items()}  # type: ignore


def base_statistics(bn: nn.Module) -> dict[str, Tensor]:
    """Return the base model's statistics that were remembered, or an empty dict."""
    return bn.__dict__.get("_base_statistics", {})


def forget_statistics(bn: nn.Module) -> None:
    """Drop the remembered statistics: the current ones are the model's own from now on."""
    bn.__dict__.pop("_base_statistics", None)


@contextmanager
def restored_on_error(model: nn.Module) -> Iterator[None]:
    """If what runs inside raises, give every BatchNorm the statistics, and those remembered of the base, that it had before."""
    before = [
        (bn, {name: getattr(bn, name).clone() for name in STATISTICS}, base_statistics(bn)) for _, bn in batch_norms(model)
    ]
    try:
        yield
    except BaseException:
        for bn, statistics, remembered in before:
            for name, value in statistics.items():
                getattr(bn, name).copy_(value)
            if not remembered:
                forget_statistics(bn)
        raise


@contextmanager
def on_base_statistics(model: nn.Module) -> Iterator[None]:
    """Run every BatchNorm on the base model's statistics inside; the current ones are restored afterwards."""
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
    """Run every BatchNorm on the batch's statistics inside, and all else in evaluation mode; running statistics stay."""
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
