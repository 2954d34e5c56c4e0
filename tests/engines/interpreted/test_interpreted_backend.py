"""The whole Python side of the Triton engine in the interpreter, on CPU tensors, by the tests of the CUDA engine.

Only the runtime of :mod:`lora_edge.ops.engines.triton.available` is replaced.
"""

from __future__ import annotations

import pytest
import torch

from helpers.backend_tests import *  # noqa: F403
from helpers.block_calls import arguments
from helpers.cases import ConvCase
from lora_edge import check
from lora_edge.ops import tt_block, tt_conv
from lora_edge.ops.activation import Activation
from lora_edge.ops.engines.triton import available
from lora_edge.ops.engines.triton.kernels import dora_fuse as dora_launches
from lora_edge.ops.engines.triton.kernels import tt_block as block_launches
from lora_edge.ops.engines.triton.kernels import tt_fuse as fuse_launches


class Launches:
    """Counts the launches."""

    name = "triton"
    count = 0

    def counted(self, function):
        def call(*args):
            self.count += 1
            return function(*args)

        return call


@pytest.fixture
def kernels(monkeypatch):
    """The Triton engine on CPU tensors, in full float32; counts its launches."""
    launches = Launches()
    for module in (block_launches, fuse_launches, dora_launches):
        for name in ("forward", "backward"):
            monkeypatch.setattr(module, name, launches.counted(getattr(module, name)))
    monkeypatch.setattr(available, "runtime", lambda: available.Runtime("cpu"))
    monkeypatch.setattr(available, "DEVICE_TYPE", "cpu")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return launches


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (
            {"activation": Activation("leaky_relu", (0.1,))},
            "activation leaky_relu; the kernels support relu, relu6 and hardtanh",
        ),
        ({"saved_dtype": torch.float64}, "saved_dtype is torch.float64; the kernels support float32, float16 and bfloat16"),
        ({"core": torch.randn(8, 17), "suffix": torch.randn(17, 6, 3, 3)}, "rank 17: the kernels support up to 16"),
        (
            {"suffix": [torch.randn(2, 6, 65), torch.randn(65, 3, 2), torch.randn(2, 3, 1)]},
            "a bond of 65 between the frozen cores: the kernels support up to 64",
        ),
        ({"x": torch.zeros(1).expand(5_000_000, 6, 9, 8)}, "x has 2160000000 elements; the kernels support fewer than 2..31"),
        ({"x": torch.zeros(1).expand(4_971_026, 6, 9, 8)}, "2147483232 elements: the kernels support up to 2147479552"),
    ],
    ids=lambda change: next(iter(change)) if isinstance(change, dict) else "",
)
def test_unsupported_calls(change, why, kernels):
    positional, options = arguments(ConvCase("x"), {}, torch.float32)
    names = ("x", "weight", "core", "suffix", "bias", "stride", "padding", "dilation", "groups", "scale")
    call = {**dict(zip(names, positional, strict=True)), **options, **change}
    with pytest.raises(RuntimeError, match=f"tt_block: backend 'triton' does not support this call: .*{why}") as caught:
        tt_block(**call, backend="triton")
    assert "\n" not in str(caught.value)
    assert kernels.count == 0


def test_strides_that_the_cuda_engine_does_not_support(kernels):
    positional, options = arguments(ConvCase("x", stride=(5, 6), padding=2), {"activation": "relu"}, torch.float32)
    y = tt_block(*positional, **options, backend="triton")
    want = tt_block(*positional, **options, backend="torch")
    torch.testing.assert_close(y, want)
    gradients = [torch.autograd.grad(z.sum(), positional[0])[0] for z in (y, want)]
    torch.testing.assert_close(*gradients)


def test_check(kernels, monkeypatch):
    """lora-edge check runs its ops, TF32 among the types."""
    monkeypatch.setattr(check, "CASES", check.CASES[:1])
    outcomes = list(check.check_backend("triton"))
    assert [outcome for outcome in outcomes if not outcome.passed] == []
    assert len(outcomes) == 4 * 4
    assert kernels.count == 2 * len(outcomes)


def test_sums_in_one_order(kernels):
    positional, _ = arguments(ConvCase("x", padding=1), {}, torch.float32)
    y = tt_conv(*positional, backend="triton")
    dy = torch.randn_like(y)
    once, again = (torch.autograd.grad(y, positional[2], dy, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(once, again)
