"""QWHA: the base is quantised, and a sparse update under a Walsh-Hadamard transform starts by repairing what that cost.

Source: QWHA, Jeon et al. 2025 (arXiv 2509.17428). Read in the authors' code (vantaa89/qwha: ``peft/.../qwha/layer.py``,
``src/init/initialize.py``): the transform along the inputs, the damped second moments, the share of each channel (AdaAlloc),
the choice of places, the least squares. Inferred: the form for convolutions, by patches, with a second moment per group;
Hadamard matrices that are cropped to the terms; round-to-nearest where the authors use MagR and GPTQ; one scale for all sizes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lora_edge.methods.base import Method, jointly
from lora_edge.methods.parts.facts import second_moments
from lora_edge.methods.parts.hadamard import hadamard_order, transform
from lora_edge.methods.parts.quantisation import dequantise, quantise
from lora_edge.nn.reparametrised import Reparametrisation, parameter

GROUP = 64  # terms of an output channel that share a scale
DAMPING = 1e-4  # added to a second moment's diagonal, times its mean


class QWHA(Reparametrisation):
    """``W' = W_Q + F Hᵀ/√N``; ``W_Q (O, n)`` is the unfolded weight, ``n = (I/g)·ΠK``, rounded to ``bits`` by groups of terms.

    ``F (O, N)`` is sparse: ``min(r(O + n), O·n)`` values are trained at places that :func:`repair` chose, so the update's rank
    is not limited by ``r``. ``H`` is a Hadamard matrix of order ``N``: ``n``, or else the next power of two, and the first
    ``n`` of its rows are used. The authors divide by ``n`` and multiply by ``s/√O``, with ``s`` from 0.25 to 4000; with Adam,
    ``s`` is a factor of the rate. ``s = √(O·N)`` here, so that a step changes layers of any size alike.

    ``W_Q`` is kept as codes, scales and zero points, which are saved with the values. What is merged is a float weight.

    Args:
        conv: the layer.
        rank: of the LoRA with as many trained elements.
        moments: ``XᵀX (g, n, n)`` of the layer's patches ``X``; see :func:`second_moments`.
        bits: of a code.
    """

    places: Tensor
    codes: Tensor
    scale: Tensor
    zero: Tensor

    def __init__(self, conv: _ConvNd, rank: int, moments: Tensor, bits: int = 4) -> None:
        super().__init__()
        weight = conv.weight.detach().cpu().flatten(1)
        quantised = quantise(weight, bits, GROUP)
        for name, value in zip(("codes", "scale", "zero"), quantised, strict=True):
            self.register_buffer(name, value.to(conv.weight.device))
        self.order = hadamard_order(weight.shape[1])
        error = weight.double() - dequantise(*quantised, GROUP).double()
        values, places = repair(error, moments, min(rank * sum(weight.shape), weight.numel()))
        self.values = parameter(conv, values)
        self.register_buffer("places", places.to(conv.weight.device))

    def base(self, weight: Tensor) -> Tensor:
        return dequantise(self.codes, self.scale, self.zero, GROUP).view(weight.shape)

    def delta(self) -> Tensor:
        out, terms = self.codes.shape
        sparse = self.values.new_zeros(out * self.order).scatter(0, self.places, self.values).view(out, self.order)
        return transform(sparse)[:, :terms] / math.sqrt(self.order)


def repair(error: Tensor, moments: Tensor, budget: int) -> tuple[Tensor, Tensor]:
    """Return ``budget`` values, and their places in the flattened ``F (O, N)``, for which ``F Hᵀ/√N`` is near ``error (O, n)``.

    Near is in what the layer computes, ``‖X(F Hᵀ/√N - error)ᵀ‖``, by ``XᵀX (g, n, n)`` alone. All is in float64, on the CPU.
    Each channel gets a share by its error, at the places of its largest terms, whose values then are fitted together.
    """
    out, terms = error.shape
    order = hadamard_order(terms)
    basis = transform(torch.eye(order, dtype=torch.float64)).T[:terms] / math.sqrt(order)  # orthonormal rows
    spectrum = error @ basis
    counts = shares(torch.linalg.vector_norm(spectrum, dim=1), budget, terms)
    values, places = [], []
    for channels, moment in zip(torch.arange(out).chunk(len(moments)), moments, strict=True):
        mean = moment.diagonal().mean()
        damped = moment + DAMPING * mean * torch.eye(terms, dtype=torch.float64)
        weighted = (damped if mean > 0 else torch.eye(terms, dtype=torch.float64)) @ basis
        gram, target = basis.T @ weighted, error[channels] @ weighted
        ranked = (gram.diagonal() * spectrum[channels].square()).argsort(dim=1, descending=True, stable=True)
        for row, channel in enumerate(channels.tolist()):
            chosen = ranked[row, : counts[channel]]
            if len(chosen):  # columns of a cropped basis may depend on each other, which gelsd allows
                fit = torch.linalg.lstsq(gram[chosen][:, chosen], target[row, chosen, None], driver="gelsd")
                values.append(fit.solution[:, 0])
                places.append(channel * order + chosen)
    return torch.cat(values), torch.cat(places)


def shares(errors: Tensor, budget: int, most: int) -> Tensor:
    """Return how many values each channel gets: in proportion to its error, rounded down, and at most ``most``.

    What is left over is spread evenly, the last ones to the channels with the fewest. The sum is ``budget``.
    """
    part = errors / errors.sum() if bool(errors.any()) else torch.zeros_like(errors)
    counts = (part * budget).floor().long().clamp_max(most)
    while left := budget - int(counts.sum()):
        free = (counts < most).nonzero()[:, 0]
        if left >= len(free):
            counts[free] = (counts[free] + left // len(free)).clamp_max(most)
        else:
            counts[free[counts[free].argsort(stable=True)[:left]]] += 1
    return counts


def _of_bits(bits: int) -> Method:
    def make(
        model: nn.Module, convs: dict[str, _ConvNd], rank: int, inputs: Tensor, labels: Tensor
    ) -> dict[str, Reparametrisation]:
        moments = second_moments(model, convs, inputs)
        made: dict[str, Reparametrisation] = {}
        for name, conv in convs.items():
            terms = conv.weight[0].numel()
            moment = moments.get(name, torch.zeros(conv.groups, terms, terms, dtype=torch.float64))
            if not bool(torch.isfinite(moment).all()):
                raise ValueError(f"{name or 'the layer'}: its inputs hold NaN or Inf; give finite windows")
            made[name] = QWHA(conv, rank, moment, bits)
        return made

    return Method(
        name="qwha" if bits == 4 else f"qwha_{bits}bit",
        title=f"QWHA, {bits} bits",
        lr=3e-3,
        prepare=jointly(make),
        starts_at_base=False,
        source="arXiv 2509.17428",
    )


METHODS = [_of_bits(bits) for bits in (2, 3, 4, 8)]
