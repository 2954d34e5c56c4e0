"""Lean forms of the layers around the convolutions: each computes exactly what the stock layer does and saves much less.

    layer                                             saved for backward
    BatchNorm on its running statistics               nothing: a fixed scale and shift (:mod:`lora_edge.nn.frozen_bn`)
    ReLU, ReLU6, Hardtanh, LeakyReLU, Hardsigmoid     one bit per element
    MaxPool1d/2d/3d                                   the position in the window, one byte per output element
    Dropout                                           its mask, one bit per element, or the generator's state
    Conv1d/2d/3d that is not adapted                  nothing; a stock one saves its input, frozen or not (pytorch#133566)

:func:`make_lean` re-classes the stock layers of a model in place, :func:`make_stock` re-classes them back; names, hooks and
state dict stay as they are.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_edge.ops import tt_block
from lora_edge.ops.activation import Activation, activate
from lora_edge.ops.bits import memory_format, pack, unpack
from lora_edge.ops.once import linear_once_differentiable
from lora_edge.ops.padding import pad
from lora_edge.ops.strides import as_a_layer, no_view
from lora_edge.ops.transforms import plain_ops_only, refuse_proxy


class LeanLayer(nn.Module):
    """Base of the lean layers; ``stock`` is the class that the layer had."""

    stock: ClassVar[type[nn.Module]]


class LeanActivation(LeanLayer):
    """An activation that saves one bit per element. In place if the stock layer is."""

    inplace: bool

    def activation(self) -> Activation:
        """Return the activation by its name and numbers."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        if not isinstance(input, Tensor):
            refuse_proxy(input)
        if not (torch.is_grad_enabled() and input.requires_grad) or plain_ops_only():
            return self.stock.forward(self, input)
        if self.inplace and input._is_view():  # autograd rejects a custom in-place function on a view
            return self.stock.forward(self, input)
        return activate(input, self.activation(), self.inplace)


class LeanReLU(LeanActivation, nn.ReLU):
    """``nn.ReLU`` with one saved bit per element."""

    stock = nn.ReLU

    def activation(self) -> Activation:
        return Activation("relu")


class LeanReLU6(LeanActivation, nn.ReLU6):
    """``nn.ReLU6`` with one saved bit per element."""

    stock = nn.ReLU6

    def activation(self) -> Activation:
        return Activation("relu6")


class LeanHardtanh(LeanActivation, nn.Hardtanh):
    """``nn.Hardtanh`` with one saved bit per element."""

    stock = nn.Hardtanh

    def activation(self) -> Activation:
        return Activation("hardtanh", (float(self.min_val), float(self.max_val)))


class LeanLeakyReLU(LeanActivation, nn.LeakyReLU):
    """``nn.LeakyReLU`` with one saved bit per element."""

    stock = nn.LeakyReLU

    def activation(self) -> Activation:
        return Activation("leaky_relu", (float(self.negative_slope),))


class LeanHardsigmoid(LeanActivation, nn.Hardsigmoid):
    """``nn.Hardsigmoid`` with one saved bit per element."""

    stock = nn.Hardsigmoid

    def activation(self) -> Activation:
        return Activation("hardsigmoid")


class LeanMaxPool(LeanLayer):
    """A max-pool that saves the position in the window, one byte per output element."""

    def forward(self, input: Tensor) -> Tensor:
        if not isinstance(input, Tensor):
            refuse_proxy(input)
        if not (torch.is_grad_enabled() and input.requires_grad) or plain_ops_only():
            return self.stock.forward(self, input)
        dims = int(self.stock.__name__[-2])
        kernel, stride, padding, dilation = (
            _each(n, dims) for n in (self.kernel_size, self.stride, self.padding, self.dilation)
        )
        window = _Window(kernel, stride, padding, dilation, bool(self.ceil_mode))
        if input.dim() == dims + 1:
            return _MaxPool.apply(input.unsqueeze(0), window).squeeze(0)
        return _MaxPool.apply(input, window)


class LeanMaxPool1d(LeanMaxPool, nn.MaxPool1d):
    """``nn.MaxPool1d`` with one saved byte per output element."""

    stock = nn.MaxPool1d


class LeanMaxPool2d(LeanMaxPool, nn.MaxPool2d):
    """``nn.MaxPool2d`` with one saved byte per output element."""

    stock = nn.MaxPool2d


class LeanMaxPool3d(LeanMaxPool, nn.MaxPool3d):
    """``nn.MaxPool3d`` with one saved byte per output element."""

    stock = nn.MaxPool3d


class _Window:
    """Kernel size, stride, padding and dilation of a pooling window, one number per dimension."""

    def __init__(self, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int], ceil_mode: bool) -> None:
        self.kernel, self.stride, self.padding, self.dilation, self.ceil_mode = kernel, stride, padding, dilation, ceil_mode

    def first(self, way: int, size: int, device: torch.device) -> Tensor:
        """Return the input position of each window's first tap along one dimension, shaped to broadcast over the positions."""
        first = torch.arange(size, device=device) * self.stride[way] - self.padding[way]
        return first.reshape(-1, *[1] * (len(self.kernel) - way - 1))


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, window: _Window) -> Tensor:
        pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(window.kernel) - 1]
        y, index = pool(
            x, window.kernel, window.stride, window.padding, window.dilation, ceil_mode=window.ceil_mode, return_indices=True
        )  # fmt: skip
        place = torch.zeros_like(index)
        for way in range(len(window.kernel)):
            inner = math.prod(x.shape[3 + way :])
            position = index.div(inner, rounding_mode="floor")
            if way:
                position = position.remainder_(x.shape[2 + way])
            tap = position.sub_(window.first(way, y.shape[2 + way], x.device)).div_(window.dilation[way], rounding_mode="floor")
            place.mul_(window.kernel[way]).add_(tap)
        ctx.save_for_backward(place.to(torch.uint8))
        ctx.shape, ctx.window = x.shape, window
        return no_view(y)

    @staticmethod
    @linear_once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        window, (place,) = ctx.window, ctx.saved_tensors
        rest = place.to(torch.int64)
        index = torch.zeros_like(rest)
        inner = 1
        for way in reversed(range(len(window.kernel))):
            tap = rest.remainder(window.kernel[way])
            rest = rest.div_(window.kernel[way], rounding_mode="floor")
            position = tap.mul_(window.dilation[way]).add_(window.first(way, dy.shape[2 + way], dy.device))
            index.add_(position.mul_(inner))
            inner *= ctx.shape[2 + way]
        exact = torch.promote_types(dy.dtype, torch.float32)  # where windows overlap, several values are summed
        dx = torch.zeros(ctx.shape, dtype=exact, device=dy.device).flatten(2)
        return dx.scatter_add_(2, index.flatten(2), dy.flatten(2).to(exact)).view(ctx.shape).to(dy.dtype), None


class LeanDropout(LeanLayer, nn.Dropout):
    """``nn.Dropout`` that saves at most one bit per element; mask and generator state are the stock layer's."""

    stock = nn.Dropout

    def forward(self, input: Tensor) -> Tensor:
        if not isinstance(input, Tensor):
            refuse_proxy(input)
        wants_gradient = torch.is_grad_enabled() and input.requires_grad
        if not self.training or not wants_gradient or not 0.0 < self.p < 1.0 or input.is_meta or plain_ops_only():
            return self.stock.forward(self, input)
        return _Dropout.apply(input, self.p)


class _Dropout(torch.autograd.Function):
    """Saves the mask's bits, or on the CPU the generator's state, if that is smaller, to draw the mask again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        ctx.p, ctx.shape, ctx.bits = p, x.shape, None
        if x.is_cuda:
            y, kept = torch.native_dropout(x, p, True)
        else:
            state = torch.get_rng_state() if x.is_cpu and x.is_contiguous() else None
            noise = F.dropout(torch.ones_like(x), p)  # torch's own draw, whose order depends on its version
            y = x * noise
            if state is not None and 8 * state.nbytes < x.numel():
                ctx.save_for_backward(state)
                return y
            kept = noise != 0
        ctx.bits = memory_format(kept)
        ctx.save_for_backward(pack(kept))
        return y

    @staticmethod
    @linear_once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (saved,) = ctx.saved_tensors
        if ctx.bits is not None:
            noise = unpack(saved, ctx.shape, ctx.bits).to(dy.dtype)
        else:
            generator = torch.Generator().set_state(saved)
            noise = dy.new_empty(ctx.shape).bernoulli_(1 - ctx.p, generator=generator)
        return dy * noise.div_(1 - ctx.p), None


class LeanConv(LeanLayer, nn.modules.conv._ConvNd):
    """A convolution that is not adapted: saves nothing while its weight is frozen."""

    backend: str = "auto"  # passed to its op

    def forward(self, input: Tensor) -> Tensor:
        if not isinstance(input, Tensor):
            refuse_proxy(input)
        if (
            not (torch.is_grad_enabled() and input.requires_grad)
            or self.weight.requires_grad
            or input.dim() != self.weight.dim()
            or input.dtype != self.weight.dtype
            or torch.is_autocast_enabled(input.device.type)
            or plain_ops_only()
        ):
            return self.stock.forward(self, input)
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            input, padding = pad(input, self._reversed_padding_repeated_twice, self.padding_mode), 0
        fixed = (self.stride, padding, self.dilation, self.groups)
        y = tt_block(input, self.weight, None, None, self.bias, *fixed, backend=self.backend)
        return as_a_layer(y, input, self.weight)


class LeanConv1d(LeanConv, nn.Conv1d):
    """``nn.Conv1d`` that saves nothing while its weight is frozen."""

    stock = nn.Conv1d


class LeanConv2d(LeanConv, nn.Conv2d):
    """``nn.Conv2d`` that saves nothing while its weight is frozen."""

    stock = nn.Conv2d


class LeanConv3d(LeanConv, nn.Conv3d):
    """``nn.Conv3d`` that saves nothing while its weight is frozen."""

    stock = nn.Conv3d


LEAN_CLASS: dict[type[nn.Module], type[LeanLayer]] = {
    cls.stock: cls
    for cls in (
        LeanReLU, LeanReLU6, LeanHardtanh, LeanLeakyReLU, LeanHardsigmoid,
        LeanMaxPool1d, LeanMaxPool2d, LeanMaxPool3d, LeanDropout, LeanConv1d, LeanConv2d, LeanConv3d,
    )
}  # fmt: skip

COMPUTED_WEIGHT = "its weight is computed (weight_norm, spectral_norm), left alone"

# modules of torch.nn whose layers save their input or output; reported where they have no lean form
_SAVING = ("activation", "pooling", "dropout", "normalization", "instancenorm")
_GLOBAL_POOL = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)  # to size 1: a mean, saves nothing


def make_lean(model: nn.Module, backend: str = "auto") -> dict[str, str]:
    """Re-class every stock layer that has a lean form; return names and reasons of those that have none.

    ``backend`` is for the convolutions that are not adapted.
    """
    left: dict[str, str] = {}
    for name, module in model.named_modules():
        kind = type(module)
        if kind in LEAN_CLASS:
            if why := _why_not_lean(module):
                left[name] = why
            else:
                module.__class__ = LEAN_CLASS[kind]  # type: ignore[assignment]
                if isinstance(module, LeanConv):
                    module.backend = backend
        elif (
            kind.__module__.rpartition(".")[2] in _SAVING
            and kind.__module__.startswith("torch.nn")
            and not (kind in _GLOBAL_POOL and set(_each(module.output_size, 1)) == {1})
        ):
            left[name] = f"{kind.__name__} has no lean form, left stock"
    return left


def make_stock(model: nn.Module) -> None:
    """Undo :func:`make_lean`."""
    for module in model.modules():
        if isinstance(module, LeanLayer):
            module.__dict__.pop("backend", None)
            module.__class__ = module.stock  # type: ignore[assignment]


def _why_not_lean(module: nn.Module) -> str | None:
    if isinstance(module, (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)):
        if module.return_indices:
            return "a max-pool that returns its indices is left stock"
        dims = int(type(module).__name__[-2])
        if math.prod(_each(module.kernel_size, dims)) > 256:
            return "a max-pool window of more than 256 positions does not fit a byte, left stock"
    if isinstance(module, nn.modules.conv._ConvNd) and "weight" not in module._parameters:
        return COMPUTED_WEIGHT
    if isinstance(module, nn.Dropout) and module.inplace:
        return "an in-place dropout is left stock"
    return None


def _each(value: Any, dims: int) -> list[Any]:
    return [value] * dims if isinstance(value, int) else list(value)
