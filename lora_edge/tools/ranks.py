"""Methods whose update can be evaluated at several ranks, and how good they are over all of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from torch import nn

from lora_edge.nn.reparametrised import reparametrised_layers
from lora_edge.tt import check_rank


@contextmanager
def at_rank(model: nn.Module, rank: int) -> Iterator[nn.Module]:
    """Make the model, in evaluation mode, compute the update of this rank inside.

    ``deltas``, ``low_rank`` and ``merge`` follow it.

    A layer that attains less than ``rank`` uses all that it has.

    Raises:
        ValueError: no layer has several ranks, or ``rank`` is not among them.
        TypeError: ``rank`` is no integer.
    """
    rank = check_rank(rank)
    layers = [kind for kind in reparametrised_layers(model).values() if kind.ranks]
    ranks = sorted({k for kind in layers for k in kind.ranks})
    if not ranks:
        raise ValueError("at_rank: no layer of the model has several ranks; prepare it by matryoshka, for example")
    if rank not in ranks:
        raise ValueError(f"at_rank: rank is {rank}; give one of {', '.join(map(str, ranks))}")
    was = [kind.active for kind in layers]
    try:
        for kind in layers:
            kind.active = min(rank, max(kind.ranks))
        yield model
    finally:
        for kind, active in zip(layers, was, strict=True):
            kind.active = active


def aurac(ranks: Sequence[int], scores: Sequence[float], *, log: bool = True) -> float:
    """Return the area under the curve of a score over ranks, by trapezoids, divided by the range of the ranks.

    Source: MatryoshkaLoRA (arXiv 2605.07850), ``metrics.py`` of its code.

    Args:
        ranks: in increasing order, at least two.
        scores: one of each rank.
        log: over ``log2`` of the ranks (the paper's second version) instead of the ranks.

    Raises:
        ValueError: the two differ in length, or the ranks are fewer than two or do not increase.
    """
    if len(ranks) != len(scores):
        raise ValueError(f"aurac: {len(ranks)} ranks and {len(scores)} scores; give one score per rank")
    if len(ranks) < 2 or any(low >= high for low, high in itertools.pairwise(ranks)) or ranks[0] < 1:
        raise ValueError(f"aurac: ranks are {list(ranks)}; give at least two, from 1 up, in increasing order")
    at = np.log2(np.asarray(ranks, float)) if log else np.asarray(ranks, float)
    heights = np.asarray(scores, float)
    return float(((heights[1:] + heights[:-1]) / 2 * np.diff(at)).sum() / (at[-1] - at[0]))
