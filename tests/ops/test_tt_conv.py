"""tt_conv and tt_fuse against ``conv(x, W + dW)`` in float64, over every attribute: value, gradients, dtype, memory format."""

# Argument lists are spliced into calls here, and mypy does not know their lengths.
# mypy: disable-error-code="call-arg"
from __future__ import annotations

import pytest
import torch
from torch import nn

from helpers.cases import CASES, ConvCase
from helpers.tolerances import TOLERANCE, relative_error
from lora_edge.memory import SavedBytes
from lora_edge.nn.layers import LoRAEdgeConv1d, LoRAEdgeConv2d, LoRAEdgeConv3d
from lora_edge.ops import reference, tt_conv, tt_fuse
from lora_edge.tt import contract_suffix, tt_svd

LAYER = {1: LoRAEdgeConv1d, 2: LoRAEdgeConv2d, 3: LoRAEdgeConv3d}


def random_layer(case: ConvCase, dtype: torch.dtype):
    """The case's layer with a random core."""
    layer = LAYER[case.dims].from_conv(case.conv(dtype), rank=case.rank)
    with torch.no_grad():
        layer.core.copy_(torch.randn(layer.core.shape))
    return layer


def oracle(case: ConvCase, layer: nn.Module, x: torch.Tensor, dy: torch.Tensor):
    """Output and gradients of the stock convolution with the fused weight, by torch's autograd in float64."""
    stock = case.conv(torch.float64)
    core = layer.core.detach().double().requires_grad_()
    suffix = layer.suffix.detach().double()
    x = x.detach().double().requires_grad_()
    weight = layer.weight.detach().double() + layer.scale * (core @ suffix.flatten(1)).reshape(layer.weight.shape)
    bias = None if layer.bias is None else layer.bias.detach().double().requires_grad_()
    y = stock._conv_forward(x, weight, bias)
    inputs = [t for t in (x, core, bias) if t is not None]
    return y, torch.autograd.grad(y, inputs, dy.double())


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_matrix(case: ConvCase, dtype):
    layer = random_layer(case, dtype)
    if layer.bias is not None:
        layer.bias.requires_grad_(True)
    x = case.x(dtype).requires_grad_()
    try:
        stock = case.conv(dtype)(x)
    except RuntimeError as error:  # torch 2.4 cannot pad a channels-last map of float16
        pytest.skip(f"the stock layer does not run here: {error}")
    y = layer(x)
    dy = torch.randn(y.shape, dtype=torch.float64).to(dtype)
    inputs = [t for t in (x, layer.core, layer.bias) if t is not None]
    got = torch.autograd.grad(y, inputs, dy)
    want_y, want = oracle(case, layer, x, dy)

    assert y.dtype == dtype
    assert y.shape == stock.shape
    assert y.stride() == stock.stride() or y.numel() == 0, "memory format of the stock layer"
    assert relative_error(y, want_y) <= TOLERANCE[dtype]
    for name, g, w, of in zip(("dx", "dB", "dbias"), got, want, inputs, strict=False):
        assert g.dtype == of.dtype, name
        assert relative_error(g, w) <= TOLERANCE[dtype], name


@pytest.mark.parametrize("route", ["factor", "dense"])
@pytest.mark.parametrize("case", [c for c in CASES if c.batch and c.padding_mode == "zeros"], ids=lambda c: c.name)
def test_gradcheck(case: ConvCase, route):
    conv = case.conv()
    x = case.x().requires_grad_()
    cores = tt_svd(conv.weight.detach(), case.rank)
    suffix = contract_suffix(cores[1:])
    core = torch.randn(case.outputs, suffix.shape[0], dtype=torch.float64, requires_grad=True)
    weight = conv.weight.detach()
    bias = None if conv.bias is None else conv.bias.detach().requires_grad_()

    def op(x, core, *bias):
        return tt_conv(
            x, weight, core, suffix, *(bias or (None,)), case.stride, case.padding, case.dilation, case.groups,
            0.7, route=route,
        )  # fmt: skip

    assert torch.autograd.gradcheck(op, (x, core) if bias is None else (x, core, bias), fast_mode=True)


@pytest.mark.parametrize("case", [c for c in CASES if c.batch and c.padding_mode == "zeros"], ids=lambda c: c.name)
@pytest.mark.parametrize("wanted", ["all", "suffix"])  # the suffix's alone comes from B^T dy, without the dense gradient
def test_trained_weight_and_suffix_get_their_gradients(case: ConvCase, wanted):
    conv = case.conv()
    suffix = contract_suffix(tt_svd(conv.weight.detach(), case.rank)[1:])
    core = torch.randn(case.outputs, suffix.shape[0], dtype=torch.float64)
    tensors = [t.detach() for t in (case.x(), conv.weight, core, suffix)]
    leaves = [t.requires_grad_() for t in (tensors if wanted == "all" else tensors[3:])]
    rest = (None, case.stride, case.padding, case.dilation, case.groups, 0.5)
    y = tt_conv(*tensors, *rest)
    want = reference.tt_conv(*tensors, *rest)
    dy = torch.randn_like(y)
    for g, w in zip(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(want, leaves, dy), strict=True):
        assert relative_error(g, w) <= 1e-12


def test_saves_h_and_never_x():
    case = ConvCase("wide", inputs=32, outputs=16, size=(20, 20), padding=1)
    layer = LoRAEdgeConv2d.from_conv(case.conv(torch.float32), rank=2)
    x = case.x(torch.float32).requires_grad_()
    with SavedBytes(layer) as saved:
        y = layer(x)
    assert saved.total == case.batch * 2 * 20 * 20 * 4  # h: r1 channels of float32
    assert x.untyped_storage().data_ptr() not in saved.storages
    assert y.untyped_storage().data_ptr() not in saved.storages


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_modes_save_nothing_more(mode):
    case = ConvCase("padded", inputs=32, outputs=16, size=(20, 20), padding=1, padding_mode=mode)
    layer = LoRAEdgeConv2d.from_conv(case.conv(torch.float32), rank=2)
    with SavedBytes(layer) as saved:
        layer(case.x(torch.float32).requires_grad_())
    assert saved.total == case.batch * 2 * 20 * 20 * 4


def test_factor_route_computes_no_dense_weight_gradient():
    """The backward runs no convolution_backward at all."""
    from torch.utils._python_dispatch import TorchDispatchMode

    ran: list[str] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            ran.append(str(func))
            return func(*args, **(kwargs or {}))

    layer = LoRAEdgeConv2d.from_conv(nn.Conv2d(16, 16, 3, padding=1), rank=2)
    y = layer(torch.randn(2, 16, 8, 8, requires_grad=True)).sum()
    with Record():
        y.backward()
    assert not [name for name in ran if "convolution_backward" in name]
    assert [name for name in ran if "convolution" in name]


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_scale_and_cores_as_suffix(groups):
    conv = nn.Conv2d(6, 12, 3, groups=groups, dtype=torch.float64)
    cores = tt_svd(conv.weight.detach(), 2)
    core = torch.randn(12, cores[1].shape[0], dtype=torch.float64)
    full = conv.weight + 0.25 * (core @ contract_suffix(cores[1:]).flatten(1)).reshape(conv.weight.shape)
    torch.testing.assert_close(tt_fuse(conv.weight, core, cores[1:], 0.25), full)
    x = torch.randn(2, 6, 8, 8, dtype=torch.float64)
    want = nn.functional.conv2d(x, full, groups=groups)
    torch.testing.assert_close(tt_conv(x, conv.weight, core, cores[1:], groups=groups, scale=0.25), want)


def test_tt_fuse_gradients():
    weight = torch.randn(5, 4, 3, dtype=torch.float64, requires_grad=True)
    core = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    suffix = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *leaves: tt_fuse(*leaves, 1.5), (weight, core, suffix))


def test_tt_fuse_rounds_once():
    """PEFT #1388 and #2502: a bfloat16 merge that rounds the update first drifts; one final cast does not."""
    weight = torch.randn(64, 32, 3).bfloat16()
    core, suffix = torch.randn(64, 4), torch.randn(4, 32, 3)
    exact = weight.double() + (core.double() @ suffix.double().flatten(1)).reshape(weight.shape)
    step = torch.finfo(torch.bfloat16).eps * exact.abs()
    terms = weight.double().abs() + (core.double().abs() @ suffix.double().abs().flatten(1)).reshape(weight.shape)
    before = 6 * torch.finfo(torch.float32).eps * terms  # four products and two sums in float32, before the one cast
    assert bool(((tt_fuse(weight, core, suffix).double() - exact).abs() <= 0.5 * (step + before) + before).all())


def test_unbatched_input():
    layer = random_layer(ConvCase("x"), torch.float64)
    x = torch.randn(6, 9, 8, dtype=torch.float64, requires_grad=True)
    one, many = layer(x), layer(x[None])[0]
    assert torch.equal(one, many)
    assert one.shape == (8, 7, 6)


def test_expanded_and_sliced_inputs_and_gradients():
    layer = random_layer(ConvCase("x"), torch.float64)
    expanded = torch.randn(1, 6, 9, 8, dtype=torch.float64).expand(4, -1, -1, -1)
    sliced = torch.randn(4, 9, 16, 12, dtype=torch.float64).permute(0, 3, 1, 2)[:, ::2, :, ::2]
    for x in (expanded, sliced):
        x = x.detach().requires_grad_()
        want = oracle(ConvCase("x"), layer, x, torch.ones(4, 8, 7, 6))[1][0]
        layer(x).sum().backward()  # dy is a single expanded number
        assert relative_error(x.grad, want) <= 1e-12


def test_grad_output_is_never_written():
    layer = random_layer(ConvCase("x"), torch.float64)
    y = layer(ConvCase("x").x().requires_grad_())
    dy = torch.randn_like(y)
    kept = dy.clone()
    y.backward(dy)
    assert torch.equal(dy, kept)


def test_double_backward_is_refused_not_wrong():
    layer = random_layer(ConvCase("x"), torch.float64)
    x = ConvCase("x").x().requires_grad_()
    (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        dx.sum().backward()


GOOD = {
    "x": torch.randn(2, 6, 8, 8),
    "weight": torch.randn(8, 3, 3, 3),
    "core": torch.randn(8, 2),
    "suffix": torch.randn(2, 3, 3, 3),
    "groups": 2,
}


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"x": torch.randn(2, 5, 8, 8)}, ValueError, r"x has 5 channels; weight \(8, 3, 3, 3\) with groups=2 needs 6"),
        ({"x": torch.randn(2, 6, 8)}, ValueError, "x has"),
        ({"x": torch.randn(6)}, ValueError, r"x has shape \(6,\)"),
        ({"x": [1.0]}, TypeError, "x is a list; give a tensor"),
        ({"x": torch.randn(2, 6, 8, 8).double()}, TypeError, "x is torch.float64, weight is torch.float32"),
        ({"x": torch.zeros(2, 6, 8, 8, dtype=torch.int32)}, TypeError, "x is torch.int32; give float32"),
        ({"x": torch.zeros(2, 6, 8, 8, device="meta")}, ValueError, "x is on meta, weight on cpu"),
        ({"weight": torch.randn(8, 3)}, ValueError, "weight has shape"),
        ({"weight": torch.randn(8, 3, 3, 3, dtype=torch.complex64)}, TypeError, "weight is torch.complex64"),
        ({"core": torch.randn(7, 2)}, ValueError, r"core has shape \(7, 2\); for this weight give \(8, r1\)"),
        ({"suffix": torch.randn(3, 3, 3, 3)}, ValueError, r"suffix has .*; for this weight and core give \(2, 3, 3, 3\)"),
        ({"suffix": torch.randn(2, 3, 3, 3, device="meta")}, ValueError, "put all on one device"),
        ({"suffix": [torch.randn(2, 3)]}, ValueError, "a TT core is"),
        ({"bias": torch.randn(3)}, ValueError, r"bias has shape \(3,\)"),
        ({"bias": torch.randn(8).double()}, TypeError, "bias is torch.float64"),
        ({"groups": 3}, ValueError, "needs 9"),
        ({"groups": 0}, ValueError, "groups is 0"),
        ({"stride": 0}, ValueError, "stride is 0; each must be at least 1"),
        ({"stride": (1, 2, 3)}, ValueError, "give one int or 2 ints"),
        ({"dilation": 1.5}, TypeError, "dilation is 1.5"),
        ({"padding": -1}, ValueError, "padding is -1"),
        ({"padding": "full"}, ValueError, 'give an int, 2 ints, "same" or "valid"'),
        ({"padding": "same", "stride": 2}, ValueError, "it is defined for stride 1 only"),
        ({"route": "fast"}, ValueError, 'give "auto", "factor" or "dense"'),
        ({"backend": "tpu"}, ValueError, "backend is 'tpu'"),
        ({"backend": "cuda"}, RuntimeError, "backend 'cuda' is"),
        ({"x": torch.randn(2, 6, 2, 2)}, RuntimeError, "[Kk]ernel size can't be greater"),
    ],
)  # fmt: skip
def test_bad_arguments(change, error, text):
    with pytest.raises(error, match=text) as caught:
        tt_conv(**{**GOOD, **change})
    assert "\n" not in str(caught.value)
