"""Whole-block fusing: ``[pad →] conv → frozen BN → (+ residual) → activation`` runs as one :func:`lora_edge.ops.tt_block`.

A module whose forward is proven pure (:mod:`lora_edge.nn`) is re-classed to a subclass of its own class whose forward runs a
*plan*: the forward's graph with each block replaced by one call. A plan runs only while everything that it was made from is
still the same; otherwise another is made, or the module's own forward runs. Where a forward is not proven pure its children
are fused each by itself, and in an ``nn.Sequential`` the runs of children between those that are not.

A plan runs only where gradients are needed. Without them, under ``torch.compile``, and inside ``lora_edge.disabled`` the
module's own forward runs, bit-identical to the base model's. Plans are no part of the module's state: pickle, deepcopy and
state dict do not see them.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_edge.environment.torch_private import has_any_global_hook
from lora_edge.nn import inference
from lora_edge.nn.frozen_bn import FrozenBatchNorm, FrozenThen
from lora_edge.nn.fuser.evaluator import Evaluator
from lora_edge.nn.fuser.find_blocks import Fuser, is_conv
from lora_edge.nn.fuser.guards import Guards, static
from lora_edge.nn.fuser.items import base_of
from lora_edge.nn.fuser.layout import Layout
from lora_edge.nn.fuser.pure import SCALARS
from lora_edge.nn.fuser.source import asks_for_its_class
from lora_edge.nn.fuser.values import Module, Refused
from lora_edge.nn.layers import LoRAEdgeConv
from lora_edge.nn.lean import LeanConv
from lora_edge.ops.activation import Activation, activate
from lora_edge.ops.conv_args import ConvArgs, conv_args
from lora_edge.ops.padding import pad
from lora_edge.ops.transforms import plain_ops_only
from lora_edge.ops.tt_block import run_block

OVERWRITE_BYTES = 4 << 20  # smaller maps are not worth the copy of each slice
MOST_PLANS = 8  # that a module keeps: for its modes, kinds of arguments and flags
MOST_MADE = 64  # that are ever made for a module: each takes as long as some steps
_CALL = nn.Module.__call__  # where somebody patched it, as torch.fx does while it traces, no plan runs
_lock = threading.RLock()

Kinds = tuple[tuple[Any, ...], tuple[tuple[str, Any], ...]]  # of the arguments and of the keyword arguments


@dataclass
class Plan:
    """How a module's forward runs while its guards hold.

    Attributes:
        forward: called as ``forward(module, *tensors)``.
        guards: what it was made from.
        blocks: name of each fused convolution with what was fused, such as "conv + bn + add + relu".
        reasons: name of each convolution that was not fused with the reason.
        activations: name of each fused convolution with the activation at the block's end.
        layer: one adapted layer, if there is one; it tells whether the model is disabled for the moment.
    """

    forward: Callable[..., Any]
    guards: Guards
    blocks: dict[str, str]
    reasons: dict[str, str]
    activations: dict[str, Activation | None]
    layer: LoRAEdgeConv | None

    def run(self, module: nn.Module, tensors: list[Tensor]) -> Any:
        return self.forward(module, *tensors)


@dataclass
class Pieces:
    """How an ``nn.Sequential`` runs where some of its children are not proven pure: in runs of those that are.

    Attributes:
        pieces: for each run of children its plan, None where they are called one by one, and their names.
        guards: on the children themselves.
    """

    pieces: list[tuple[Plan | None, list[str]]]
    guards: Guards
    layer: LoRAEdgeConv | None

    def run(self, module: nn.Module, tensors: list[Tensor]) -> Any:
        (x,) = tensors
        for plan, names in self.pieces:
            if plan is not None and type(x) is Tensor and plan.guards.hold(module):
                x = plan.run(module, [x])
            else:
                for name in names:
                    x = module._modules[name](x)  # type: ignore[misc]
        return x

    def _join(self, part: str) -> dict[str, Any]:
        return {name: value for plan, _ in self.pieces if plan is not None for name, value in getattr(plan, part).items()}

    @property
    def blocks(self) -> dict[str, str]:
        return self._join("blocks")

    @property
    def reasons(self) -> dict[str, str]:
        return self._join("reasons")

    @property
    def activations(self) -> dict[str, Activation | None]:
        return self._join("activations")


@dataclass
class NoPlan:
    """Why a module's own forward runs, as long as the guards hold."""

    why: str
    guards: Guards


@dataclass
class Fused:
    """What :func:`fuse` did to a model: fused blocks and reasons, by dotted name."""

    blocks: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    activations: dict[str, Activation | None] = field(default_factory=dict)


class LeanModule(nn.Module):
    """Mixin of the re-classed modules: their forward runs a plan where gradients are needed."""

    base_class: type[nn.Module]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Not that of the user's class, which might register each of its subclasses."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        getstate = getattr(self.base_class, "__getstate__", None)
        state = dict(self.__dict__) if getstate is None else getstate(self)
        if isinstance(state, dict):
            state = {key: value for key, value in state.items() if key not in (_PLANS, _PLANS_MADE)}
        return _rebuild, (self.base_class,), state


_PLANS, _PLANS_MADE = "_lean_plans", "_lean_plans_made"


def _forward_of(base_class: type[nn.Module]) -> Callable[..., Any]:
    own_forward = base_class.forward

    @functools.wraps(own_forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _wanted():
            kinds, tensors = kinds_of(args, kwargs)
            if kinds is not None:
                plan = current_plan(self, kinds)
                if not isinstance(plan, NoPlan) and (plan.layer is None or plan.layer.enabled):
                    return plan.run(self, tensors)
        return base_class.forward(self, *args, **kwargs)

    return forward


def fuse(model: nn.Module) -> Fused:
    """Re-class every module of an adapted model that can run a plan; returns what was fused and why the rest was not."""
    found = Fused()
    _fuse(model, "", found, False)
    return found


def unfuse(model: nn.Module) -> None:
    """Undo :func:`fuse`."""
    for module in model.modules():
        if isinstance(module, LeanModule):
            for name in (_PLANS, _PLANS_MADE):
                module.__dict__.pop(name, None)
            module.__class__ = module.base_class  # type: ignore[assignment]


def describe(model: nn.Module) -> Fused:
    """The blocks as they would run now: hooks or layers may have changed since :func:`fuse`."""
    found = Fused()
    _describe(model, "", found)
    return found


def fused_block(
    conv: nn.modules.conv._ConvNd,
    x: Tensor,
    bn: FrozenBatchNorm | None = None,
    residual: Any = None,
    residual_bn: FrozenBatchNorm | None = None,
    activation: Activation | None = None,
    padding: tuple[int, ...] | None = None,
    overwrite: bool = False,
    adds_in_place: bool = False,
) -> Tensor:
    """One block on live modules: as one op where that is exact, else step by step.

    Args:
        conv: an adapted or a stock convolution.
        x: its input.
        bn: the frozen BatchNorm behind it.
        residual: what is added, before its own ``residual_bn``.
        activation: the activation at the end.
        padding: amounts of an ``F.pad`` with zeros in front, last dimension first.
        overwrite: nobody else needs ``x``, so the output may take its place in memory.
        adds_in_place: the addition is ``y += residual``, which keeps the shape and dtype of ``y``.
    """
    weight = conv.weight
    norms = [norm for norm in (bn, residual_bn) if norm is not None]
    if (
        x.dim() != weight.dim()
        or x.dtype != weight.dtype
        or torch.is_autocast_enabled(x.device.type)
        or (isinstance(conv, LoRAEdgeConv) and not conv.enabled)
        or not all(norm.is_lean() and norm.running_var is not None for norm in norms)
        or any(norm.running_var.dtype != weight.dtype for norm in norms)  # type: ignore[union-attr]
    ):
        return _step_by_step(conv, x, bn, residual, residual_bn, activation, padding, adds_in_place)
    args = layer_args(conv, padding)
    if conv.padding_mode != "zeros":
        x = pad(x, conv._reversed_padding_repeated_twice, conv.padding_mode)
    if residual is not None:
        shape = (x.shape[0], weight.shape[0], *args.output_size(x.shape[2:], weight.shape[2:]))
        if not isinstance(residual, Tensor) or residual.shape != shape or residual.dtype != x.dtype:
            return _step_by_step(conv, x, bn, residual, residual_bn, activation, padding, adds_in_place)
    core, suffix, scale, saved_dtype = None, None, 1.0, None
    if isinstance(conv, LoRAEdgeConv):
        core, suffix, scale, saved_dtype = conv.core, conv.frozen_suffix(), conv.scale, conv.saved_dtype
        inference.drop(conv)
    return run_block(
        x, weight, core, suffix, conv.bias, args, scale, None if bn is None else bn.scale_and_shift(), residual,
        None if residual_bn is None else residual_bn.scale_and_shift(), activation, saved_dtype,
        overwrite and conv.padding_mode == "zeros" and x.untyped_storage().nbytes() >= OVERWRITE_BYTES,
        conv.backend if isinstance(conv, (LoRAEdgeConv, LeanConv)) else "auto",
    )  # fmt: skip


def _step_by_step(
    conv: nn.Module,
    x: Tensor,
    bn: nn.Module | None,
    residual: Any,
    residual_bn: nn.Module | None,
    activation: Activation | None,
    padding: tuple[int, ...] | None,
    adds_in_place: bool,
) -> Tensor:
    y = conv(x if padding is None else F.pad(x, padding))
    y = y if bn is None else _normalized(bn, y)
    if residual is not None:
        shortcut = residual if residual_bn is None else _normalized(residual_bn, residual)
        y = y.add_(shortcut) if adds_in_place else y + shortcut
    return y if activation is None else activate(y, activation)


def _normalized(bn: nn.Module, x: Tensor) -> Tensor:
    return bn.normalized(x) if isinstance(bn, FrozenThen) else bn(x)


def layer_args(conv: nn.modules.conv._ConvNd, padding: tuple[int, ...] | None = None) -> ConvArgs:
    """The arguments of a layer's convolution, without its own padding where that is not of zeros, with that of an ``F.pad``."""
    own = 0 if conv.padding_mode != "zeros" else conv.padding if isinstance(conv.padding, str) else tuple(conv.padding)
    return _fixed_args(tuple(conv.stride), own, tuple(conv.dilation), conv.groups, tuple(conv.weight.shape[2:]), padding)


@functools.lru_cache(maxsize=1024)
def _fixed_args(
    stride: tuple[int, ...],
    own: Any,
    dilation: tuple[int, ...],
    groups: int,
    kernel: tuple[int, ...],
    padding: tuple[int, ...] | None,
) -> ConvArgs:
    dims = len(kernel)
    args = conv_args(stride, own, dilation, groups, dims, "tt_block")
    if padding is None:
        return args
    extra = [(padding[2 * k], padding[2 * k + 1]) for k in reversed(range(len(padding) // 2))]
    extra = [(0, 0)] * (dims - len(extra)) + extra
    total = args.total_padding(kernel)
    pairs = tuple((low + more[0], high + more[1]) for (low, high), more in zip(total, extra, strict=True))
    return args._replace(padding=pairs)


def kinds_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Kinds | None, list[Tensor]]:
    """What a plan is made for: each argument a tensor with its dimensions, or its value; None where it is neither."""
    if len(args) == 1 and not kwargs and type(args[0]) is Tensor:
        return ((("tensor", args[0].dim()),), ()), [args[0]]
    tensors: list[Tensor] = []
    kinds = [_kind(value, tensors) for value in args]
    named = [(name, _kind(value, tensors)) for name, value in kwargs.items()]
    if not tensors or None in kinds or any(kind is None for _, kind in named):
        return None, []
    return (tuple(kinds), tuple(named)), tensors


def _kind(value: Any, tensors: list[Tensor]) -> Any:
    if type(value) in (Tensor, nn.Parameter):
        tensors.append(value)
        return "tensor", value.dim()
    if type(value) in SCALARS and type(value) is not float:
        return "known", value, type(value)
    return ("known", value, repr(value)) if type(value) is float else None


def current_plan(module: nn.Module, kinds: Kinds) -> Plan | Pieces | NoPlan:
    """The plan for arguments of these kinds that holds now; it is made where there is none."""
    entries = module.__dict__.get(_PLANS, ())
    for made_for, plan in entries:
        if made_for == kinds and plan.guards.hold(module):
            return plan
    made = module.__dict__.get(_PLANS_MADE, 0)
    if made >= MOST_MADE:
        return NoPlan("what it reads changes too often", Guards(module).fix())
    plan = make_plan(module, kinds)
    with _lock:
        entries = module.__dict__.get(_PLANS, ())
        module.__dict__[_PLANS] = ((kinds, plan), *entries)[:MOST_PLANS]
        module.__dict__[_PLANS_MADE] = made + 1
    return plan


def make_plan(module: nn.Module, kinds: Kinds, training: bool | None = None) -> Plan | Pieces | NoPlan:
    """Evaluate a module's forward and fuse its blocks. Reads the model and changes nothing.

    Args:
        module: an adapted module.
        kinds: of its arguments.
        training: what ``self.training`` is taken to be; None for what it is.
    """
    with Evaluator(module, training) as evaluator:
        try:
            evaluator.run([kind[:2] for kind in kinds[0]], {name: kind[:2] for name, kind in kinds[1]})
        except (Refused, RecursionError) as refusal:
            why = NoPlan(str(refusal), evaluator.guards.fix())
        else:
            return _finish(module, evaluator)
    iterates = static(type(module), "__iter__") is nn.Sequential.__iter__
    if iterates and base_forward(module) is nn.Sequential.forward and len(kinds[0]) == 1 and not kinds[1]:
        return _make_pieces(module, training) or why
    return why


def base_forward(module: nn.Module) -> Any:
    """The forward of a module's own class."""
    return static(getattr(type(module), "base_class", type(module)), "forward")


def _finish(module: nn.Module, evaluator: Evaluator) -> Plan:
    modules = dict(module.named_modules(remove_duplicate=False))
    fuser = Fuser(evaluator.graph, modules, evaluator.guards, fused_block)
    blocks, reasons = fuser.run()
    Layout(evaluator.graph, modules, fused_block).run()
    evaluator.graph.lint()
    code = evaluator.graph.python_code("self")
    scope = {**code.globals, "__name__": __name__}
    exec(code.src, scope)
    layer = next((m for m in module.modules() if isinstance(m, LoRAEdgeConv)), None)
    return Plan(scope["forward"], evaluator.guards.fix(), blocks, reasons, fuser.activations, layer)


def _make_pieces(module: nn.Module, training: bool | None) -> Pieces | None:
    """Runs of a sequence's children that are proven pure; None where no block is found in any."""
    with Evaluator(module, training) as whole:
        children = list(whole.reader.children(Module(module, "")))
        for name in ("forward", "__iter__"):
            whole.guards.class_attribute(base_of(type(module)), name)
        guards = whole.guards.fix()
    runs: list[list[str]] = [[]]
    for name in children:
        if _run_of(module, [name], training) is None:
            runs += [[name], []]
        else:
            runs[-1].append(name)
    pieces = [(_run_of(module, names, training), names) for names in runs if names]
    if not any(plan is not None and plan.blocks for plan, _ in pieces):
        return None
    layer = next((m for m in module.modules() if isinstance(m, LoRAEdgeConv)), None)
    return Pieces(pieces, guards, layer)


def _run_of(module: nn.Module, names: list[str], training: bool | None) -> Plan | None:
    with Evaluator(module, training) as evaluator:
        children = evaluator.reader.children(Module(module, ""))
        try:
            x = evaluator.argument(("tensor", None))
            for name in names:
                x = evaluator.follow(functools.partial(evaluator.calls.enter, children[name], [x], {}))
            evaluator.finish(x)
        except (Refused, RecursionError):
            return None
        return _finish(module, evaluator)


def _wanted() -> bool:
    if not torch.is_grad_enabled():
        return False
    traced = torch.compiler.is_compiling() or plain_ops_only()
    return not traced and nn.Module.__call__ is _CALL and not has_any_global_hook()


def _rebuild(base_class: type[nn.Module]) -> nn.Module:
    return object.__new__(_lean_class(base_class))


def _lean_class(base_class: type[nn.Module]) -> type[LeanModule]:
    """The one subclass of a class whose forward runs plans; nothing else holds it, so it goes with its base."""
    with _lock:
        for cls in type.__subclasses__(base_class):
            if cls.__dict__.get("base_class") is base_class and issubclass(cls, LeanModule):
                return cls
        names = {
            "__module__": base_class.__module__,
            "__qualname__": base_class.__qualname__,
            "base_class": base_class,
            "forward": _forward_of(base_class),
        }
        return type(base_class.__name__, (LeanModule, base_class), names)


def _fuse(module: nn.Module, name: str, found: Fused, covered: bool) -> None:
    """``covered``: a module above has a plan, so this one needs its own only where that does not hold."""
    has_convs = any(is_conv(m) for m in module.modules())
    if not has_convs or is_conv(module) or isinstance(module, LeanModule):
        return
    if asks_for_its_class(type(module)):
        reason = f"{type(module).__name__} asks for its own class, so it keeps that"
        if not covered:
            found.reasons.update({_join(name, n): reason for n, child in module.named_children() if is_conv(child)})
    elif covered:
        module.__class__ = _lean_class(type(module))  # type: ignore[assignment]
    else:
        plan = _likely_plan(module)
        if not isinstance(plan, NoPlan):
            module.__class__ = _lean_class(type(module))  # type: ignore[assignment]
        covered = _report(plan, module, name, found)
    for child_name, child in module.named_children():
        _fuse(child, _join(name, child_name), found, covered)


def _describe(module: nn.Module, name: str, found: Fused) -> None:
    if is_conv(module):
        return
    plan = _likely_plan(module) if isinstance(module, LeanModule) else None
    if plan is None or not _report(plan, module, name, found):
        for child_name, child in module.named_children():
            _describe(child, _join(name, child_name), found)


def _report(plan: Plan | Pieces | NoPlan, module: nn.Module, name: str, found: Fused) -> bool:
    """Write down what a plan fuses; whether it runs all of the module by itself."""
    if isinstance(plan, NoPlan):
        found.reasons.update({_join(name, n): plan.why for n, child in module.named_children() if is_conv(child)})
        return False
    found.blocks.update({_join(name, conv): what for conv, what in plan.blocks.items()})
    found.reasons.update({_join(name, conv): reason for conv, reason in plan.reasons.items()})
    found.activations.update({_join(name, conv): last for conv, last in plan.activations.items()})
    return isinstance(plan, Plan)


def _likely_plan(module: nn.Module) -> Plan | Pieces | NoPlan:
    """The plan of the last run, else one for as many tensors as the forward needs, in training if that has one."""
    for kinds, _ in module.__dict__.get(_PLANS, ())[:1]:
        return current_plan(module, kinds)
    kinds = _likely_kinds(module)
    if kinds is None:
        return NoPlan("its forward has no readable signature", Guards(module).fix())
    plan = make_plan(module, kinds, True)
    if isinstance(plan, NoPlan):
        other = make_plan(module, kinds, False)
        return plan if isinstance(other, NoPlan) else other
    return plan


def _likely_kinds(module: nn.Module) -> Kinds | None:
    try:
        parameters = list(inspect.signature(base_forward(module)).parameters.values())[1:]
    except (TypeError, ValueError):
        return None
    dims = next(m.weight.dim() for m in module.modules() if is_conv(m))  # type: ignore[operator, union-attr]
    needed = [p for p in parameters if p.default is inspect.Parameter.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    takes_any = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    positional = [("tensor", dims) for p in needed if p.kind is not p.KEYWORD_ONLY] or [("tensor", dims)] * takes_any
    named = [(p.name, ("tensor", dims)) for p in needed if p.kind is p.KEYWORD_ONLY]
    return (tuple(positional), tuple(named)) if positional or named else None


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix and name else prefix or name
