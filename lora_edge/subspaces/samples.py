"""The few target samples that a pass before training uses: labelled pairs, or inputs alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

MOST_BATCHES = 4  # used at most; together as many samples as the largest of them holds

Sample = tuple[Tensor, Tensor]


def few_samples(batches: Iterable[Any], device: torch.device) -> list[Sample]:
    """Return the pairs that a pass uses: equal parts of the first few batches, together as many as the largest of them holds.

    Args:
        batches: pairs ``(x (N, ...), y)`` of inputs and classes, as from a DataLoader.
        device: of the returned samples.

    Raises:
        TypeError: ``batches`` is not iterable.
        ValueError: there are none, one is not a pair of tensors, or its ``x`` and ``y`` differ in length.
    """
    few = _first(batches, "pairs (x, y)")
    for k, batch in enumerate(few):
        if not _is_pair(batch):
            raise ValueError(f"batches: batch {k} is a {type(batch).__name__}; give pairs (x, y) of tensors")
        x, y = batch
        if x.dim() == 0 or y.dim() == 0 or len(x) != len(y):
            raise ValueError(f"batches: batch {k} has x {tuple(x.shape)} and y {tuple(y.shape)}; give one class per sample")
    part = _part([x for x, _ in few], "(x, y)")
    return [(x[:part].to(device), y[:part].to(device)) for x, y in few]


def few_inputs(batches: Iterable[Any], device: torch.device) -> list[Tensor]:
    """As :func:`few_samples`, for batches ``x (N, ...)`` or tuples and lists that start with it; labels are ignored."""
    few = [batch[0] if isinstance(batch, (tuple, list)) and batch else batch for batch in _first(batches, "inputs x")]
    for k, x in enumerate(few):
        if not isinstance(x, Tensor) or x.dim() == 0:
            raise ValueError(f"batches: batch {k} is a {type(x).__name__}; give x (N, ...) or tuples that start with it")
    part = _part(few, "x")
    return [x[:part].to(device) for x in few]


def _is_pair(batch: Any) -> bool:
    """Whether a batch is ``(x, y)``, two tensors."""
    return isinstance(batch, (tuple, list)) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch)


def _first(batches: Iterable[Any], what: str) -> list[Any]:
    try:
        return list(itertools.islice(iter(batches), MOST_BATCHES))
    except TypeError as error:
        raise TypeError(f"batches is a {type(batches).__name__} ({error}); give an iterable of {what}") from None


def _part(inputs: list[Tensor], what: str) -> int:
    size = max(map(len, inputs), default=0)
    if size == 0:
        raise ValueError(f"batches holds no samples, or its iterator was already used up; give at least one batch {what}")
    return -(-size // len(inputs))
