"""Products of every layer's dense weight gradient ``dW (O, I/g, *K)`` with thin matrices; ``dW`` itself is never formed.

Both products are gradients of the adapted layer ``W + B S`` itself:

    dW S^T    the gradient of the core where ``B = 0``: takes the memory and time of a training step
    B^T dW    the gradient of the suffix where ``S = 0``: it needs the layers' inputs, so it runs in micro-batches

One pass gives the leading right singular directions: those of ``B^T dW`` for a random orthonormal ``B`` are close to them
(Halko, Martinsson and Tropp, SIAM Review 2011, section 4), and are equal to them if ``B`` is square. On T-ResNet the first two
capture .98 of the energy that the exact ones capture. Both products run on a copy of the model that shares its weights; the
model is not changed.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_edge.error_text import first_line
from lora_edge.nn import blocks, frozen_bn, lean
from lora_edge.nn.bn_statistics import batch_norms
from lora_edge.nn.layers import ADAPTED_CLASS, LoRAEdgeConv, add_core
from lora_edge.subspaces.inputs import whole_rows
from lora_edge.subspaces.samples import Sample
from lora_edge.tt import contract_suffix

MICRO_BATCHES = 3  # per batch when all layers' inputs are saved: on W1 to W3 at most twice a training step's bytes
OVERSAMPLING = 32  # at least so many rows of a sketch beyond the requested rank, if the layer has as many channels


def leading_gradients(
    model: nn.Module, names: Sequence[str], rank: int, samples: list[Sample], backend: str = "auto"
) -> dict[str, Tensor]:
    """Return ``sqrt(O / q) B^T dW (q, I/g, *K)`` of each named convolution, on the CPU; its norm is about that of ``dW``.

    ``B (O, q)`` is random and orthonormal; ``q`` exceeds ``rank``, or is ``O``. The loss is the cross-entropy, BatchNorm uses
    its running statistics and dropout is off.

    Args:
        model: the base model.
        names: dotted names of stock convolutions.
        rank: number of singular directions that must be precise.
        samples: from :func:`lora_edge.subspaces.samples.few_samples`.
        backend: of the layers that are not named; no kernel computes the gradient of a suffix.

    Raises:
        ValueError: the loss or a gradient is NaN or Inf, or the gradient is zero in every layer.
        RuntimeError: the model cannot be copied.
    """
    generator = torch.Generator().manual_seed(0)  # a separate one: torch's own belongs to the user
    zeros, bases = {}, {}
    for name in names:
        weight: Tensor = model.get_submodule(name).weight  # type: ignore[assignment]
        count = min(whole_rows(rank + OVERSAMPLING), len(weight))
        random = torch.randn(len(weight), count, generator=generator, dtype=torch.float64)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        bases[name] = (torch.linalg.qr(random)[0] * (len(weight) / count) ** 0.5).to(dtype)
        zeros[name] = torch.zeros(()).expand(count, *weight.shape[1:])
    cut = []
    for x, y in samples:
        parts = -(-MICRO_BATCHES // len(samples))
        cut += list(zip(x.chunk(parts), y.chunk(parts), strict=True))
    return _gradients(model, zeros, bases, "suffix", cut, backend)


def captured_energies(
    model: nn.Module, suffixes: dict[str, list[Tensor]], samples: list[Sample], backend: str = "auto"
) -> dict[str, Tensor]:
    """Return ``|dW v_q|^2`` for each row ``v_q`` of the suffix, orthonormalised in order: the gradient energy it can capture.

    Args:
        model: the base model.
        suffixes: frozen cores ``[G2, ..., Gd]`` by the convolution's name.
        samples: from :func:`lora_edge.subspaces.samples.few_samples`.
        backend: of the model's layers.

    Returns:
        Energies ``(r1,)`` by name, float64.

    Raises:
        ValueError, RuntimeError: as for :func:`leading_gradients`.
    """
    directions = {}
    for name, cores in suffixes.items():
        rows = contract_suffix(cores).to(torch.float64)
        directions[name] = torch.linalg.qr(rows.flatten(1).T)[0].T.reshape(rows.shape)
    return {
        name: seen.double().square().sum(dim=0) for name, seen in _times_suffix(model, directions, samples, backend).items()
    }


def _times_suffix(model: nn.Module, suffixes: dict[str, Tensor], samples: list[Sample], backend: str) -> dict[str, Tensor]:
    cores = {name: torch.zeros(model.get_submodule(name).weight.shape[0], len(rows)) for name, rows in suffixes.items()}  # type: ignore
    return _gradients(model, suffixes, cores, "core", samples, backend)


def _gradients(
    model: nn.Module,
    suffixes: dict[str, Tensor],
    cores: dict[str, Tensor],
    wanted: str,
    samples: list[Sample],
    backend: str,
) -> dict[str, Tensor]:
    """Return the gradient of the mean cross-entropy for every core or suffix, as ``wanted``; the other of the two is zero."""
    copied = twin(model)
    for module in copied.modules():
        module.training = False
    layers: dict[str, LoRAEdgeConv] = {}
    for name, suffix in suffixes.items():
        layer: Any = copied.get_submodule(name)
        layer.__class__ = ADAPTED_CLASS[type(layer)]
        # no kernel computes the gradient of a suffix
        add_core(layer, suffix, cores[name], backend="torch" if wanted == "suffix" else backend)
        layer.core.requires_grad_(wanted == "core")
        layer.suffix.requires_grad_(wanted == "suffix")
        layer.trains_suffix = wanted == "suffix"
        layers[name] = layer
    for _, norm in batch_norms(copied):
        if frozen_bn.why_not_frozen(norm) is None:
            frozen_bn.freeze_bn(norm, lean=True)
    lean.make_lean(copied, backend)
    blocks.fuse(copied)
    count = sum(len(x) for x, _ in samples)
    for x, y in samples:
        if len(x):
            with torch.enable_grad():
                loss = _summed_cross_entropy(copied, x, y) / count
            if loss.requires_grad:
                loss.backward()  # type: ignore[no-untyped-call]
    found = {}
    for name, layer in layers.items():
        parameter = getattr(layer, wanted)
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        found[name] = gradient.detach().cpu()
        if not bool(torch.isfinite(gradient).all()):
            raise ValueError(f"batches: the gradient of {name or 'the model'} holds NaN or Inf; give finite inputs")
    if not any(bool(gradient.count_nonzero()) for gradient in found.values()):
        raise ValueError(
            "batches yield no gradient: it is zero in every layer; give samples that the model does not fit already"
        )
    return found


def _summed_cross_entropy(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return the cross-entropy, summed over the samples ``x (N, ...)`` of classes ``y (N,)``, in float32 or better.

    Raises:
        ValueError: the model's output is not a tensor or does not fit ``y``, or the loss is NaN or Inf.
    """
    logits = model(x)
    if not isinstance(logits, Tensor):
        raise ValueError(f"batches: the model's output is a {type(logits).__name__}; the pass needs logits (N, C, ...)")
    try:
        loss = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), y, reduction="sum")
    except (RuntimeError, IndexError, ValueError) as error:
        why = first_line(error)
        raise ValueError(
            f"batches: no cross-entropy of output {tuple(logits.shape)} and y {tuple(y.shape)} {y.dtype} ({why}); "
            "give pairs (x, y) of inputs and classes"
        ) from None
    if not bool(torch.isfinite(loss)):
        raise ValueError(f"batches: the loss is {float(loss.detach())}; give finite inputs, and a model whose output is finite")
    return loss


def twin(model: nn.Module) -> nn.Module:
    """Return a copy of the model with separate modules and flags that shares the weights' memory."""
    shared: dict[int, Any] = {}
    for module in model.modules():
        shared.update(
            {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in module._parameters.values() if p is not None}
        )
        # a weight computed by torch.nn.utils.weight_norm is not a leaf, which deepcopy rejects
        shared.update({id(value): value.detach() for value in module.__dict__.values() if isinstance(value, Tensor)})
    try:
        return copy.deepcopy(model, shared)
    except Exception as error:
        raise RuntimeError(
            f'the model cannot be copied, which the gradient pass needs ({first_line(error)}); use subspace="weight"'
        ) from None
