"""TeRA against tensorly's Tucker form; its shared bases."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from helpers.methods import RANK, WEIGHTS, begun, perturbed, small_base
from helpers.networks import network
from lora_edge.methods.files import trained_state
from lora_edge.methods.tera import METHOD, Bases, TeRA
from lora_edge.nn.reparametrised import reparametrised_layers, share

FULL = 64  # more than any axis of WEIGHTS has


def made_for(conv: nn.Module, rank: int) -> TeRA:
    made = TeRA(conv, rank)
    share([made], Bases([conv], rank))
    return made


def oracle(made: TeRA, diagonals: list[torch.Tensor], size: torch.Tensor) -> torch.Tensor:
    """``size · G ×ₙ Uₙ diag(dₙ)`` by tensorly."""
    tensorly = pytest.importorskip("tensorly")
    tensorly.set_backend("pytorch")
    shared = dict(made.shared.named_buffers())
    core = next(value for name, value in shared.items() if name.startswith("core"))
    factors = [shared[f"factor_{n}"] * d for n, d in zip(made.sizes, diagonals, strict=True)]
    return size * tensorly.tucker_to_tensor((core, factors))


@pytest.mark.parametrize("rank", [1, 3, FULL])
@pytest.mark.parametrize("weight", list(WEIGHTS))
def test_agrees_with_tensorly(weight, rank):
    conv = WEIGHTS[weight]().double()
    made = made_for(conv, rank)
    layer = perturbed(conv, made)
    theirs = [d.detach().clone().requires_grad_() for d in made.diagonals]
    got, want = layer.weight - conv.weight.detach(), oracle(made, theirs, conv.weight.detach().norm())
    assert [len(d) for d in theirs] == [min(size, rank) for size in conv.weight.shape]
    torch.testing.assert_close(got, want)
    dy = torch.randn_like(got)
    for mine, their in zip(
        torch.autograd.grad((got * dy).sum(), list(made.diagonals)), torch.autograd.grad((want * dy).sum(), theirs), strict=True
    ):
        torch.testing.assert_close(mine, their)


def test_scales_on_the_wrong_side_of_the_factors_are_another_update():
    """``D U`` in place of ``U D``: of the right shape at full rank, and wrong."""
    conv = WEIGHTS["wide"]().double()
    made = made_for(conv, FULL)
    layer = perturbed(conv, made)
    shared = dict(made.shared.named_buffers())
    turned = [d[:, None] * shared[f"factor_{n}"] for n, d in zip(made.sizes, made.diagonals, strict=True)]
    wrong = made.scale * torch.einsum("abc,xa,yb,zc->xyz", shared["core_5x6x7"], *turned)
    right = layer.weight - conv.weight
    assert float((wrong - right).detach().norm() / right.detach().norm()) > 0.5


@pytest.mark.parametrize("weight", list(WEIGHTS))
def test_the_update_has_full_rank_and_starts_with_a_gradient_for_the_outputs_alone(weight):
    conv = WEIGHTS[weight]().double()
    made = made_for(conv, FULL)
    start = torch.autograd.grad(made.delta().sum(), list(made.diagonals))
    assert not made.delta().count_nonzero()
    assert [bool(gradient.count_nonzero()) for gradient in start] == [True] + [False] * (len(start) - 1)
    update = (perturbed(conv, made).weight - conv.weight).detach()
    assert int(torch.linalg.matrix_rank(update.flatten(1))) == min(update.flatten(1).shape)


def test_linear_in_each_diagonal():
    conv = WEIGHTS["groups"]().double()
    made = made_for(conv, 3)
    perturbed(conv, made)
    once = made.delta().detach()
    for diagonal in made.diagonals:
        with torch.no_grad():
            diagonal.mul_(2)
            torch.testing.assert_close(made.delta(), 2 * once)
            diagonal.div_(2)


def test_as_large_as_the_weight_where_all_diagonals_are_one():
    torch.manual_seed(0)
    conv = nn.Conv1d(48, 64, 5)
    made = made_for(conv, FULL)
    with torch.no_grad():
        made.diagonals[0].fill_(1.0)
    assert float(made.delta().detach().norm() / conv.weight.detach().norm()) == pytest.approx(1, rel=0.05)
    factor = made.shared.factor_48
    torch.testing.assert_close(factor.T @ factor, torch.eye(48), rtol=0, atol=1e-5)


def test_layers_hold_one_set_of_bases_that_is_saved_once():
    base, x = small_base()
    model, training = begun(base, "tera", x)
    kinds = list(reparametrised_layers(model).values())
    assert len({id(kind.shared) for kind in kinds}) == 1
    sizes = {size for conv in reparametrised_layers(model) for size in conv.weight.shape}
    saved = trained_state(model)
    bases = {name.rpartition(".")[2]: value for name, value in saved.items() if ".lent." in name}
    assert set(bases) == {f"factor_{size}" for size in sizes} | {"core_2x2x2", "core_2x2x1"}
    assert not any(value.requires_grad for value in bases.values())
    count = sum(value.numel() for value in saved.values())
    assert count == training.count + len(kinds) + RANK * sum(sizes - {1}) + 1 + 8 + 4  # scales, factors, cores


def test_the_shared_bases_survive_a_copy_of_the_model():
    base, x = network("2-D")
    METHOD.begin(base, RANK, x, torch.zeros(4).long())
    twin = copy.deepcopy(base)
    (shared,) = {id(kind.shared) for kind in reparametrised_layers(base).values()}
    (copied,) = {id(kind.shared) for kind in reparametrised_layers(twin).values()}
    assert shared != copied
