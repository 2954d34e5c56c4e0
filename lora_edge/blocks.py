"""Whole-block fusing: ``[pad →] conv → frozen BN → (+ residual) → activation`` runs as one :func:`lora_edge.ops.tt_block`.

A module whose forward traces by ``torch.fx`` is re-classed to a subclass of its own class whose forward runs a *plan*: the
traced code with each block replaced by one call. Where the whole model does not trace its children are tried, one by one; what
does not trace runs as it is. The plan is dropped whenever the modules changed (a hook, a flag, another submodule) and made
anew; it is no part of the module's state, so pickle and deepcopy do not see it.

The plan runs only where gradients are needed. Without them, under ``torch.compile``, and inside ``lora_edge.disabled`` the
module's own forward runs, bit-identical to the base model's.
"""

from __future__ import annotations

import functools
import inspect
import operator
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from lora_edge import inference
from lora_edge.frozen_bn import FrozenBatchNorm
from lora_edge.layers import LoRAEdgeConv
from lora_edge.lean import LeanActivation, LeanConv, LeanLayer
from lora_edge.ops.activation import Activation, activate
from lora_edge.ops.conv_args import ConvArgs, conv_args
from lora_edge.ops.kernels import channels_last_for_the_cpu
from lora_edge.ops.padding import pad
from lora_edge.ops.transforms import plain_ops_only
from lora_edge.ops.tt_block import run_block

_ADD = {operator.add, operator.iadd, torch.add, "add", "add_"}
_FUNCTIONAL: dict[Any, str] = {
    F.relu: "relu", torch.relu: "relu", "relu": "relu", F.relu_: "relu", torch.relu_: "relu", "relu_": "relu",
    F.relu6: "relu6", F.hardtanh: "hardtanh", F.leaky_relu: "leaky_relu", F.hardsigmoid: "hardsigmoid",
}  # fmt: skip
OVERWRITE_BYTES = 4 << 20  # smaller maps are not worth the copy of each slice
_SCALARS = (bool, int, float, str, type(None))


@dataclass
class Plan:
    """How a module's forward runs.

    Attributes:
        forward: the traced code, called as ``forward(module, x)``.
        blocks: name of each fused convolution with what was fused, such as "conv + bn + add + relu".
        reasons: name of each convolution that was not fused with the reason.
        activations: name of each fused convolution with the activation at the block's end.
        layer: one adapted layer, if there is one; it tells whether the model is disabled for the moment.
    """

    forward: Callable[[nn.Module, Tensor], Tensor]
    blocks: dict[str, str]
    reasons: dict[str, str]
    activations: dict[str, Activation | None]
    layer: LoRAEdgeConv | None


@dataclass
class Fused:
    """What :func:`fuse` did to a model: fused blocks and reasons, by dotted name."""

    blocks: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    activations: dict[str, Activation | None] = field(default_factory=dict)


class LeanModule(nn.Module):
    """Mixin of the re-classed modules: their forward runs the plan where gradients are needed."""

    base_class: type[nn.Module]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and _wanted():
            plan = _current_plan(self)
            if plan is not None:
                return plan.forward(self, channels_last_for_the_cpu(args[0]))
        return self.base_class.forward(self, *args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        getstate = getattr(self.base_class, "__getstate__", None)
        state = dict(self.__dict__) if getstate is None else getstate(self)
        if isinstance(state, dict):
            state = {key: value for key, value in state.items() if key != "_lean_plan"}
        return _rebuild, (self.base_class,), state


_lean_classes: dict[type[nn.Module], type[LeanModule]] = {}


def fuse(model: nn.Module) -> Fused:
    """Re-class every module of an adapted model that can run a plan; returns what was fused and why the rest was not."""
    found = Fused()
    _fuse(model, "", found)
    return found


def unfuse(model: nn.Module) -> None:
    """Undo :func:`fuse`."""
    for module in model.modules():
        if isinstance(module, LeanModule):
            module.__dict__.pop("_lean_plan", None)
            module.__class__ = module.base_class  # type: ignore[assignment]


def fused_block(
    conv: nn.modules.conv._ConvNd,
    x: Tensor,
    bn: FrozenBatchNorm | None = None,
    residual: Any = None,
    residual_bn: FrozenBatchNorm | None = None,
    activation: Activation | None = None,
    padding: tuple[int, ...] | None = None,
    overwrite: bool = False,
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
    """
    weight = conv.weight
    norms = [norm for norm in (bn, residual_bn) if norm is not None]
    if (
        x.dim() != weight.dim()
        or x.dtype != weight.dtype
        or torch.is_autocast_enabled(x.device.type)
        or not all(norm.is_lean() and norm.running_var is not None for norm in norms)
        or any(norm.running_var.dtype != weight.dtype for norm in norms)  # type: ignore[union-attr]
    ):
        return _step_by_step(conv, x, bn, residual, residual_bn, activation, padding)
    args = layer_args(conv, padding)
    if conv.padding_mode != "zeros":
        x = pad(x, conv._reversed_padding_repeated_twice, conv.padding_mode)
    if residual is not None:
        shape = (x.shape[0], weight.shape[0], *args.output_size(x.shape[2:], weight.shape[2:]))
        if not isinstance(residual, Tensor) or residual.shape != shape or residual.dtype != x.dtype:
            return _step_by_step(conv, x, bn, residual, residual_bn, activation, padding)
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
) -> Tensor:
    y = conv(x if padding is None else F.pad(x, padding))
    y = y if bn is None else bn(y)
    if residual is not None:
        y = y + (residual if residual_bn is None else residual_bn(residual))
    return y if activation is None else activate(y, activation)


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


def _wanted() -> bool:
    if not torch.is_grad_enabled():
        return False
    traced = torch.compiler.is_compiling() or plain_ops_only()
    return not traced and not nn.modules.module._has_any_global_hook()


def _rebuild(base_class: type[nn.Module]) -> nn.Module:
    return object.__new__(_lean_class(base_class))


def _lean_class(base_class: type[nn.Module]) -> type[LeanModule]:
    if base_class not in _lean_classes:
        names = {"__module__": base_class.__module__, "__qualname__": base_class.__qualname__, "base_class": base_class}
        _lean_classes[base_class] = type(base_class.__name__, (LeanModule, base_class), names)
    return _lean_classes[base_class]


def _fuse(module: nn.Module, name: str, found: Fused) -> None:
    has_convs = any(_is_conv(m) for m in module.modules())
    if not has_convs or _is_conv(module) or isinstance(module, LeanModule):
        return
    plan, why = _make_plan(module)
    if plan is not None:
        module.__class__ = _lean_class(type(module))  # type: ignore[assignment]
        module.__dict__["_lean_plan"] = (_signature(module), plan, None)
        found.blocks.update({_join(name, conv): what for conv, what in plan.blocks.items()})
        found.reasons.update({_join(name, conv): reason for conv, reason in plan.reasons.items()})
        return
    for child_name, child in module.named_children():
        if _is_conv(child):
            found.reasons[_join(name, child_name)] = why
        _fuse(child, _join(name, child_name), found)


def describe(model: nn.Module) -> Fused:
    """The blocks as they would run now: hooks or layers may have changed since :func:`fuse`."""
    found = Fused()
    for name, module in model.named_modules():
        if isinstance(module, LeanModule) and (plan := _current_plan(module)) is not None:
            found.blocks.update({_join(name, conv): what for conv, what in plan.blocks.items()})
            found.reasons.update({_join(name, conv): reason for conv, reason in plan.reasons.items()})
            found.activations.update({_join(name, conv): last for conv, last in plan.activations.items()})
    return found


def _current_plan(module: LeanModule) -> Plan | None:
    """The module's plan, made anew if the module changed; None where it has none or is disabled."""
    made_for, plan, seen = module.__dict__.get("_lean_plan", (None, None, None))
    if seen is None or not seen.again(module):
        signature = _signature(module)
        if made_for != signature:
            plan, _ = _make_plan(module)
        module.__dict__["_lean_plan"] = (signature, plan, _Seen(module))
    is_disabled = plan is not None and plan.layer is not None and not plan.layer.enabled
    return None if is_disabled else plan


def _signature(module: nn.Module) -> tuple[Any, ...]:
    """Everything that the traced code may depend on: the modules, their hooks and their plain attributes."""
    signature: list[Any] = []
    for m in module.modules():
        signature += (id(m), m.base_class if isinstance(m, LeanModule) else type(m), _has_hooks(m))
        if not isinstance(m, (LoRAEdgeConv, FrozenBatchNorm)):  # theirs are read when the block runs
            signature += [value for value in m.__dict__.values() if isinstance(value, _SCALARS)]
    return tuple(signature)


class _Seen:
    """The modules as they were seen last: what is the same object still needs no new :func:`_signature`, which takes longer.

    It holds no reference to the root itself, so that a model still goes where its last reference goes.
    """

    def __init__(self, root: nn.Module) -> None:
        modules = list(root.modules())
        self.below = modules[1:]
        self.children = [m._modules for m in modules]
        self.hooks = [
            hooks
            for m in modules
            for hooks in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks)
        ]
        self.types, self.hooked = [*map(type, modules)], [*map(bool, self.hooks)]
        self.sizes = [*map(len, self.attributes(root))]
        self.values = [*chain.from_iterable(map(dict.values, self.attributes(root)))]

    def attributes(self, root: nn.Module) -> list[dict[str, Any]]:
        """Every module's attributes and its submodules; the root's without its plan."""
        own = {name: value for name, value in vars(root).items() if name != "_lean_plan"}
        return [own, *map(vars, self.below), *self.children]

    def again(self, root: nn.Module) -> bool:
        """Whether all types, attributes and submodules are the same objects and no hook came or went."""
        attributes = self.attributes(root)
        return (
            [type(root), *map(type, self.below)] == self.types
            and [*map(bool, self.hooks)] == self.hooked
            and [*map(len, attributes)] == self.sizes
            and all(map(operator.is_, chain.from_iterable(map(dict.values, attributes)), self.values))
        )


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


def _is_conv(module: nn.Module) -> bool:
    return isinstance(module, (LoRAEdgeConv, LeanConv))


class _Tracer(fx.Tracer):
    """Stops at torch's own layers, at this library's, and at every module with a hook, whose call must stay a call."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        ours = isinstance(m, (LoRAEdgeConv, FrozenBatchNorm, LeanLayer, LeanModule))
        return ours or _has_hooks(m) or super().is_leaf_module(m, module_qualified_name)


def _make_plan(module: nn.Module) -> tuple[Plan | None, str]:
    """Trace a module and fuse its blocks; None and the reason where that is not possible or not safe."""
    lean_class = type(module)
    base_class = module.base_class if isinstance(module, LeanModule) else type(module)
    try:
        parameters = list(inspect.signature(base_class.forward).parameters.values())[1:]
    except (TypeError, ValueError):
        return None, "its forward has no readable signature"
    if not parameters or parameters[0].kind not in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD):
        return None, "its forward does not take one tensor"
    if any(p.default is inspect.Parameter.empty for p in parameters[1:]):
        return None, "its forward takes more than one input"
    attributes = [(m, dict(m.__dict__)) for m in module.modules()]
    random_state = (torch.get_rng_state(), random.getstate())
    module.__class__ = base_class  # type: ignore[assignment]
    try:
        graph = _Tracer().trace(module, {p.name: p.default for p in parameters[1:]} or None)
    except Exception as error:  # whatever the user's forward does with a proxy
        return None, f"it does not trace: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    finally:
        module.__class__ = lean_class  # type: ignore[assignment]
        wrote = _restore(attributes)
    if wrote:
        return None, "its forward writes attributes or makes constants, so it is run as it is"
    if not torch.equal(random_state[0], torch.get_rng_state()) or random_state[1] != random.getstate():
        torch.set_rng_state(random_state[0])
        random.setstate(random_state[1])
        return None, "its forward draws random numbers outside of layers, so it is run as it is"
    modules = dict(module.named_modules(remove_duplicate=False))
    fuser = _Fuser(graph, modules)
    blocks, reasons = fuser.run()
    code = graph.python_code("self")
    scope = dict(code.globals)
    exec(code.src, scope)
    layer = next((m for m in module.modules() if isinstance(m, LoRAEdgeConv)), None)
    return Plan(scope["forward"], blocks, reasons, fuser.activations, layer), ""


def _restore(attributes: list[tuple[nn.Module, dict[str, Any]]]) -> bool:
    """Put back what tracing wrote on modules; True if it wrote anything."""
    wrote = False
    for module, before in attributes:
        now = module.__dict__
        if now.keys() != before.keys() or any(now[key] is not value for key, value in before.items()):
            wrote = True
            now.clear()
            now.update(before)
    return wrote


class _Fuser:
    """Finds the blocks of a traced graph and replaces each by one call of :func:`fused_block`."""

    def called(self, node: fx.Node) -> Any:
        """The module that a node calls, None if it calls none."""
        return self.modules[str(node.target)] if node.op == "call_module" else None

    def __init__(self, graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
        self.graph, self.modules = graph, modules
        self.order = {node: k for k, node in enumerate(graph.nodes)}
        self.claimed: set[fx.Node] = set()
        self.activations: dict[str, Activation | None] = {}

    def run(self) -> tuple[dict[str, str], dict[str, str]]:
        blocks: dict[str, str] = {}
        reasons: dict[str, str] = {}
        convs = [n for n in self.graph.nodes if n.op == "call_module" and _is_conv(self.called(n))]
        for node in reversed(convs):  # of two branches that meet in an addition the later one takes it
            what, why = self.fuse(node)
            if what:
                blocks[node.target] = what
            else:
                reasons[node.target] = why
        self.mark_private_inputs()
        for node in list(self.graph.nodes):
            self.make_functional_activation_lean(node)
        self.graph.lint()
        return dict(reversed(blocks.items())), dict(reversed(reasons.items()))

    def fuse(self, node: fx.Node) -> tuple[str, str]:
        """Fuse the block that begins with a convolution; what was fused, or why not."""
        conv = self.called(node)
        if _has_hooks(conv):
            return "", "the convolution has a hook"
        chain, what = [node], ["conv"]
        call: dict[str, Any] = {}
        source = node.args[0]
        if node.kwargs or len(node.args) != 1 or not isinstance(source, fx.Node):
            return "", "the convolution is not called with one tensor"
        amounts = self.zero_pad(source, conv)
        if amounts is not None:
            call["padding"] = amounts
            what.insert(0, "pad")
        tail = node
        norm = self.next(tail)
        if norm is not None and (bn := self.frozen_bn(norm)):
            call["bn"] = bn
            chain.append(norm)
            what.append("bn")
            tail = norm
        add = self.next(tail)
        if add is not None and (other := self.other_operand(add, tail)) is not None:
            call["residual"], call["residual_bn"], branch = other
            chain += [add, *branch]
            what.append("bn of the shortcut + add" if branch else "add")
            tail = add
        last = self.next(tail)
        if last is not None and (activation := self.activation(last)):
            call["activation"] = activation
            chain.append(last)
            what.append(activation.name)
            tail = last
        if len(what) == 1 and not isinstance(conv, LoRAEdgeConv):
            return "", "nothing behind it can be fused" + self.why_next(tail)
        if self.written_between(node, tail, chain):
            return "", "something is written in place between its parts"
        inner = source.args[0] if amounts is not None else source
        assert isinstance(inner, fx.Node)
        if amounts is not None:
            chain.append(source)
        self.claimed.update(chain)
        self.activations[str(node.target)] = call.get("activation")
        self.replace(chain, inner, call)
        return " + ".join(what), ""

    def next(self, node: fx.Node) -> fx.Node | None:
        """The only user of a node, None if it has several or it belongs to another block."""
        users = list(node.users)
        return users[0] if len(users) == 1 and users[0] not in self.claimed else None

    def why_next(self, node: fx.Node) -> str:
        users = list(node.users)
        if len(users) != 1:
            return f": its output has {len(users)} users"
        user = users[0]
        if user.op == "call_module" and _has_hooks(self.called(user)):
            return f": {user.target} has a hook"
        return f": {user.target} follows"

    def frozen_bn(self, node: fx.Node) -> str | None:
        """Name of the lean frozen BatchNorm that a node calls."""
        bn = self.called(node)
        return str(node.target) if isinstance(bn, FrozenBatchNorm) and bn.is_lean() and not _has_hooks(bn) else None

    def other_operand(self, add: fx.Node, mine: fx.Node) -> tuple[fx.Node, str | None, list[fx.Node]] | None:
        """The residual of an addition, the BatchNorm on it, and the nodes of that branch that the block takes in."""
        if add.op not in ("call_function", "call_method") or add.target not in _ADD or len(add.args) != 2 or add.kwargs:
            return None
        left, right = add.args
        other = right if left is mine else left
        if not isinstance(other, fx.Node) or other is mine:
            return None
        in_place = add.target in (operator.iadd, "add_")
        if in_place and left is not mine and len(other.users) != 1:
            return None
        bn = self.frozen_bn(other)
        if bn is not None and len(other.users) == 1 and other not in self.claimed and isinstance(other.args[0], fx.Node):
            return other.args[0], bn, [other]
        return other, None, []

    def activation(self, node: fx.Node) -> Activation | None:
        """The lean activation that a node applies."""
        if node.op == "call_module":
            module = self.called(node)
            return module.activation() if isinstance(module, LeanActivation) and not _has_hooks(module) else None
        if node.op not in ("call_function", "call_method") or node.target not in _FUNCTIONAL:
            return None
        kind = _FUNCTIONAL[node.target]
        numbers = {k: v for k, v in node.kwargs.items() if k not in ("inplace", "input")}
        order = {"hardtanh": (("min_val", -1.0), ("max_val", 1.0)), "leaky_relu": (("negative_slope", 0.01),)}.get(kind, ())
        values = []
        for k, (name, default) in enumerate(order):
            values.append(node.args[1 + k] if len(node.args) > 1 + k else numbers.pop(name, default))
        if numbers or not all(isinstance(v, (int, float)) for v in values):
            return None
        return Activation(kind, tuple(float(v) for v in values))  # type: ignore[arg-type]

    def zero_pad(self, node: fx.Node, conv: Any) -> tuple[int, ...] | None:
        """Amounts of a zero padding that only this convolution uses and whose taps the kernel can take in."""
        if len(node.users) != 1 or node in self.claimed or conv.padding_mode != "zeros":
            return None
        amounts: Any = None
        if node.op == "call_function" and node.target is F.pad and len(node.args) >= 2:
            rest = {
                "mode": "constant",
                "value": None,
                **dict(zip(("mode", "value"), node.args[2:], strict=False)),
                **node.kwargs,
            }
            if rest["mode"] == "constant" and not rest["value"]:
                amounts = node.args[1]
        elif node.op == "call_module":
            layer = self.called(node)
            constant = isinstance(layer, (nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)) and layer.value == 0
            amounts = layer.padding if constant and not _has_hooks(layer) else None
        if not isinstance(amounts, (tuple, list)) or not all(isinstance(a, int) and a >= 0 for a in amounts):
            return None
        dims = conv.weight.dim() - 2
        if len(amounts) % 2 or len(amounts) // 2 > dims:
            return None
        uneven = [amounts[2 * k + 1] - amounts[2 * k] for k in range(len(amounts) // 2)]
        dilation = [conv.dilation[dims - 1 - k] for k in range(len(uneven))]
        own_is_even = not isinstance(conv.padding, str)
        return tuple(amounts) if own_is_even and all(u % d == 0 for u, d in zip(uneven, dilation, strict=True)) else None

    def written_between(self, first: fx.Node, last: fx.Node, chain: list[fx.Node]) -> bool:
        """Whether a node outside the block writes in place while the block would be delayed to its last node."""
        return any(
            self.order[first] < self.order.get(node, -1) < self.order[last] and node not in chain and node not in self.claimed
            for node in self.graph.nodes
            if self.writes(node)
        )

    def writes(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return bool(getattr(self.called(node), "inplace", False))
        if node.op == "call_method":
            return str(node.target).endswith("_") and not str(node.target).endswith("__")
        name = getattr(node.target, "__name__", "")
        in_place_name = name.endswith("_") or node.target in (operator.iadd, operator.isub, operator.imul, operator.setitem)
        return node.op == "call_function" and (in_place_name or bool(node.kwargs.get("inplace")))

    def replace(self, chain: list[fx.Node], x: fx.Node, call: dict[str, Any]) -> None:
        """Put one call in the place of the chain's last node and erase the chain."""
        chain = sorted(chain, key=self.order.__getitem__)
        conv = next(n for n in chain if n.op == "call_module" and _is_conv(self.called(n)))
        with self.graph.inserting_before(chain[-1]):
            modules = {k: self.graph.get_attr(call[k]) for k in ("bn", "residual_bn") if call.get(k)}
            kwargs = {k: v for k, v in {**call, **modules}.items() if v is not None}
            block = self.graph.call_function(fused_block, (self.graph.get_attr(str(conv.target)), x), kwargs)
        chain[-1].replace_all_uses_with(block)
        self.order[block] = self.order[chain[-1]]
        self.claimed.add(block)
        for node in reversed(chain):
            self.graph.erase_node(node)

    def mark_private_inputs(self) -> None:
        """A block's input that another block made and that nobody else uses may be overwritten."""
        for node in self.graph.nodes:
            if node.target is fused_block and node.op == "call_function":
                x = node.args[1]
                if x.op == "call_function" and x.target is fused_block and len(x.users) == 1:
                    node.kwargs = {**node.kwargs, "overwrite": True}

    def make_functional_activation_lean(self, node: fx.Node) -> None:
        if node.op == "call_module" or node in self.claimed or (activation := self.activation(node)) is None:
            return
        with self.graph.inserting_before(node):
            lean = self.graph.call_function(activate, (node.args[0], activation, self.writes(node)))
        node.replace_all_uses_with(lean)
        self.graph.erase_node(node)


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix and name else prefix or name
