"""What the model's own code gets: maps and gradients in stock strides, and never a view from a custom function."""

from __future__ import annotations

import copy
import importlib
import inspect
import pkgutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lora_edge
from helpers.networks import train
from lora_edge.methods import memflora, one_bit
from lora_edge.nn import frozen_bn, lean
from lora_edge.ops import activation, dispatch, dora_fuse, padding, strides, tt_block, tt_conv, tt_fuse
from lora_edge.ops.engines.torch.dora_fuse import DoRAFuse
from lora_edge.ops.engines.torch.tt_block import TTBlock
from lora_edge.ops.engines.torch.tt_conv import TTConv
from lora_edge.ops.engines.torch.tt_fuse import TTFuse
from lora_edge.ops.once import _NotTwice
from lora_edge.ops.reference import tt_conv as reference_tt_conv


class Flat(nn.Module):
    """Passes a map to code that depends on its strides."""

    def __init__(self, dims: int, use: str, opaque: bool) -> None:
        super().__init__()
        conv, bn = (nn.Conv1d, nn.Conv2d)[dims - 1], (nn.BatchNorm1d, nn.BatchNorm2d)[dims - 1]
        self.conv, self.bn, self.again = conv(3, 8, 3, padding=1), bn(8), conv(8, 8, 3, padding=1)
        self.pool = (nn.MaxPool1d, nn.MaxPool2d)[dims - 1](2)
        self.use, self.opaque = use, opaque
        self.strides: list[tuple[int, ...]] = []

    def forward(self, x):
        if self.opaque:
            self.strides.append(x.stride())
        x = F.relu(self.bn(self.conv(x)))
        x = self.pool(x) + 0.5
        if self.use == "view":
            return x.view(x.size(0), -1)
        if self.use == "as_strided":
            return torch.as_strided(x, (x.size(0), 5), (x[0].numel(), 1))
        if self.use == "written view":
            x.view(x.size(0), -1)[:, ::2].mul_(3.0)
            return self.again(x)
        if self.use == "transposed":
            return self.again(x.transpose(1, -1).reshape(x.shape))
        if self.use == "written map":
            y = self.again(x)
            x.clamp_(max=0.25)
            return y.flatten(1).sum(1) + x.flatten(1).sum(1)
        return self.again(x)


INPUTS = {
    "contiguous": lambda x: x,
    "channels-last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "transposed": lambda x: x.transpose(1, -1).contiguous().transpose(1, -1),
    "expanded": lambda x: x[:1].expand(x.shape),
}


@pytest.mark.parametrize("use", ["view", "as_strided", "written view", "transposed", "written map", "map"])
@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("opaque", [False, True])
def test_maps_leave_the_blocks_in_stock_strides(use, dims, opaque):
    torch.manual_seed(0)
    base = Flat(dims, use, opaque)
    ours, stock = lora_edge.adapt(copy.deepcopy(base), 2), lora_edge.adapt(copy.deepcopy(base), 2, lean=False)
    for core in (*lora_edge.trainable_parameters(ours), *lora_edge.trainable_parameters(stock)):
        nn.init.constant_(core, 0.1)
    for kind, make in INPUTS.items():
        leaf = torch.randn(4, 3, *[8] * dims).requires_grad_()
        results = []
        for model in (ours, stock):
            try:
                y = model(make(leaf))
            except RuntimeError as error:
                results.append(str(error).splitlines()[0])
                continue
            gradients = torch.autograd.grad(y.square().sum(), [leaf, model.conv.core, model.again.core], allow_unused=True)
            results.append((y, *gradients))
        if isinstance(results[1], str):
            assert results[0] == results[1], kind
            continue
        assert results[0][0].stride() == results[1][0].stride(), kind
        for got, want in zip(*results, strict=True):
            assert (got is None) == (want is None)
            if got is not None:  # sums of 100 float32 products, whose order differs
                torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


def test_training_through_a_classical_flatten():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8 * 16, 4))
    lora_edge.adapt(model, 2)
    train(model, torch.randn(4, 3, 8, 8), list(lora_edge.trainable_parameters(model)))


def test_code_before_a_block_gets_its_gradient_in_its_own_strides():
    seen = []

    class Own(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, dy):
            seen.append(dy.stride())
            return 2 * dy.view(-1).view(dy.shape)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.ReLU())

        def forward(self, x):
            return self.block(Own.apply(x))

    model = lora_edge.adapt(Net(), 2)
    assert model._lora_edge.blocks == {"block.0": "conv + bn + relu"}
    model(torch.randn(4, 3, 10, requires_grad=True)).sum().backward()
    assert seen == [(30, 10, 1)]


def _block(x):
    conv = torch.randn(4, 3, 3)
    core, suffix = torch.randn(4, 2).requires_grad_(), torch.randn(2, 3, 3)
    return conv, core, suffix, x


def _op(op, backend, **options):
    def run():
        weight, core, suffix, x = _block(torch.randn(2, 3, 9).mT.contiguous().mT)
        return op(x, weight, core, suffix, backend=backend, **options)

    return run


def _kernel():
    weight, _, _, x = _block(torch.randn(2, 3, 9).mT.contiguous().mT)
    core = torch.randn(*weight.shape[:1], 2, *weight.shape[2:], requires_grad=True)
    suffix = torch.randn(2, weight.shape[1], *[1] * (weight.dim() - 2))
    return tt_block(x, weight, core, suffix, activation="relu", backend="auto")


def _frozen(x):
    bn = nn.BatchNorm1d(4)
    frozen_bn.freeze_bn(bn.requires_grad_(False), lean=True)
    return bn(x)


def _lean(layer, x):
    model = nn.Sequential(layer)
    lean.make_lean(model)
    return model(x)


def _map(*shape):
    return torch.randn(shape, requires_grad=True)


CALLS = {
    TTConv: _op(tt_conv, "torch"),
    TTBlock: _op(tt_block, "torch", activation="relu"),
    dispatch._Block: _op(tt_block, "auto", activation="relu"),
    dispatch._Kernel: _kernel,
    TTFuse: lambda: tt_fuse(*_block(None)[:3], backend="torch"),
    DoRAFuse: lambda: dora_fuse(*_block(None)[:3], torch.rand(4), backend="torch"),
    frozen_bn._FrozenBatchNorm: lambda: _frozen(_map(2, 9, 4).mT),
    lean._MaxPool: lambda: _lean(nn.MaxPool1d(2), _map(2, 9, 4).mT),
    lean._Dropout: lambda: _lean(nn.Dropout(0.5), _map(2, 9, 4).mT),
    strides._LaidOut: lambda: dispatch.laid_out(_map(2, 3, 9)),
    strides._StockStrides: lambda: strides.in_stock_strides(_map(2, 9, 4).mT),
    padding._Pad: lambda: padding.pad(_map(2, 3, 9), (1, 1), "reflect"),
    _NotTwice: lambda: _NotTwice.apply(_map(2, 3)),
    activation._Activate: lambda: activation.activate(_map(2, 3, 9), activation.Activation("relu")),
    memflora._Given: lambda: memflora._Given.apply(_map(3).sum(), [torch.ones(3)], _map(3)),
    one_bit._Nearest: lambda: one_bit._Nearest.apply(_map(4), torch.tensor([0, 1, 1, 0]), one_bit.codebook(1).float()),
}
ELSEWHERE = {dispatch._Fuse, dispatch._Dora}  # need a device: tests/engines/test_cuda_backend.py


def _functions():
    for found in pkgutil.walk_packages(lora_edge.__path__, "lora_edge."):
        if found.name.rpartition(".")[2] in ("_C", "__main__") or "benchmarks" in found.name:
            continue
        module = importlib.import_module(found.name)
        for value in vars(module).values():
            if inspect.isclass(value) and issubclass(value, torch.autograd.Function) and value.__module__ == module.__name__:
                yield value


def test_every_autograd_function_is_tested_here():
    pytest.importorskip("triton")  # its modules are imported too
    assert set(_functions()) == {*CALLS, *ELSEWHERE}


@pytest.mark.parametrize("function", list(CALLS), ids=lambda function: function.__name__)
def test_no_function_returns_a_view(function):
    y = CALLS[function]()
    assert y.grad_fn is not None
    assert not y._is_view()
    y.mul_(2.0).relu_()  # in place, as an activation of the model does
    if function is not _NotTwice:
        y.sum().backward()


@pytest.mark.parametrize("op", [tt_conv, tt_block])
def test_the_ops_give_stock_strides(op):
    weight, core, suffix, x = _block(torch.randn(2, 3, 9))
    assert op(x, weight, core, suffix).stride() == reference_tt_conv(x, weight, core, suffix).stride()
