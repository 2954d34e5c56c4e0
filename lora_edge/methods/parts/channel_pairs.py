"""Which convolutions are coupled by channels that nothing else reads: hidden channels, as opposed to a residual stream's."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.conv import _ConvNd

from lora_edge.nn.fuser.evaluator import Evaluator
from lora_edge.nn.fuser.values import Refused

# layers and functions that compute each channel from that channel alone and keep the channels' order
_LAYER_NAMES = """Identity BatchNorm1d BatchNorm2d BatchNorm3d Dropout Dropout1d Dropout2d Dropout3d
ReLU ReLU6 LeakyReLU PReLU ELU SELU CELU GELU SiLU Mish Hardswish Hardsigmoid Hardtanh Sigmoid Tanh Softplus
MaxPool1d MaxPool2d MaxPool3d AvgPool1d AvgPool2d AvgPool3d"""
_FUNCTION_NAMES = """relu relu_ relu6 leaky_relu elu selu celu gelu silu mish hardswish hardsigmoid hardtanh sigmoid tanh
softplus dropout max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d"""
_METHOD_NAMES = "relu relu_ sigmoid sigmoid_ tanh tanh_"
_LAYERS = {getattr(nn, name) for name in _LAYER_NAMES.split()}
_FUNCTIONS = {getattr(owner, name) for owner in (torch, F) for name in _FUNCTION_NAMES.split() if hasattr(owner, name)}
_METHODS = set(_METHOD_NAMES.split())


@dataclass(frozen=True)
class ChannelPair:
    """Two convolutions by dotted name: each output channel of ``producer`` is the input channel of ``consumer`` of that number.

    Nothing else reads these channels, and on the way are only layers that keep channels apart: BatchNorm, activations, dropout,
    pooling, and the depthwise convolutions ``between``.
    """

    producer: str
    between: tuple[str, ...]
    consumer: str


def channel_pairs(model: nn.Module, convs: dict[str, _ConvNd], dims: int) -> list[ChannelPair]:
    """Return the pairs among ``convs``, in the order of the forward; a convolution may consume in one and produce in another.

    Forwards are read as for fusing (:mod:`lora_edge.nn.fuser`): nothing runs. Where one is not proven pure, its children are
    searched one by one, on the premise that their own parts are called by nobody else. A pair must be one in training and in
    evaluation; a convolution that is called twice is in none.

    Args:
        model: the base model.
        convs: the convolutions to consider, by dotted name.
        dims: the number of dimensions of the model's input, batch included.
    """
    times = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    names: dict[nn.Module, str] = {conv: name for name, conv in convs.items() if times[id(conv)] == 1}
    training = set(_pairs_in(model, names, dims, True))
    return [pair for pair in _pairs_in(model, names, dims, False) if pair in training]


def _pairs_in(module: nn.Module, names: dict[nn.Module, str], dims: int | None, training: bool) -> list[ChannelPair]:
    if isinstance(module, _ConvNd) or not any(part in names for part in module.modules()):
        return []
    with Evaluator(module, training) as evaluator:
        try:
            evaluator.run([("tensor", dims)], {})
        except (Refused, RecursionError):
            pass
        else:
            return _pairs_of(evaluator.graph, dict(module.named_modules(remove_duplicate=False)), names)
    return [pair for child in module.children() for pair in _pairs_in(child, names, None, training)]


def _pairs_of(graph: fx.Graph, modules: dict[str, nn.Module], names: dict[nn.Module, str]) -> list[ChannelPair]:
    called = {node: modules[str(node.target)] for node in graph.nodes if node.op == "call_module"}
    times = Counter(called.values())
    once = {node: names[module] for node, module in called.items() if module in names and times[module] == 1}
    pairs: list[ChannelPair] = []
    for producer in once:
        if any(once[producer] in pair.between for pair in pairs):
            continue
        node: fx.Node = producer
        between: list[str] = []
        while len(node.users) == 1:
            user = next(iter(node.users))
            if user.all_input_nodes != [node]:
                break
            if user in once:
                conv: _ConvNd = called[user]  # type: ignore[assignment]
                if not conv.groups == conv.in_channels == conv.out_channels:
                    pairs.append(ChannelPair(once[producer], tuple(between), once[user]))
                    break
                between.append(once[user])
            elif not _keeps_channels(user, called):
                break
            node = user
    return pairs


def _keeps_channels(node: fx.Node, called: dict[fx.Node, nn.Module]) -> bool:
    if node in called:
        return type(called[node]) in _LAYERS
    return node.target in (_METHODS if node.op == "call_method" else _FUNCTIONS)
