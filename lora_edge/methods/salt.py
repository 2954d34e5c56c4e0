"""SALT: scale and shift the leading singular values; a low-rank matrix in the coordinates of the others; two penalties.

Source: SALT, Elsayed et al. 2025 (arXiv 2503.16055), in the authors' ``Adapters/SALT.py`` and ``train.py``.
Read there: the share of values that are scaled, the elementwise ReLU, ``X``'s start, the penalty (norms summed over the layers,
times 0.01, the default of their training function). Their convolution unfolds the weight as here, but starts off the base; here
it starts as their linear layer. ``salt_linear``, without the ReLU, is ours.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lora_edge.methods.base import Method, Prepare, reparametrised
from lora_edge.methods.training import Training, cross_entropy
from lora_edge.nn.reparametrised import Reparametrisation, parameter, reparametrised_layers, zeros

PENALTY = 0.01
SCALED = 0.1  # share of the singular values that are scaled and shifted


class SALT(Reparametrisation):
    """``W' = U ReLU(Σ') Vᵀ``, ``Σ' = blockdiag(diag(a∘σ_k + b), diag(σ_rest) + X Y)``, of the unfolded weight ``(O, J)``.

    Of the ``p = min(O, J)`` singular values the first ``k = max(1, ⌊p/10⌋)`` get ``a, b (k,)``, from 1 and 0; the others share
    ``X (p-k, r)``, from ``U(±√(6/r))``, and ``Y (r, p-k)``, from 0. ``r`` is at most ``p-k``. ``W`` is kept and the change of
    ``Σ`` added, so the start is exact; ``U``, ``σ`` and ``V`` are buffers because an SVD differs between machines.

    The ReLU acts on every element: it removes the negative elements of ``X Y`` off the diagonal, and at the start, where they
    are zero, only those on the diagonal have a gradient.
    """

    u: Tensor
    values: Tensor
    vt: Tensor

    def __init__(self, conv: _ConvNd, rank: int, relu: bool = True) -> None:
        super().__init__()
        self.relu, self.shape = relu, conv.weight.shape[1:]
        u, values, vt = torch.linalg.svd(conv.weight.detach().cpu().double().flatten(1), full_matrices=False)
        for name, value in (("u", u), ("values", values), ("vt", vt)):
            self.register_buffer(name, parameter(conv, value).detach())
        self.scaled = max(1, int(SCALED * len(values)))
        rest = len(values) - self.scaled
        rank = min(rank, rest)
        bound = (6 / max(rank, 1)) ** 0.5
        self.scale: nn.Parameter = parameter(conv, torch.ones(self.scaled))
        self.shift = zeros(conv, self.scaled)
        self.lora_X = parameter(conv, torch.empty(rest, rank).uniform_(-bound, bound))
        self.lora_Y = zeros(conv, rank, rest)

    def leading(self) -> Tensor:
        """The change ``(k,)`` of the leading singular values."""
        leading = self.values[: self.scaled]
        return self.scale * leading + self.shift - leading

    def delta(self) -> Tensor:
        before = torch.diag(self.values)
        after = before + torch.block_diag(torch.diag(self.leading()), self.lora_X @ self.lora_Y)
        return self.u @ ((F.relu(after) if self.relu else after) - before) @ self.vt

    def penalty(self) -> Tensor:
        """``‖diag(a∘σ_k + b - σ_k)‖ + ‖X Y‖``; both gradients are zero at zero."""
        return torch.linalg.vector_norm(self.leading()) + torch.linalg.vector_norm(self.lora_X @ self.lora_Y)

    def low_rank(self) -> tuple[Tensor, Tensor, float] | None:
        """Plain LoRA of rank ``k + r`` without the ReLU; with it the update is no product."""
        if self.relu:
            return None
        k = self.scaled
        b = torch.cat([self.u[:, :k] * self.leading(), self.u[:, k:] @ self.lora_X], dim=1)
        return b, torch.cat([self.vt[:k], self.lora_Y @ self.vt[k:]]).unflatten(1, self.shape), 1.0


def penalised(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The cross-entropy plus 0.01 times the penalties of all layers."""
    layers = [kind for kind in reparametrised_layers(model).values() if isinstance(kind, SALT)]
    return cross_entropy(model, x, y) + PENALTY * torch.stack([kind.penalty() for kind in layers]).sum()


def _prepare(relu: bool) -> Prepare:
    prepare = reparametrised(lambda conv, rank: SALT(conv, rank, relu))

    def penalise(model: nn.Module, rank: int, inputs: Tensor, labels: Tensor) -> Training:
        return Training(prepare(model, rank, inputs, labels), loss=penalised)

    return penalise


METHODS = [
    Method("salt", "SALT", lr=3e-3, prepare=_prepare(relu=True), source="arXiv 2503.16055"),
    Method("salt_linear", "SALT without ReLU", lr=3e-3, prepare=_prepare(relu=False), source="arXiv 2503.16055"),
]
