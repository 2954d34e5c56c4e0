"""``summary``: what ``adapt`` did to a model, one row per layer."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lora_edge.nn.blocks import describe
from lora_edge.nn.layers import LoRAEdgeConv
from lora_edge.nn.reparametrised import added_tensors
from lora_edge.nn.training_flags import in_evaluation
from lora_edge.ops import dispatch
from lora_edge.ops.activation import Activation
from lora_edge.ops.backends import AVAILABLE, NAMES, requested, state
from lora_edge.ops.block_tensors import BlockTensors
from lora_edge.ops.conv_args import ConvArgs, conv_args
from lora_edge.ops.engines import registry as engines
from lora_edge.ops.plan import Epilogue
from lora_edge.ops.route import choose_route, saved_channels_positions
from lora_edge.surgery.adapted import Adapted, require_adapted, unwrap
from lora_edge.surgery.base_state import join, thawed_norms
from lora_edge.surgery.idle_cores import idle_cores
from lora_edge.tt import is_kernel


@dataclass(frozen=True)
class LayerSummary:
    """One adapted convolution. ``route`` and ``saved_bytes`` (of ``h`` or ``x``) are None if no example input was given.

    ``backend`` is what a training step runs on, with the reason in brackets where the engine does not support the call; None
    where that depends on the input and no example was given.

    ``block`` is what runs as one op with it, such as "conv + bn + relu", or in brackets the reason why nothing does.
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

    ``parameters`` counts the base model's parameters, ``trainable`` those that the optimizer trains, ``saved_bytes`` what the
    adapted convolutions save for backward on the example input. ``heads`` are the classifiers that train beside the cores.
    ``notes`` warn of layers that do not do what is expected: a core that did not learn, a BatchNorm that is no longer frozen.
    All names are those in the model that :func:`summary` was given.
    """

    layers: list[LayerSummary]
    left_alone: dict[str, str]
    parameters: int
    trainable: int
    saved_bytes: int | None
    heads: list[str] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)

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
        lines += [f"trained head: {name}" for name in self.heads]
        return "\n".join(lines + [f"{name}: {why}" for name, why in [*self.left_alone.items(), *self.notes.items()]])


def summary(model: nn.Module, example: Tensor | None = None) -> Summary:
    """Summarise an adapted model, per layer and in total: parameters, and on an example the route and the saved bytes.

    Args:
        model: an adapted model, or a module that holds one or several; the totals are those of the whole module.
        example: an input ``(N, C, *L)``. It runs once, without gradients and in evaluation mode, to find each layer's input
            size; the route depends on the sizes, the bytes also on the batch size.

    Returns:
        A :class:`Summary`; ``print`` shows it as a table.

    Raises:
        RuntimeError: nothing in the model is adapted.
    """
    found = require_adapted(model)
    model = unwrap(model)
    layers = {join(one.name, name): layer for one in found for name, layer in one.layers.items()}
    inputs = {} if example is None else _inputs(model, layers, example)
    rows: list[LayerSummary] = []
    left_alone: dict[str, str] = {}
    notes: dict[str, str] = {}
    for one in found:
        now = describe(one.model)
        reasons = {**({} if one.state is None else one.state.not_fused), **now.reasons}
        blocks = {**{name: f"({why})" for name, why in reasons.items()}, **now.blocks}
        for name, layer in one.layers.items():
            full = join(one.name, name)
            rows.append(_row(full, layer, inputs.get(full, []), now.activations.get(name), blocks.get(name, "")))
        if one.state is not None:
            left_alone.update({join(one.name, name): why for name, why in one.state.left_alone.items()})
        notes.update(_notes(one))
    added = {id(p): p.numel() for layer in layers.values() for p in (layer.core, layer.suffix)}
    added.update({id(t): t.numel() for _, t in added_tensors(model) if isinstance(t, nn.Parameter)})
    return Summary(
        layers=rows,
        left_alone=left_alone,
        parameters=sum(p.numel() for p in model.parameters()) - sum(added.values()),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        saved_bytes=None if example is None else sum(row.saved_bytes or 0 for row in rows),
        heads=[join(one.name, one.state.head) for one in found if one.state is not None and one.state.head is not None],
        notes=notes,
    )


def _notes(one: Adapted) -> dict[str, str]:
    notes = {
        join(one.name, name): "its core got no gradient in training and did not learn; exclude it" for name in idle_cores(one)
    }
    if one.state is not None:
        for name, kind in thawed_norms(one.model, one.state).items():
            notes[join(one.name, name)] = f"was a frozen BatchNorm at adapt and is a {kind} now; convert the model before adapt"
    return notes


def _inputs(model: nn.Module, layers: dict[str, LoRAEdgeConv], example: Tensor) -> dict[str, list[Tensor]]:
    """Return a shape-only (meta) copy of each input of each layer."""
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
        kernel = is_kernel(layer.core)
        route = choose_route(weight.shape, layer.rank, args, size, itemsize / x.element_size(), kernel)
        samples = x.shape[0] if x.dim() == weight.dim() else 1
        routes.append(route)
        batched = x.new_empty(samples, x.shape[-dims - 1], *size, device="meta")
        epilogue = Epilogue(layer.scale, activation, layer.saved_dtype)
        runs_on.append(_backend(layer, batched, args, epilogue))
        elements = samples * saved_channels_positions(weight.shape, layer.rank, args, size, route, kernel)
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
    """What a layer's op runs on, by the rule of :mod:`lora_edge.ops.backends`; None where it depends on a missing input."""
    wanted, source = requested(layer.backend)
    works = state(wanted) if wanted in NAMES else "unknown"
    if works != AVAILABLE:
        return f"none ({wanted}{source} is {works})"
    device = layer.weight.device
    name = engines.chosen(wanted, device)
    if name == engines.TORCH:
        why = None if wanted == name or device.type == "cpu" else engines.reason(engines.ENGINES[0], device)
        return name if why is None else f"{name} ({why})"
    why = engines.reason(name, device)
    if why is None:
        if x is None or args is None or epilogue is None:
            return None
        tensors = BlockTensors(x, layer.weight, layer.core, None, None, dispatch.factors_of(layer.suffix))
        why = dispatch.refusal(name, tensors, args, epilogue)
    if why is None:
        return name
    return f"torch ({why})" if wanted == "auto" else f"none ({name} does not support it: {why})"
