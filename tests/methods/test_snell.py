"""SNELL against the authors' kernel and threshold, its sparsity, its rank."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers.methods import METHODS, WEIGHTS, small_base
from lora_edge.methods.snell import SNELL
from lora_edge.tools import deltas


def kernel_of(p, q):
    """The two distances by their definition, over all pairs."""
    first, second = (torch.linalg.vector_norm(q[h][:, None] - p[h][None], dim=-1) for h in (0, 1))
    return 0.1 * first - 0.1 * second


def sparsified(kernel, sparsity):
    """The authors' rule: the kernel times its own thresholded size, which is detached."""
    size = kernel.abs()
    threshold = torch.quantile(size.detach().flatten(), sparsity)
    return kernel * F.threshold(size, float(threshold), 0.0).detach()


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("rank", [2, 4])
@pytest.mark.parametrize("name", list(WEIGHTS))
def test_values_and_gradients_are_those_of_the_formula(name, rank, sparsity):
    conv = WEIGHTS[name]().double()
    made = SNELL(conv, rank, sparsity)
    leaves = [t.detach().clone().requires_grad_() for t in (made.p, made.q)]
    kernel = kernel_of(*leaves)
    want = sparsified(kernel, sparsity)
    torch.testing.assert_close(made.delta(), want)
    dw = torch.randn_like(want)
    gradients = torch.autograd.grad(want, leaves, dw, retain_graph=True)
    for got, expected in zip(torch.autograd.grad(made.delta(), (made.p, made.q), dw), gradients, strict=True):
        torch.testing.assert_close(got, expected)
    true = torch.autograd.grad((kernel * kernel.abs() * (want != 0)), leaves, dw)
    torch.testing.assert_close(true[0], 2 * gradients[0])  # with |K| trained, every gradient would be twice as large
    soft = kernel.sign() * (kernel.abs() - torch.quantile(kernel.abs(), sparsity)).clamp_min(0)
    mask = kernel * (want != 0)
    assert not torch.allclose(made.delta(), soft)
    assert not torch.allclose(made.delta(), mask)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.77])
@pytest.mark.parametrize("name", list(WEIGHTS))
def test_the_share_of_zeros_is_the_sparsity(name, sparsity):
    made = SNELL(WEIGHTS[name](), 2, sparsity)
    update = made.delta()
    assert abs(float((update == 0).double().mean()) - sparsity) <= 1 / update.numel()


def test_the_update_of_a_small_rank_has_full_rank():
    made = SNELL(nn.Conv2d(8, 64, 3).double(), 8)
    assert int(torch.linalg.matrix_rank(made.delta())) == 64


def test_starts_near_the_base_and_both_factors_with_the_range_of_the_authors():
    torch.manual_seed(0)
    conv = nn.Conv1d(64, 128, 5)
    made = SNELL(conv, 8)
    for factor, length in ((made.p, 320 * 4), (made.q, 128 * 4)):
        assert 0.9 * length**-0.5 < float(factor.detach().abs().max()) <= length**-0.5
    off = float(made.delta().detach().norm() / conv.weight.detach().norm())
    assert 0 < off < 2e-3
    base, x = small_base()
    METHODS["snell"].prepare(base, 2, x, torch.arange(8) % 2)
    for name, update in deltas(base).items():
        original = base.get_submodule(name).parametrizations.weight.original
        assert 0 < float(update.norm() / original.norm()) < 0.02


def test_equal_points_have_finite_gradients():
    """The distance of a point to itself has no slope."""
    made = SNELL(nn.Conv1d(3, 9, 3), 2)
    with torch.no_grad():
        made.q.copy_(made.p)
    made.delta().sum().backward()
    assert bool(torch.isfinite(made.p.grad).all() and torch.isfinite(made.q.grad).all())


def test_an_odd_rank_is_refused_before_anything_changes():
    base, x = small_base()
    kinds = [type(m) for m in base.modules()]
    with pytest.raises(ValueError, match=r"block1\.conv1: rank is 3; .* give an even one, such as 4") as caught:
        METHODS["snell"].prepare(base, 3, x, torch.arange(8) % 2)
    assert "\n" not in str(caught.value)
    assert [type(m) for m in base.modules()] == kinds
    assert all(p.requires_grad for p in base.parameters())
