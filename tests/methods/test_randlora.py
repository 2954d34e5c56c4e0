"""RandLoRA against peft on the unfolded weight, its rank and its count."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from helpers.methods import METHODS, WEIGHTS, perturbed, prepared, small_base
from lora_edge.har.models import TResNet
from lora_edge.methods.randlora import Bases, RandLoRA
from lora_edge.nn.reparametrised import reparametrised_layers, share
from lora_edge.tools import deltas

SHAPES = {**WEIGHTS, "square": lambda: nn.Conv1d(4, 12, 3)}
RANKS = [1, 2, 4, 7]  # of which some do not divide the shorter side, and 7 is above it


def made_alone(conv, rank, others=(), **options):
    made = RandLoRA(conv, rank, **options)
    share([made], Bases([conv, *others], rank))
    return made


def pefts_linear(conv, made, rank, alpha, *others):
    """peft's RandLoRA on a linear layer with the convolution's unfolded weight, with the bases and values of ``made``."""
    peft = pytest.importorskip("peft")
    linear = nn.Linear(made.terms, made.outs, bias=False)
    linear.weight = nn.Parameter(conv.parametrizations.weight.original.detach().flatten(1).clone())
    model = nn.Sequential()
    model.add_module("layer", linear)
    for place, other in enumerate(others):
        model.add_module(f"other{place}", other)
    targets = [name for name, _ in model.named_children()]
    oracle = peft.get_peft_model(model, peft.RandLoraConfig(r=rank, randlora_alpha=alpha, target_modules=targets))
    theirs = next(m for m in oracle.modules() if hasattr(m, "randlora_lambda"))
    a, b = theirs.randlora_A, theirs.randlora_B
    assert (a["default"].squeeze(1).shape, b["default"].shape) == (made.shared.a.shape, made.shared.b.shape)
    lambdas, gamma = theirs.randlora_lambda["default"], theirs.randlora_gamma["default"]
    assert (lambdas.shape, gamma.shape) == (made.lambda_.shape, made.gamma.shape)
    assert not lambdas.count_nonzero()
    torch.testing.assert_close(gamma, torch.full_like(gamma, 1 / max(gamma.shape)))
    a["default"] = made.shared.a[:, None]
    b["default"] = made.shared.b
    with torch.no_grad():
        lambdas.copy_(made.lambda_)
        gamma.copy_(made.gamma)
    return oracle, theirs, lambdas, gamma


def papers_sum(made):
    """``Σ_n B_n Λ_n A Γ_n``, transposed where ``O < J``."""
    bases, shorter = made.gamma.shape
    longer = max(made.outs, made.terms)
    a, b = made.shared.a[:, :shorter], made.shared.b[:longer]
    terms = [b[:, n] @ (made.lambda_[:, n, None] * a * made.gamma[n]) for n in range(bases)]
    return made.scaling * (sum(terms) if made.terms <= made.outs else sum(terms).T)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("name", list(SHAPES))
def test_update_and_gradients_are_pefts(name, rank):
    conv = SHAPES[name]()
    made = made_alone(conv, rank, alpha=3.0)
    torch.testing.assert_close(made.gamma, torch.full_like(made.gamma, 1 / max(made.gamma.shape)))
    layer = perturbed(conv, made)
    oracle, theirs, lambdas, gamma = pefts_linear(layer, made, rank, 3.0)
    torch.testing.assert_close(made.delta(), theirs.get_delta_weight("default"), rtol=1e-5, atol=1e-6)
    x, dy = torch.randn(7, made.terms), torch.randn(7, made.outs)
    (x @ layer.weight.flatten(1).T * dy).sum().backward()
    (oracle(x) * dy).sum().backward()
    torch.testing.assert_close(made.lambda_.grad, lambdas.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(made.gamma.grad, gamma.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", list(SHAPES))
def test_update_is_not_the_papers_sum(name):
    """The two differ as soon as there are several bases of several vectors."""
    conv = SHAPES[name]()
    made = made_alone(conv, 2)
    perturbed(conv, made, size=1.0)
    update, paper = made.delta(), papers_sum(made)
    assert float((update - paper).detach().norm() / paper.detach().norm()) > 0.3
    alone = made_alone(conv, 100)
    perturbed(conv, alone, size=1.0)
    torch.testing.assert_close(alone.delta(), papers_sum(alone), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", list(SHAPES))
@pytest.mark.parametrize("rank", RANKS)
def test_update_has_full_rank(name, rank):
    conv = SHAPES[name]().double()
    made = made_alone(conv, rank)
    perturbed(conv, made, size=1.0)
    assert torch.linalg.matrix_rank(made.delta()) == min(made.outs, made.terms)


@pytest.mark.parametrize("name", list(SHAPES))
def test_a_layer_uses_the_part_of_larger_bases_that_pefts_uses(name):
    conv = SHAPES[name]()
    made = made_alone(conv, 2, others=[nn.Conv1d(20, 30, 4)])
    assert made.shared.a.shape == (2, 30)
    assert made.shared.b.shape == (80, 15, 2)
    layer = perturbed(conv, made)
    _, theirs, _, _ = pefts_linear(layer, made, 2, 40.0, nn.Linear(80, 30))
    torch.testing.assert_close(made.delta(), theirs.get_delta_weight("default"), rtol=1e-5, atol=1e-6)


def test_bases_have_the_variance_of_pefts():
    bases = Bases([nn.Conv1d(64, 128, 3)], 8)
    for base in (bases.a, bases.b):
        torch.testing.assert_close(base.std(), torch.tensor(1.0), rtol=0.05, atol=0)
        assert float(base.mean().abs()) < 0.1


def test_only_lambda_moves_in_the_first_step():
    base, x = small_base()
    model, _ = prepared(base, "randlora", x)
    model(x).square().sum().backward()
    for made in reparametrised_layers(model).values():
        assert not made.gamma.grad.count_nonzero()
        assert made.lambda_.grad.count_nonzero()


def test_the_bases_are_one_for_all_layers_and_frozen():
    base, x = small_base()
    model, parameters = prepared(base, "randlora", x)
    layers = list(reparametrised_layers(model).values())
    assert len({id(made.shared) for made in layers}) == 1
    names = [name for name, _ in model.named_buffers() if name.endswith(("lent.a", "lent.b"))]
    assert len(names) == 2
    assert not any(p is layers[0].shared.b for p in parameters)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.1)
    assert all(update.count_nonzero() for update in deltas(model).values())


def test_fewer_elements_are_trained_at_a_larger_rank():
    counts = []
    for rank in (1, 2, 8, 32, 128):
        torch.manual_seed(0)
        model = TResNet(6, 3)
        counts.append(METHODS["randlora"].begin(model, rank, torch.empty(0), torch.empty(0)).count)
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == 2422
