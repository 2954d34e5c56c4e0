"""The tests that every engine with kernels passes: calls, saved tensors, autograd, custom operators, refusals.

A test module imports them and provides the fixture ``kernels``, with a ``name`` and a ``count`` of its launches.
"""

# Argument lists are spliced into calls here, and mypy does not know their lengths.
# mypy: disable-error-code="call-arg"
from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import lora_edge
from helpers.block_calls import EPILOGUES, arguments, double, leaves
from helpers.cases import CASES, ConvCase
from helpers.networks import network, train
from helpers.tolerances import relative_error
from lora_edge.memory import SavedBytes
from lora_edge.methods.dora import DoRA
from lora_edge.nn.reparametrised import reparametrise
from lora_edge.ops import custom_ops, dora_fuse, plan, reference, tt_block, tt_conv, tt_fuse, use_backend
from lora_edge.ops.activation import Activation
from lora_edge.ops.bits import memory_format
from lora_edge.ops.conv_args import conv_args
from lora_edge.tt import contract_suffix, tt_svd

PLAIN = [case for case in CASES if case.padding_mode == "zeros" and case.dims < 3]


FEW = [c for c in PLAIN if c.name in ("plain, channels-last", "dilation, stride, padding", "groups", "1-D stride, dilation")]


def compare(positional, options, tolerance, kernels, dy=None):
    """Compare value and every gradient of a tt_block call by the kernels with the reference in float64."""
    before = kernels.count
    y = tt_block(*positional, **options, backend=kernels.name)
    exact, exact_options = tuple(map(double, positional)), {k: double(v) for k, v in options.items() if k != "saved_dtype"}
    want = reference.tt_block(*exact, **exact_options)
    assert y.shape == want.shape
    assert y.dtype == positional[0].dtype
    assert memory_format(y) == memory_format(want)
    assert relative_error(y, want) <= tolerance
    plain = reference.tt_block(*exact, **{**exact_options, "activation": None})
    corner = 0.0 if exact_options.get("activation") is None else 0.1  # where a rounding would flip a derivative
    bounds = (0.0, 6.0) if exact_options.get("activation") != Activation("hardtanh", (-0.5, 0.8)) else (-0.5, 0.8)
    far = ((plain - bounds[0]).abs() > corner) & ((plain - bounds[1]).abs() > corner)
    dy = torch.randn_like(y).where(far, 0.0) if dy is None else dy
    inputs, exact_inputs = leaves(positional, options), leaves(exact, exact_options)
    got, expected = torch.autograd.grad(y, inputs, dy), torch.autograd.grad(want, exact_inputs, dy.double())
    for leaf, g, w in zip(inputs, got, expected, strict=True):
        assert g.shape == leaf.shape
        assert g.dtype == leaf.dtype
        assert relative_error(g, w) <= tolerance
    assert kernels.count - before == (2 if positional[0].shape[0] else 0)


def takes_factor_route(case):
    """Whether the cost model chooses the factor route, which the kernels compute; the dense route is torch's."""
    conv, args = case.conv(), conv_args(case.stride, case.padding, case.dilation, case.groups, case.dims, "test")
    rank = contract_suffix(tt_svd(conv.weight.detach(), case.rank)[1:]).shape[0]
    return plan.choose_route(conv.weight.shape, rank, args, case.size) == "factor"


@pytest.mark.parametrize("adapted", [True, False], ids=["adapted", "frozen"])
@pytest.mark.parametrize("epilogue", ["nothing", "residual", "affine, residual with affine, relu6", "hardtanh"])
@pytest.mark.parametrize("case", PLAIN, ids=lambda c: c.name)
def test_matrix(case, epilogue, adapted, kernels):
    positional, options = arguments(case, EPILOGUES[epilogue], torch.float32, adapted)
    if adapted and not takes_factor_route(case):
        with pytest.raises(
            RuntimeError, match=f"tt_block: backend '{kernels.name}' does not support this call: the dense route"
        ):
            tt_block(*positional, **options, backend=kernels.name)
        return
    compare(positional, options, 1e-5, kernels)


@pytest.mark.parametrize("epilogue", ["nothing", "residual", "affine, residual with affine, relu6", "hardtanh"])
@pytest.mark.parametrize("case", FEW, ids=lambda c: c.name)
def test_trained_kernel(case, epilogue, kernels):
    """The kernels run the fused weight as a frozen one and hand back the masked ``dy``."""
    (x, weight, _, _, *rest), options = arguments(case, EPILOGUES[epilogue], torch.float32)
    core = torch.randn(weight.shape[0], 2, *weight.shape[2:]).requires_grad_()
    compare((x, weight, core, torch.randn(2, weight.shape[1], *[1] * case.dims), *rest), options, 1e-5, kernels)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", FEW, ids=lambda c: c.name)
def test_half_precision(case, dtype, kernels):
    positional, options = arguments(case, EPILOGUES["affine, residual, relu"], dtype)
    compare(positional, options, 1e-2, kernels)


@pytest.mark.parametrize("case", FEW, ids=lambda c: c.name)
def test_precision_follows_torch(case, kernels, monkeypatch):
    positional, options = arguments(case, EPILOGUES["residual"], torch.float32)
    exact = tt_block(*positional, **options, backend=kernels.name)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    compare(positional, options, 1e-3, kernels)
    rounded = tt_block(*positional, **options, backend=kernels.name)
    assert relative_error(rounded, exact) > 1e-5


@pytest.mark.parametrize("saved_dtype", [torch.float16, torch.bfloat16], ids=str)
def test_saved_dtype(saved_dtype, kernels):
    positional, options = arguments(ConvCase("x"), EPILOGUES["affine, relu"], torch.float32)
    exact = tt_block(*positional, **options, backend=kernels.name)
    rounded = tt_block(*positional, **options, saved_dtype=saved_dtype, backend=kernels.name)
    assert torch.equal(exact, rounded)
    dy, inputs = torch.randn_like(exact), leaves(positional, options)
    got, want = torch.autograd.grad(rounded, inputs, dy), torch.autograd.grad(exact, inputs, dy)
    assert torch.equal(got[0], want[0])
    assert 0 < relative_error(got[1], want[1]) <= 1e-2


@pytest.mark.parametrize("case", FEW, ids=lambda c: c.name)
def test_frozen_cores_and_routes(case, kernels):
    """tt_conv: the list of cores is contracted in the kernel; the factor route can be forced."""
    positional, _ = arguments(case, {}, torch.float32)
    x, weight, core, _, bias, *rest = positional
    cores = tt_svd(weight.double(), case.rank)[1:]
    exact = tuple(map(double, (x, weight, core))), double(bias)
    want = reference.tt_conv(*exact[0], contract_suffix(cores), exact[1], *rest)
    got = tt_conv(x, weight, core, [c.float() for c in cores], bias, *rest, route="factor", backend=kernels.name)
    assert relative_error(got, want) <= 1e-5
    dy = torch.randn_like(got)
    expected = torch.autograd.grad(want, [*(exact[0][i] for i in (0, 2)), exact[1]], dy.double())
    for g, w in zip(torch.autograd.grad(got, [x, core, bias], dy), expected, strict=True):
        assert relative_error(g, w) <= 1e-5
    with pytest.raises(RuntimeError, match=f"tt_conv: backend '{kernels.name}' does not support this call: the dense route"):
        tt_conv(*positional, route="dense", backend=kernels.name)
    assert kernels.count == 2


@pytest.mark.parametrize("as_cores", [False, True], ids=["suffix", "cores"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel", [(5,), (3, 4)], ids=str)
def test_fuse(kernel, dtype, as_cores, kernels):
    weight = torch.randn(9, 6, *kernel).to(dtype).requires_grad_()
    cores = tt_svd(weight.detach().float(), 3)[1:]
    core = torch.randn(9, cores[0].shape[0], requires_grad=True)
    factors = cores if as_cores else contract_suffix(cores)
    got = tt_fuse(weight, core, factors, 0.7, backend=kernels.name)
    exact = [t.detach().double().requires_grad_() for t in (weight, core)]
    want = reference.tt_fuse(*exact, contract_suffix(cores).double(), 0.7)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert got.dtype == dtype
    assert relative_error(got, want) <= tolerance
    dy = torch.randn_like(got).movedim(0, 1).contiguous().movedim(0, 1)  # any strides
    for g, w in zip(torch.autograd.grad(got, [weight, core], dy), torch.autograd.grad(want, exact, dy.double()), strict=True):
        assert relative_error(g, w) <= tolerance
    assert kernels.count == 2


def dora_arguments(kernel, dtype=torch.float32, factors=torch.float32):
    """Weight, core, suffix and magnitude; all but the weight are trained."""
    tensors = (torch.randn(9, 6, *kernel), torch.randn(9, 3), torch.randn(3, 6, *kernel), torch.rand(9) + 0.5)
    weight, *trained = (t.to(dtype if t is tensors[0] else factors) for t in tensors)
    return weight, *(t.requires_grad_() for t in trained)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel", [(5,), (3, 4)], ids=str)
def test_dora(kernel, dtype, kernels):
    tensors = dora_arguments(kernel, dtype)
    got = dora_fuse(*tensors, 0.7, backend=kernels.name)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    want = reference.dora_fuse(*exact, 0.7)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert got.dtype == dtype
    assert relative_error(got, want) <= tolerance
    dy = torch.randn_like(got).movedim(0, 1).contiguous().movedim(0, 1)  # any strides
    expected = torch.autograd.grad(want, exact[1:], dy.double())
    for g, w in zip(torch.autograd.grad(got, tensors[1:], dy), expected, strict=True):
        assert relative_error(g, w) <= 1e-5
    assert kernels.count == 2


@pytest.mark.parametrize("needs", [1, 2, 3], ids=["core", "suffix", "magnitude"])
def test_dora_computes_only_what_is_needed(needs, kernels):
    tensors = [t.detach().requires_grad_(i == needs) for i, t in enumerate(dora_arguments((5,)))]
    got, want = (dora_fuse(*tensors, backend=name) for name in (kernels.name, "torch"))
    dy = torch.randn_like(got)
    pair = (torch.autograd.grad(y, tensors[needs], dy)[0] for y in (got, want))
    assert relative_error(*pair) <= 1e-5


def test_a_dora_layer_trains_as_on_torch(kernels):
    outputs = {}
    for backend in ("torch", "auto"):
        torch.manual_seed(0)
        conv = nn.Conv1d(6, 9, 5).requires_grad_(False)
        reparametrise(conv, DoRA(conv, 2))
        with use_backend(backend):
            before = kernels.count
            optimizer = torch.optim.SGD([p for p in conv.parameters() if p.requires_grad], 0.05)
            for _ in range(3):
                optimizer.zero_grad()
                conv(torch.randn(4, 6, 20)).square().mean().backward()
                optimizer.step()
            assert (kernels.count > before) == (backend == "auto")
            outputs[backend] = conv.weight.detach()
    assert relative_error(outputs["auto"], outputs["torch"]) <= 1e-5


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({0: torch.randn(9, 6, 5, requires_grad=True)}, "weight requires a gradient"),
        ({0: torch.randn(9, 6, 5).double()}, "weight is torch.float64"),
        ({3: torch.rand(9).double()}, "magnitude is torch.float64; the kernels support float32, float16 and bfloat16"),
        ({1: torch.randn(9, 65), 2: torch.randn(65, 6, 5)}, "rank 65: the kernels support up to 64"),
        ({0: torch.randn(9, 6, 5, 1, 1), 2: torch.randn(3, 6, 5, 1, 1)}, "a 3-D convolution"),
    ],
    ids=["weight", "float64", "magnitude", "rank", "3-D"],
)
def test_what_dora_leaves_to_torch(change, why, kernels):
    tensors = [change.get(i, t) for i, t in enumerate(dora_arguments((5,)))]
    with pytest.raises(RuntimeError, match=f"dora_fuse: backend '{kernels.name}' does not support this call: .*{why}"):
        dora_fuse(*tensors, backend=kernels.name)
    torch.testing.assert_close(dora_fuse(*tensors), dora_fuse(*tensors, backend="torch"))
    assert kernels.count == 0


@pytest.mark.parametrize("factors", [torch.float32, torch.float16], ids=str)
def test_opcheck_of_dora(factors, kernels):
    torch.library.opcheck(custom_ops.dora_fuse, (*dora_arguments((3, 4), factors, torch.float32), kernels.name, 0.5))


def test_dora_compiles_without_graph_breaks(kernels):
    torch._dynamo.reset()
    tensors = dora_arguments((5,))
    compiled = torch.compile(lambda *t: dora_fuse(*t, 0.5).square(), backend="aot_eager", fullgraph=True)
    before = kernels.count
    got, want = (torch.autograd.grad(f(*tensors).sum(), tensors[1:]) for f in (compiled, lambda *t: dora_fuse(*t, 0.5) ** 2))
    assert kernels.count - before == 4
    assert all(relative_error(g, w) <= 1e-6 for g, w in zip(got, want, strict=True))


def test_auto_uses_the_kernels_and_torch_does_not(kernels):
    positional, _ = arguments(ConvCase("x"), {}, torch.float32)
    tt_conv(*positional)
    assert kernels.count == 1
    with use_backend("torch"):
        tt_conv(*positional)
    tt_conv(*positional, backend="torch")
    assert kernels.count == 1
    with use_backend("torch"):
        tt_conv(*positional, backend=kernels.name)
    assert kernels.count == 2


WIDE = ConvCase("wide", inputs=32, outputs=16, size=(20, 20), padding=1)


@pytest.mark.parametrize("saved_dtype", [None, torch.float16], ids=str)
@pytest.mark.parametrize("epilogue", ["nothing", "residual", "affine, relu", "affine, residual with affine, relu6"])
def test_saves_h_and_bits_and_nothing_else(epilogue, saved_dtype, kernels):
    positional, options = arguments(WIDE, EPILOGUES[epilogue], torch.float32)
    own = nn.Module()
    vectors = [*options.get("affine", ()), *options.get("residual_affine", ())]
    for k, t in enumerate([*positional[1:4], *vectors]):
        own.register_buffer(f"b{k}", t.detach())
    positional = (positional[0], own.b0, own.b1.requires_grad_(), own.b2, *positional[4:])
    for name in ("affine", "residual_affine"):
        if name in options:
            options[name] = tuple(
                getattr(own, f"b{3 + k}") for k, v in enumerate(vectors) if any(v is t for t in options[name])
            )
    with SavedBytes(own) as saved:
        y = tt_block(*positional, **options, saved_dtype=saved_dtype, backend=kernels.name)
    h = WIDE.batch * 2 * 20 * 20 * (saved_dtype or torch.float32).itemsize
    assert saved.total == h + (y.numel() // 8 if "activation" in options else 0)
    assert y.untyped_storage().data_ptr() not in saved.storages


@pytest.mark.parametrize("needs", ["x", "core", "bias", "residual"])
def test_saves_and_computes_only_what_is_needed(needs, kernels):
    positional, options = arguments(WIDE, EPILOGUES["affine, residual, relu"], torch.float32)
    tensors = dict(zip(("x", "weight", "core", "suffix", "bias"), positional, strict=False), residual=options["residual"])
    for name, tensor in tensors.items():
        tensor.requires_grad_(name == needs)
    own = nn.Module()
    for k, t in enumerate([*positional[1:4], *options["affine"]]):
        own.register_parameter(f"p{k}", nn.Parameter(t, t.requires_grad) if k != 1 else None)
    with SavedBytes(own) as saved:
        y = tt_block(*positional, **options, backend=kernels.name)
    bits, h = y.numel() // 8, WIDE.batch * 2 * 20 * 20 * 4
    factors = sum(t.numel() * 4 for t in positional[1:4]) + 16 * 4  # the layer's own tensors, which are not registered here
    assert saved.total <= bits + (h if needs == "core" else 0) + factors
    want = reference.tt_block(*positional, **options)
    dy = torch.randn_like(y)
    got = torch.autograd.grad(y, tensors[needs], dy)[0]
    assert relative_error(got, torch.autograd.grad(want, tensors[needs], dy)[0]) <= 1e-5
    with torch.no_grad(), SavedBytes(own) as saved:
        tt_block(*positional, **options, backend=kernels.name)
    assert saved.total == 0


def test_unbatched(kernels):
    positional, _ = arguments(ConvCase("x", batch=1), {}, torch.float32)
    x, *rest = positional
    one = x.detach()[0].requires_grad_()
    y, want = tt_conv(one, *rest, backend=kernels.name), tt_conv(x, *rest, backend=kernels.name)[0]
    assert torch.equal(y, want)
    y.sum().backward()
    assert one.grad.shape == one.shape


def test_1d_in_channels_last_memory(kernels):
    """(N, L, C) viewed as (N, C, L), as a Linear gives it, is read and written without a copy."""
    case = ConvCase("1-D", dims=1, kernel=3, size=(20,), padding=1)
    positional, options = arguments(case, EPILOGUES["affine, relu"], torch.float32)
    x = positional[0].detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    compare((x, *positional[1:]), options, 1e-5, kernels)
    y = tt_block(x, *positional[1:], **options)
    assert y.stride() == (20 * 8, 1, 8)
    assert torch.autograd.grad(y.sum(), x)[0].stride() == (20 * 6, 1, 6)


@pytest.mark.parametrize("channels_last", [False, True])
def test_strided_overlapping_and_misaligned_tensors(channels_last, kernels):
    case = ConvCase("odd", batch=4, channels_last=channels_last)
    positional, options = arguments(case, EPILOGUES["affine, residual, relu"], torch.float32)
    sliced = torch.randn(4, 9, 16, 12).permute(0, 3, 1, 2)[:, ::2, :, ::2]
    expanded = torch.randn(1, 6, 9, 8).expand(4, -1, -1, -1)
    overlapping = torch.randn(4 * 6 * 80).as_strided((4, 6, 9, 8), (6 * 80, 80, 6, 1))
    misaligned = torch.randn(4 * 6 * 9 * 8 + 1)[1:].view(4, 6, 9, 8)
    flipped = torch.randn(6, 4, 8, 9).transpose(0, 1).transpose(2, 3)
    for x in (sliced, expanded, overlapping, misaligned, flipped):
        positional = (x.detach().requires_grad_(), *positional[1:])
        y = tt_block(*positional, **options, backend=kernels.name)
        exact, exact_options = tuple(map(double, positional)), {k: double(v) for k, v in options.items()}
        want = reference.tt_block(*exact, **exact_options)
        assert relative_error(y, want) <= 1e-5
        for dy in (torch.ones(()).expand_as(y), torch.randn(8, 1, 7, 6).transpose(0, 1).expand_as(y)):
            kept = dy.clone()
            got = torch.autograd.grad(y, leaves(positional, options), dy, retain_graph=True)
            expected = torch.autograd.grad(want, leaves(exact, exact_options), dy.double(), retain_graph=True)
            for g, w in zip(got, expected, strict=True):
                assert relative_error(g, w) <= 1e-5
            assert torch.equal(dy, kept)


def test_factors_in_any_layout(kernels):
    positional, options = arguments(ConvCase("x"), EPILOGUES["affine, relu"], torch.float32)
    x, weight, core, suffix, bias, *rest = positional
    weight = weight.contiguous(memory_format=torch.channels_last)
    core = torch.stack([core.detach(), core.detach()], -1)[..., 0].requires_grad_()
    bias = torch.stack([bias.detach(), bias.detach()], -1)[..., 0].requires_grad_()
    options["affine"] = tuple(torch.stack([t, t], -1)[..., 0] for t in options["affine"])
    suffix = suffix.contiguous(memory_format=torch.channels_last)
    compare((x, weight, core, suffix, bias, *rest), options, 1e-5, kernels)


def test_residual_without_activation_gets_dy_itself(kernels):
    positional, options = arguments(ConvCase("x"), EPILOGUES["residual"], torch.float32)
    y = tt_block(*positional, **options, backend=kernels.name)
    dy = torch.randn_like(y)
    (got,) = torch.autograd.grad(y, options["residual"], dy)
    assert got.data_ptr() == dy.data_ptr()


def test_double_backward_is_refused_and_changed_factors_are_noticed(kernels):
    positional, options = arguments(ConvCase("x"), EPILOGUES["affine, relu"], torch.float32)
    y = tt_block(*positional, **options, backend=kernels.name)
    (dx,) = torch.autograd.grad(y.square().sum(), positional[0], create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        dx.sum().backward()
    y = tt_block(*positional, **options, backend=kernels.name).sum()
    with torch.no_grad():
        positional[2].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_autocast(kernels):
    positional, options = arguments(ConvCase("x"), EPILOGUES["affine, residual, relu"], torch.float32)
    for backend in (kernels.name, "torch"):
        with torch.autocast("cpu", torch.bfloat16):
            y, conv = tt_block(*positional, **options, backend=backend), tt_conv(*positional, backend=backend)
        want = reference.tt_block(*positional, **options)
        assert y.dtype == conv.dtype == torch.bfloat16
        assert relative_error(y, want) <= 1e-2
        for g, leaf in zip(torch.autograd.grad(y.sum(), leaves(positional, options)), leaves(positional, options), strict=True):
            assert g.dtype == leaf.dtype
    assert kernels.count == 3


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"x": torch.randn(3, 6, 9, 8).double()}, TypeError, "x is torch.float64, weight is torch.float32"),
        ({"x": torch.zeros(3, 6, 9, 8, dtype=torch.int32)}, TypeError, "x is torch.int32"),
        ({"x": torch.zeros(3, 6, 9, 8, device="meta")}, ValueError, "x is on meta, weight on cpu"),
        ({"core": torch.zeros(8, 2, device="meta")}, ValueError, "weight is on cpu, core on meta"),
        ({"x": torch.randn(3, 5, 9, 8)}, ValueError, "x has 5 channels"),
        ({"x": torch.randn(9, 8)}, ValueError, "x has shape"),
        ({"suffix": torch.randn(2, 6, 3)}, ValueError, "suffix has shape"),
        ({"suffix": [torch.randn(2, 6, 2), torch.randn(3, 3, 2), torch.randn(2, 3, 1)]}, ValueError, "neighbouring bonds"),
        ({"suffix": [torch.randn(2, 6, 2), torch.randn(2, 9, 1)]}, ValueError, r"suffix has shape \(2, 6, 9\)"),
        ({"bias": torch.randn(7)}, ValueError, "bias has shape"),
        ({"residual": torch.randn(3, 8, 9, 8)}, ValueError, "residual has shape"),
        ({"residual": torch.randn(3, 8, 7, 6).half()}, ValueError, "residual is torch.float16"),
        ({"x": torch.randn(3, 6, 2, 8)}, RuntimeError, r"kernel size can't be greater than the padded input: .*\(3, 3\) of"),
        ({"x": torch.randn(3, 6, 0, 8)}, RuntimeError, "kernel size can't be greater than the padded input"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_any_launch(change, error, text, kernels):
    positional, _ = arguments(ConvCase("x"), {}, torch.float32)
    names = ("x", "weight", "core", "suffix", "bias", "stride", "padding", "dilation", "groups", "scale")
    with pytest.raises(error, match=text) as caught:
        tt_block(**{**dict(zip(names, positional, strict=True)), **change}, backend=kernels.name)
    assert "\n" not in str(caught.value)
    assert kernels.count == 0


def operator_arguments(
    engine: str, case: ConvCase, activation: str | None, as_cores: bool, saved_dtype=None, residual: bool = True
):
    """Positional arguments of lora_edge::tt_block."""
    epilogue = {"affine": True, **({"residual": True} if residual else {})}
    (x, weight, core, suffix, bias, stride, padding, dilation, groups, scale), options = arguments(
        case, epilogue, torch.float32
    )
    factors = [c.float() for c in tt_svd(weight.double(), case.rank)[1:]] if as_cores else [suffix]
    args = conv_args(stride, padding, dilation, groups, case.dims, "test")
    pads = [p for pair in args.total_padding(weight.shape[2:]) for p in pair]
    layer = (args.stride, pads, args.dilation, groups, scale, activation, -0.5, 0.8, saved_dtype, True, activation is not None)
    layer = (engine, *layer)
    return (x, weight, core, bias, options.get("residual"), factors, *options["affine"], None, None, *map(_plain, layer))


def _plain(value):
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize(
    "inputs",
    [
        lambda name: operator_arguments(name, ConvCase("x"), "relu", False),
        lambda name: operator_arguments(name, ConvCase("x", channels_last=True, padding=1), "hardtanh", True, torch.float16),
        lambda name: operator_arguments(name, ConvCase("x", dims=1, kernel=4, size=(12,), padding="same"), None, True),
        lambda name: operator_arguments(name, ConvCase("x", groups=2, stride=2), None, False, residual=False),
    ],
)
def test_opcheck(inputs, kernels):
    torch.library.opcheck(custom_ops.tt_block, inputs(kernels.name))


@pytest.mark.parametrize("trained", ["core", "weight and core"])
def test_opcheck_of_fuse(trained, kernels):
    weight = torch.randn(8, 6, 3, 3, requires_grad=trained != "core")
    torch.library.opcheck(
        custom_ops.tt_fuse, (weight, torch.randn(8, 2, requires_grad=True), tt_svd(weight.detach(), 2)[1:], kernels.name, 0.5)
    )


def test_compile_without_graph_breaks(kernels):
    torch._dynamo.reset()
    case = ConvCase("x", padding=1)
    (x, weight, core, suffix, bias, *_), options = arguments(case, EPILOGUES["affine, residual, relu"], torch.float32)
    cores = [c.float() for c in tt_svd(weight.double(), 2)[1:]]

    def step(x, residual):
        fused = tt_fuse(weight, core, cores, 0.5)
        y = tt_conv(x, weight, core, cores, bias, padding=1) + fused.sum()
        z = tt_conv(y, weight[:6, :8] if weight.shape[1] >= 8 else weight[:, :6].transpose(0, 1), *other)
        return tt_block(z, weight, core, suffix, bias, padding=1, **{**options, "residual": residual})

    other = (torch.randn(6, 2), torch.randn(2, 8, 3, 3), None, 1, 1)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for batch in (3, 5, 4):
        x, residual = (torch.randn(batch, n, 9, 8, requires_grad=True) for n in (6, 8))
        before = kernels.count
        y = compiled(x, residual)
        assert kernels.count - before == 4
        want = step(x, residual)
        assert relative_error(y, want) <= 1e-6
        dy, inputs = torch.randn_like(y), [x, core, bias, residual]
        for g, w in zip(torch.autograd.grad(y, inputs, dy), torch.autograd.grad(want, inputs, dy), strict=True):
            assert relative_error(g, w) <= 1e-6


@pytest.mark.parametrize("name", ["1-D", "2-D"])
def test_a_network_trains_as_on_torch(name, kernels):
    """The same losses step by step, with fused blocks; the summary names each layer's backend."""
    outputs = {}
    for backend in ("torch", "auto"):
        model, x = network(name)
        lora_edge.adapt(model, 2, backend=backend)
        torch.manual_seed(1)
        before = kernels.count
        train(model, x, list(lora_edge.trainable_parameters(model)))
        assert (kernels.count > before) == (backend == "auto")
        outputs[backend] = model(x).detach()
    assert relative_error(outputs["auto"], outputs["torch"]) <= 1e-4
    rows = {row.name: row.backend for row in lora_edge.summary(model, x).layers}
    if name == "1-D":
        assert set(rows.values()) == {kernels.name}
    else:
        assert rows["stem"] == kernels.name
        assert rows["depthwise"].startswith("torch (the dense route")
    assert "backend" in str(lora_edge.summary(model, x))


def test_plans_are_bounded(kernels):
    assert plan.block_plan.cache_info().maxsize == plan.PLANS
    positional, _ = arguments(ConvCase("x"), {}, torch.float32)
    tt_conv(*positional)
    misses = plan.block_plan.cache_info().misses
    tt_conv(*positional)
    assert plan.block_plan.cache_info().misses == misses
    positional, _ = arguments(replace(ConvCase("x"), batch=5), {}, torch.float32)
    tt_conv(*positional)
    assert plan.block_plan.cache_info().misses == misses + 1


__all__ = [name for name in globals() if name.startswith("test_")]  # what an engine's module imports
