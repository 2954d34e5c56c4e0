"""A trained kernel in the core's place: the ops against the plain steps, on every case and engine; what they save; refusals."""

# Argument lists are spliced into calls here, and mypy does not know their lengths.
# mypy: disable-error-code="call-arg"
from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from helpers.block_calls import EPILOGUES, arguments, double, leaves
from helpers.cases import CASES, ConvCase
from helpers.tolerances import TOLERANCE, relative_error
from lora_edge.memory import SavedBytes
from lora_edge.ops import reference, tt_block, tt_conv, tt_fuse
from lora_edge.ops.activation import Activation
from lora_edge.ops.backends import AVAILABLE, state
from lora_edge.ops.conv_args import conv_args
from lora_edge.ops.tt_block import run_block
from lora_edge.tt import update_of

ZEROS = [case for case in CASES if case.padding_mode == "zeros"]
FEW = ["plain", "stride", "same, even kernel, dilated", "groups", "depthwise multiplier", "1-D stride, dilation", "3-D"]
SOME = [case for case in ZEROS if case.name in FEW]


@pytest.fixture(autouse=True)
def _poisoned():
    """Memory that nothing writes holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def call(case: ConvCase, epilogue: dict, dtype=torch.float64):
    """Positional and keyword arguments of ``tt_block`` with a kernel and its suffix; x, core, bias and residual are trained."""
    (x, weight, _, _, *rest), options = arguments(case, epilogue, dtype)
    rank = min(case.rank, weight.shape[1])
    core = torch.randn(weight.shape[0], rank, *weight.shape[2:], dtype=torch.float64).to(dtype).requires_grad_()
    suffix = torch.randn(rank, weight.shape[1], *[1] * case.dims, dtype=torch.float64).to(dtype)
    return (x, weight, core, suffix, *rest), options


def assert_like_the_reference(positional, options, tolerance, **more):
    """Compare value and every gradient with the reference in float64."""
    y = tt_block(*positional, **options, **more)
    exact, exact_options = tuple(map(double, positional)), {k: double(v) for k, v in options.items()}
    want = reference.tt_block(*exact, **exact_options)
    plain = reference.tt_block(*exact, **{**exact_options, "activation": None})
    assert y.dtype == positional[0].dtype
    assert relative_error(y, want) <= tolerance
    corners = () if y.dtype == torch.float64 else (0.0, 6.0, -0.5, 0.8, 3.0, -3.0)  # where a rounding would flip a derivative
    dy = torch.randn_like(want)
    for corner in corners:
        dy = dy.where((plain - corner).abs() > 0.1, 0.0)
    got = torch.autograd.grad(y, leaves(positional, options), dy.to(y.dtype))
    for k, (g, w) in enumerate(zip(got, torch.autograd.grad(want, leaves(exact, exact_options), dy), strict=True)):
        assert g.shape == w.shape
        assert relative_error(g, w) <= tolerance, k


@pytest.mark.parametrize("epilogue", list(EPILOGUES))
@pytest.mark.parametrize("case", ZEROS, ids=lambda c: c.name)
def test_matrix(case, epilogue):
    assert_like_the_reference(*call(case, EPILOGUES[epilogue]), 1e-12)


@pytest.mark.parametrize("epilogue", list(EPILOGUES))
@pytest.mark.parametrize("case", ZEROS, ids=lambda c: c.name)
def test_matrix_in_float32_by_an_engine_with_kernels_where_there_is_one(case, epilogue):
    assert_like_the_reference(*call(case, EPILOGUES[epilogue], torch.float32), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", SOME, ids=lambda c: c.name)
def test_half_precision(case, dtype):
    """Beside the float32 kernel that the layers keep."""
    (x, weight, core, suffix, *rest), options = call(case, EPILOGUES["affine, residual with affine, relu6"], dtype)
    core, suffix = core.detach().float().requires_grad_(), suffix.float()
    assert_like_the_reference((x, weight, core, suffix, *rest), options, 3 * TOLERANCE[dtype])


@pytest.mark.parametrize("batch", [1, 9, 21])
def test_slices_of_the_batch(batch, monkeypatch):
    monkeypatch.setattr(sys.modules["lora_edge.ops.engines.torch.tt_block"], "SLICE_BYTES", 1)
    case = ConvCase("sliced", batch=batch, size=(9, 7), outputs=4, padding=1)
    assert_like_the_reference(*call(case, EPILOGUES["affine, residual with affine, relu6"]), 1e-12, backend="torch")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_overwriting_the_input(dtype):
    """``q`` is taken before ``y`` reuses the memory of ``x``."""
    case = ConvCase("square", outputs=6, padding=1, channels_last=True)
    (leaf, weight, core, suffix, bias, *rest), options = call(case, EPILOGUES["affine, relu"], dtype)
    args = conv_args(1, 1, 1, 1, 2, "test")
    want = reference.tt_block(leaf, weight, core, suffix, bias, *rest, **options)
    dy = torch.randn_like(want)
    expected = torch.autograd.grad(want, [leaf, core, bias], dy)
    x = leaf * 1.0
    storage = x.untyped_storage().data_ptr()
    named = (options["affine"], None, None, Activation("relu"), None)
    y = run_block(x, weight, core, suffix, bias, args, 0.7, *named, overwrite=True)
    assert y.untyped_storage().data_ptr() == storage
    assert relative_error(y, want) <= TOLERANCE[dtype]
    for g, w in zip(torch.autograd.grad(y, [leaf, core, bias], dy), expected, strict=True):
        assert relative_error(g, w) <= TOLERANCE[dtype]


@pytest.mark.parametrize("wanted", ["all", "suffix"])
@pytest.mark.parametrize("case", SOME, ids=lambda c: c.name)
def test_trained_weight_and_suffix_get_their_gradients(case, wanted):
    (x, weight, core, suffix, bias, *rest), options = call(case, EPILOGUES["affine, relu"])
    tensors = [t.detach() for t in (x, weight, core, suffix)]
    inputs = [t.requires_grad_() for t in (tensors if wanted == "all" else tensors[3:])]
    fixed = (None if bias is None else bias.detach(), *rest)
    for op, oracle, more in ((tt_block, reference.tt_block, options), (tt_conv, reference.tt_conv, {})):
        y, want = op(*tensors, *fixed, **more), oracle(*tensors, *fixed, **more)
        dy = torch.randn_like(y)
        for g, w in zip(torch.autograd.grad(y, inputs, dy), torch.autograd.grad(want, inputs, dy), strict=True):
            assert relative_error(g, w) <= 1e-12


@pytest.mark.parametrize("route", ["factor", "dense"])
@pytest.mark.parametrize("case", SOME, ids=lambda c: c.name)
def test_conv_gradcheck(case, route):
    (x, weight, core, suffix, bias, *rest), _ = call(case, {})

    def op(x, core, bias):
        return tt_conv(x, weight, core, suffix, bias, *rest, route=route)

    assert torch.autograd.gradcheck(op, (x, core, bias), fast_mode=True)


def test_fuse_and_its_gradients():
    weight, core = torch.randn(6, 4, 3, 2).double().requires_grad_(), torch.randn(6, 2, 3, 2).double().requires_grad_()
    suffix = torch.randn(2, 4, 1, 1).double().requires_grad_()
    want = weight + 1.5 * torch.einsum("oqhw,qi->oihw", core, suffix[..., 0, 0])
    torch.testing.assert_close(tt_fuse(weight, core, suffix, 1.5), want)
    torch.testing.assert_close(1.5 * update_of(core, suffix).view(weight.shape), want - weight)
    assert torch.autograd.gradcheck(lambda *tensors: tt_fuse(*tensors, 1.5), (weight, core, suffix))
    wrong = weight + 1.5 * torch.einsum("oqhw,qi->oihw", core.flip(2, 3), suffix[..., 0, 0])  # the mutant: taps in reverse
    assert relative_error(wrong, want) > 0.1


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("saved_dtype", [None, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("epilogue", list(EPILOGUES))
def test_saves_q_and_bits_and_nothing_else(epilogue, saved_dtype, backend):
    """Also at a stride: ``q`` is at the input's positions."""
    case = ConvCase("wide", inputs=32, outputs=16, size=(20, 20), padding=1, stride=2)
    (x, weight, core, suffix, *rest), options = call(case, EPILOGUES[epilogue], torch.float32)
    own = nn.Module()
    for k, t in enumerate([weight, core, suffix, *options.get("affine", ()), *options.get("residual_affine", ())]):
        own.register_buffer(f"b{k}", t.detach())
    own.b1.requires_grad_()
    with SavedBytes(own) as saved:
        y = tt_block(x, own.b0, own.b1, own.b2, *rest, **options, saved_dtype=saved_dtype, backend=backend)
    q = case.batch * 2 * 20 * 20 * (saved_dtype or torch.float32).itemsize
    bits = y.numel() // 8 if "activation" in options else 0
    affine = sum(16 * 4 for name in ("affine", "residual_affine") if name in options)
    assert q + bits <= saved.total <= q + bits + affine
    assert x.untyped_storage().data_ptr() not in saved.storages


def test_an_empty_batch():
    positional, options = call(ConvCase("empty", batch=0, padding=1), EPILOGUES["affine, relu"], torch.float32)
    y = tt_block(*positional, **options)
    gradients = torch.autograd.grad(y.sum(), leaves(positional, options))
    assert all(not g.count_nonzero() for g in gradients)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"core": torch.randn(8, 2, 3, 2)}, r"core has shape \(8, 2, 3, 2\); .* give \(8, r1\), or a kernel \(8, r, 3, 3\)"),
        ({"core": torch.randn(7, 2, 3, 3)}, "core has shape"),
        ({"core": torch.randn(8, 2, 3)}, "core has shape"),
        ({"suffix": torch.randn(2, 3, 3, 3)}, r"suffix has .*; for this weight and core give \(2, 3, 1, 1\)"),
        ({"suffix": torch.randn(3, 3, 1, 1)}, r"give \(2, 3, 1, 1\)"),
    ],
)
def test_bad_arguments(change, text):
    good = {
        "x": torch.randn(2, 6, 8, 8), "weight": torch.randn(8, 3, 3, 3), "core": torch.randn(8, 2, 3, 3),
        "suffix": torch.randn(2, 3, 1, 1), "groups": 2,
    }  # fmt: skip
    tt_conv(**good)
    with pytest.raises(ValueError, match=text) as caught:
        tt_conv(**{**good, **change})
    assert "\n" not in str(caught.value)


def test_a_named_backend_without_it_refuses_by_name():
    if state("cpu") != AVAILABLE:
        pytest.skip(f"the CPU engine is {state('cpu')}")
    weight, core, suffix = torch.randn(8, 4, 3), torch.randn(8, 2, 3), torch.randn(2, 4, 1)
    with pytest.raises(RuntimeError, match=r"tt_fuse: backend 'cpu' does not support this call"):
        tt_fuse(weight, core, suffix, backend="cpu")
    with pytest.raises(RuntimeError, match=r"tt_conv: backend 'cpu' does not support this call: the dense route"):
        tt_conv(torch.randn(2, 4, 9), weight, core.requires_grad_(), suffix, route="dense", backend="cpu")
    assert tt_conv(torch.randn(2, 4, 9), weight, core, suffix, backend="cpu").shape == (2, 8, 7)


def test_without_gradients_nothing_is_saved_and_the_value_is_the_same():
    positional, options = call(ConvCase("plain"), EPILOGUES["affine, residual, relu"], torch.float32)
    want = tt_block(*positional, **options)
    with torch.no_grad():
        assert torch.equal(tt_block(*positional, **options), want)
    frozen = tuple(t.detach() if isinstance(t, torch.Tensor) else t for t in positional)
    y = tt_block(*frozen, **{**options, "residual": options["residual"].detach()})
    assert not y.requires_grad
    assert torch.equal(y, want)


def test_torch_compile_runs_it_in_torch():
    positional, options = call(ConvCase("plain"), EPILOGUES["affine, relu"], torch.float32)
    x, weight, core, suffix, *rest = positional

    def step(x, core):
        return tt_block(x, weight, core, suffix, *rest, **options)

    compiled = torch.compile(step, backend="eager", fullgraph=True)
    y, want = compiled(x, core), step(x, core)
    assert relative_error(y, want) <= 1e-5
    dy = torch.randn_like(y)
    for g, w in zip(torch.autograd.grad(y, [x, core], dy), torch.autograd.grad(want, [x, core], dy), strict=True):
        assert relative_error(g, w) <= 1e-5
