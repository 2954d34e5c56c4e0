"""The three doors to compiled code under random calls: no crash, no hang, and valid calls have the reference's value.

LORA_EDGE_FUZZ_CALLS   calls per door, 150 unless set; 2,000 in ``make sanitize``
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import lora_edge
from helpers.fuzz_calls import Call, Launch
from helpers.fuzz_doors import DOORS
from lora_edge import ops
from lora_edge.environment import extension as _extension
from lora_edge.ops.engines.cpu import available

pytestmark = pytest.mark.skipif(isinstance(available.runtime(), str), reason=f"the CPU engine is {available.runtime()}")

ROOT = Path(__file__).resolve().parents[2]
CALLS = int(os.environ.get("LORA_EDGE_FUZZ_CALLS") or 150)
SECONDS_PER_CALL = 1.0  # a call takes a few milliseconds, and tens of times that with sanitizers or on a busy machine


@pytest.mark.other_python
@pytest.mark.parametrize("door", DOORS)
def test_random_calls(door):
    command = [sys.executable, "tests/helpers/fuzz_doors.py", door, str(CALLS)]
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=60 + SECONDS_PER_CALL * CALLS)
    assert done.returncode == 0, done.stderr[-3000:].replace("\r", "\n")
    assert f"{CALLS} calls" in done.stdout
    print(done.stdout.strip())


# one change of each kind


@pytest.fixture
def fields():
    names = _extension.load().call_fields("Plan")
    zeros = {
        name: 0
        for name in names
        if name.endswith(("type", "precision", "activation", "pad_h", "pad_w", "cores", "bond2", "bond3"))
    }
    return dict.fromkeys(names, 1) | zeros | {"low": 0.0, "high": 6.0, "scale": 1.0}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"in_h": 2**31 - 1, "in_w": 2}, "x has batch * channels * in_h * in_w = 1 * 1 * 2147483647 * 2 elements"),
        ({"batch": 2**20, "outputs": 2**12}, "y has batch * outputs * out_h * out_w"),
        ({"kernel_h": 2**16, "kernel_w": 2**16}, "weight has outputs * channels / groups * kernel_h * kernel_w"),
        ({"rank": 2**20, "kernel_w": 2**12}, "suffix has rank * channels / groups * kernel_h * kernel_w"),
        ({"rank": 2**20, "out_w": 2**12}, "h has batch * out_h * out_w * groups * rank"),
        ({"cores": 3, "bond2": 2**20, "bond3": 2**20}, "core2 has bond2 * kernel * bond3"),
        ({"pad_w": 2**31 - 1}, "in + pad + dilation * kernel + stride * out along w is 2147483650"),
        ({"stride_h": 2**31 - 1}, "in + pad + dilation * kernel + stride * out along h is"),
        ({"dilation_h": 2**31 - 1}, "in + pad + dilation * kernel + stride * out along h is"),
        ({"cores": 2, "bond2": 1, "kernel_h": 3}, "kernel_h is 3; with 2 cores, a 1-D kernel, it must be 1"),
    ],
)
def test_a_plan_names_the_size_that_is_too_large(fields, change, text):
    with pytest.raises(ValueError, match=r"^Plan: ") as raised:
        _extension.load().Plan(**fields | change)
    assert str(raised.value).startswith(f"Plan: {text}")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "change", [{"stride_w": 9}, {"stride_w": 31}, {"stride_h": 5}, {"kernel_h": 2**15}, {"in_w": 2**29}, {"type": 1}]
)
def test_scratch_of_a_refused_plan_is_an_error(fields, change):
    plan = _extension.load().Plan(**fields | change)
    assert plan.cpu_refusal() is not None
    with pytest.raises(RuntimeError, match=r"^cpu_scratch: .*the CPU engine supports"):
        plan.cpu_scratch()
    for op in ("tt_fuse", "dora_fuse", "tt_block"):
        assert plan.refusal(op) is not None or min(plan.scratch().values()) >= 0


def a_launch(backward: bool = False) -> Launch:
    import random

    calls = (Call(random.Random(seed)) for seed in range(200))
    whole = ("bias", "a", "residual", "core")
    return Launch(
        next(call for call in calls if all(call.tensors[name] is not None for name in whole) and call.activation), backward
    )


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_a_launch_names_the_tensor_that_does_not_fit(backward):
    names = [name for name in a_launch(backward).numbers if f"{name}_bytes" in a_launch(backward).numbers]
    a_launch(backward).run()
    for name in names:
        if a_launch(backward).numbers[name] == 0:
            continue
        for number, value in ((f"{name}_bytes", -4), (f"{name}_bytes", 0), (name, 0), (name, -8), (name, 2**62 + 1)):
            launch = a_launch(backward)
            launch.numbers[number] = value
            if name == "bits" and number == name and value > 0:
                continue  # bytes may be at any address
            with pytest.raises(ValueError, match=f"of {name} is "):
                launch.run()


@pytest.mark.parametrize(("axis", "stride"), [("c", 2), ("n", -1), ("h", 2**40), ("w", 2**31), ("n", 2**20)])
def test_a_launch_names_the_stride_that_does_not_fit(axis, stride):
    for name, backward in (("x", False), ("residual", False), ("y", False), ("dy", True), ("dx", True), ("dresidual", True)):
        launch = a_launch(backward)
        size = {"n": "batch", "c": "channels" if name in ("x", "dx") else "outputs"}
        edge = ("in" if name in ("x", "dx") else "out") + f"_{axis}"
        if launch.fields[size.get(axis, edge)] == 1:
            continue
        launch.numbers[f"{name}_{axis}"] = stride
        with pytest.raises(ValueError, match=f"of {name} is "):
            launch.run()


@pytest.mark.parametrize("late", [False, True], ids=["before forward", "before backward"])
@pytest.mark.parametrize("shape", [(2, 4), (4, 24), (24, 3), (2400, 4), (0, 4), (96,)], ids=str)
def test_a_layer_whose_core_was_replaced(shape, late):
    model = nn.Sequential(nn.Conv1d(8, 24, 3, padding=1), nn.BatchNorm1d(24), nn.ReLU())
    model, x = lora_edge.adapt(model, rank=4), torch.randn(2, 8, 20, requires_grad=True)
    y = model(x) if late else None
    model[0].core.data = torch.zeros(shape)
    with pytest.raises((ValueError, RuntimeError), match=r"core|shape"):
        (model(x) if y is None else y).sum().backward()


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("saved", lambda saved: saved[:-1], "saved has shape"),
        ("saved", lambda saved: saved[:0], "saved has shape"),
        ("saved", lambda saved: saved.float(), "saved is torch.float32"),
        ("dy", lambda dy: dy[:1], "dy has shape"),
        ("dy", lambda dy: dy.double(), "float32, float16 and bfloat16"),
        ("weight", lambda weight: weight[:4], "channels|shape"),
        ("core", lambda core: core[:, :1], "core has shape"),
        ("factors", lambda factors: [factors[0][:, :, :1]], "suffix has shape"),
        ("factors", lambda factors: [], "save_h is True without a core"),
        ("x_shape", lambda shape: [2, 8, 2**31], "dy has shape|does not support this call"),
        ("x_shape", lambda shape: [-2, 8, 20], "x has shape"),
        ("needs", lambda needs: needs[:3], "needs is"),
        ("engine", lambda _: "cuda", "the engine 'cuda' is"),
        ("engine", lambda _: "none", "engine is 'none'; give one of"),
        ("engine", lambda _: "torch", "engine is 'torch'; give one of"),
    ],
)
def test_an_operator_names_what_does_not_fit(name, value, text):
    from lora_edge.ops import custom_ops  # noqa: F401

    layer = {
        "engine": "cpu",
        "stride": [1],
        "padding": [1, 1],
        "dilation": [1],
        "groups": 1,
        "scale": 1.0,
        "activation": "relu",
    }
    layer |= {"low": 0.0, "high": 0.0, "saved_dtype": None, "save_h": True, "save_bits": True}
    x, weight, core, factors = torch.randn(2, 8, 20), torch.randn(16, 8, 3), torch.randn(16, 2), [torch.randn(2, 8, 3)]
    y, saved = torch.ops.lora_edge.tt_block(x, weight, core, None, None, factors, None, None, None, None, *layer.values())
    call = {
        "dy": torch.ones_like(y),
        "saved": saved,
        "weight": weight,
        "core": core,
        "factors": factors,
        "a": None,
        "residual_a": None,
    }
    call |= {"x_shape": [2, 8, 20], "channels_last": True, "needs": [True, True, True, False], **layer}
    torch.ops.lora_edge.tt_block_backward(*call.values())
    call[name] = value(call[name])
    with pytest.raises((ValueError, TypeError, RuntimeError), match=text):
        torch.ops.lora_edge.tt_block_backward(*call.values())


def test_sizes_beyond_32_bits_are_refused_by_name():
    weight, core, suffix = torch.randn(4, 3, 3), torch.randn(4, 2), torch.randn(2, 3, 3)
    for x, options in (
        (torch.zeros(()).expand(1, 3, 2**31), {}),
        (torch.zeros(()).expand(2**31, 3, 9), {}),
        (torch.randn(1, 3, 9), {"padding": 2**31}),
        (torch.randn(1, 3, 9), {"padding": 2**40}),
        (torch.randn(1, 3, 9), {"stride": 2**40}),
    ):
        with pytest.raises(RuntimeError, match="backend 'cpu' does not support this call"):
            ops.tt_block(x, weight, core, suffix, **options, backend="cpu")
