"""The CPU engine (csrc/cpu) against float64, with every instruction set, number of threads and division of the work."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lora_edge
from helpers import kernel_cases
from helpers.cases import ConvCase
from helpers.kernel_cases import Case
from helpers.tolerances import relative_error
from lora_edge import ops
from lora_edge.har.models import MobileNetV2, ResNet18, TResNet, pointwise
from lora_edge.ops import backends, reference, use_backend
from lora_edge.ops.activation import Activation
from lora_edge.ops.conv_args import ConvArgs
from lora_edge.ops.engines.cpu import available
from lora_edge.ops.route import choose_route
from lora_edge.ops.tt_block import run_block

pytestmark = pytest.mark.skipif(isinstance(available.runtime(), str), reason=f"the CPU engine is {available.runtime()}")

_LAST = {"channels_last": True}
_SHAPES = [  # larger than the other kernels' cases: whole panels, several chunks of k and units, odd remainders
    ConvCase("panels and chunks", inputs=70, outputs=136, kernel=3, padding=1, size=(9, 11), **_LAST),
    ConvCase("many samples a unit", dims=1, inputs=16, outputs=24, kernel=5, padding="same", size=(7,), batch=70),
    ConvCase("even kernel", dims=1, inputs=97, outputs=64, kernel=8, padding="same", size=(60,), bias=False, batch=5),
    ConvCase("tall", inputs=70, outputs=72, kernel=3, padding=1, size=(10, 11), batch=5, **_LAST),
    ConvCase("tall, many channels", inputs=264, outputs=24, kernel=3, padding=1, size=(6, 9), batch=6, **_LAST),
    ConvCase("wide, many channels", inputs=300, outputs=24, kernel=(2, 5), padding="same", size=(6, 9), batch=6, **_LAST),
    ConvCase("two taps", dims=1, inputs=8, outputs=16, kernel=2, padding="same", size=(21,)),
    ConvCase("four taps", dims=1, inputs=8, outputs=16, kernel=4, padding=2, size=(20,)),
    ConvCase("seven taps", dims=1, inputs=8, outputs=16, kernel=7, padding=3, size=(2,)),
    ConvCase("more taps than positions", dims=1, inputs=8, outputs=8, kernel=7, padding=6, size=(3,)),
    ConvCase("stride 2", inputs=24, outputs=40, kernel=3, stride=2, padding=1, size=(13, 12), batch=4, **_LAST),
    ConvCase("1x1, stride 2", inputs=24, outputs=40, kernel=1, stride=2, size=(13, 12), batch=4, **_LAST),
    ConvCase("dilated", inputs=8, outputs=8, kernel=3, dilation=2, padding=2, size=(9, 9)),
    ConvCase("one sample", inputs=16, outputs=72, kernel=3, padding=1, size=(20, 20), batch=1, **_LAST),
    ConvCase("frozen depthwise", inputs=24, outputs=24, groups=24, kernel=3, padding=1, size=(9, 8), **_LAST),
    ConvCase("frozen depthwise, stride 2", inputs=16, outputs=16, groups=16, kernel=5, stride=2, padding=2, size=(9, 8)),
]
_EPILOGUES = [
    {"affine": True, "activation": "relu"},
    {"residual": True, "residual_affine": True, "affine": True, "activation": "hardtanh"},
    {"activation": "relu6", "residual": True, "cores": True},
]
CASES = [case for case in kernel_cases.CASES_OF_BLOCKS if case.unit == "fp32" and case.saved is None and not case.not_a_number]
CASES += [
    Case(conv, "fp32", **{**epilogue, **({"adapted": False, "cores": False} if "depthwise" in conv.name else {})})
    for conv in _SHAPES
    for epilogue in _EPILOGUES
]
_ACTIVATIONS = {
    None: None, "relu": Activation("relu"), "relu6": Activation("relu6"), "hardtanh": Activation("hardtanh", (-0.5, 0.7)),
}  # fmt: skip
_BOUNDS = {None: (), "relu": (0.0,), "relu6": (0.0, 6.0), "hardtanh": (-0.5, 0.7)}


@pytest.fixture(autouse=True)
def poisoned():
    """Memory that is never written reads as NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def results(case: Case, inputs, backend: str | None) -> dict[str, Tensor]:
    """``y`` and the gradients; by the reference in float64 if ``backend`` is None."""

    def of(value):
        if isinstance(value, (tuple, list)):
            return type(value)(map(of, value))
        return value if value is None or backend is not None else value.double()

    residual = inputs.residual if case.residual else None
    residual_affine = inputs.residual_affine if case.residual else None
    named = {"x": inputs.x, "core": inputs.core, "bias": inputs.bias, "residual": residual}
    leaves = {name: of(t).detach().requires_grad_(name != "x" or case.dx) for name, t in named.items() if t is not None}
    x, core, bias, residual = (leaves.get(name) for name in named)
    factors = None if not inputs.rank else of(inputs.cores if case.cores else inputs.suffix)
    weight, affine, residual_affine = of(inputs.weight), of(inputs.affine), of(residual_affine)
    activation = _ACTIVATIONS[case.activation]
    if backend is None:
        y = reference.tt_block(
            x, weight, core, factors, bias, *inputs.args[:4], case.scale, affine=affine, residual=residual,
            residual_affine=residual_affine, activation=activation,
        )  # fmt: skip
    else:
        y = run_block(
            x, weight, core, factors, bias, inputs.args, case.scale, affine, residual, residual_affine, activation, None,
            backend=backend,
        )  # fmt: skip
    trained = {name: t for name, t in leaves.items() if t.requires_grad}
    if not trained:
        return {"y": y}
    return {"y": y, **dict(zip(trained, torch.autograd.grad(y, list(trained.values()), of(inputs.dy)), strict=True))}


def supported(case: Case) -> bool:
    """Whether the engine supports a case: neither groups nor the dense route."""
    groups, inputs = case.conv.groups, kernel_cases._Inputs(case)
    if case.adapted and choose_route(inputs.weight.shape, inputs.rank, inputs.args, inputs.x.shape[2:], 1.0) == "dense":
        return False
    return groups == 1 or (not case.adapted and groups == case.conv.inputs == case.conv.outputs and groups % 8 == 0)


@pytest.mark.parametrize("times", [1, 6], ids=["few positions", "many positions"])
@pytest.mark.parametrize("case", [case for case in CASES if supported(case)], ids=lambda case: case.name)
def test_case(case, times):
    """With six times the batch most cases exceed the engine's path for few positions, and have more units."""
    if times > 1:
        case = replace(case, conv=replace(case.conv, batch=case.conv.batch * times))
    compare(case, kernel_cases._Inputs(case), times > 1)


def compare(case: Case, inputs, many: bool) -> None:
    """Compare the engine with float64, to 1e-6."""
    z = results(replace(case, activation=None), inputs, None)["y"].detach()
    for bound in _BOUNDS[case.activation]:  # a rounding there flips a bit
        near = (z - bound).abs() <= 1e-6 * z.abs().max()
        inputs.dy = inputs.dy.where(~near, 0.0) if near.any() else inputs.dy
    got = results(case, inputs, "cpu")
    for name, want in results(case, inputs, None).items():
        summed = name == "bias" or (name == "core" and many)  # sums over many positions, whose terms cancel
        assert relative_error(got[name], want) <= 1e-6 * (5 if summed else 1), name


@pytest.mark.parametrize("size", [(5,), (6,), (9,), (15,), (30,), (31,), (6, 9)], ids=str)
@pytest.mark.parametrize("taps", range(2, 12))
def test_case_of_taps(taps, size):
    """Tiles of two and of four outputs, at every remainder of the width, and the input gradients of strided ones."""
    for stride, inputs, outputs in ((1, 13, 70), (2, 33, 17), (3, 8, 9)):
        kernel = taps if len(size) == 1 else (2, taps)
        conv = ConvCase(
            "taps", dims=len(size), inputs=inputs, outputs=outputs, kernel=kernel, size=size, stride=stride, padding=taps // 2,
            batch=64, **_LAST,
        )  # fmt: skip
        case = Case(conv, "fp32", affine=True, activation="relu")
        compare(case, kernel_cases._Inputs(case), True)


def digest(threads: int) -> list[float]:
    """Float64 sums over the results of some cases, for an exact comparison."""
    torch.set_num_threads(threads)
    found = []
    for case in CASES[-3 * len(_SHAPES) :: 3]:
        found += [float(t.detach().double().sum()) for t in results(case, kernel_cases._Inputs(case), "cpu").values()]
    return found


def test_threads_do_not_change_a_bit():
    before = torch.get_num_threads()
    try:
        one = digest(1)
        assert all(digest(threads) == one for threads in (2, 3, 7))
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.other_python
@pytest.mark.parametrize("instructions", ["avx2", "baseline"])
def test_other_instruction_sets(instructions):
    """The cases again, in a process that is limited to these instructions."""
    if os.environ.get("LORA_EDGE_CPU"):
        pytest.skip(f"LORA_EDGE_CPU is {os.environ['LORA_EDGE_CPU']} already")
    env = {**os.environ, "LORA_EDGE_CPU": instructions}
    code = "import lora_edge._C as c; print(c.build_info()['cpu'])"
    root = Path(__file__).parents[2]
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=root, check=True)
    if found.stdout.strip() != instructions:
        pytest.skip(f"this machine has no {instructions}")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", "test_case"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=root)
    assert done.returncode == 0, done.stdout[-2000:]


@given(
    dims=st.integers(1, 2), inputs=st.integers(1, 40), outputs=st.integers(1, 80), kernel=st.integers(1, 9),
    size=st.integers(1, 20), stride=st.integers(1, 4), padding=st.integers(0, 5), dilation=st.integers(1, 3),
    batch=st.integers(1, 9), rank=st.integers(1, 5), epilogue=st.sampled_from(_EPILOGUES), last=st.booleans(),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_any_convolution(dims, inputs, outputs, kernel, size, stride, padding, dilation, batch, rank, epilogue, last):
    kernel = min(kernel, 4) if dims == 2 else kernel
    if size + 2 * padding < dilation * (kernel - 1) + 1:
        return
    conv = ConvCase(
        "random", dims=dims, inputs=inputs, outputs=outputs, kernel=kernel, size=(size, size + 1)[:dims], stride=stride,
        padding=padding, dilation=dilation, batch=batch, rank=rank, channels_last=last,
    )  # fmt: skip
    case = Case(conv, "fp32", **{**epilogue, "cores": False})
    made = kernel_cases._Inputs(case)
    exact = results(case, made, None)
    near = reference.tt_block(
        made.x.double(), made.weight.double(), made.core.double(), made.suffix.double(), made.bias.double(), *made.args[:4],
        affine=None if made.affine is None else tuple(t.double() for t in made.affine),
        residual=made.residual.double() if case.residual else None,
        residual_affine=None if made.residual_affine is None else tuple(t.double() for t in made.residual_affine),
    )  # fmt: skip
    rounding = 1e-5 * float(
        near.detach().abs().max()
    )  # of the sums, whose size a clamp does not change; 20 times the engine's 0.5e-6
    for bound in (0.0, 6.0, -0.5, 0.7):  # a rounding there flips a bit
        made.dy = made.dy.where((near - bound).abs() > rounding, 0.0)
    exact = results(case, made, None)
    got = results(case, made, "auto")
    for name, want in exact.items():
        atol = rounding if name == "y" else 1e-5 * float(want.detach().abs().max()) + 1e-9
        assert torch.allclose(got[name].double(), want, rtol=1e-4, atol=atol), name


@pytest.mark.parametrize("batch", [1, 2, 5, 40])
@pytest.mark.parametrize("kernel", [1, 3])
def test_y_overwrites_x(batch, kernel):
    x = torch.randn(batch, 72, 9, 10).contiguous(memory_format=torch.channels_last)
    weight, core, suffix = torch.randn(72, 72, kernel, kernel), torch.randn(72, 2), torch.randn(2, 72, kernel, kernel)
    core.requires_grad_()
    residual, dy = torch.randn(batch, 72, 9, 10), torch.randn(batch, 72, 9, 10)
    args = ConvArgs((1, 1), (kernel // 2, kernel // 2), (1, 1), 1)

    def run(overwrite: bool) -> tuple[Tensor, ...]:
        leaf = x.clone().requires_grad_()
        inner = leaf * 1  # which the product's backward does not need
        y = run_block(
            inner, weight, core, suffix, None, args, 0.7, None, residual, None, Activation("relu"), None, overwrite, "cpu"
        )  # fmt: skip
        assert (y.data_ptr() == inner.data_ptr()) == overwrite
        return (y, *torch.autograd.grad(y, (leaf, core), dy))

    assert all(torch.equal(a, b) for a, b in zip(run(True), run(False), strict=True))


def test_nan_spreads_no_further_than_it_should():
    x = torch.randn(3, 8, 12, 10)
    weight, core, suffix = torch.randn(16, 8, 3, 3), torch.randn(16, 2), torch.randn(2, 8, 3, 3)
    clean = ops.tt_block(x, weight, core, suffix, padding=1, activation="relu", backend="cpu")
    x[1, 3, 5, 4] = float("nan")
    y = ops.tt_block(x, weight, core, suffix, padding=1, activation="relu", backend="cpu")
    assert y[1, :, 4:7, 3:6].isnan().all()
    near = torch.zeros_like(y, dtype=torch.bool)
    near[1, :, 4:7, 2:7] = True  # pairs of outputs share products
    assert torch.equal(y[~near], clean[~near])


def test_strided_and_expanded_tensors():
    base = torch.randn(4, 9, 16, 24)
    sliced = base.permute(0, 3, 1, 2)[:, ::3, :, ::2]
    expanded = torch.randn(1, 8, 9, 8).expand(4, -1, -1, -1)
    weight, core, suffix = torch.randn(8, 8, 3, 3), torch.randn(8, 2, requires_grad=True), torch.randn(2, 8, 3, 3)
    for x in (sliced, expanded):
        x = x.detach().requires_grad_()
        y = ops.tt_block(x, weight, core, suffix, padding=1, backend="cpu")
        want = reference.tt_block(x.double(), weight.double(), core.double(), suffix.double(), None, 1, 1)
        assert relative_error(y, want) <= 1e-6
        for dy in (torch.ones(()).expand_as(y), torch.randn(4, 8, 1, 1).expand_as(y)):
            kept = dy.clone()
            got = torch.autograd.grad(y, (x, core), dy, retain_graph=True)
            expected = torch.autograd.grad(want, (x, core), dy.double(), retain_graph=True)
            assert all(relative_error(g, w) <= 2e-6 for g, w in zip(got, expected, strict=True))
            assert torch.equal(dy, kept)


def test_calls_left_to_torch():
    weight, core, suffix, x = torch.randn(8, 8, 3), torch.randn(8, 2), torch.randn(2, 8, 3), torch.randn(2, 8, 9)
    for change, why in (
        ({"x": x.half(), "weight": weight.half()}, "16-bit tensors"),
        ({"x": x.double(), "weight": weight.double()}, "weight is torch.float64"),
        ({"groups": 2, "weight": weight[:, :4], "suffix": suffix[:, :4]}, "groups; the CPU engine supports one group"),
        ({"stride": 5}, "a stride over 4"),
    ):
        call = {"x": x, "weight": weight, "core": core, "suffix": suffix, "padding": 1, **change}
        with pytest.raises(RuntimeError, match=f"tt_block: backend 'cpu' does not support this call: .*{why}"):
            ops.tt_block(**call, backend="cpu")
        assert ops.tt_block(**call).shape[0] == 2
    with pytest.raises(RuntimeError, match="tt_fuse: backend 'cpu' does not support this call: tt_fuse by itself"):
        ops.tt_fuse(weight, core, suffix, backend="cpu")
    assert torch.equal(ops.tt_conv(x, weight, 0 * core, suffix), nn.functional.conv1d(x, weight))  # "auto": bit-identical
    with pytest.raises(RuntimeError, match=r"traced by torch.compile; the CPU engine runs in eager mode"):
        torch.compile(lambda: ops.tt_block(x, weight, core, suffix, backend="cpu"), backend="eager")()


def test_named_where_it_is_missing(monkeypatch):
    monkeypatch.setattr(available, "runtime", lambda: "not built; do this")
    assert backends()["cpu"] == "not built; do this"
    with pytest.raises(RuntimeError, match="backend 'cpu' is not built; do this"):
        ops.tt_block(torch.randn(1, 2, 3), torch.randn(2, 2, 1), None, None, backend="cpu")
    assert ops.tt_block(torch.randn(1, 2, 3), torch.randn(2, 2, 1), None, None).shape == (1, 2, 3)


@pytest.mark.parametrize("saved_dtype", [None, "float16", "bfloat16"])
@pytest.mark.parametrize(
    ("make", "shape"),
    [(lambda: TResNet(97, 5), (97, 30)), (lambda: MobileNetV2(5), (3, 33, 40)), (lambda: ResNet18(5), (3, 16, 16))],
    ids=["TResNet", "MobileNetV2", "ResNet18"],
)
def test_networks_train_as_on_torch(make, shape, saved_dtype):
    torch.manual_seed(0)
    state = make().state_dict()
    x, y = torch.randn(6, *shape), torch.randint(5, (6,))
    found = {}
    for backend in ("torch", "cpu"):
        adapted = make()
        adapted.load_state_dict(state)
        targets = pointwise(adapted) if isinstance(adapted, MobileNetV2) else None
        lora_edge.adapt(adapted, 2, saved_dtype=saved_dtype, targets=targets)
        optimizer = torch.optim.SGD(lora_edge.trainable_parameters(adapted), lr=1e-3)
        losses = []
        with use_backend(backend if backend == "torch" else "auto"):
            for _ in range(4):
                loss = nn.functional.cross_entropy(adapted(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(float(loss.detach()))
        found[backend] = losses
    assert found["cpu"] == pytest.approx(found["torch"], rel=2e-3 if saved_dtype else 2e-4)


def test_one_copy_at_the_door(monkeypatch):
    """Maps and gradients stay channels-last from block to block, in 1-D too."""
    from lora_edge.ops.engines.cpu import launch

    model = lora_edge.adapt(TResNet(6, 3), 2)
    seen = []
    original = launch.channels_last
    monkeypatch.setattr(launch, "lay_out", original)  # copies at the door itself are not counted
    monkeypatch.setattr(launch, "channels_last", lambda x: (seen.append(original(x) is x), original(x))[1])
    model(torch.randn(4, 6, 20)).sum().backward()
    assert seen.count(False) == 1  # the incoming gradient at the other end, from the mean
    assert len(seen) > 10
