"""LoLDU against elimination step by step, in float64: factors, weight, gradient; zero pivots, the whole diagonal."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from helpers.methods import RANK, WEIGHTS, perturbed
from lora_edge.methods.loldu import LoLDU, whole_diagonal


def eliminated(weight):
    """Return the pivots ``d_i`` and the unit-pivot columns ``l_i`` and rows ``u_i`` with ``W = Σ d_i l_i u_iᵀ``."""
    rest, taken = weight.clone(), []
    found = []
    for place in range(min(weight.shape)):
        free = [row for row in range(len(weight)) if row not in taken]
        pivot_row = free[int(rest[free, place].abs().argmax())]
        taken.append(pivot_row)
        pivot = rest[pivot_row, place].clone()
        column, row = rest[:, place] / pivot, rest[pivot_row] / pivot
        rest = rest - pivot * torch.outer(column, row)
        found.append((pivot, column, row))
    torch.testing.assert_close(rest, torch.zeros_like(rest), rtol=0, atol=1e-12)
    return found


def random_conv(name):
    torch.manual_seed(0)
    return WEIGHTS[name]().double()


@pytest.mark.parametrize("rank", [1, 3, 100])
@pytest.mark.parametrize("name", list(WEIGHTS))
def test_weight_and_gradient_are_those_of_elimination(name, rank):
    conv = random_conv(name)
    made = LoLDU(conv, rank, alpha=3.0)
    layer = perturbed(conv, made)
    parts = eliminated(conv.weight.detach().flatten(1))[:rank]
    assert made.z.shape == (len(parts),)
    scale = 3.0 / len(parts)
    torch.testing.assert_close(made.z0, torch.stack([pivot for pivot, _, _ in parts]))
    want = conv.weight.detach().flatten(1).clone()
    for z, (pivot, column, row) in zip(made.z.detach(), parts, strict=True):
        want += scale * (z - pivot) * torch.outer(column, row)
    torch.testing.assert_close(layer.weight.flatten(1), want)
    gradient = torch.randn_like(conv.weight)
    (layer.weight * gradient).sum().backward()
    dense = gradient.flatten(1)
    torch.testing.assert_close(made.z.grad, torch.stack([scale * column @ dense @ row for _, column, row in parts]))
    b, a, s = made.low_rank()
    torch.testing.assert_close(s * b @ a.flatten(1), made.delta())


@pytest.mark.parametrize("name", list(WEIGHTS))
def test_the_rows_in_pivot_order_or_not_divided_by_their_pivots_are_another_update(name):
    """The careless forms: ``P`` left out, or LU's own ``U`` in the place of LDU's."""
    conv = random_conv(name)
    made = LoLDU(conv, RANK)
    perturbed(conv, made)
    _, lower, upper = torch.linalg.lu(conv.weight.detach().flatten(1))
    move = made.z - made.z0
    without_p = (lower[:, :RANK] * move) @ made.right.flatten(1)
    undivided = (made.left * move) @ upper[:RANK]
    for wrong in (without_p, undivided):
        assert (wrong - made.delta()).norm() > 0.1 * made.delta().norm()


@pytest.mark.parametrize("name", list(WEIGHTS))
def test_the_whole_diagonal_is_trained_and_can_take_the_weight_to_zero(name):
    conv = random_conv(name)
    made = whole_diagonal(conv, 1)
    assert made.z.numel() == min(conv.weight.flatten(1).shape)
    with torch.no_grad():
        made.z.zero_()
        torch.testing.assert_close(made.adapted(conv.weight), torch.zeros_like(conv.weight), rtol=0, atol=1e-12)


def test_zero_pivots_are_passed_over():
    """A dead input has a pivot of zero and leaves the others; a weight of rank 1 has one pivot, one of zeros none."""
    conv = nn.Conv1d(3, 8, 2)
    with torch.no_grad():
        conv.weight[:, 0, 0] = 0
    made = LoLDU(conv, 100)
    assert made.z.shape == (5,)
    assert bool(torch.isfinite(made.right).all())
    with torch.no_grad():
        conv.weight.copy_(torch.outer(torch.randn(8), torch.randn(6)).view(8, 3, 2))
    assert LoLDU(conv, 100).z.shape == (1,)
    with torch.no_grad():
        conv.weight.zero_()
    made = LoLDU(conv, 100, alpha=3.0)
    assert made.z.shape == (0,)
    assert torch.equal(made.adapted(conv.weight), conv.weight)
