"""MemFLoRA: a frozen projection of the input channels to a few, and a trained kernel of full size on those few.

Source: MemFLoRA (arXiv 2610.08669, ASP-DAC 2027). Read: the paper and the authors' code (``bnpa_conv_bn_act_2d.py``): ``P`` is
drawn from N(0, 1/r), ``U`` starts at zero and is trained by Adam at 1e-3, BatchNorm stays on the source's statistics. Inferred:
groups, which the authors do not have, share ``P``. Their weight decay of 5e-4 is left out, as in all methods here.

``memflora_sg`` trains ``P`` too (read: ``bnpa_sg.py``), at ten times ``U``'s rate. Its exact gradient needs each layer's input,
which is not saved: backward leaves ``dL/dq`` of ``q = P x`` behind, and a second forward, without gradients and with the same
weights, meets it with each input.

Two more projections are ours: a Gaussian one with balanced rows, and one by the SVD of the weight's input side. Both get what
LoRA-Edge gets beside its cores: BatchNorm near the target's statistics, and turned axes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lora_edge.adapt import LayerUpdate, inner_model, install, trainable_parameters
from lora_edge.methods.base import Method, PrepareList, adaptable
from lora_edge.methods.parts.backbone import move_statistics
from lora_edge.methods.training import Training, cross_entropy
from lora_edge.nn.layers import LoRAEdgeConv
from lora_edge.ops.padding import pad_by_mode
from lora_edge.ops.trained_kernel import projection_grad, recorded
from lora_edge.subspaces.weight import kernel_suffix, scaled_rows
from lora_edge.surgery.ties import tied_groups
from lora_edge.tt import check_rank

PROJECTION_RATE = 10.0  # of P's rate to U's: 1e-2 and 1e-3 in the authors' code
Project = Callable[[Tensor, int], Tensor]  # the weight (O, I/g, *K) and the rank to P (r, I/g)


def gaussian(weight: Tensor, rank: int) -> Tensor:
    """``P`` as the authors draw it: entries from N(0, 1/r), so a row's norm is about ``√(I/(g·r))`` whatever the weight's."""
    rank = min(rank, weight.shape[1])
    return torch.randn(rank, weight.shape[1]) / math.sqrt(rank)


def balanced(weight: Tensor, rank: int) -> Tensor:
    """A Gaussian ``P`` whose rows all have the norm of :func:`lora_edge.subspaces.weight.kernel_norm`."""
    return scaled_rows(weight, gaussian(weight, rank))


def trained_kernel(project: Project, *, subspace: str = "random", moves: bool = False) -> PrepareList:
    """Return ``prepare`` for a projection: ``ΔW[o,i,k] = Σ_q U[o,q,k] P[q,i]``, ``P (r, I/g)`` frozen, ``U (O, r, *K)`` zero.

    The groups share ``P``. ``r`` is at most ``I/g``, at which the whole layer is trained; in a depthwise layer it is 1. It is
    the library's own layer in the form "kernel", which saves ``P x`` and bits, and has an adapter file.

    Args:
        project: makes ``P`` of a weight ``(O, I/g, *K)`` and a rank.
        subspace: "weight" if ``P`` is made from the weight, else "random".
        moves: first move BatchNorm's statistics to the target's windows.
    """

    def prepare(model: nn.Module, rank: int, inputs: Tensor, labels: Tensor) -> list[nn.Parameter]:
        rank = check_rank(rank)
        model = inner_model(model)
        convs = adaptable(model)
        updates: dict[str, LayerUpdate] = {}
        for group in tied_groups(model, list(convs)):
            weight = convs[group[0]].weight.detach()
            rows = project(weight, rank)
            rows = rows.reshape(*rows.shape, *[1] * (weight.dim() - 2))
            updates.update({name: LayerUpdate(rows, bond_cap=rank, form="kernel") for name in group})
        if moves:
            move_statistics(model, inputs)
        install(model, updates, subspace=subspace)
        return list(trainable_parameters(model))

    return prepare


def trains_projection(prepare: PrepareList) -> Callable[[nn.Module, int, Tensor, Tensor], Training]:
    """Return ``prepare`` for a method that trains ``P`` too, by :func:`second_forward`."""

    def prepare_both(model: nn.Module, rank: int, inputs: Tensor, labels: Tensor) -> Training:
        prepare(model, rank, inputs, labels)
        projections = {id(layer.suffix.requires_grad_(True)) for layer in _layers(model)}

        def two_rates(parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
            own = [p for p in parameters if id(p) in projections]
            rest = [p for p in parameters if id(p) not in projections]
            groups: list[dict[str, Any]] = [{"params": rest}, {"params": own, "lr": PROJECTION_RATE * lr}]
            return torch.optim.Adam(groups, lr=lr)

        return Training(list(trainable_parameters(model)), loss=second_forward, optimizer=two_rates)

    return prepare_both


def second_forward(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The cross-entropy with all its gradients, those of ``P`` by a second forward; neither forward saves a layer's input.

    The second forward repeats the first one's random draws, and the model's buffers move once.
    """
    if not torch.is_grad_enabled():
        return cross_entropy(model, x, y)
    layers = _layers(model)
    gradients: dict[nn.Parameter, Tensor] = {layer.suffix: torch.zeros_like(layer.suffix) for layer in layers}
    others = [p for p in model.parameters() if p.requires_grad and p not in gradients]
    devices = [x.device] if x.device.type == "cuda" else []
    drawn = torch.get_rng_state(), [torch.cuda.get_rng_state(device) for device in devices]
    with recorded() as calls:
        loss = cross_entropy(model, x, y)
    found = torch.autograd.grad(loss, others, allow_unused=True)
    gradients.update((p, torch.zeros_like(p) if g is None else g) for p, g in zip(others, found, strict=True))
    waiting: dict[int, list[Tensor | None]] = {}  # dq of each call that has not been met yet, by the address of its suffix
    for call in calls:
        waiting.setdefault(call.suffix.data_ptr(), []).append(call.dq)

    def meet(layer: LoRAEdgeConv, given: tuple[Tensor, ...]) -> None:
        dq = waiting[layer.suffix.data_ptr()].pop(0)
        if dq is not None:
            seen = given[0] if given[0].dim() == layer.weight.dim() else given[0].unsqueeze(0)
            seen = pad_by_mode(layer, seen).to(dq.dtype)
            gradients[layer.suffix] += projection_grad(dq, seen, layer.suffix, layer.groups)

    buffers = [buffer.clone() for buffer in model.buffers()]
    hooks = [layer.register_forward_pre_hook(meet) for layer in layers]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            torch.set_rng_state(drawn[0])
            for device, state in zip(devices, drawn[1], strict=True):
                torch.cuda.set_rng_state(state, device)
            model(x)
    finally:
        for hook in hooks:
            hook.remove()
    with torch.no_grad():
        for buffer, kept in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(kept)
    return _Given.apply(loss.detach(), list(gradients.values()), *gradients)


class _Given(torch.autograd.Function):
    """A value whose gradients are known."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *parameters: nn.Parameter) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, dvalue: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return None, None, *[dvalue * gradient for gradient in ctx.gradients]


def _layers(model: nn.Module) -> list[LoRAEdgeConv]:
    return [module for module in model.modules() if isinstance(module, LoRAEdgeConv)]


METHODS = [
    Method("memflora", "MemFLoRA", lr=3e-3, prepare=trained_kernel(gaussian), source="arXiv 2610.08669"),
    Method(
        "memflora_sg", "MemFLoRA, projections trained", lr=1e-3, prepare=trains_projection(trained_kernel(gaussian)),
        source="arXiv 2610.08669",
    ),
    Method(
        "memflora_balanced", "MemFLoRA, balanced rows", lr=2e-2, prepare=trained_kernel(balanced, moves=True), turns=True,
        starts_at_base=False, source="arXiv 2610.08669",
    ),
    Method(
        "kernel_core", "trained kernel on the weight's inputs", lr=6e-2,
        prepare=trained_kernel(kernel_suffix, subspace="weight", moves=True), turns=True, starts_at_base=False,
        source="arXiv 2610.08669",
    ),
]  # fmt: skip
