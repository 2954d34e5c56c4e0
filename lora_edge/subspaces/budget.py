"""Spread a budget of trained parameters over the layers as ranks.

One more rank costs a layer ``O`` parameters, a column of its core, and gains the energy of the layer's next direction.
"""

from __future__ import annotations

import re

from torch import Tensor, nn

MOST_RANK = 16  # of a layer: the highest that the kernels support
CORE_BYTES = 4  # per parameter: cores are float32
_UNITS = {"b": 1, "kb": 1_000, "mb": 1_000_000}
_FORM = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(%|[km]?b)\s*", re.IGNORECASE)


def parse_budget(params: object, model: nn.Module) -> int:
    """Return the number of trained parameters that ``params`` allows.

    Args:
        params: ``"0.5%"`` of the model's parameters, ``"20kB"`` of cores at 4 bytes per parameter (B, kB or MB, decimal), or an
            int, the number itself.
        model: the base model.

    Raises:
        TypeError: ``params`` is neither a string nor an int; bool is rejected.
        ValueError: it has another form, is not above zero, or exceeds the number of all parameters.
    """
    forms = 'give a share as "0.5%", bytes as "20kB", or a number of parameters'
    if isinstance(params, bool) or not isinstance(params, (int, str)):
        raise TypeError(f"params is {params!r}, a {type(params).__name__}; {forms}")
    total = sum(p.numel() for p in model.parameters())
    if isinstance(params, int):
        count = params
    else:
        match = _FORM.fullmatch(params)
        if match is None:
            raise ValueError(f"params is {params!r}; {forms}")
        number, unit = float(match[1]), match[2].lower()
        count = int(number / 100 * total + 1e-6) if unit == "%" else int(number * _UNITS[unit] / CORE_BYTES)
    if not 0 < count <= total:
        raise ValueError(f"params={params!r} is {count:,} of the model's {total:,} parameters; {forms}, at least one core's")
    return count


def spread_ranks(energies: dict[str, Tensor], costs: dict[str, int], budget: int) -> dict[str, int]:
    """Return, by name, the ranks that gain the most energy for the budget; a layer that gets none is missing.

    Every layer with any energy first gets rank 1 if the budget allows that for all. Then ranks are given one at a time to the
    layer whose next direction gains the most energy per parameter, as long as its column fits.

    Args:
        energies: by layer, the gain ``(highest rank,)`` of each further rank.
        costs: by layer, the parameters of one rank: its output channels ``O``.
        budget: total number of parameters.

    Raises:
        ValueError: no layer has any energy, or the budget is below the smallest core.
    """
    gains = {name: [float(gain) for gain in energy] for name, energy in energies.items() if bool(energy.count_nonzero())}
    if not gains:
        raise ValueError("params: no layer has any energy to spread ranks by; the weights or gradients are zero")
    smallest = min(gains, key=lambda name: costs[name])
    if budget < costs[smallest]:
        raise ValueError(
            f"params allows {budget:,} parameters, but the smallest core, of {smallest or 'the model'} at rank 1, has "
            f"{costs[smallest]:,}; give at least that"
        )
    everywhere = sum(costs[name] for name in gains)
    ranks = dict.fromkeys(gains, 1 if everywhere <= budget else 0)
    left = budget - everywhere if everywhere <= budget else budget
    while True:
        fits = [name for name, rank in ranks.items() if rank < len(gains[name]) and costs[name] <= left]
        if not fits:
            return {name: rank for name, rank in ranks.items() if rank}
        best = max(fits, key=lambda name: gains[name][ranks[name]] / costs[name])  # the first layer if several are equal
        ranks[best] += 1
        left -= costs[best]
