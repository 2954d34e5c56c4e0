"""The dense weight gradient ``dW (O, I/g, *K)`` of every layer, seen through thin matrices: it is never kept, and never whole.

Both products are gradients of the adapted layer ``W + B S`` itself:

    dW S^T    the gradient to the core where ``B = 0``: a training step, in its memory and its time
    B^T dW    the gradient to the suffix where ``S = 0``; it needs the layers' inputs, so it is taken in micro-batches

One pass gives the leading right singular directions: those of ``B^T dW`` for a random orthonormal ``B`` are near them (Halko,
Martinsson and Tropp, SIAM Review 2011, section 4), and are the same where ``B`` is square. On T-ResNet the first two catch .98
of the energy that the exact ones catch. Both products run on a twin of the model that shares its weights: the model is not
touched.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_edge import calibration
from lora_edge.nn import blocks, frozen_bn, lean
from lora_edge.nn.layers import ADAPTED_CLASS, LoRAEdgeConv, attach
from lora_edge.subspaces.inputs import whole_rows
from lora_edge.subspaces.samples import Sample
from lora_edge.tt import contract_suffix

MICRO_BATCHES = 3  # of a batch where all layers' inputs are saved: on W1 to W3 within twice a training step's bytes
OVERSAMPLING = 32  # at least so many rows of a sketch beyond the rank asked for, where the layer has as many channels


def leading_gradients(
    model: nn.Module, names: Sequence[str], rank: int, samples: list[Sample], backend: str = "auto"
) -> dict[str, Tensor]:
    """``B^T dW (q, I/g, *K)`` of each named convolution by the root of ``O / q``, on the CPU: about the norm of ``dW``.

    ``B (O, q)`` is random and orthonormal, ``q`` above ``rank`` or all of ``O``. The loss is the cross-entropy, BatchNorm is on
    its running statistics and dropout is off.

    Args:
        names: dotted names of stock convolutions.
        rank: how many singular directions are to be precise.
        samples: from :func:`lora_edge.subspaces.samples.few_samples`.
        backend: what the layers run on that are not named; no kernel has the gradient to a suffix.

    Raises:
        ValueError: the loss or a gradient is NaN or Inf, or the gradient is zero in every layer; the message says which.
        RuntimeError: the model cannot be copied.
    """
    generator = torch.Generator().manual_seed(0)  # of its own: torch's is the user's
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
    """``|dW v_q|^2`` for each row ``v_q`` of the suffix, orthonormalised in order: what the row can catch of the gradient.

    Args:
        suffixes: name of a convolution and its frozen cores ``[G2, ..., Gd]``.
        samples: from :func:`lora_edge.subspaces.samples.few_samples`.

    Returns:
        Energies ``(r1,)`` by name, float64.

    Raises:
        as :func:`leading_gradients`.
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
    """Gradient of the mean cross-entropy to every layer's core or suffix. One of the two is zero: the output is the base's."""
    twin = _twin(model)
    for module in twin.modules():
        module.training = False
    layers: dict[str, LoRAEdgeConv] = {}
    for name, suffix in suffixes.items():
        layer: Any = twin.get_submodule(name)
        layer.__class__ = ADAPTED_CLASS[type(layer)]
        attach(layer, suffix, cores[name], backend="torch" if wanted == "suffix" else backend)  # no kernel has that gradient
        layer.core.requires_grad_(wanted == "core")
        layer.suffix.requires_grad_(wanted == "suffix")
        layer.trains_suffix = wanted == "suffix"
        layers[name] = layer
    for _, norm in calibration.batch_norms(twin):
        if frozen_bn.why_not_frozen(norm) is None:
            frozen_bn.freeze_bn(norm, lean=True)
    lean.make_lean(twin, backend)
    blocks.fuse(twin)
    count = sum(len(x) for x, _ in samples)
    for x, y in samples:
        if len(x):
            with torch.enable_grad():
                loss = _summed_cross_entropy(twin, x, y) / count
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
    """The cross-entropy, summed over the samples ``x (N, ...)`` of classes ``y (N,)``, in float32 or better.

    Raises:
        ValueError: the model's output is no tensor, does not go with ``y``, or the loss is NaN or Inf.
    """
    logits = model(x)
    if not isinstance(logits, Tensor):
        raise ValueError(f"batches: the model's output is a {type(logits).__name__}; the pass needs logits (N, C, ...)")
    try:
        loss = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), y, reduction="sum")
    except (RuntimeError, IndexError, ValueError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(
            f"batches: no cross-entropy of output {tuple(logits.shape)} and y {tuple(y.shape)} {y.dtype} ({why}); "
            "give pairs (x, y) of inputs and classes"
        ) from None
    if not bool(torch.isfinite(loss)):
        raise ValueError(f"batches: the loss is {float(loss.detach())}; give finite inputs, and a model whose output is finite")
    return loss


def _twin(model: nn.Module) -> nn.Module:
    """A copy of the model with modules and flags of its own that shares the weights' memory."""
    shared: dict[int, Any] = {}
    for module in model.modules():
        shared.update(
            {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in module._parameters.values() if p is not None}
        )
        # a computed weight of torch.nn.utils.weight_norm is no leaf, which deepcopy does not take
        shared.update({id(value): value.detach() for value in module.__dict__.values() if isinstance(value, Tensor)})
    try:
        return copy.deepcopy(model, shared)
    except Exception as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RuntimeError(
            f'the model cannot be copied, which the gradient pass needs ({why}); use subspace="weight"'
        ) from None
