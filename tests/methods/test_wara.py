"""WaRA against Haar's transform as a matrix, its Kronecker form, and peft's inverse transform."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from helpers.methods import RANK, WEIGHTS, assert_update_is_a_product, ours
from lora_edge.methods.conv_lora import ConvLoRA
from lora_edge.methods.wara import WaRA


def haar(size):
    """The orthonormal transform of an axis of even size: the low band's rows, then the high band's."""
    rows = torch.zeros(size, size).double()
    for i in range(size // 2):
        rows[i, 2 * i : 2 * i + 2] = torch.tensor([0.5, 0.5]).double().sqrt()
        rows[size // 2 + i, 2 * i : 2 * i + 2] = torch.tensor([1.0, -1.0]).double() * 0.5**0.5
    return rows


def transformed(conv, a, b, per_subband):
    """ΔW by the definition: a matrix of subbands per tap, transformed back along both axes, cropped."""
    out, into = conv.weight.shape[:2]
    taps = conv.weight[0, 0].numel()
    if into == 1:
        into, taps = taps, 1
    rank = b.shape[-1]
    a = a.view(-1, rank, (into + 1) // 2, taps)
    bands = [torch.einsum("hr,rik->hik", b[min(s, len(b) - 1)], a[min(s, len(a) - 1)]) for s in range(4)]
    if not per_subband:
        bands[1] = bands[2] = torch.zeros_like(bands[0])
    whole = torch.cat([torch.cat(bands[:2], dim=1), torch.cat(bands[2:], dim=1)], dim=0)
    back = torch.einsum("ho,hik,ij->ojk", haar(whole.shape[0]), whole, haar(whole.shape[1]))
    return back[:out, :into].reshape(conv.weight.shape)


@pytest.mark.parametrize("per_subband", [False, True])
@pytest.mark.parametrize("name", [*WEIGHTS, "odd"])
def test_values_and_gradients_are_those_of_the_transform(name, per_subband):
    conv = (WEIGHTS.get(name) or (lambda: nn.Conv1d(5, 7, 3)))().double()
    layer, made = ours(conv, WaRA, per_subband=per_subband)
    leaves = [t.detach().clone().requires_grad_() for t in (made.lora_A, made.lora_B)]
    want = conv.weight.detach() + transformed(conv, leaves[0], leaves[1], per_subband)
    torch.testing.assert_close(layer.weight, want)
    dw = torch.randn_like(want)
    layer.weight.backward(dw)
    for p, gradient in zip((made.lora_A, made.lora_B), torch.autograd.grad(want, leaves, dw), strict=True):
        torch.testing.assert_close(p.grad, gradient)


@pytest.mark.parametrize("name", ["wide", "tall", "groups", "3-D"])
def test_shared_factors_are_a_kronecker_product_of_twice_the_rank(name):
    conv = WEIGHTS[name]().double()
    layer, made = ours(conv, WaRA)
    a, b = made.lora_A.flatten(2), made.lora_B[0]
    m = torch.tensordot(b, a, 1)  # (O/2, I/2g, taps)
    want = torch.kron(m, torch.eye(2).double().unsqueeze(-1))[: conv.out_channels, : conv.weight.shape[1]]
    update = (layer.weight - conv.weight).flatten(2)
    torch.testing.assert_close(update, want)
    assert int(torch.linalg.matrix_rank(update.flatten(1), atol=1e-9)) == min(2 * RANK, *update.flatten(1).shape)
    blocks = torch.cat([m, m]).repeat(1, 2, 1)[: conv.out_channels, : conv.weight.shape[1]]
    assert not torch.allclose(update, blocks)  # halves in the place of neighbours


def test_a_transform_of_one_factorisation_would_be_conv_lora():
    """Which is why the subbands do not share one: its rank stays r."""
    a, b = torch.randn(RANK, 8).double(), torch.randn(10, RANK).double()
    assert int(torch.linalg.matrix_rank(haar(10).T @ b @ a @ haar(8))) == RANK
    conv = nn.Conv1d(8, 10, 1).double()
    for per_subband, rank in ((False, 2 * RANK), (True, 4 * RANK)):
        layer, _ = ours(conv, WaRA, per_subband=per_subband)
        assert int(torch.linalg.matrix_rank((layer.weight - conv.weight).flatten(1), atol=1e-9)) == rank


def test_per_subband_agrees_with_pefts_inverse_transform():
    waverec = pytest.importorskip("peft.tuners.waveft.waverec2d")
    made = ours(nn.Conv1d(8, 10, 1).double(), WaRA, per_subband=True)[1]
    a = made.lora_A.view(4, RANK, 4)
    low, (high_in, high_out, high) = made.lora_B[0] @ a[0], [made.lora_B[s] @ a[s] for s in (1, 2, 3)]
    theirs = waverec.waverec2d((low, (high_out, high_in, high)), "haar")
    torch.testing.assert_close(made.delta(), theirs.squeeze(0))


@pytest.mark.parametrize("per_subband", [False, True])
def test_every_channel_of_a_depthwise_layer_and_of_odd_sizes_is_reached(per_subband):
    for conv in (nn.Conv1d(6, 6, 5, groups=6), nn.Conv2d(7, 7, 3, groups=7), nn.Conv1d(5, 7, 3)):
        layer, _ = ours(copy.deepcopy(conv), WaRA, per_subband=per_subband)
        update = (layer.weight - conv.weight).flatten(1)
        assert bool((update.abs().amax(dim=1) > 0).all() and (update.abs().amax(dim=0) > 0).all())


def test_trains_half_of_conv_loras_elements_per_rank():
    conv = nn.Conv1d(8, 10, 3)
    count = sum(p.numel() for p in ConvLoRA(conv, 4).parameters())
    assert sum(p.numel() for p in WaRA(conv, 4).parameters()) == count // 2
    assert sum(p.numel() for p in WaRA(conv, 4, per_subband=True).parameters()) == 2 * count


@pytest.mark.parametrize("name", ["wara", "wara_per_subband"])
def test_the_update_is_a_product(name):
    assert_update_is_a_product(name)
