"""Find the blocks ``[pad →] conv → frozen BN → (+ residual) → activation`` in a forward's graph; replace each by one call."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from lora_edge.nn.frozen_bn import FrozenBatchNorm
from lora_edge.nn.fuser import pure
from lora_edge.nn.fuser.calls import normalized
from lora_edge.nn.fuser.guards import Guards
from lora_edge.nn.layers import LoRAEdgeConv
from lora_edge.nn.lean import LeanActivation, LeanConv
from lora_edge.ops.activation import Activation, activate, apply

_ADD = {operator.add, operator.iadd, torch.add, "add", "add_"}
_FUNCTIONAL: dict[Any, str] = {
    F.relu: "relu", torch.relu: "relu", "relu": "relu", F.relu_: "relu", torch.relu_: "relu", "relu_": "relu",
    F.relu6: "relu6", F.hardtanh: "hardtanh", F.leaky_relu: "leaky_relu", F.hardsigmoid: "hardsigmoid",
}  # fmt: skip

_OUTSIDE = "outside"
_MAKE_NEW = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm)  # their result has its own memory


def activate_(x: Tensor, activation: Activation) -> Tensor:
    """Apply :func:`activate` in place; on a view torch's own function, because autograd rejects a custom in-place one there."""
    return apply(x, activation, True) if x._is_view() else activate(x, activation, True)


def is_conv(module: nn.Module | None) -> bool:
    """Whether a block may start with this module."""
    return isinstance(module, (LoRAEdgeConv, LeanConv))


class Fuser:
    """Replaces each block of a graph by one call.

    Args:
        graph: a forward as :class:`lora_edge.nn.fuser.evaluator.Evaluator` found it.
        modules: by dotted name.
        guards: get what a block additionally depends on.
        block: the function that replaces a block, ``block(conv, x, bn=, residual=, residual_bn=, activation=, padding=)``.

    Attributes:
        activations: name of each fused convolution, with the activation at the end of its block.
    """

    def __init__(self, graph: fx.Graph, modules: dict[str, nn.Module], guards: Guards, block: Callable[..., Any]) -> None:
        self.graph, self.modules, self.guards, self.block = graph, modules, guards, block
        self.order = {node: k for k, node in enumerate(graph.nodes)}
        copies: dict[fx.Node, fx.Node] = {}
        fx.Graph().graph_copy(graph, copies)
        for node, copy in copies.items():
            node.meta["original"] = copy
        self.claimed: set[fx.Node] = set()
        self.activations: dict[str, Activation | None] = {}
        self.memory: dict[fx.Node, set[Any]] = {}
        self.find_memory()

    def called(self, node: fx.Node) -> Any:
        """Return the module that a node calls, None if it calls none."""
        return self.modules[str(node.target)] if node.op == "call_module" else None

    def run(self) -> tuple[dict[str, str], dict[str, str]]:
        """Fuse every block; return what was fused and why the rest was not, by the convolution's name."""
        blocks: dict[str, str] = {}
        reasons: dict[str, str] = {}
        convs = [n for n in self.graph.nodes if n.op == "call_module" and is_conv(self.called(n))]
        for node in reversed(convs):  # where two branches meet in an addition, the later one gets it
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
        """Fuse the block that starts with a convolution; return what was fused, or why not."""
        conv = self.called(node)
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
            if add.target in (operator.iadd, "add_"):
                call["adds_in_place"] = True
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
            return "", "nothing after it can be fused" + self.why_next(tail)
        if amounts is not None:
            chain.append(source)
        if self.written_between(chain):
            return "", "something is written in place between its parts"
        inner = source.args[0] if amounts is not None else source
        assert isinstance(inner, fx.Node)
        self.claimed.update(chain)
        self.activations[str(node.target)] = call.get("activation")
        self.replace(chain, inner, call)
        return " + ".join(what), ""

    def next(self, node: fx.Node) -> fx.Node | None:
        """Return the only user of a node; None if there are several or it belongs to another block."""
        users = list(node.users)
        return users[0] if len(users) == 1 and users[0] not in self.claimed else None

    def why_next(self, node: fx.Node) -> str:
        """Say what follows a node that ends a block."""
        users = list(node.users)
        if len(users) != 1:
            return f": its output has {len(users)} users"
        user = users[0]
        return f": {user.target} follows"

    def frozen_bn(self, node: fx.Node) -> str | None:
        """Return the name of the lean frozen BatchNorm that a node applies, or None."""
        if node.op == "call_function" and node.target is normalized:
            name = str(node.all_input_nodes[0].target)
            return name if self.modules[name].is_lean() else None  # type: ignore[operator]
        bn = self.called(node)
        return str(node.target) if isinstance(bn, FrozenBatchNorm) and bn.is_lean() else None

    def normalizes(self, node: fx.Node) -> Any:
        """Return the input of a node that applies a BatchNorm."""
        return node.args[1] if node.op == "call_function" else node.args[0]

    def other_operand(self, add: fx.Node, mine: fx.Node) -> tuple[fx.Node, str | None, list[fx.Node]] | None:
        """Return the residual of an addition, the BatchNorm on it, and the nodes of that branch that join the block."""
        if add.op not in ("call_function", "call_method") or add.target not in _ADD or len(add.args) != 2 or add.kwargs:
            return None
        left, right = add.args
        other = right if left is mine else left
        if not isinstance(other, fx.Node) or other is mine:
            return None
        in_place = add.target in (operator.iadd, "add_")
        if in_place and left is not mine:  # it writes into the shortcut, which may be the input of other code
            return None
        bn = self.frozen_bn(other)
        inner = None if bn is None else self.normalizes(other)
        if bn is not None and len(other.users) == 1 and other not in self.claimed and isinstance(inner, fx.Node):
            return inner, bn, [other]
        return other, None, []

    def activation(self, node: fx.Node) -> Activation | None:
        """Return the lean activation that a node applies, or None."""
        if node.op == "call_module":
            module = self.called(node)
            if not isinstance(module, LeanActivation):
                return None
            self.depends_on(module, "min_val", "max_val", "negative_slope")
            return module.activation()
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
        """Return the amounts of a zero padding that only this convolution uses and that can be merged with its own, or None."""
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
            amounts = layer.padding if constant else None
            if constant:
                self.depends_on(layer, "padding", "value")
        if not isinstance(amounts, (tuple, list)) or not all(isinstance(a, int) and a >= 0 for a in amounts):
            return None
        dims = conv.weight.dim() - 2
        if len(amounts) % 2 or len(amounts) // 2 > dims:
            return None
        uneven = [amounts[2 * k + 1] - amounts[2 * k] for k in range(len(amounts) // 2)]
        dilation = [conv.dilation[dims - 1 - k] for k in range(len(uneven))]
        own_is_even = not isinstance(conv.padding, str)
        self.depends_on(conv, "padding", "padding_mode", "dilation")
        return tuple(amounts) if own_is_even and all(u % d == 0 for u, d in zip(uneven, dilation, strict=True)) else None

    def written_between(self, chain: list[fx.Node]) -> bool:
        """Whether something that a block reads may be written in place before the position of its last node, where it runs."""
        last = max(self.order[node] for node in chain)
        writing = [n for n in self.graph.nodes if self.order.get(n, last) < last and n not in chain and self.writes(n)]
        for node in chain:
            read = {_OUTSIDE}  # its parameters and buffers
            for source in node.all_input_nodes:
                if source not in chain:
                    read |= self.memory[source]
            if any(self.order[n] > self.order[node] and read & self.memory[n] for n in writing):
                return True
        return False

    def find_memory(self) -> None:
        """Record whose memory each value may share: that of the nodes that made it, or of inputs, parameters and buffers."""
        for node in self.graph.nodes:
            if node.op in ("placeholder", "get_attr"):
                self.memory[node] = {_OUTSIDE}
            elif isinstance(self.called(node), _MAKE_NEW):
                self.memory[node] = {node}
            else:
                self.memory[node] = set().union(*(self.memory[source] for source in node.all_input_nodes))

    def writes(self, node: fx.Node) -> bool:
        """Whether a node writes into its input."""
        if node.op == "call_module":
            return bool(getattr(self.called(node), "inplace", False))
        return node.op in ("call_function", "call_method") and pure.writes(node.target, node.kwargs)

    def depends_on(self, module: nn.Module, *names: str) -> None:
        """Guard the attributes of a layer that a block is made for."""
        for name in names:
            if name in module.__dict__:
                self.guards.attribute(module, name, module.__dict__[name])

    def replace(self, chain: list[fx.Node], x: fx.Node, call: dict[str, Any]) -> None:
        """Replace the chain's last node by one call and erase the chain."""
        chain = sorted(chain, key=self.order.__getitem__)
        conv = next(n for n in chain if n.op == "call_module" and is_conv(self.called(n)))
        with self.graph.inserting_before(chain[-1]):
            modules = {k: self.graph.get_attr(call[k]) for k in ("bn", "residual_bn") if call.get(k)}
            kwargs = {k: v for k, v in {**call, **modules}.items() if v is not None}
            block = self.graph.call_function(self.block, (self.graph.get_attr(str(conv.target)), x), kwargs)
        block.meta.update(kind=pure.TENSOR, original=chain[-1].meta["original"])
        chain[-1].replace_all_uses_with(block)
        self.order[block], self.memory[block] = self.order[chain[-1]], self.memory[chain[-1]]
        self.claimed.add(block)
        for node in reversed(chain):
            self.graph.erase_node(node)

    def mark_private_inputs(self) -> None:
        """Allow a block to overwrite an input that another block made and that nothing else uses."""
        for node in self.graph.nodes:
            if node.target is self.block and node.op == "call_function":
                x = node.args[1]
                if x.op == "call_function" and x.target is self.block and len(x.users) == 1:
                    node.kwargs = {**node.kwargs, "overwrite": True}

    def make_functional_activation_lean(self, node: fx.Node) -> None:
        """Replace an activation function outside the blocks by its lean form."""
        if node.op == "call_module" or node in self.claimed or (activation := self.activation(node)) is None:
            return
        if len(node.args) == 0:
            return
        with self.graph.inserting_before(node):
            lean = self.graph.call_function(activate_ if self.writes(node) else activate, (node.args[0], activation))
        lean.meta.update(kind=pure.TENSOR, original=node.meta["original"])
        node.replace_all_uses_with(lean)
        self.graph.erase_node(node)
