"""One-for-All and rsLoRA against peft's rsLoRA, with Kaiming and with Gaussian A."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from helpers.methods import CONVS, METHODS, RANK, WEIGHTS, assert_same, begun, ours, peft_layer, prepared, small_base
from lora_edge.har.models import TResNet
from lora_edge.methods.one_for_all import ALPHA, GaussianRSLoRA, RSLoRA
from lora_edge.nn.reparametrised import reparametrised_layers

INIT = {RSLoRA: True, GaussianRSLoRA: "gaussian"}
KINDS = pytest.mark.parametrize("kind", list(INIT))


@KINDS
@pytest.mark.parametrize("name", list(CONVS))
def test_agrees_with_pefts_rslora(name, kind):
    make, shape = CONVS[name]
    conv = make()
    oracle, theirs = peft_layer(conv, use_rslora=True, init_lora_weights=INIT[kind])
    layer, mine = ours(conv, kind, alpha=3.0)
    a, b = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    with torch.no_grad():
        a.copy_(mine.lora_A)
        b.copy_(mine.lora_B.view(b.shape))
    assert_same(layer, oracle, torch.randn(shape), [(mine.lora_A, a), (mine.lora_B, b)])


@KINDS
@pytest.mark.parametrize("name", list(CONVS))
def test_starts_as_in_peft(name, kind):
    """With the same seed, both draw the same ``A``: after the Kaiming one that every kind draws first, the Gaussian one."""
    conv = CONVS[name][0]()
    _, theirs = peft_layer(conv)
    torch.manual_seed(3)
    if kind is GaussianRSLoRA:
        RSLoRA(conv, RANK)
    theirs.reset_lora_parameters("default", init_lora_weights=INIT[kind])
    torch.manual_seed(3)
    assert torch.equal(kind(conv, RANK).lora_A, theirs.lora_A["default"].weight)


@KINDS
@pytest.mark.parametrize("weight", list(WEIGHTS))
def test_by_its_formula(weight, kind):
    """In float64, also with groups, which share ``A``; conv LoRA's ``alpha/r`` in place of ``alpha/√r`` is far away."""
    conv = WEIGHTS[weight]().double()
    layer, mine = ours(conv, kind)
    product = torch.einsum("or,r...->o...", mine.lora_B, mine.lora_A).detach()
    got = (layer.weight - conv.weight).detach()
    torch.testing.assert_close(got, ALPHA / math.sqrt(RANK) * product)
    wrong = ALPHA / RANK * product
    assert float((got - wrong).norm()) > 0.2 * float(got.norm())


def test_the_gaussian_has_a_standard_deviation_of_one_over_the_rank():
    conv = TResNet(6, 3).block2.conv2
    for rank in (2, 8):
        assert float(GaussianRSLoRA(conv, rank).lora_A.detach().std()) == pytest.approx(1 / rank, rel=0.05)


def test_the_first_update_is_as_large_at_every_rank_unless_a_is_gaussian():
    """One step of Adam moves every element of ``B`` by as much; what that does to the weight must not depend on the rank."""

    def update(kind, rank):
        made = kind(TResNet(6, 3).block2.conv2, rank)
        with torch.no_grad():
            made.lora_B.add_(1e-2 * torch.randn_like(made.lora_B).sign())
            return float(made.delta().norm())

    torch.manual_seed(0)
    assert update(RSLoRA, 64) / update(RSLoRA, 4) == pytest.approx(1, rel=0.1)
    assert update(GaussianRSLoRA, 64) / update(GaussianRSLoRA, 4) == pytest.approx(1 / 16, rel=0.1)


def test_one_for_all_trains_the_first_and_the_last_convolution():
    base, x = small_base()
    model, training = begun(base, "one_for_all", x)
    names = {module: name for name, module in model.named_modules()}
    assert [names[conv] for conv in reparametrised_layers(model)] == ["block1.conv1", "block3.conv3"]
    everywhere = prepared(copy.deepcopy(base), "rslora", x)[1]
    assert training.count < 0.2 * sum(p.numel() for p in everywhere)
    assert METHODS["one_for_all"].source != METHODS["rslora"].source
