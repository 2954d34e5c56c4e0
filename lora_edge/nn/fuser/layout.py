"""Lay out a graph: channels-last maps between blocks, stock strides everywhere else.

The CPU engine computes on channels-last maps. Maps stay channels-last between blocks, and through operations whose result does
not depend on strides. Anything else that reads a map (a view, the model's output, a layer with unknown needs) gets the strides
that stock layers would have produced. An input of several blocks is laid out once, not by each of them.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from lora_edge.nn.frozen_bn import FrozenBatchNorm
from lora_edge.nn.fuser import pure
from lora_edge.nn.fuser.calls import normalized
from lora_edge.nn.fuser.find_blocks import activate_
from lora_edge.nn.fuser.stock_strides import SizesAndStrides, StockStrides
from lora_edge.nn.lean import LeanActivation, LeanConv, LeanMaxPool
from lora_edge.ops.activation import activate
from lora_edge.ops.dispatch import laid_out

_INDIFFERENT_LAYERS = (
    FrozenBatchNorm, LeanActivation, LeanConv, LeanMaxPool, nn.modules.batchnorm._BatchNorm, nn.modules.conv._ConvNd,
    nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.modules.pooling._AdaptiveMaxPoolNd, nn.Upsample, nn.modules.padding._ConstantPadNd, nn.ZeroPad2d,
    nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh, nn.ELU, nn.SELU, nn.CELU, nn.Mish,
    nn.LeakyReLU, nn.Hardtanh, nn.Softplus,
)  # fmt: skip
_NAMES = """relu relu6 hardtanh leaky_relu hardsigmoid hardswish silu gelu elu selu celu mish sigmoid tanh softplus relu_
sigmoid_ tanh_ clamp clamp_ exp sqrt abs neg square add sub mul div add_ sub_ mul_ div_ mean sum amax amin cat
concat avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d interpolate
pad addcmul maximum minimum"""
_INDIFFERENT_NAMES = set(_NAMES.split())
_INDIFFERENT = {
    *(activate, activate_, normalized),
    *(getattr(owner, name) for owner in (torch, F) for name in _INDIFFERENT_NAMES if hasattr(owner, name)),
    *(operator.add, operator.sub, operator.mul, operator.truediv, operator.neg, operator.pow),
    *(operator.iadd, operator.isub, operator.imul, operator.itruediv),
}


class Layout:
    """Lays out one graph.

    Args:
        graph: a forward with its blocks fused.
        modules: by dotted name.
        block: the function that a fused block calls: ``block(conv, x, ...)``.
    """

    def __init__(self, graph: fx.Graph, modules: dict[str, nn.Module], block: Any) -> None:
        self.graph, self.modules, self.block = graph, modules, block
        self.private: dict[fx.Node, None] = {}  # maps that may have the engine's strides

    def run(self) -> None:
        """Lay out the graph, in place."""
        self.without_values: dict[fx.Node, fx.Node] = {}
        self.name_results_of_writing()
        for node in list(self.graph.nodes):
            if self.keeps(node):
                self.private[node] = None
        self.lay_out_inputs()
        for node in [*self.private]:
            self.restore_after(node)

    def name_results_of_writing(self) -> None:
        """Let later users of the input of an in-place operation refer to its result."""
        order = {node: k for k, node in enumerate(self.graph.nodes)}
        for node in list(self.graph.nodes):
            source = node.args[0] if node.args else None
            if not isinstance(source, fx.Node) or source.meta.get("kind") != pure.TENSOR:
                continue
            if self.writes(node) and node.meta.get("kind") == pure.TENSOR:
                for user in [u for u in source.users if order[u] > order[node]]:
                    user.replace_input_with(source, node)

    def writes(self, node: fx.Node) -> bool:
        """Whether a node writes into its first argument and returns it."""
        if node.op == "call_module":
            return bool(getattr(self.modules[str(node.target)], "inplace", False))
        into_others = node.target in (F.batch_norm, F.instance_norm, torch.batch_norm) or "out" in node.kwargs
        is_call = node.op in ("call_function", "call_method") and not into_others
        return is_call and pure.writes(node.target, node.kwargs)

    def is_block(self, node: fx.Node) -> bool:
        """Whether a node is a fused block."""
        return node.op == "call_function" and node.target is self.block

    def indifferent(self, node: fx.Node) -> bool:
        """Whether a node's values do not depend on strides and it keeps its input's, in its own memory or in place."""
        if node.op == "call_module":
            return isinstance(self.modules[str(node.target)], _INDIFFERENT_LAYERS)
        if node.op == "call_method":
            return node.target in _INDIFFERENT_NAMES
        return node.op == "call_function" and node.target in _INDIFFERENT

    def keeps(self, node: fx.Node) -> bool:
        """Whether a node's result may have the engine's strides."""
        if self.is_block(node):
            return True
        if self.writes(node) and node.args[0] not in self.private:
            return False  # the result is a map of other code
        return (
            node.meta.get("kind") == pure.TENSOR
            and self.indifferent(node)
            and any(i in self.private for i in node.all_input_nodes)
        )

    def stock_strides_of(self, node: fx.Node) -> tuple[StockStrides, list[fx.Node]]:
        """Return the function that gives a map its stock strides, and the further nodes that it needs."""
        now = {other.meta["original"]: other for other in self.graph.nodes if "original" in other.meta}
        inputs: dict[fx.Node, fx.Node] = {}
        seen, waiting = set(), [node.meta["original"]]
        while waiting:
            original = waiting.pop()
            if original in seen:
                continue
            seen.add(original)
            if original in now and now[original] not in self.private:
                inputs[original] = now[original]
            else:
                waiting += original.all_input_nodes
        in_stock_strides = StockStrides(node.meta["original"], list(inputs), self.modules)
        return in_stock_strides, [self.sizes_of(node) for node in inputs.values()]

    def sizes_of(self, node: fx.Node) -> fx.Node:
        """Return a node for sizes and strides instead of the value, so that no map is kept alive for them."""
        if node.op in ("placeholder", "get_attr") or node.meta.get("kind") != pure.TENSOR:
            return node
        if node not in self.without_values:
            with self.graph.inserting_after(node):
                self.without_values[node] = self.graph.call_function(SizesAndStrides, (node,))
        return self.without_values[node]

    def lay_out_inputs(self) -> None:
        """Copy each map that blocks read and other code made once, as long as nothing is written in between."""
        laid: dict[fx.Node, fx.Node] = {}
        for node in list(self.graph.nodes):
            if self.is_block(node):
                sources = [node.args[1], node.kwargs.get("residual")]
                for source in sources:
                    if isinstance(source, fx.Node) and source not in self.private and source.meta.get("kind") == pure.TENSOR:
                        if source not in laid:
                            with self.graph.inserting_before(node):
                                laid[source] = self.graph.call_function(laid_out, (source,))
                                laid[source].meta["kind"] = pure.TENSOR
                        node.replace_input_with(source, laid[source])
            elif self.writes(node) or pure.writes(node.target, node.kwargs):
                laid.clear()

    def restore_after(self, node: fx.Node) -> None:
        """Give a map stock strides from its first user that needs them on; all later users read that copy."""
        order = {other: k for k, other in enumerate(self.graph.nodes)}
        strict = [user for user in node.users if not self.is_block(user) and user not in self.private]
        strict = [user for user in strict if not (self.writes(user) and self.indifferent(user) and user.args[0] is not node)]
        if not strict:
            return
        first = min(order[user] for user in strict)
        later = [user for user in node.users if order[user] >= first]
        in_stock_strides, inputs = self.stock_strides_of(node)
        with self.graph.inserting_before(next(user for user in strict if order[user] == first)):
            modules = tuple(self.graph.get_attr(name) for name in in_stock_strides.names)
            stock = self.graph.call_function(in_stock_strides, (node, modules, *inputs))
        stock.meta["kind"] = pure.TENSOR
        for user in later:
            user.replace_input_with(node, stock)
