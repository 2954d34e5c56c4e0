"""S²FT: a few hidden channels of each pair of convolutions, trained densely: what makes them and what reads them.

Source: S²FT, Yang et al. 2024 (arXiv 2412.06289), in the authors' ``s2ft/s2.py`` and ``s2_utils.py``. Read there: rows of the
producer and columns of the consumer from zero, added without a factor, and the random choice of channels; the published runs
train columns alone (``v_ratio`` and ``u_ratio`` are 0). Inferred: pairs of convolutions in the place of heads and feed-forward
layers (a depthwise convolution between them adds its own rows), an index in the place of their permutation, and the budget,
which the pairs share as evenly as it allows, where the authors draw channels over the whole model. A channel that is zero in
all the target's windows, as behind a dead ReLU, is not drawn, because nothing of it would be trained.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lora_edge.methods.base import Make, Method, NotApplicableError, jointly
from lora_edge.methods.parts.channel_pairs import ChannelPair, channel_pairs
from lora_edge.methods.parts.facts import live_channels
from lora_edge.nn.reparametrised import Reparametrisation, zeros


class S2FT(Reparametrisation):
    """``ΔW[R] += rows`` and ``ΔW[:, C] += columns`` of one convolution; all else of ``ΔW`` is zero.

    ``rows (|R|, I/g, *K)`` are those of output channels ``R``, ``columns (|C|, O/g, *K)`` those of input channels ``C`` of
    all groups; each is absent where it has no channel. An element in both has two parameters, whose sum counts.
    """

    made: Tensor
    read: Tensor

    def __init__(self, conv: _ConvNd, made: Tensor, read: Tensor) -> None:
        super().__init__()
        self.shape, self.groups = conv.weight.shape, conv.groups
        self.register_buffer("made", made.clone().to(conv.weight.device))
        self.register_buffer("read", read.clone().to(conv.weight.device))
        self.rows = zeros(conv, len(made), *self.shape[1:]) if len(made) else None
        self.columns = zeros(conv, len(read), conv.out_channels // conv.groups, *self.shape[2:]) if len(read) else None

    def delta(self) -> Tensor:
        update: Tensor | float = 0.0
        if self.rows is not None:
            update = self.rows.new_zeros(self.shape).index_copy(0, self.made, self.rows)
        if self.columns is not None:
            by_input = self.columns.new_zeros(self.groups * self.shape[1], *self.columns.shape[1:])
            by_input = by_input.index_copy(0, self.read, self.columns).unflatten(0, (self.groups, -1))
            update = update + by_input.transpose(1, 2).reshape(self.shape)
        return update  # type: ignore[return-value]


def spread(costs: dict[ChannelPair, int], sizes: dict[ChannelPair, int], budget: int) -> dict[ChannelPair, int]:
    """Return how many channels each pair gets for at most ``budget`` elements, but one in all at least.

    Each in turn gets one more, the cheapest first, until none is affordable or left.

    Args:
        costs: the elements that one channel of a pair trains.
        sizes: how many channels a pair can give.
        budget: elements in all.
    """
    order = sorted(costs, key=lambda pair: costs[pair])
    counts = dict.fromkeys(costs, 0)
    grows = True
    while grows:
        grows = False
        for pair in order:
            if costs[pair] <= budget and counts[pair] < sizes[pair]:
                counts[pair] += 1
                budget -= costs[pair]
                grows = True
    return counts if any(counts.values()) else {**counts, order[0]: 1}


def _make(rows: bool, columns: bool) -> Make:
    """Return ``make`` of :func:`jointly`; ``rank`` is the budget: so many elements per output channel of the model."""

    def trained(convs: dict[str, _ConvNd], pair: ChannelPair) -> int:
        made = sum(convs[name].weight[0].numel() for name in (pair.producer, *pair.between)) if rows else 0
        consumer = convs[pair.consumer]
        read = consumer.weight[:, 0].numel() // consumer.groups if columns else 0
        return made + read

    def make(
        model: nn.Module, convs: dict[str, _ConvNd], rank: int, inputs: Tensor, labels: Tensor
    ) -> dict[str, Reparametrisation]:
        pairs = channel_pairs(model, convs, inputs.dim())
        live = live_channels(model, [pair.consumer for pair in pairs], inputs) if pairs else {}
        pairs = [pair for pair in pairs if len(live[pair.consumer])]
        if not pairs:
            raise NotApplicableError(
                "S²FT: no convolution's channels are read by one other convolution alone; use another method"
            )
        costs = {pair: trained(convs, pair) for pair in pairs}
        sizes = {pair: len(live[pair.consumer]) for pair in pairs}
        counts = spread(costs, sizes, rank * sum(conv.out_channels for conv in convs.values()))
        made: dict[str, Tensor] = {}
        read: dict[str, Tensor] = {}
        for pair, count in counts.items():
            channels = live[pair.consumer][torch.randperm(sizes[pair])[:count]].sort().values
            if rows:
                made.update(dict.fromkeys((pair.producer, *pair.between), channels))
            if columns:
                read[pair.consumer] = channels
        none = torch.empty(0, dtype=torch.long)
        found = {name: (made.get(name, none), read.get(name, none)) for name in convs}
        return {name: S2FT(convs[name], r, c) for name, (r, c) in found.items() if len(r) or len(c)}

    return make


def _form(name: str, title: str, rows: bool, columns: bool) -> Method:
    return Method(name, title, lr=5e-3, prepare=jointly(_make(rows, columns)), source="arXiv 2412.06289")


METHODS = [
    _form("s2ft", "S²FT", rows=True, columns=True),
    _form("s2ft_columns", "S²FT, columns", rows=False, columns=True),  # as the authors train
    _form("s2ft_rows", "S²FT, rows", rows=True, columns=False),
]
