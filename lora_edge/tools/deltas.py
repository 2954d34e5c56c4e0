"""The updates of a model's convolutions, dense or as a product of two factors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lora_edge.finite import check_finite
from lora_edge.nn.branch import branches
from lora_edge.nn.layers import LoRAEdgeConv
from lora_edge.nn.reparametrised import evaluated, exact_dtype
from lora_edge.tt import check_rank, is_kernel, update_of


def deltas(model: nn.Module, base: nn.Module | Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Return ``ΔW (O, I/g, *K)`` of every adapted convolution by dotted name: the weight that is merged minus the base's.

    Args:
        model: prepared by any method of :mod:`lora_edge.methods` or by :func:`lora_edge.adapt`; or any model, with ``base``.
        base: the base model or its state dict, for a model that does not keep its base's weights: one that was merged or
            fine-tuned in full. All convolutions with a weight in it are returned then.

    Returns:
        Copies in float32, or float64 for a float64 weight. The weights of :func:`lora_edge.merge` are these updates added to
        the base's and rounded once.

    Raises:
        RuntimeError: nothing in the model is adapted, and ``base`` is not given.
        ValueError: a weight of ``base`` has another shape than the model's, or a layer has a branch, which is no weight.
    """
    _refuse_branches(model, "deltas")
    with torch.no_grad(), evaluated(model) as layers:
        if base is not None:
            return _beside(model, base.state_dict() if isinstance(base, nn.Module) else base)
        found = {}
        for name, module in model.named_modules():
            if isinstance(module, LoRAEdgeConv):
                update = module.scale * update_of(module.core, module.suffix)
                found[name] = update.view(module.weight.shape).to(exact_dtype(module.weight))
            elif module in layers:
                weight: Tensor = module.parametrizations["weight"].original  # type: ignore[index, union-attr, assignment]
                exact = weight.to(exact_dtype(weight))
                found[name] = layers[module].adapted(exact) - exact  # type: ignore[index]
        if not found:
            raise RuntimeError("deltas: nothing in the model is adapted, so it keeps no base weights; give base=")
        return {name: update.detach() for name, update in found.items()}


def _beside(model: nn.Module, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, module in model.named_modules():
        before = base.get(f"{name}.weight" if name else "weight")
        if before is None or not isinstance(module, _ConvNd):
            continue
        weight = module.weight
        if isinstance(module, LoRAEdgeConv):
            weight = weight + module.scale * update_of(module.core, module.suffix).view(weight.shape)
        if weight.shape != before.shape:
            shapes = f"{tuple(before.shape)} in the base and {tuple(weight.shape)} in the model"
            raise ValueError(f"deltas: {name or 'the weight'} is {shapes}; give the model's own base")
        exact = exact_dtype(weight)
        found[name] = (weight.to(exact) - before.to(weight.device, exact)).detach()
    return found


def low_rank(model: nn.Module, rank: int | None = None) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Return each adapted convolution's update as ``(B (O, r), A (r, I/g, *K), scale)`` with ``ΔW = scale · B A``.

    Args:
        model: as for :func:`deltas`.
        rank: None for the factors that the methods themselves have. Otherwise the update's best approximation of at most this
            rank, by SVD, with balanced factors and scale 1; of any update.

    Raises:
        RuntimeError: nothing in the model is adapted.
        ValueError: without ``rank``, for a layer whose update has no such form, which the message names.
            Or with one, for an update that holds NaN or Inf.
        TypeError: ``rank`` is no integer.
    """
    if rank is not None:
        rank, updates = check_rank(rank), deltas(model)
        check_finite(updates, "low_rank", "train at a lower rate")
        return {name: (*_truncated(update, rank), 1.0) for name, update in updates.items()}
    _refuse_branches(model, "low_rank")
    found: dict[str, tuple[Tensor, Tensor, float]] = {}
    with torch.no_grad(), evaluated(model) as layers:
        for name, module in model.named_modules():
            if isinstance(module, LoRAEdgeConv):
                found[name] = (*_factors(module.core.detach(), module.suffix.detach()), module.scale)
            elif module in layers:
                factors = layers[module].low_rank()  # type: ignore[index]
                if factors is None:
                    kind = type(layers[module]).__name__  # type: ignore[index]
                    raise ValueError(f"low_rank: the update of {name or 'the layer'} by {kind} is no product; give a rank")
                found[name] = (factors[0].detach().clone(), factors[1].detach().clone(), factors[2])
    if not found:
        raise RuntimeError("low_rank: nothing in the model is adapted; prepare it by a method first")
    return found


def _refuse_branches(model: nn.Module, what: str) -> None:
    for name in branches(model):
        raise ValueError(
            f"{what}: {name or 'the layer'} has a branch, which is no weight; call lora_edge.nn.branch.fold_branches first"
        )


def _factors(core: Tensor, suffix: Tensor) -> tuple[Tensor, Tensor]:
    """``B (O, r)`` and ``A (r, I/g, *K)``; of a trained kernel ``r·ΠK`` rows, each row of the suffix at each tap."""
    if not is_kernel(core):
        return core.clone(), suffix.clone()
    taps = core[0, 0].numel()
    rows = torch.einsum("qi,kl->qkil", suffix.flatten(1), torch.eye(taps).to(suffix))
    return core.flatten(1).clone(), rows.reshape(-1, suffix.shape[1], *core.shape[2:])


def _truncated(update: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    u, values, vt = torch.linalg.svd(update.flatten(1).double(), full_matrices=False)
    roots = values[:rank].sqrt()
    b, a = u[:, :rank] * roots, roots[:, None] * vt[:rank]
    return b.to(update.dtype), a.to(update.dtype).unflatten(1, update.shape[1:])
