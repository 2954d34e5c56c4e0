"""Lean layers against stock layers: the same values bit for bit, the same gradients, and the saved bytes they promise."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lora_edge
from helpers.networks import network
from lora_edge.memory import saved_bytes
from lora_edge.nn.frozen_bn import freeze_bn
from lora_edge.nn.lean import LEAN_CLASS, make_lean, make_stock

SHAPES = {1: (3, 5, 17), 2: (3, 5, 12, 11), 3: (2, 4, 7, 6, 5)}

LAYERS = [
    (nn.ReLU(), 2),
    (nn.ReLU(inplace=True), 2),
    (nn.ReLU6(), 1),
    (nn.ReLU6(inplace=True), 3),
    (nn.Hardtanh(-0.5, 0.7), 2),
    (nn.Hardtanh(0.1, 0.2, inplace=True), 2),
    (nn.LeakyReLU(0.2), 2),
    (nn.LeakyReLU(-0.3), 2),  # a negative slope: the sign of the output does not tell the sign of the input
    (nn.LeakyReLU(0.1, inplace=True), 2),
    (nn.Hardsigmoid(), 2),
    (nn.MaxPool1d(3), 1),
    (nn.MaxPool1d(4, stride=2, padding=2, dilation=2), 1),
    (nn.MaxPool2d(2), 2),
    (nn.MaxPool2d((3, 2), stride=(2, 1), padding=(1, 0)), 2),
    (nn.MaxPool2d(3, stride=2, padding=1, dilation=2, ceil_mode=True), 2),
    (nn.MaxPool2d(3, stride=1), 2),  # windows overlap: one input is the largest of several
    (nn.MaxPool3d((2, 3, 1), stride=(2, 1, 1), padding=(1, 1, 0)), 3),
]


def run(layer: nn.Module, x: torch.Tensor):
    leaf = x.clone().requires_grad_()
    y = layer(leaf * 1.0)  # not a leaf, so that an in-place layer may write it
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float32).bfloat16()
    return y, torch.autograd.grad(y, leaf, dy.to(y.dtype))[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("stock", "dims"), LAYERS, ids=str)
def test_values_and_gradients_are_those_of_the_stock_layers(stock, dims, dtype):
    lean = nn.Sequential(copy.deepcopy(stock))
    assert make_lean(lean) == {}
    assert type(lean[0]) is LEAN_CLASS[type(stock)]
    x = torch.randn(SHAPES[dims]).to(dtype)
    for value in (x, x.round()):  # rounded: many values at the corners and many ties
        (y, dx), (want, dwant) = run(lean, value), run(stock, value)
        assert torch.equal(y, want)
        if dtype == torch.bfloat16 and "Pool" in type(stock).__name__:  # torch sums overlapping windows in bfloat16
            dwant = run(stock, value.double())[1]
            assert float((dx - dwant).norm() / dwant.norm()) <= 1e-2
        else:
            torch.testing.assert_close(dx, dwant, rtol=1e-6, atol=0)
    with torch.no_grad():
        assert torch.equal(lean(x.clone()), stock(x.clone()))
    make_stock(lean)
    assert type(lean[0]) is type(stock)


def test_activations_propagate_nan_as_torch_does():
    x = torch.tensor([float("nan"), -1.0, 0.0, 1.0, 6.0, 7.0, float("inf")])
    for stock in (nn.ReLU(), nn.ReLU6()):
        lean = nn.Sequential(copy.deepcopy(stock))
        make_lean(lean)
        for got, want in zip(run(lean, x), run(stock, x), strict=True):
            torch.testing.assert_close(got, want, equal_nan=True)


@pytest.mark.parametrize(
    ("layer", "shape", "saved"),
    [
        (nn.ReLU(), (4, 8, 10), 40),  # one bit per element
        (nn.Hardsigmoid(), (3, 3, 3), 4),  # 27 bits
        (nn.MaxPool2d(2), (4, 8, 6, 6), 288),  # one byte per element of the output
        (nn.Dropout(0.5), (4, 8, 10), 4 * 8 * 10 // 8),
    ],
    ids=str,
)
def test_saved_bytes(layer, shape, saved):
    model = nn.Sequential(layer)
    make_lean(model)
    assert saved_bytes(model, torch.randn(shape, requires_grad=True)) == saved


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("affine", [True, False])
def test_frozen_bn_is_exact_and_saves_nothing(dims, affine):
    stock = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1](SHAPES[dims][1], affine=affine, dtype=torch.float64)
    x = torch.randn(SHAPES[dims], dtype=torch.float64)
    stock(3 * x + 1)
    frozen = copy.deepcopy(stock.eval()).requires_grad_(False)
    freeze_bn(frozen, lean=True)
    (y, dx), (want, dwant) = run(frozen.train(), x), run(stock, x)
    assert torch.equal(y, want)
    torch.testing.assert_close(dx, dwant, rtol=1e-12, atol=1e-12)
    assert saved_bytes(frozen, x.requires_grad_()) == 0


def test_a_frozen_bn_whose_scale_is_trained_gets_its_gradient():
    bn = nn.BatchNorm1d(4).eval()
    freeze_bn(bn, lean=True)
    bn(torch.randn(3, 4, 5)).square().sum().backward()
    assert bn.weight.grad is not None


@pytest.mark.parametrize("p", [0.0, 0.3, 0.9, 1.0])
def test_dropout_draws_the_stock_mask_and_advances_the_generator_alike(p):
    lean, stock = nn.Sequential(nn.Dropout(p)), nn.Dropout(p)
    make_lean(lean)
    for x in (
        torch.randn(40, 50),
        torch.randn(4, 6, 5, 7).to(memory_format=torch.channels_last),
        torch.randn(3, 8, 4).mT,
        torch.randn(64, 1280),
    ):
        results = []
        for model in (lean, stock):
            torch.manual_seed(1)
            leaf = x.clone().requires_grad_()
            y = model(leaf)
            (dx,) = torch.autograd.grad(y.sum(), leaf)
            results.append((y, dx, torch.get_rng_state(), torch.tensor(y.stride())))
        for got, want in zip(*results, strict=True):
            assert torch.equal(got, want)
    assert torch.equal(lean.eval()(x), x)


def test_layers_without_a_lean_form_stay_stock_and_are_named():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.GELU(),
        nn.AvgPool2d(2),
        nn.GroupNorm(2, 4),
        nn.MaxPool2d(17, stride=1),
        nn.MaxPool2d(2, return_indices=True),
        nn.Dropout(0.5, inplace=True),
        nn.AdaptiveAvgPool2d((2, None)),
        nn.AdaptiveAvgPool2d(1),
    )
    lora_edge.adapt(model, 2)
    left = lora_edge.summary(model).left_alone
    assert list(left) == ["1", "2", "3", "4", "5", "6", "7"]
    assert left["1"] == "GELU has no lean form, left stock"
    assert "does not fit a byte" in left["4"]


def test_lean_false_leaves_every_layer_stock():
    model, x = network("2-D")
    lora_edge.adapt(model, 2, lean=False)
    assert not any(type(m) in LEAN_CLASS.values() for m in model.modules())
    assert lora_edge.summary(model).layers[0].block == ""
    base = copy.deepcopy(model)
    with lora_edge.disabled(base):
        assert torch.equal(model(x), base(x)), "bit-identical where gradients are needed, too"
