"""``summary``: what ``adapt`` made of a model, a row a layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_edge.adapt import require_adapted
from lora_edge.blocks import describe
from lora_edge.layers import LoRAEdgeConv
from lora_edge.ops import engines, kernels
from lora_edge.ops.activation import Activation
from lora_edge.ops.backends import AVAILABLE, NAMES, requested, state
from lora_edge.ops.conv_args import ConvArgs, conv_args
from lora_edge.ops.plan import Epilogue
from lora_edge.ops.route import choose_route, saved_channels_positions
from lora_edge.reparametrised import reparametrised_layers
from lora_edge.training_flags import in_evaluation


@dataclass(frozen=True)
class LayerSummary:
    """One adapted convolution. ``route`` and ``saved_bytes`` (``h`` or ``x``) are None where no example input was given.

    ``backend`` is what a training step runs on, with the reason in brackets where a CUDA device's kernels do not take the call;
    None where that depends on the input and no example was given.

    ``block`` is what runs as one op with it, such as "conv + bn + relu"; the reason in brackets where nothing does.
    """

    name: str
    kind: str
    weight_shape: tuple[int, ...]
    rank: int
    parameters: int
    trainable: int
    route: str | None
    saved_bytes: int | None
    backend: str | None
    block: str


@dataclass(frozen=True)
class Summary:
    """Rows for the adapted layers, what was left alone and why, and the totals of the whole model.

    ``parameters`` counts the base model's, ``trainable`` what the optimizer trains, ``saved_bytes`` what the adapted
    convolutions save for backward on the example input.
    """

    layers: list[LayerSummary]
    left_alone: dict[str, str]
    parameters: int
    trainable: int
    saved_bytes: int | None

    def __str__(self) -> str:
        head = ("layer", "kind", "weight", "rank", "parameters", "trainable", "route", "saved bytes", "backend", "block")
        rows = [
            (r.name, r.kind, "x".join(map(str, r.weight_shape)), str(r.rank), f"{r.parameters:,}", f"{r.trainable:,}",
             r.route or "-", "-" if r.saved_bytes is None else f"{r.saved_bytes:,}",
             r.backend or "-", r.block)
            for r in self.layers
        ]  # fmt: skip
        share = 100 * self.trainable / self.parameters if self.parameters else 0.0
        saved = "-" if self.saved_bytes is None else f"{self.saved_bytes:,}"
        rows.append(("total", "", "", "", f"{self.parameters:,}", f"{self.trainable:,} ({share:.2f} %)", "", saved, "", ""))
        widths = [max(len(row[k]) for row in [head, *rows]) for k in range(len(head))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in [head, *rows]]
        return "\n".join(lines + [f"{name}: {why}" for name, why in self.left_alone.items()])


def summary(model: nn.Module, example: Tensor | None = None) -> Summary:
    """Per adapted layer and in total: parameters, trainable parameters, and on an example the route and the saved bytes.

    Args:
        model: an adapted model.
        example: an input ``(N, C, *L)``. It runs once, without gradients and in evaluation mode, to learn each layer's input
            size; the route depends on the sizes, the bytes on the batch as well.

    Returns:
        A :class:`Summary`; ``print`` shows it as a table.

    Raises:
        RuntimeError: the model is not adapted.
    """
    model, state, layers = require_adapted(model)
    inputs = {} if example is None else _inputs(model, layers, example)
    now = describe(model)
    reasons = {**({} if state is None else state.not_fused), **now.reasons}
    blocks = {**{name: f"({why})" for name, why in reasons.items()}, **now.blocks}
    rows = [
        _row(name, layer, inputs.get(name, []), now.activations.get(name), blocks.get(name, ""))
        for name, layer in layers.items()
    ]
    added = sum(layer.core.numel() + layer.suffix.numel() for layer in layers.values())
    added += sum(p.numel() for kind in reparametrised_layers(model).values() for p in kind.parameters())
    return Summary(
        layers=rows,
        left_alone={} if state is None else dict(state.left_alone),
        parameters=sum(p.numel() for p in model.parameters()) - added,
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        saved_bytes=None if example is None else sum(row.saved_bytes or 0 for row in rows),
    )


def _inputs(model: nn.Module, layers: dict[str, LoRAEdgeConv], example: Tensor) -> dict[str, list[Tensor]]:
    """A shape-only (meta) copy of every input each layer saw."""
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}
    handles = [
        layer.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0].to("meta")))
        for name, layer in layers.items()
    ]
    try:
        with torch.no_grad(), in_evaluation(model):
            model(example)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _row(name: str, layer: LoRAEdgeConv, inputs: list[Tensor], activation: Activation | None, block: str) -> LayerSummary:
    weight = layer.weight
    routes: list[str] = []
    runs_on = [] if inputs else [_backend(layer, None, None, None)]
    saved = 0
    for x in inputs:
        dims = weight.dim() - 2
        size = list(x.shape[-dims:])
        padding: int | str | tuple[int, ...] = layer.padding  # type: ignore[assignment]
        if layer.padding_mode != "zeros":
            grow = layer._reversed_padding_repeated_twice
            size = [n + grow[2 * (dims - 1 - k)] + grow[2 * (dims - 1 - k) + 1] for k, n in enumerate(size)]
            padding = 0
        args = conv_args(layer.stride, padding, layer.dilation, layer.groups, dims, "summary")
        itemsize = (layer.saved_dtype or x.dtype).itemsize
        route = choose_route(weight.shape, layer.rank, args, size, itemsize / x.element_size())
        samples = x.shape[0] if x.dim() == weight.dim() else 1
        routes.append(route)
        batched = x.new_empty(samples, x.shape[-dims - 1], *size, device="meta")
        epilogue = Epilogue(layer.scale, activation, layer.saved_dtype)
        runs_on.append(_backend(layer, batched, args, epilogue))
        elements = samples * saved_channels_positions(weight.shape, layer.rank, args, size, route)
        saved += elements * (itemsize if route == "factor" else x.element_size())
    return LayerSummary(
        name=name,
        kind=type(layer).__name__,
        weight_shape=tuple(weight.shape),
        rank=layer.rank,
        parameters=weight.numel() + (0 if layer.bias is None else layer.bias.numel()),
        trainable=sum(p.numel() for p in layer.parameters() if p.requires_grad),
        route="/".join(dict.fromkeys(routes)) or None,
        saved_bytes=saved if inputs else None,
        backend="/".join(dict.fromkeys(on for on in runs_on if on)) or None,
        block=block,
    )


def _backend(layer: LoRAEdgeConv, x: Tensor | None, args: ConvArgs | None, epilogue: Epilogue | None) -> str | None:
    """What a layer's op runs on, by the rule of :mod:`lora_edge.ops.backends`; None where an input would decide and none is."""
    wanted, source = requested(layer.backend)
    works = state(wanted) if wanted in NAMES else "unknown"
    if works != AVAILABLE:
        return f"none ({wanted}{source} is {works})"
    if wanted == "torch":
        return "torch"
    device = layer.weight.device
    name = engines.chosen(wanted, device)
    why = engines.reason(name, device)
    if wanted == "auto" and why and device.type == "cpu":
        return "torch"
    if why is None:
        if x is None or args is None or epilogue is None:
            return None
        why = kernels.refusal(name, x, layer.weight, layer.core, layer.suffix, args, epilogue)
    if why is None:
        return name
    return f"torch ({why})" if wanted == "auto" else f"none ({name} does not take it: {why})"
