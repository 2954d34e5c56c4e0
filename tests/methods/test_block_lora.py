"""Block-LoRA: its formula, and that it is conv LoRA of rank r/n with a rate for B that is n times as high."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from helpers.methods import WEIGHTS, begun, ours, perturbed, small_base
from lora_edge.methods.block_lora import BlockLoRA
from lora_edge.methods.conv_lora import ConvLoRA
from lora_edge.nn.reparametrised import reparametrise
from lora_edge.surgery.base_state import fingerprint_state


@pytest.mark.parametrize("blocks", [1, 2, 3])
@pytest.mark.parametrize("weight", list(WEIGHTS))
def test_by_its_formula(weight, blocks):
    """Block by block, values and gradients: ``[B_1 ... B_n] [A; ...; A]``."""
    conv = WEIGHTS[weight]().double()
    made = BlockLoRA(conv, 6, blocks)
    layer = perturbed(conv, made)
    a, b = (p.detach().clone().requires_grad_() for p in (made.lora_A, made.lora_B))
    want = (torch.cat(list(b), dim=1) @ torch.cat([a.flatten(1)] * blocks)).view(conv.weight.shape)
    got = layer.weight - conv.weight.detach()
    torch.testing.assert_close(got, want)
    dy = torch.randn_like(got)
    for mine, theirs in zip(
        torch.autograd.grad((got * dy).sum(), [made.lora_A, made.lora_B]),
        torch.autograd.grad((want * dy).sum(), [a, b]),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)
    assert int(torch.linalg.matrix_rank(want.detach().flatten(1))) <= 6 // blocks
    assert made.lora_A.numel() + made.lora_B.numel() == 6 // blocks * a[0].numel() + 6 * conv.out_channels


def trained(conv: nn.Module, made: nn.Module, factor: float, x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
    """The weight after each of 20 steps of Adam, whose rate is ``factor`` times as high for ``B``."""
    conv = copy.deepcopy(conv).requires_grad_(False)
    reparametrise(conv, made)
    optimizer = torch.optim.Adam([{"params": [made.lora_A], "lr": 0.01}, {"params": [made.lora_B], "lr": factor * 0.01}])
    weights = []
    for _ in range(20):
        optimizer.zero_grad()
        (conv(x) - y).square().mean().backward()
        optimizer.step()
        weights.append(conv.weight.detach().clone())
    return weights


@pytest.mark.parametrize("blocks", [2, 4])
@pytest.mark.parametrize("weight", list(WEIGHTS))
def test_is_exactly_conv_lora_of_the_blocks_rank_with_a_higher_rate_for_b(weight, blocks):
    torch.manual_seed(4)
    conv, rank = WEIGHTS[weight](), 3
    x = torch.randn(4, conv.in_channels, *(9 for _ in conv.kernel_size))
    y = torch.randn_like(conv(x))
    ours_, plain = BlockLoRA(conv, blocks * rank, blocks), ConvLoRA(conv, rank)
    with torch.no_grad():
        plain.lora_A.copy_(ours_.lora_A)
    same_rate = copy.deepcopy(plain)
    got, want = trained(conv, ours_, 1.0, x, y), trained(conv, plain, blocks, x, y)
    for mine, theirs in zip(got, want, strict=True):
        assert float((mine - theirs).abs().max()) == 0.0
    assert all(torch.equal(arm, ours_.lora_B[0]) for arm in ours_.lora_B)
    slower = trained(conv, same_rate, 1.0, x, y)
    assert float((got[-1] - slower[-1]).norm()) > 0.05 * float((got[-1] - conv.weight.detach()).norm())


def test_arms_that_start_apart_are_another_method():
    """Random arms neither start at the base nor stay together, and arms with an ``A`` each are conv LoRA of rank r."""
    conv = WEIGHTS["wide"]().double()
    layer, made = ours(conv, BlockLoRA)
    with torch.no_grad():
        assert not torch.allclose(made.lora_B[0], made.lora_B[1])
        twin, other = ours(conv, ConvLoRA)
        other.lora_A[:1], other.lora_B[:, :1] = made.lora_A, made.lora_B[0]
        other.lora_B[:, 1:] = made.lora_B[1]
        assert not torch.allclose(layer.weight, twin.weight)
        other.lora_A[1:] = made.lora_A
        torch.testing.assert_close(layer.weight, twin.weight)


@pytest.mark.parametrize("rank", [1, 3])
def test_a_rank_that_the_blocks_do_not_divide_is_refused(rank):
    base, x = small_base()
    before = fingerprint_state(base.state_dict())
    with pytest.raises(ValueError, match=f"rank is {rank}, which 2 blocks do not divide; give a multiple of 2") as caught:
        begun(base, "block_lora", x, rank)
    assert "\n" not in str(caught.value)
    assert fingerprint_state(base.state_dict()) == before
