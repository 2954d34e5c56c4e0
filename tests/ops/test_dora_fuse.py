"""dora_fuse and dora_norm against dense DoRA in float64 and PEFT's DoRA layer: values, all gradients, rounding, bytes."""

# Argument lists are spliced into calls here, and mypy does not know their lengths.
# mypy: disable-error-code="call-arg"
from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from helpers.methods import peft_layer
from helpers.tolerances import TOLERANCE, relative_error
from lora_edge.memory import SavedBytes, StorageTracker
from lora_edge.ops import dora_fuse, dora_norm, reference
from lora_edge.ops.dora_fuse import row_squares
from lora_edge.ops.engines.torch import dora_fuse as of_torch

NAMES = ("weight", "core", "suffix", "magnitude")
SHAPES = {  # (O, I/g, *K) and r
    "wide": ((5, 7, 9), 3),
    "tall": ((23, 2, 1, 3), 2),
    "3-D": ((6, 4, 2, 3, 2), 3),
    "depthwise": ((9, 1, 5), 2),
    "rank above the row": ((4, 1, 2), 6),
    "one row": ((1, 3, 3), 1),
}


def call(shape: tuple[int, ...], rank: int, dtype: torch.dtype = torch.float64, factors: torch.dtype | None = None):
    """A weight in ``dtype``, and the factors and the magnitude in ``factors``, all of which require a gradient."""
    factors = factors or dtype
    tensors = {
        "weight": torch.randn(shape).to(dtype),
        "core": torch.randn(shape[0], rank).to(factors),
        "suffix": torch.randn(rank, *shape[1:]).to(factors),
        "magnitude": (torch.rand(shape[0]) + 0.5).to(factors),
    }
    return [tensors[name].requires_grad_() for name in NAMES]


def exact(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach().double().requires_grad_() for t in tensors]


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that no one has written holds NaN."""

    def filled(empty):
        def make(*args, **options):
            made = empty(*args, **options)
            return made.fill_(float("nan")) if made.is_floating_point() else made

        return make

    monkeypatch.setattr(torch.Tensor, "new_empty", filled(torch.Tensor.new_empty))
    monkeypatch.setattr(torch, "empty_like", filled(torch.empty_like))


@pytest.mark.parametrize("known", [False, True], ids=["", "squares known"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_agrees_with_dense_dora(name, dtype, known, poisoned, monkeypatch):
    """The factors in the dtype in which they are kept beside the weight."""
    monkeypatch.setattr(of_torch, "AT_ONCE", 2 * math.prod(SHAPES[name][0][1:]))  # several chunks, the last one smaller
    factors = torch.float64 if dtype == torch.float64 else torch.float32
    tensors = call(*SHAPES[name], dtype, factors)
    squares = row_squares(tensors[0].detach()) if known else None
    got = dora_fuse(*tensors, 0.7, weight_squares=squares)
    leaves = exact(tensors)
    want = reference.dora_fuse(*leaves, 0.7)
    assert got.dtype == dtype
    assert relative_error(got, want) <= TOLERANCE[dtype]
    dy = torch.randn_like(got)
    found, expected = torch.autograd.grad(got, tensors, dy), torch.autograd.grad(want, leaves, dy.double())
    for tensor, g, w in zip(tensors, found, expected, strict=True):
        assert g.dtype == tensor.dtype
        assert relative_error(g, w) <= TOLERANCE[tensor.dtype]
    norms = dora_norm(*tensors[:3], 0.7, weight_squares=squares)
    assert norms.dtype == factors
    assert relative_error(norms, reference.dora_norm(*leaves[:3], 0.7)) <= TOLERANCE[factors]


@pytest.mark.parametrize("needs", NAMES)
def test_computes_only_the_gradient_that_is_needed(needs, poisoned):
    tensors = call(*SHAPES["wide"])
    for name, tensor in zip(NAMES, tensors, strict=True):
        tensor.requires_grad_(name == needs)
    got, want = dora_fuse(*tensors), reference.dora_fuse(*tensors)
    dy, wanted = torch.randn_like(got), tensors[NAMES.index(needs)]
    torch.testing.assert_close(torch.autograd.grad(got, wanted, dy), torch.autograd.grad(want, wanted, dy))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("conv", [nn.Conv1d(6, 12, 5), nn.Conv2d(6, 12, (3, 5)), nn.Conv3d(3, 8, 3)], ids=["1-D", "2-D", "3-D"])
def test_agrees_with_peft(conv, dtype):
    """The weight's and every trained gradient, from the output of PEFT's layer."""
    oracle, layer = peft_layer(conv.to(dtype), use_dora=True)
    a, b, m = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.lora_magnitude_vector["default"].weight
    for parameter in (a, b, m):
        parameter.data = parameter.data.to(dtype) + 0.3 * torch.rand_like(parameter.data, dtype=dtype)
    core, suffix, magnitude = (t.detach().clone().requires_grad_() for t in (b.flatten(1), a, m.flatten()))
    fused = dora_fuse(conv.weight.detach(), core, suffix, magnitude, 3 / 2)
    x = torch.randn(2, conv.in_channels, *[7] * (conv.weight.dim() - 2), dtype=dtype)
    y, want = conv._conv_forward(x, fused, conv.bias), oracle(x)
    assert relative_error(y, want) <= TOLERANCE[dtype]
    dy = torch.randn_like(y)
    got, expected = torch.autograd.grad(y, (core, suffix, magnitude), dy), torch.autograd.grad(want, (b, a, m), dy)
    for g, w in zip(got, expected, strict=True):
        assert relative_error(g, w.view(g.shape)) <= TOLERANCE[dtype]


def test_the_norm_is_a_constant_in_backward():
    """A mutant: differentiated through the norm, the gradients of both factors are others."""
    weight, core, suffix, magnitude = call(*SHAPES["wide"])
    rows = (weight + (core @ suffix.flatten(1)).view(weight.shape)).flatten(1)
    wrong = (magnitude / rows.norm(dim=1)).unsqueeze(1) * rows
    dy, factors = torch.randn_like(weight), (core, suffix)
    got = torch.autograd.grad(dora_fuse(weight, core, suffix, magnitude), factors, dy)
    for g, w in zip(got, torch.autograd.grad(wrong.view(weight.shape), factors, dy), strict=True):
        assert relative_error(g, w) > 0.1


def test_starts_at_the_weight_to_the_last_bit():
    """With a core of zeros and the magnitude that :func:`dora_norm` finds, every dtype keeps every bit."""
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        weight, core, suffix, _ = call((40, 30, 3), 4, dtype, torch.float64 if dtype == torch.float64 else torch.float32)
        core = torch.zeros_like(core)
        assert torch.equal(dora_fuse(weight, core, suffix, dora_norm(weight, core, suffix)), weight)
        assert torch.equal(dora_norm(weight, core, suffix), row_squares(weight).sqrt())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_rounded_once(dtype):
    """A gain and an update that are small beside the weight are not rounded before the one cast, as in half they would be."""
    weight, core, suffix, _ = (t.detach() for t in call((64, 32, 3), 4, dtype, torch.float32))
    core = 1e-2 * core
    magnitude = dora_norm(weight, core, suffix) * (1 + 1e-3 * torch.randn(64))
    want = reference.dora_fuse(*exact([weight, core, suffix, magnitude]))
    got = dora_fuse(weight, core, suffix, magnitude)
    step = torch.finfo(dtype).eps * want.abs()
    before = 16 * torch.finfo(torch.float32).eps * (want.abs() + (core.abs() @ suffix.abs().flatten(1)).view(want.shape))
    assert bool(((got.double() - want).abs() <= 0.5 * (step + before) + before).all())
    in_half = (magnitude / dora_norm(weight, core, suffix)).to(dtype).view(-1, 1, 1) * (
        weight + (core.to(dtype) @ suffix.to(dtype).flatten(1)).view(weight.shape)
    )
    assert relative_error(in_half, want) > 1.1 * relative_error(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_row_of_zeros_stays_zero(dtype):
    weight, core, suffix, magnitude = call((5, 4, 3), 2, dtype, torch.float32)
    with torch.no_grad():
        weight[2], magnitude[2] = 0.0, 0.0
        core[3], weight[3], magnitude[3] = 0.0, 0.0, 0.0
    got = dora_fuse(weight, core, suffix, magnitude)
    assert not got[2:4].count_nonzero()
    assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(got.float().sum(), (weight, core, suffix, magnitude)))


def test_rows_that_cancel():
    """``s B A = -W`` up to rounding: the square of the norm is clamped at 0, and nothing is NaN."""
    core, suffix = torch.randn(6, 2), torch.randn(2, 5, 3)
    weight = -(core @ suffix.flatten(1)).view(6, 5, 3)
    norms = dora_norm(weight, core, suffix)
    assert bool((norms <= 1e-2 * weight.flatten(1).norm(dim=1)).all())
    assert bool(dora_fuse(weight, core, suffix, torch.zeros(6)).isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_beside_the_weight(dtype):
    """The norm takes ``O r + r²`` and vectors, not ``O n``; the whole op adds its result, and half precision one chunk."""
    (outputs, columns), rank = (64, 4608), 4
    weight, core, suffix, magnitude = call((outputs, 512, 3, 3), rank, dtype, torch.float32)
    chunk = 0 if dtype == torch.float32 else 4 * of_torch.AT_ONCE
    beside = 4 * (outputs * rank + rank**2) + 8 * 4 * outputs + chunk
    dense = 4 * outputs * columns
    squares, own = row_squares(weight), [weight, core, suffix, magnitude]
    for known in (squares, None):
        with StorageTracker([*own, squares]) as tracker:
            dora_norm(weight, core, suffix, weight_squares=known)
        assert tracker.peak <= beside < dense / 3
    with StorageTracker([*own, squares]) as tracker:
        reference.dora_norm(weight, core, suffix)
    assert tracker.peak >= dense
    with torch.no_grad(), StorageTracker([*own, squares]) as tracker:
        dora_fuse(weight, core, suffix, magnitude, weight_squares=squares)
    assert tracker.peak <= weight.nbytes + 2 * beside


def test_saves_its_operands_and_the_norms():
    layer = nn.ParameterList(t.detach() for t in call((16, 8, 3), 2, torch.float32))
    with SavedBytes(layer) as saved:
        dora_fuse(*layer)
    assert saved.total == 16 * 4


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"suffix": [torch.zeros(2, 4, 1)]}, TypeError, "suffix is a list; give a tensor"),
        ({"suffix": torch.zeros(2, 4)}, ValueError, r"suffix has shape \(2, 4\)"),
        ({"core": torch.zeros(4, 2)}, ValueError, r"core has shape \(4, 2\); for this weight give \(5, r1\)"),
        ({"magnitude": torch.zeros(5, 1)}, ValueError, r"magnitude has shape \(5, 1\) on cpu; give \(5,\) on cpu"),
        ({"magnitude": None}, TypeError, "magnitude is a NoneType; give a tensor"),
        ({"weight_squares": torch.zeros(4)}, ValueError, r"weight_squares has shape \(4,\) on cpu; give \(5,\) on cpu"),
        ({"weight": torch.zeros(5, 4, dtype=torch.int32)}, TypeError, "weight is torch.int32"),
    ],
)
def test_bad_input_is_named(change, error, text):
    given = dict(zip(NAMES, call((5, 4, 3), 2), strict=True)) | change
    with pytest.raises(error, match=f"dora_fuse: {text}"):
        dora_fuse(**given)
