"""The LoRA methods against peft and loralib: conv LoRA, LoRA-FA, PiSSA, DoRA, LoRA-C."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from helpers.methods import CONVS, LABELS, METHODS, RANK, assert_same, ours, peft_layer
from helpers.networks import train
from lora_edge.methods.conv_lora import ConvLoRA
from lora_edge.methods.dora import DoRA
from lora_edge.methods.lora_c import LoRAC
from lora_edge.methods.lora_c_factors import LoRACFactors
from lora_edge.methods.lora_fa import LoRAFA
from lora_edge.methods.pissa import PiSSA


def assert_pefts_conv_lora(name, kind):
    """Assert that the layer agrees with PEFT's at the same factors; ``lora_A`` is trained or frozen in both."""
    make, shape = CONVS[name]
    conv = make()
    oracle, theirs = peft_layer(conv)
    layer, mine = ours(conv, kind, alpha=3.0)
    a, b = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    a.requires_grad_(mine.lora_A.requires_grad)
    with torch.no_grad():
        a.copy_(mine.lora_A)
        b.copy_(mine.lora_B.view(b.shape))
    trained = [(mine.lora_A, a)] if a.requires_grad else []
    assert_same(layer, oracle, torch.randn(shape), [*trained, (mine.lora_B, b)])
    return mine


@pytest.mark.parametrize("name", list(CONVS))
def test_conv_lora_agrees_with_peft(name):
    assert assert_pefts_conv_lora(name, ConvLoRA).lora_A.grad is not None


@pytest.mark.parametrize("name", list(CONVS))
def test_conv_lora_starts_as_in_peft(name):
    """With the same seed, both draw the same random ``A``."""
    conv = CONVS[name][0]()
    _, theirs = peft_layer(conv)
    torch.manual_seed(3)
    theirs.reset_lora_parameters("default", init_lora_weights=True)
    torch.manual_seed(3)
    assert torch.equal(ConvLoRA(conv, RANK).lora_A, theirs.lora_A["default"].weight)


@pytest.mark.parametrize("name", list(CONVS))
def test_lora_fa_agrees_with_peft_where_a_is_frozen(name):
    assert assert_pefts_conv_lora(name, LoRAFA).lora_A.grad is None


@pytest.mark.parametrize("name", list(CONVS))
def test_dora_agrees_with_peft(name):
    make, shape = CONVS[name]
    conv = make()
    oracle, theirs = peft_layer(conv, use_dora=True)
    start = DoRA(conv, RANK)
    magnitude = theirs.lora_magnitude_vector["default"].weight
    torch.testing.assert_close(start.magnitude, magnitude.flatten())
    layer, mine = ours(conv, DoRA, alpha=3.0)
    a, b = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    with torch.no_grad():
        a.copy_(mine.lora_A)
        b.copy_(mine.lora_B.view(b.shape))
        magnitude.copy_(mine.magnitude.view(magnitude.shape))
    pairs = [(mine.lora_A, a), (mine.lora_B, b), (mine.magnitude, magnitude)]
    assert_same(layer, oracle, torch.randn(shape), pairs)


@pytest.mark.parametrize("name", ["1-D", "2-D", "2-D stride"])
def test_pissa_agrees_with_peft_on_the_unfolded_convolution(name):
    """peft has PiSSA only for linear layers; a convolution is a linear layer on its unfolded input."""
    make, shape = CONVS[name]
    conv = make()
    linear = nn.Linear(conv.weight[0].numel(), conv.out_channels, bias=conv.bias is not None)
    linear.weight = nn.Parameter(conv.weight.detach().flatten(1).clone())
    if conv.bias is not None:
        linear.bias = conv.bias
    oracle, theirs = peft_layer(linear, init_lora_weights="pissa")
    a, b = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    start = PiSSA(conv, RANK, alpha=3.0)
    values = torch.linalg.svdvals(conv.weight.detach().flatten(1).double())
    turned = torch.finfo(a.dtype).eps * linear.in_features**0.5 * float(values[0] / (values[RANK - 1] - values[RANK]))
    rounding = 4 * turned * float(values[0])  # rounding turns singular vectors by its size over the gap between their values
    torch.testing.assert_close(start.lora_B @ start.lora_A.flatten(1), b @ a, rtol=0, atol=rounding)
    torch.testing.assert_close(start.lora_A.square().sum(), a.square().sum())  # halves of equal weight
    layer, mine = ours(conv, PiSSA, alpha=3.0)
    with torch.no_grad():
        a.copy_(mine.lora_A.flatten(1))
        b.copy_(mine.lora_B)
    kernel, stride, padding = (
        [1] * (2 - len(t)) + list(t) if i < 2 else [0] * (2 - len(t)) + list(t)
        for i, t in enumerate((conv.kernel_size, conv.stride, conv.padding))
    )

    def unfolded(x):
        image = x if x.dim() == 4 else x.unsqueeze(2)
        columns = nn.functional.unfold(image, kernel, stride=stride, padding=padding)
        return oracle(columns.transpose(1, 2)).transpose(1, 2).reshape(conv(x).shape)

    assert_same(layer, unfolded, torch.randn(shape), [(mine.lora_A, a), (mine.lora_B, b)])


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kernel", [1, 3])
def test_lora_c_agrees_with_loralib(kernel, groups):
    loralib = pytest.importorskip("loralib")
    oracle = loralib.Conv2d(6, 8, kernel, r=RANK, lora_alpha=3, merge_weights=False, padding=1, groups=groups)
    start = LoRAC(oracle.conv, RANK)
    assert start.lora_A.shape == oracle.lora_A.shape
    assert start.lora_B.shape == oracle.lora_B.shape
    layer, mine = ours(oracle.conv, LoRAC, alpha=3.0)
    with torch.no_grad():
        oracle.lora_A.copy_(mine.lora_A)
        oracle.lora_B.copy_(mine.lora_B)
    pairs = [(mine.lora_A, oracle.lora_A), (mine.lora_B, oracle.lora_B)]
    assert_same(layer, oracle, torch.randn(3, 6, 9, 8), pairs)


@pytest.mark.parametrize(
    ("conv", "a", "b"),
    [
        (nn.Conv2d(6, 8, 3), (6, 18), (24, 6)),  # loralib's own: (r·K, I·K) and (O·K, r·K)
        (nn.Conv1d(6, 8, 5), (10, 30), (8, 10)),
        (nn.Conv1d(6, 8, 5, groups=2), (10, 30), (4, 10)),
        (nn.Conv2d(6, 8, (3, 5), groups=2), (10, 30), (12, 10)),
        (nn.Conv3d(4, 6, 3), (6, 12), (54, 6)),
    ],
)
def test_lora_c_by_its_formula(conv, a, b):
    layer, mine = ours(conv, LoRAC, alpha=3.0)
    assert (mine.lora_A.shape, mine.lora_B.shape) == (a, b)
    want = conv.weight + 3 / RANK * (mine.lora_B @ mine.lora_A).view(conv.weight.shape)
    torch.testing.assert_close(layer.weight, want)


@pytest.mark.parametrize("groups", [1, 2])
def test_lora_c_factors_by_its_formula(groups):
    for conv, formula in (
        (nn.Conv1d(6, 8, 5, groups=groups), "ohq,qiw->oiw"),
        (nn.Conv2d(6, 8, (3, 5), groups=groups), "ohq,qiw->oihw"),
        (nn.Conv3d(6, 8, (2, 3, 5), groups=groups), "odhq,qiw->oidhw"),
    ):
        layer, mine = ours(conv, LoRACFactors, alpha=3.0)
        want = conv.weight + 3 / RANK * torch.einsum(formula, mine.lora_B, mine.lora_A)
        torch.testing.assert_close(layer.weight, want)


def test_lora_c_factors_in_one_dimension_is_conv_lora():
    conv = nn.Conv1d(6, 8, 5)
    layer, mine = ours(conv, LoRACFactors, alpha=3.0)
    twin, other = ours(conv, ConvLoRA, alpha=3.0)
    with torch.no_grad():
        other.lora_A.copy_(mine.lora_A)
        other.lora_B.copy_(mine.lora_B.squeeze(1))
    torch.testing.assert_close(layer.weight, twin.weight)


def test_dora_keeps_a_dead_channel_dead():
    conv = nn.Conv1d(3, 4, 3, bias=False)
    with torch.no_grad():
        conv.weight[1] = 0.0
    x = torch.randn(2, 3, 9)
    parameters = METHODS["dora"].prepare(conv, RANK, x, LABELS)
    train(conv, x, parameters)
    assert all(bool(torch.isfinite(p).all()) for p in parameters)
    assert bool(torch.isfinite(conv.weight).all())


def test_pissas_rank_is_at_most_the_rank_of_the_weight():
    conv = nn.Conv1d(2, 6, 2)
    made = PiSSA(conv, 50)
    assert made.lora_B.shape == (6, 4)
    torch.testing.assert_close((made.lora_B @ made.lora_A.flatten(1)).view(conv.weight.shape), conv.weight)
    assert not made.delta().count_nonzero()
