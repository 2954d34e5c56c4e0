"""VeRA against peft's on linear layers of the unfolded weights; its shared factors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from helpers.methods import WEIGHTS, begun, peft_vera, perturbed, small_base
from lora_edge.methods.files import trained_state
from lora_edge.methods.vera import Factors, VeRA
from lora_edge.nn.reparametrised import reparametrised_layers, share

RANK = 3


def layers_of(convs: list[nn.Module]) -> list[tuple[nn.Module, VeRA]]:
    """The convolutions computed by VeRA on one pair of factors, moved from their start."""
    kinds = [VeRA(conv, RANK) for conv in convs]
    share(kinds, Factors(convs, RANK))
    return [(perturbed(conv, kind), kind) for conv, kind in zip(convs, kinds, strict=True)]


def peft_layers(kinds: list[VeRA]) -> list[nn.Module]:
    """peft's VeRA on linear layers of the same sizes, with the same factors and scales."""
    layers = peft_vera([(len(k.b), k.sizes.numel()) for k in kinds], RANK)
    for layer, kind in zip(layers, kinds, strict=True):
        assert layer.vera_A["default"].shape == kind.shared.a.shape
        assert layer.vera_B["default"].shape == kind.shared.b.shape
        torch.testing.assert_close(layer.vera_lambda_d["default"].data, torch.full((RANK,), 0.1).double())
        assert not layer.vera_lambda_b["default"].count_nonzero()
        layer.vera_A["default"], layer.vera_B["default"] = kind.shared.a, kind.shared.b
        with torch.no_grad():
            layer.vera_lambda_d["default"].copy_(kind.d)
            layer.vera_lambda_b["default"].copy_(kind.b)
    return layers


def test_agrees_with_peft_where_layers_of_all_sizes_share():
    convs = [make().double() for make in WEIGHTS.values()]
    made = layers_of(convs)
    kinds = [kind for _, kind in made]
    oracles = peft_layers(kinds)
    for conv, (layer, kind), oracle in zip(convs, made, oracles, strict=True):
        got = layer.weight - conv.weight.detach()
        want = oracle.get_delta_weight("default").view(conv.weight.shape)
        torch.testing.assert_close(got, want)
        dy = torch.randn_like(got)
        mine = torch.autograd.grad((got * dy).sum(), [kind.d, kind.b])
        theirs = torch.autograd.grad((want * dy).sum(), [oracle.vera_lambda_d["default"], oracle.vera_lambda_b["default"]])
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b)


def test_the_first_elements_of_the_shared_factor_are_another_update():
    """A slice takes the first terms of each rank; the first elements of all would mix ranks."""
    convs = [WEIGHTS["tall"]().double(), WEIGHTS["wide"]().double()]
    (layer, kind), _ = layers_of(convs)
    right = (layer.weight - convs[0].weight).detach().flatten(1)
    first = kind.shared.a.flatten()[: RANK * right.shape[1]].view(RANK, -1)
    wrong = (kind.b[:, None] * (kind.shared.b[: len(kind.b)] * kind.d) @ first).detach()
    assert float((wrong - right).norm() / right.norm()) > 0.5


def test_starts_at_zero_with_a_gradient_for_the_outputs_alone():
    conv = WEIGHTS["groups"]()
    kind = VeRA(conv, RANK)
    share([kind], Factors([conv], RANK))
    d, b = torch.autograd.grad(kind.delta().sum(), [kind.d, kind.b])
    assert not kind.delta().count_nonzero()
    assert not d.count_nonzero()
    assert b.all()


def test_factors_follow_kaimings_law():
    """Uniform within ``√(6/fan_in)``, as in peft."""
    torch.manual_seed(0)
    factors = Factors([nn.Conv1d(200, 6, 5), nn.Conv1d(4, 2000, 3)], 4)
    for value, fan in ((factors.a, 1000), (factors.b, 4)):
        assert value.abs().max() <= math.sqrt(6 / fan)
        assert float(value.std()) == pytest.approx(math.sqrt(2 / fan), rel=0.05)


def test_layers_hold_one_pair_of_factors_that_is_saved_once():
    base, x = small_base()
    model, training = begun(base, "vera", x)
    kinds = list(reparametrised_layers(model).values())
    assert len({id(kind.shared) for kind in kinds}) == 1
    sizes = sum(value.numel() for value in kinds[0].shared.state_dict().values())
    assert sum(value.numel() for value in trained_state(model).values()) == training.count + sizes
