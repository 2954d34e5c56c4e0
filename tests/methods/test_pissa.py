"""PiSSA's fast SVD and quantised residual; ``test_lora_family.py`` has PiSSA itself against peft."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from helpers.methods import RANK, WEIGHTS, peft_layer, perturbed
from lora_edge.methods.parts.quantisation import dequantise, quantise
from lora_edge.methods.pissa import PiSSA, QPiSSA


def decaying(name):
    """A convolution in float64 whose singular values halve, as a trained weight's decay."""
    torch.manual_seed(0)
    conv = WEIGHTS[name]().double()
    u, values, vt = torch.linalg.svd(conv.weight.detach().flatten(1), full_matrices=False)
    falling = 4 * 0.5 ** torch.arange(len(values), dtype=torch.float64)
    with torch.no_grad():
        conv.weight.copy_(((u * falling) @ vt).view(conv.weight.shape))
    return conv


@pytest.mark.parametrize("name", list(WEIGHTS))
def test_the_fast_svd_finds_the_leading_vectors(name):
    conv = decaying(name)
    exact, fast = PiSSA(conv, RANK, alpha=3.0), PiSSA(conv, RANK, alpha=3.0, niter=10)
    torch.testing.assert_close(fast.b0 @ fast.a0.flatten(1), exact.b0 @ exact.a0.flatten(1), rtol=0, atol=1e-5)
    torch.testing.assert_close(fast.a0.square().sum(), exact.a0.square().sum())
    assert not fast.delta().count_nonzero()
    rough = PiSSA(conv, RANK, alpha=3.0, niter=0)  # a random start alone is no SVD
    errors = [(exact.b0 @ exact.a0.flatten(1) - made.b0 @ made.a0.flatten(1)).norm() for made in (fast, rough)]
    assert errors[1] > 100 * errors[0]


def test_the_fast_svd_agrees_with_pefts():
    conv = decaying("tall").float()
    linear = nn.Linear(conv.weight[0].numel(), conv.out_channels)
    linear.weight = nn.Parameter(conv.weight.detach().flatten(1).clone())
    _, theirs = peft_layer(linear, init_lora_weights="pissa_niter_16")
    ours = PiSSA(conv, RANK, alpha=3.0, niter=16)
    a, b = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    torch.testing.assert_close(ours.b0 @ ours.a0.flatten(1), b @ a, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("name", list(WEIGHTS))
def test_the_quantised_residual_is_nearer_to_the_weight_than_the_quantised_weight(name, bits):
    conv = decaying(name)
    weight = conv.weight.detach().flatten(1)
    made = QPiSSA(conv, RANK, alpha=3.0, bits=bits, group=16)
    u, values, vt = torch.linalg.svd(weight, full_matrices=False)
    leading = (u[:, :RANK] * values[:RANK]) @ vt[:RANK]
    residual = dequantise(*quantise(weight - leading, bits, 16), 16)
    torch.testing.assert_close(made.adapted(conv.weight).flatten(1), residual + leading)
    plain = (weight - dequantise(*quantise(weight, bits, 16), 16)).norm()
    ours = (weight - made.adapted(conv.weight).flatten(1)).norm()
    assert ours < 0.75 * plain
    of_the_weight = dequantise(*quantise(weight, bits, 16), 16) + leading - leading  # the careless form gains nothing
    torch.testing.assert_close((weight - of_the_weight).norm(), plain)


@pytest.mark.parametrize("name", list(WEIGHTS))
def test_the_quantised_residual_stays_while_the_factors_train(name):
    conv = decaying(name)
    made = QPiSSA(conv, RANK, alpha=3.0)
    assert made.codes.dtype == torch.uint8
    assert int(made.codes.max()) <= 15
    residual = made.base(conv.weight).flatten(1)
    layer = perturbed(conv, made)
    gradient = torch.randn_like(conv.weight)
    (layer.weight * gradient).sum().backward()
    b, a, dense = made.lora_B, made.lora_A.flatten(1), gradient.flatten(1)
    torch.testing.assert_close(layer.weight.flatten(1), residual + 1.5 * b @ a)
    torch.testing.assert_close(made.lora_B.grad, 1.5 * dense @ a.T)
    torch.testing.assert_close(made.lora_A.grad.flatten(1), 1.5 * b.T @ dense)
    assert made.low_rank() is None
