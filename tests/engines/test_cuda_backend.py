"""The whole Python side of the CUDA engine with the real kernels, on the emulator and CPU tensors.

Only :func:`lora_edge.ops.engines.cuda.available.runtime` is replaced. What the kernels compute is tested case by case in
test_kernels.py; here it is how they are called, by the tests that every engine with kernels passes and some of its own.
"""

# Argument lists are spliced into calls here, and mypy does not know their lengths.
# mypy: disable-error-code="call-arg"
from __future__ import annotations

import pytest
import torch

from helpers import emulator
from helpers.backend_tests import *  # noqa: F403
from helpers.backend_tests import PLAIN
from helpers.block_calls import arguments
from helpers.cases import ConvCase
from helpers.emulated_cuda import kernels  # noqa: F401
from lora_edge.ops import plan, tt_block, tt_conv, tt_fuse
from lora_edge.ops.activation import Activation
from lora_edge.ops.block_tensors import BlockTensors
from lora_edge.ops.conv_args import conv_args
from lora_edge.ops.engines import memory_layout
from lora_edge.ops.engines.cuda import launch as cuda_launch
from lora_edge.ops.plan import Epilogue, Saves


@pytest.mark.parametrize("case", PLAIN, ids=lambda c: c.name)
def test_saved_buffer_is_as_large_as_the_kernels_say(case, kernels):
    positional, _ = arguments(case, {}, torch.float32)
    x, weight, core, suffix, _, *conv, _ = positional
    sizes = plan.sizes_of(BlockTensors(x, weight, core, None, None, [suffix]))
    args, epilogue = conv_args(*conv, case.dims, "test"), Epilogue(1.0, Activation("relu"))
    found = (cuda_launch, emulator.extension().Plan)
    planned = plan.block_plan(*found, sizes, args, epilogue, Saves(True, True), "factor", plan.FP32)
    scratch = planned.native.scratch()
    assert scratch["h"] <= planned.saved.bits_at < scratch["h"] + 16
    assert planned.saved.bits_at + scratch["bits"] == planned.saved.bytes


def test_views_that_reach_too_far_are_copied():
    far = torch.empty_strided((2, 3), (2**31, 1), dtype=torch.uint8, device="meta")
    assert memory_layout.near(far).is_contiguous()
    near = torch.empty_strided((2, 3), (2**30, 1), dtype=torch.uint8, device="meta")
    assert memory_layout.near(near) is near


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (
            {"activation": Activation("leaky_relu", (0.1,))},
            "activation leaky_relu; the kernels support relu, relu6 and hardtanh",
        ),
        ({"saved_dtype": torch.float64}, "saved_dtype is torch.float64; the kernels support float32, float16 and bfloat16"),
        ({"stride": 5}, "stride"),
        ({"weight": "requires grad"}, "weight requires a gradient; the kernels compute it for x, core, bias and residual"),
        ({"suffix": "requires grad"}, "suffix requires a gradient"),
        ({"affine": (torch.ones(8), torch.ones(8).half())}, "affines of several dtypes"),
        (
            {"suffix": [torch.randn(2, 6, 2), torch.randn(2, 3, 2).half(), torch.randn(2, 3, 1)]},
            "frozen cores of several dtypes",
        ),
        ({"core": torch.randn(8, 65), "suffix": torch.randn(65, 6, 3, 3)}, "rank"),
        ({"x": torch.zeros(1).expand(5_000_000, 6, 9, 8)}, "x has 2160000000 elements; the kernels support fewer than 2..31"),
    ],
    ids=lambda change: next(iter(change)) if isinstance(change, dict) else "",
)
def test_unsupported_calls(change, why, kernels):
    positional, options = arguments(ConvCase("x", padding=2), {}, torch.float32)
    names = ("x", "weight", "core", "suffix", "bias", "stride", "padding", "dilation", "groups", "scale")
    call = dict(zip(names, positional, strict=True)) | options
    for name, value in change.items():
        call[name] = call[name].requires_grad_() if isinstance(value, str) else value
    with pytest.raises(RuntimeError, match=f"tt_block: backend '{kernels.name}' does not support this call: .*{why}") as caught:
        tt_block(**call, backend=kernels.name)
    assert "\n" not in str(caught.value)
    if "x" not in change:
        assert tt_block(**call).shape[1] == 8  # under "auto" it runs on torch
    assert kernels.count == 0


def test_3d_and_float64_go_to_torch(kernels):
    for case, dtype, why in (
        (ConvCase("3-D", dims=3, size=(5, 6, 4)), torch.float32, "3-D"),
        (ConvCase("x"), torch.float64, "64"),
    ):
        positional, _ = arguments(case, {}, dtype)
        with pytest.raises(RuntimeError, match=f"tt_conv: backend '{kernels.name}' does not support this call: .*{why}"):
            tt_conv(*positional, backend=kernels.name)
        tt_conv(*positional)
        with pytest.raises(RuntimeError, match=f"tt_fuse: backend '{kernels.name}' does not support this call: .*{why}"):
            tt_fuse(*positional[1:4], backend=kernels.name)
    assert kernels.count == 0


def test_compile_gives_the_same_calls_to_torch(kernels):
    torch._dynamo.reset()
    positional, options = arguments(ConvCase("x", stride=5, padding=2), {"activation": "relu"}, torch.float32)
    torch.compile(lambda: tt_block(*positional, **options).sum(), backend="eager")().backward()
    assert kernels.count == 0
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match="does not support this call"):
        torch.compile(lambda: tt_block(*positional, **options, backend=kernels.name), backend="eager")()
