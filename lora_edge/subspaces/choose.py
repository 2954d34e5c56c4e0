"""Choose rank and frozen cores of every layer to adapt, from ``adapt``'s ``rank``, ``params``, ``subspace`` and ``batches``."""

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

FROM_BATCHES = ("input", "gradient")  # made from target batches, which must be given
SUBSPACES = ("weight", *FROM_BATCHES, "auto")


def choose_suffixes(
    model: nn.Module,
    groups: list[list[str]],
    rank: int,
    budget: int | None,
    subspace: str,
    batches: Iterable[Any] | None,
    scaling: str,
    backend: str,
) -> dict[str, tuple[int, list[Tensor]]]:
    """Return rank and frozen cores ``[G2, ..., Gd]`` for each group. Changes neither the model nor torch's generator.

    Args:
        model: the base model.
        groups: names of convolutions, grouped by the weight they share; a group uses the gradients or inputs of all of them.
        rank: of every layer, unless there is a budget.
        budget: total number of trained parameters, None to use ``rank``.
        subspace: "weight", "input" or "gradient".
        batches: see :func:`lora_edge.adapt`; None where they are not needed.
        scaling, backend: as for :func:`lora_edge.adapt`.

    Returns:
        By the first name of each group; a group for which the budget leaves no rank is missing.

    Raises:
        ValueError: a suffix cannot be made; the message names the layer.
    """
    cap = rank if budget is None else MOST_RANK
    names = [name for group in groups for name in group]
    weights: dict[str, Tensor] = {group[0]: model.get_submodule(group[0]).weight for group in groups}  # type: ignore[misc]
    rows: dict[str, Tensor] = {}  # that the suffixes are made from, if not from the weights
    energies: dict[str, Tensor] = {}

    def suffix(name: str, own: int) -> list[Tensor]:
        with naming_layer(name):
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
def naming_layer(layer: str) -> Iterator[None]:
    """Put the layer's name in front of the message of a ValueError raised inside."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{layer or 'model'}: {error}") from None
