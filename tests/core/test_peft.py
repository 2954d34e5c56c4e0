"""The exact oracle: PEFT's conv LoRA with the suffix loaded into ``lora_A`` (groups 1, dilation 1)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lora_edge

peft = pytest.importorskip("peft")

CASES = {
    "1-D": (nn.Conv1d(6, 12, 5, stride=2, padding=2), (4, 6, 21)),
    "1-D even same": (nn.Conv1d(6, 12, 8, padding=3), (4, 6, 20)),
    "2-D": (nn.Conv2d(6, 12, 3, padding=1), (4, 6, 9, 8)),
    "2-D stride": (nn.Conv2d(6, 12, (3, 5), stride=2, padding=(1, 2), bias=False), (4, 6, 9, 8)),
    "3-D": (nn.Conv3d(3, 8, 3, padding=1), (2, 3, 5, 6, 4)),
}


@pytest.mark.parametrize("rank", [1, 2, 5])
@pytest.mark.parametrize("name", list(CASES))
def test_output_core_and_input_gradients(name, rank):
    conv, shape = CASES[name]
    model = nn.Sequential()
    model.add_module("conv", type(conv)(**_arguments(conv)))
    model.conv.load_state_dict(conv.state_dict())
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=["conv"], lora_dropout=0.0)
    oracle = peft.get_peft_model(model, config)
    theirs = next(m for m in oracle.modules() if hasattr(m, "lora_A"))

    ours = lora_edge.adapt(type(conv)(**_arguments(conv)), rank)
    ours.load_state_dict(conv.state_dict())
    core = torch.randn_like(ours.core)
    with torch.no_grad():
        ours.core.copy_(core)
        theirs.lora_A["default"].weight.copy_(ours.suffix)
        theirs.lora_B["default"].weight.copy_(core.reshape(theirs.lora_B["default"].weight.shape))
    theirs.lora_A["default"].weight.requires_grad_(False)

    x = torch.randn(shape, requires_grad=True)
    x_theirs = x.detach().clone().requires_grad_()
    y, want = ours(x), oracle(x_theirs)
    dy = torch.randn_like(y)
    y.backward(dy)
    want.backward(dy)
    for got, expected in (
        (y, want),
        (x.grad, x_theirs.grad),
        (ours.core.grad, theirs.lora_B["default"].weight.grad.flatten(1)),
    ):
        assert float((got - expected).detach().norm() / expected.detach().norm()) <= 1e-6


def _arguments(conv):
    return {
        "in_channels": conv.in_channels,
        "out_channels": conv.out_channels,
        "kernel_size": conv.kernel_size,
        "stride": conv.stride,
        "padding": conv.padding,
        "bias": conv.bias is not None,
    }
