"""Hydra against its branches run as convolutions, its bias, its groups."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lora_edge
from helpers.methods import CONVS, LABELS, METHODS, RANK, WEIGHTS, assert_same, ours
from helpers.networks import output
from lora_edge.methods.conv_lora import ConvLoRA
from lora_edge.methods.hydra import Hydra, Sequential
from lora_edge.nn.reparametrised import reparametrised_layers

WITH_BIAS = {
    **{name: (make, shape) for name, (make, shape) in CONVS.items() if name != "2-D stride"},
    "groups": (lambda: nn.Conv2d(6, 8, 3, stride=2, groups=2, dilation=2, padding=2, padding_mode="reflect"), (3, 6, 9, 8)),
    "depthwise": (lambda: nn.Conv1d(6, 6, 5, stride=2, groups=6), (3, 6, 21)),
}


def branches(conv, made):
    """The authors' forward: y0 = Wx + b, then up(down(x)) + up_s(down_s(y0)), as convolutions with leaves of their own."""
    stock = copy.deepcopy(conv).requires_grad_(False)
    lora_edge.nn.reparametrised.restore_weight(stock)
    g, width = stock.groups, stock.out_channels // stock.groups
    trained = {name: p.detach().clone().requires_grad_() for name, p in made.named_parameters()}
    one = (1,) * (stock.weight.dim() - 2)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[len(one) - 1]

    def forward(x):
        y0 = stock(x)
        a = trained["sequential_A"].view(-1, width, *one)
        b = trained["sequential_B"]
        y = y0 + made.scaling * convolve(convolve(y0, a, groups=g), b.reshape(g * width, -1, *one), groups=g)
        if "lora_A" in trained:
            down = copy.deepcopy(stock)
            del down.weight, down.bias
            for k in range(g):  # each group of inputs through the same A, then its own rows of B
                down.weight, down.bias, down.groups = trained["lora_A"], None, 1
                part = x.chunk(g, dim=1)[k]
                up = trained["lora_B"].view(g, width, -1, *one)[k]
                rows = [slice(None)] * y.dim()
                rows[1] = slice(k * width, (k + 1) * width)
                y = y.index_add(1, torch.arange(k * width, (k + 1) * width), made.scaling * convolve(down(part), up))
        return y

    return forward, trained


@pytest.mark.parametrize("kind", [Hydra, Sequential])
@pytest.mark.parametrize("name", [*CONVS, *WITH_BIAS])
def test_agrees_with_the_branches(name, kind):
    make, shape = WITH_BIAS.get(name) or CONVS[name]
    layer, made = ours(make().double(), kind, alpha=3.0)
    oracle, trained = branches(layer, made)
    x = torch.randn(shape).double()
    assert_same(layer, oracle, x, [(p, trained[key]) for key, p in made.named_parameters()])
    torch.testing.assert_close(layer(x), oracle(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", list(WITH_BIAS))
def test_without_the_bias_rule_the_branches_are_missed(name):
    make, shape = WITH_BIAS[name]
    layer, made = ours(make().double(), Hydra, alpha=3.0)
    x = torch.randn(shape).double()
    want = branches(layer, made)[0](x)
    stale = layer.parametrizations.bias.original.view(-1, *(1,) * (x.dim() - 2))
    wrong = layer(x) - layer.bias.view(stale.shape) + stale
    assert float((layer(x) - want).detach().abs().max()) <= 1e-12
    assert float((wrong - want).detach().abs().max()) > 1e-3


@pytest.mark.parametrize("kind", [Hydra, Sequential])
@pytest.mark.parametrize("name", list(WEIGHTS))
def test_values_are_those_of_a_blockwise_matrix(name, kind):
    conv = WEIGHTS[name]().double()
    layer, made = ours(conv, kind, alpha=3.0)
    a = made.sequential_A.view(conv.groups, -1, conv.out_channels // conv.groups)
    mix = torch.eye(conv.out_channels).double() + 3 / RANK * torch.block_diag(*(made.sequential_B @ a))
    want = mix @ conv.weight.flatten(1)
    if kind is Hydra:
        want = want + 3 / RANK * made.lora_B @ made.lora_A.flatten(1)
    torch.testing.assert_close(layer.weight.flatten(1), want)
    torch.testing.assert_close(layer.bias, mix @ conv.bias)


def test_a_depthwise_layer_gets_a_scale_per_channel():
    layer, made = ours(nn.Conv1d(6, 6, 5, groups=6), Sequential)
    assert (made.sequential_A.shape, made.sequential_B.shape) == ((6, 1), (6, 1, 1))
    ratio = layer.weight / layer.parametrizations.weight.original
    torch.testing.assert_close(ratio, ratio[..., :1].expand(ratio.shape))


def test_the_branch_behind_keeps_the_rows_space_and_the_one_beside_is_conv_lora():
    conv = nn.Conv1d(6, 4, 7).double()
    layer, _ = ours(conv, Sequential)
    rows = torch.linalg.qr(conv.weight.flatten(1).T)[0]
    new = layer.weight.flatten(1)
    torch.testing.assert_close(new @ rows @ rows.T, new)
    assert float((new - conv.weight.flatten(1)).detach().abs().max()) > 1e-2
    both, mine = ours(conv, Hydra, alpha=3.0)
    beside, lora = ours(conv, ConvLoRA, alpha=3.0)
    with torch.no_grad():
        mine.sequential_B.zero_()
        lora.lora_A.copy_(mine.lora_A)
        lora.lora_B.copy_(mine.lora_B)
    torch.testing.assert_close(both.weight, beside.weight)
    assert torch.equal(both.bias, conv.bias)


def test_both_downs_start_with_the_range_of_their_row():
    made = Hydra(nn.Conv2d(8, 64, 3, groups=2), 4)
    for matrix, length in ((made.sequential_A, 32), (made.lora_A, 36)):
        assert 0.9 * length**-0.5 < float(matrix.detach().abs().max()) <= length**-0.5


@pytest.mark.parametrize("name", ["hydra", "hydra_sequential"])
def test_disabled_and_merge_restore_the_bias_and_the_order_of_parameters(name):
    base = nn.Sequential(nn.Conv1d(4, 6, 3), nn.ReLU(), nn.Conv1d(6, 6, 3, groups=2, bias=False), nn.Conv1d(6, 2, 1))
    model, x = copy.deepcopy(base), torch.randn(2, 4, 12)
    parameters = METHODS[name].prepare(model, RANK, x, LABELS)
    with torch.no_grad():
        for p in parameters:
            p.add_(0.3 * torch.randn_like(p))
    assert not torch.equal(model[0].bias, base[0].bias)
    with lora_edge.disabled(model):
        assert torch.equal(model[0].bias, base[0].bias)
        assert torch.equal(output(model, x), output(base, x))
    want = output(model, x)
    biases = [layer.bias.detach().clone() for layer in (model[0], model[3])]
    lora_edge.merge(model)
    assert not reparametrised_layers(model)
    torch.testing.assert_close(output(model, x), want)
    assert [list(layer._parameters) for layer in model] == [list(layer._parameters) for layer in base]
    assert list(model.state_dict()) == list(base.state_dict())
    assert model[2].bias is None
    assert all(torch.equal(layer.bias, bias) for layer, bias in zip((model[0], model[3]), biases, strict=True))


def test_two_layers_with_one_bias_get_a_bias_each():
    model = nn.Sequential(nn.Conv1d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv1d(4, 4, 3, padding=1))
    model[2].weight, model[2].bias = model[0].weight, model[0].bias
    x = torch.randn(2, 4, 9)
    parameters = METHODS["hydra"].prepare(model, RANK, x, LABELS)
    with torch.no_grad():
        for p in parameters:
            p.add_(0.3 * torch.randn_like(p))
    want = output(model, x)
    torch.testing.assert_close(output(lora_edge.merge(model), x), want)
    assert not torch.equal(model[0].bias, model[2].bias)
