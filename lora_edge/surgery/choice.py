"""Rank and frozen cores of every layer to adapt: what ``rank``, ``params``, ``subspace`` and ``batches`` come to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lora_edge.subspaces.budget import MOST_RANK, spread_ranks
from lora_edge.subspaces.gradient import captured_energies, leading_gradients
from lora_edge.subspaces.inputs import leading_inputs
from lora_edge.subspaces.samples import few_inputs, few_samples
from lora_edge.subspaces.weight import gradient_suffix, row_energies, suffix_along, weight_energies, weight_suffix


def choose(
    model: nn.Module,
    groups: list[list[str]],
    rank: int,
    budget: int | None,
    subspace: str,
    batches: Iterable[Any] | None,
    scaling: str,
    backend: str,
) -> dict[str, tuple[int, list[Tensor]]]:
    """Rank and frozen cores ``[G2, ..., Gd]`` by the first name of each group. Touches neither the model nor torch's generator.

    Args:
        groups: names of convolutions, together where they share one weight: what is seen of the gradient or the input then
            comes from all of them.
        budget: trained parameters in all, None where ``rank`` counts.

    Returns:
        By the first name of each group; a group that the budget leaves no rank for is not in it.
    """
    cap = rank if budget is None else MOST_RANK
    names = [name for group in groups for name in group]
    weights: dict[str, Tensor] = {group[0]: model.get_submodule(group[0]).weight for group in groups}  # type: ignore[misc]
    rows: dict[str, Tensor] = {}  # that the suffixes are made of, where not of the weights
    energies: dict[str, Tensor] = {}

    def suffix(name: str, own: int) -> list[Tensor]:
        with named(name):
            if not rows:
                return weight_suffix(weights[name], own, scaling)
            make = gradient_suffix if subspace == "gradient" else suffix_along
            return make(weights[name], rows[name], own, scaling)

    if batches is not None:
        device = next(iter(weights.values())).device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            needs_labels = subspace == "gradient" or budget is not None
            samples = few_samples(batches, device) if needs_labels else []
            seen: dict[str, Tensor] = {}
            if subspace == "gradient":
                seen = leading_gradients(model, names, cap, samples, backend)
            elif subspace == "input":
                inputs = [x for x, _ in samples] if needs_labels else few_inputs(batches, device)
                seen = leading_inputs(model, names, cap, inputs)
            if seen:
                rows = {group[0]: torch.cat([seen[name] for name in group]) for group in groups}
            if budget is not None and subspace != "gradient":
                cores = {group[0]: suffix(group[0], cap) for group in groups}
                each = captured_energies(model, {name: cores[g[0]] for g in groups for name in g}, samples, backend)
                energies = {group[0]: torch.stack([each[name] for name in group]).sum(dim=0) for group in groups}
    if budget is None:
        ranks = dict.fromkeys(weights, rank)
    else:
        of_rows = {name: row_energies(tensor, cap) for name, tensor in rows.items()}
        energies = energies or of_rows or {name: weight_energies(weight, cap) for name, weight in weights.items()}
        ranks = spread_ranks(energies, {name: len(weight) for name, weight in weights.items()}, budget)
    return {name: (own, suffix(name, own)) for name, own in ranks.items()}


@contextmanager
def named(layer: str) -> Iterator[None]:
    """A ValueError inside says which layer it is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{layer or 'model'}: {error}") from None
