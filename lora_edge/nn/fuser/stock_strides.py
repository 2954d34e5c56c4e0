"""The strides that a map would have if stock layers had made it, for the places where blocks meet other code.

Each of torch's kernels decides on strides by its own rules: which operand of a sum comes first, whether all maps of a ``cat``
are channels-last, what a convolution of a transposed map in float64 returns. If everything that a map was made from is
contiguous, the map is too. Otherwise the stock layers run once, without gradients, on memory of the same sizes and strides.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from lora_edge.nn.frozen_bn import FrozenBatchNorm
from lora_edge.ops.plan import dense_stride
from lora_edge.ops.strides import restrided

_MOST_KNOWN = 64  # sizes and strides of inputs for which the result is remembered


class SizesAndStrides:
    """Sizes and strides of a tensor, without its values."""

    def __init__(self, tensor: Tensor) -> None:
        self.shape, self.strides = tensor.shape, tensor.stride()
        self.dtype, self.device = tensor.dtype, tensor.device
        self.contiguous = tensor.is_contiguous()

    def stride(self) -> tuple[int, ...]:
        return self.strides

    def is_contiguous(self) -> bool:
        return self.contiguous


class StockStrides:
    """A function in a graph: returns a map in its stock strides.

    Args:
        result: the map's node in the graph before blocks were fused.
        inputs: nodes in that graph on which it depends and whose values are those of stock layers.
        modules: by dotted name.

    Attributes:
        names: dotted names of the modules that a call needs.
    """

    def __init__(self, result: fx.Node, inputs: list[fx.Node], modules: dict[str, nn.Module]) -> None:
        self.__name__, self.__qualname__, self.__module__ = "in_stock_strides", "in_stock_strides", __name__
        self.result, self.inputs = result, inputs
        self.steps = _steps(result, inputs)
        self.names = list(dict.fromkeys(str(step.target) for step in self.steps if step.op == "call_module"))
        self.convs = [k for k, name in enumerate(self.names) if isinstance(modules[name], nn.modules.conv._ConvNd)]
        self.known: dict[Any, tuple[int, ...]] = {}

    def __call__(self, y: Tensor, modules: tuple[nn.Module, ...], *values: Any) -> Tensor:
        """Return ``y``, or a copy of it in stock strides.

        Args:
            y: the map.
            modules: those named by :attr:`names`; this function holds no reference to them, so that the model can be collected.
            values: of the inputs.
        """
        tensors = [value for value in values if isinstance(value, (Tensor, SizesAndStrides))]
        tensors += [modules[k].weight for k in self.convs]  # type: ignore[misc]
        if all(map(_is_plain, tensors)):
            stride = _dense(y.shape)
        else:
            key = tuple((t.shape, t.stride(), t.dtype, t.device) for t in tensors)
            found = self.known.get(key)
            if found is None or len(found) != y.dim():
                found = self.find(modules, values)
                if len(self.known) < _MOST_KNOWN:
                    self.known[key] = found
            stride = found
        return restrided(y, stride)

    @torch.no_grad()
    def find(self, modules: tuple[nn.Module, ...], values: tuple[Any, ...]) -> tuple[int, ...]:
        """Return the strides that stock layers produce for inputs of these sizes and strides."""
        # in one dtype, whatever autocast does on the way: strides do not depend on it
        dtype: Any = modules[self.convs[0]].weight.dtype if self.convs else None
        known: dict[fx.Node, Any] = {node: _alike(value, dtype) for node, value in zip(self.inputs, values, strict=True)}
        device = next((value.device.type for value in values if isinstance(value, (Tensor, SizesAndStrides))), "cpu")
        with torch.autocast(device, enabled=False):
            self.run(known, modules)
        return known[self.result].stride()  # type: ignore[no-any-return]

    def run(self, known: dict[fx.Node, Any], modules: tuple[nn.Module, ...]) -> None:
        """Run the steps on the known inputs, adding the results to ``known``."""
        for step in self.steps:
            args = fx.node.map_arg(step.args, known.__getitem__)
            kwargs = fx.node.map_arg(step.kwargs, known.__getitem__)
            if step.op == "call_module":
                known[step] = _stock(modules[self.names.index(str(step.target))], *args, **kwargs)
            elif step.op == "call_method":
                known[step] = getattr(args[0], step.target)(*args[1:], **kwargs)  # type: ignore[arg-type]
            else:
                known[step] = step.target(*args, **kwargs)  # type: ignore[operator]


def _steps(result: fx.Node, inputs: list[fx.Node]) -> list[fx.Node]:
    """Return the nodes to run from the inputs to the result, in their order."""
    needed, waiting = set(), [result]
    while waiting:
        node = waiting.pop()
        if node not in needed and node not in inputs:
            needed.add(node)
            waiting += node.all_input_nodes
    return [node for node in result.graph.nodes if node in needed]


def _stock(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, FrozenBatchNorm):
        return F.batch_norm(args[0], args[0].new_zeros(args[0].shape[1]), args[0].new_ones(args[0].shape[1]))  # moves nothing
    return getattr(module, "stock", type(module)).forward(module, *args, **kwargs)


def _alike(value: Any, dtype: torch.dtype | None) -> Any:
    if not isinstance(value, (Tensor, SizesAndStrides)):
        return value
    wanted = dtype if dtype is not None and value.dtype.is_floating_point else value.dtype
    return torch.empty_strided(value.shape, value.stride(), dtype=wanted, device=value.device)


def _is_plain(tensor: Tensor | SizesAndStrides) -> bool:
    """Whether a tensor is contiguous for torch too: if a dimension has one element, its stride decides the kind of map."""
    return tensor.is_contiguous() and (1 not in tensor.shape or tensor.stride() == _dense(tensor.shape))


@functools.lru_cache(maxsize=1024)
def _dense(shape: torch.Size) -> tuple[int, ...]:
    return dense_stride(shape, False)
