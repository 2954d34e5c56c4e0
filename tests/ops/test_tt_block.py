"""tt_block against the plain steps in float64: value and every gradient over the case table, saved bytes, slices, bad input."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

from helpers.block_calls import EPILOGUES, arguments, double, leaves
from helpers.cases import CASES, ConvCase
from helpers.tolerances import TOLERANCE, relative_error
from lora_edge.memory import SavedBytes
from lora_edge.ops import reference, tt_block
from lora_edge.ops import tt_block as public
from lora_edge.ops.activation import Activation
from lora_edge.ops.bits import memory_format, pack, unpack
from lora_edge.ops.conv_args import conv_args
from lora_edge.ops.tt_block import run_block

BLOCK_CASES = [case for case in CASES if case.padding_mode == "zeros"]


@pytest.mark.parametrize("adapted", [True, False], ids=["adapted", "frozen"])
@pytest.mark.parametrize("epilogue", list(EPILOGUES))
@pytest.mark.parametrize("case", BLOCK_CASES, ids=lambda c: c.name)
def test_matrix(case, epilogue, adapted):
    positional, options = arguments(case, EPILOGUES[epilogue], adapted=adapted)
    y = tt_block(*positional, **options)
    want = reference.tt_block(*positional, **options)
    assert y.shape == want.shape
    assert memory_format(y) == memory_format(want)
    assert relative_error(y, want) <= 1e-12
    dy = torch.randn_like(y)
    inputs = leaves(positional, options)
    got = torch.autograd.grad(y, inputs, dy)
    for k, (g, w) in enumerate(zip(got, torch.autograd.grad(want, inputs, dy), strict=True)):
        assert g.shape == w.shape
        assert relative_error(g, w) <= 1e-12, k


@pytest.mark.parametrize("case", BLOCK_CASES, ids=lambda c: c.name)
def test_a_suffix_alone_gets_its_gradient(case, monkeypatch):
    """From ``B^T dz``, without the dense weight gradient; in slices."""
    monkeypatch.setattr(sys.modules["lora_edge.ops.engines.torch.tt_block"], "SLICE_BYTES", 1)
    (x, weight, core, suffix, *rest), options = arguments(case, EPILOGUES["affine, residual with affine, relu6"])
    suffix.requires_grad_()
    y = tt_block(x, weight, core.detach(), suffix, *rest, **options)
    want = reference.tt_block(x, weight, core.detach(), suffix, *rest, **options)
    dy = torch.randn_like(y)
    inputs = [x, suffix]
    for g, w in zip(torch.autograd.grad(y, inputs, dy), torch.autograd.grad(want, inputs, dy), strict=True):
        assert relative_error(g, w) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [c for c in BLOCK_CASES if c.rank <= 3], ids=lambda c: c.name)
def test_other_dtypes(case, dtype):
    positional, options = arguments(case, EPILOGUES["affine, residual with affine, relu6"], dtype)
    y = tt_block(*positional, **options)
    exact, exact_options = tuple(map(double, positional)), {k: double(v) for k, v in options.items()}
    want = reference.tt_block(*exact, **exact_options)
    assert y.dtype == dtype
    assert relative_error(y, want) <= 3 * TOLERANCE[dtype]  # the affine amplifies the rounding
    dy = torch.where((want > 0.1) & (want < 5.9), torch.randn_like(want), 0.0)  # a bit may differ at the activation's corner
    got = torch.autograd.grad(y, leaves(positional, options), dy.to(dtype))
    for g, w in zip(got, torch.autograd.grad(want, leaves(exact, exact_options), dy), strict=True):
        assert relative_error(g, w) <= 3 * TOLERANCE[dtype]


@pytest.mark.parametrize("batch", [1, 7, 8, 9, 21])
@pytest.mark.parametrize("outputs", [1, 4, 8], ids=lambda o: f"{o} outputs")  # 1 x 9 x 7 bits: only 8 samples fill whole bytes
@pytest.mark.parametrize("channels_last", [False, True])
def test_slices_of_the_batch(batch, outputs, channels_last, monkeypatch):
    monkeypatch.setattr(sys.modules["lora_edge.ops.engines.torch.tt_block"], "SLICE_BYTES", 1)
    case = ConvCase("sliced", batch=batch, size=(9, 7), outputs=outputs, padding=1, channels_last=channels_last)
    positional, options = arguments(case, EPILOGUES["affine, residual with affine, relu6"])
    inputs = leaves(positional, options)
    y, want = tt_block(*positional, **options), reference.tt_block(*positional, **options)
    dy = torch.randn_like(y)
    for g, w in zip(torch.autograd.grad(y, inputs, dy), torch.autograd.grad(want, inputs, dy), strict=True):
        assert relative_error(g, w) <= 1e-12


@pytest.mark.parametrize("adapted", [True, False], ids=["adapted", "frozen"])
@pytest.mark.parametrize("batch", [1, 9])
@pytest.mark.parametrize("channels_last", [False, True])
def test_overwriting_the_input(batch, channels_last, adapted, monkeypatch):
    monkeypatch.setattr(sys.modules["lora_edge.ops.engines.torch.tt_block"], "SLICE_BYTES", 1)
    case = ConvCase("square", outputs=6, padding=1, batch=batch, channels_last=channels_last)
    positional, options = arguments(case, EPILOGUES["affine, residual with affine, relu6"], adapted=adapted)
    leaf, weight, core, suffix, bias, *_ = positional
    args = conv_args(1, 1, 1, 1, 2, "test")
    named = (options["affine"], options["residual"], options["residual_affine"], Activation("relu6"), None)
    x = leaf * 1.0  # not a leaf: in a forward plan it is the previous block's output
    storage = x.untyped_storage().data_ptr()
    y = run_block(x, weight, core, suffix, bias, args, 0.7, *named, overwrite=True)
    assert y.untyped_storage().data_ptr() == storage
    want = reference.tt_block(*positional, **options)
    assert relative_error(y, want) <= 1e-12
    dy = torch.randn_like(want)
    inputs = leaves(positional, options)
    for g, w in zip(torch.autograd.grad(y, inputs, dy), torch.autograd.grad(want, inputs, dy), strict=True):
        assert relative_error(g, w) <= 1e-12


@pytest.mark.parametrize("saved_dtype", [None, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("epilogue", list(EPILOGUES))
def test_saves_h_and_bits_and_nothing_else(epilogue, saved_dtype):
    case = ConvCase("wide", inputs=32, outputs=16, size=(20, 20), padding=1)
    positional, options = arguments(case, EPILOGUES[epilogue], torch.float32)
    own = torch.nn.Module()
    for k, t in enumerate([*positional[1:4], *options.get("affine", ()), *options.get("residual_affine", ())]):
        own.register_buffer(f"b{k}", t.detach())
    positional = (positional[0], own.b0, own.b1.requires_grad_(), own.b2, *positional[4:])
    with SavedBytes(own) as saved:
        y = tt_block(*positional, **options, saved_dtype=saved_dtype)
    h = case.batch * 2 * 20 * 20 * (saved_dtype or torch.float32).itemsize
    bits = y.numel() // 8 if "activation" in options else 0
    affine = sum(16 * 4 for name in ("affine", "residual_affine") if name in options)  # a, a few bytes per channel
    assert h + bits <= saved.total <= h + bits + affine


@pytest.mark.parametrize("saved_dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_h_rounds_only_the_core_gradient(saved_dtype):
    positional, options = arguments(ConvCase("x"), EPILOGUES["affine, relu"], torch.float32)
    inputs = leaves(positional, options)
    exact, rounded = tt_block(*positional, **options), tt_block(*positional, **options, saved_dtype=saved_dtype)
    assert torch.equal(exact, rounded)
    dy = torch.randn_like(exact)
    got, want = torch.autograd.grad(rounded, inputs, dy), torch.autograd.grad(exact, inputs, dy)
    assert torch.equal(got[0], want[0])
    assert 0 < relative_error(got[1], want[1]) <= 1e-2


def test_dense_route_and_trained_weight():
    case = ConvCase("narrow", inputs=2, outputs=16, padding=1, rank=8)  # two input channels, eight of h
    positional, options = arguments(case, EPILOGUES["affine, residual, relu"])
    positional = (positional[0], positional[1].requires_grad_(), positional[2], positional[3].requires_grad_(), *positional[4:])
    for trained in (inputs := leaves(positional, options)), [t for t in inputs if t is not positional[1]]:
        y, want = tt_block(*positional, **options), reference.tt_block(*positional, **options)
        dy = torch.randn_like(y)
        for g, w in zip(torch.autograd.grad(y, trained, dy), torch.autograd.grad(want, trained, dy), strict=True):
            assert relative_error(g, w) <= 1e-12


def test_gradcheck():
    positional, options = arguments(replace(ConvCase("x"), size=(5, 5)), {"affine": True, "residual": True})
    inputs = leaves(positional, options)

    def block(x, core, bias, residual):
        return tt_block(x, positional[1], core, positional[3], bias, *positional[5:], **{**options, "residual": residual})

    assert torch.autograd.gradcheck(block, inputs)


@pytest.mark.parametrize("shape", [(0,), (1,), (7,), (8, 3), (3, 5, 4, 2), (2, 3, 2, 2, 5)])
def test_bits_round_trip(shape):
    mask = torch.rand(shape) > 0.5
    for tensor in (mask, *([mask.contiguous(memory_format=torch.channels_last)] if mask.dim() == 4 else [])):
        bits = pack(tensor)
        assert bits.numel() == -(-mask.numel() // 8)
        assert torch.equal(unpack(bits, mask.shape, memory_format(tensor)), mask)


def test_second_backward_and_freed_bits():
    positional, options = arguments(ConvCase("x"), EPILOGUES["affine, relu"])
    y = tt_block(*positional, **options).sum()
    y.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.backward()


def test_a_core_that_was_changed_before_backward_is_an_error():
    positional, options = arguments(ConvCase("x"), EPILOGUES["affine, relu"])
    y = tt_block(*positional, **options).sum()
    with torch.no_grad():
        positional[2].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (
            {"residual": torch.randn(3, 8, 7, 5).double()},
            ValueError,
            r"residual has shape .3, 8, 7, 5.; the output is .3, 8, 7, 6.",
        ),
        ({"residual": torch.randn(3, 8, 7, 6)}, ValueError, r"residual is torch.float32"),
        ({"residual_affine": (torch.ones(8), torch.ones(8))}, ValueError, "residual_affine without a residual"),
        ({"affine": torch.ones(8)}, TypeError, "affine is a Tensor; give a tuple"),
        ({"affine": (torch.ones(8), torch.ones(3))}, ValueError, r"affine has shape \(3,\) on cpu; give \(8,\) on cpu"),
        ({"affine": (torch.ones(8, requires_grad=True), torch.ones(8))}, ValueError, "the affine is frozen"),
        ({"activation": "gelu"}, ValueError, "activation is 'gelu'; give None or one of 'relu'"),
        ({"activation": "hardtanh"}, ValueError, r"give Activation\('hardtanh', \(low, high\)\)"),
        ({"saved_dtype": torch.int8}, ValueError, "saved_dtype is torch.int8"),
        ({"core": None}, ValueError, "one of core and suffix is None"),
        ({"backend": "triton"}, RuntimeError, "backend 'triton' is"),
        ({"x": torch.randn(6, 9, 8).double()}, ValueError, "x has shape"),
    ],
)
def test_bad_arguments(change, error, text):
    positional, _ = arguments(ConvCase("x"), {})
    names = ("x", "weight", "core", "suffix", "bias", "stride", "padding", "dilation", "groups", "scale")
    with pytest.raises(error, match=text) as caught:
        public(**{**dict(zip(names, positional, strict=True)), **change})
    assert "\n" not in str(caught.value)
