"""MatryoshkaLoRA against the sum over its ranks; its ranks in evaluation, one by one."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F

import lora_edge
from helpers.methods import LABELS, WEIGHTS, begun, ours, perturbed, small_base
from helpers.networks import output, train
from lora_edge.methods.conv_lora import ConvLoRA
from lora_edge.methods.matryoshka import Matryoshka
from lora_edge.methods.training import training_step
from lora_edge.nn.reparametrised import reparametrised_layers
from lora_edge.tools import at_rank, aurac, deltas, low_rank


def nested(made: Matryoshka, rank: int) -> torch.Tensor:
    """The update of one rank, by its definition."""
    return torch.einsum("or,r...->o...", made.lora_B[:, :rank], made.lora_A[:rank]) / math.sqrt(rank)


def gradients(update: torch.Tensor, made: Matryoshka, seed: int = 0) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(seed)
    return torch.autograd.grad((update * torch.randn_like(update)).sum(), [made.lora_A, made.lora_B])


@pytest.mark.parametrize(("rank", "ranks"), [(1, (1,)), (5, (1, 2, 4, 5)), (8, (1, 2, 4, 8))])
@pytest.mark.parametrize("weight", list(WEIGHTS))
def test_the_training_form_is_the_sum_over_the_ranks(weight, rank, ranks):
    conv = WEIGHTS[weight]().double()
    made = Matryoshka(conv, rank)
    layer = perturbed(conv, made)
    assert made.ranks == ranks
    got, want = layer.weight - conv.weight.detach(), torch.stack([nested(made, t) for t in ranks]).sum(0)
    torch.testing.assert_close(got, want)
    for mine, theirs in zip(gradients(got, made), gradients(want, made), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("weight", list(WEIGHTS))
def test_the_evaluation_form_is_one_rank_and_not_the_training_form(weight):
    conv = WEIGHTS[weight]().double()
    made = Matryoshka(conv, 6)
    layer = perturbed(conv, made)
    trained = (layer.weight - conv.weight).detach()
    layer.eval()
    for rank in (*made.ranks, None):
        made.active = rank
        want = nested(made, rank or 6)
        torch.testing.assert_close(layer.weight - conv.weight, want)
        assert float((trained - want).detach().norm()) > 0.2 * float(trained.norm())


def test_the_diagonal_of_rank_8():
    made = Matryoshka(WEIGHTS["wide"](), 8)
    want = torch.tensor([2.5607, 1.5607, 0.8536, 0.8536, 0.3536, 0.3536, 0.3536, 0.3536])
    torch.testing.assert_close(made.diagonal, want, rtol=0, atol=1e-4)


def test_with_a_single_rank_it_is_conv_lora():
    conv = WEIGHTS["groups"]()
    layer, made = ours(conv, Matryoshka, ranks=(2,))
    twin, other = ours(conv, ConvLoRA, alpha=math.sqrt(2))
    with torch.no_grad():
        other.lora_A.copy_(made.lora_A)
        other.lora_B.copy_(made.lora_B)
    torch.testing.assert_close(layer.weight, twin.weight)
    torch.testing.assert_close(layer.eval().weight, twin.weight)


def test_every_rank_is_evaluated_and_merged():
    base, x = small_base()
    model, training = begun(base, "matryoshka", x, 5)
    train(model, x, training.parameters)
    model.eval()
    whole = output(model, x)
    names, weights = {m: n for n, m in model.named_modules()}, dict(base.named_modules())
    for rank in (1, 2, 4, 5):
        with at_rank(model, rank):
            here, updates, factors = output(model, x), deltas(model), low_rank(model)
            merged = lora_edge.merge(copy.deepcopy(model))
        for conv, made in reparametrised_layers(model).items():
            name, want = names[conv], nested(made, rank)
            torch.testing.assert_close(updates[name], want, rtol=1e-4, atol=1e-6)
            b, a, scale = factors[name]
            assert b.shape[1] == len(a) == rank
            torch.testing.assert_close(scale * torch.einsum("or,r...->o...", b, a), want)
            torch.testing.assert_close(merged.get_submodule(name).weight, weights[name].weight + want)
        torch.testing.assert_close(output(merged, x), here, rtol=1e-4, atol=1e-4)
        assert torch.equal(here, whole) == (rank == 5)
    with pytest.raises(ValueError, match="rank is 3; give one of 1, 2, 4, 5"), at_rank(model, 3):
        pass
    assert torch.equal(output(model, x), whole)


def test_training_lowers_the_loss_at_every_rank():
    base, x = small_base()
    model, training = begun(base, "matryoshka", x, 4)
    optimizer = training.optimizer(training.parameters, 1e-2)
    y = LABELS[: len(x)]
    with torch.no_grad():
        before = float(F.cross_entropy(model.eval()(x), y))
    for step in range(1, 11):
        training_step(model.train(), training, optimizer, x, y, step, 10)
    model.eval()
    losses = []
    for rank in (1, 2, 4):
        with at_rank(model, rank), torch.no_grad():
            losses.append(float(F.cross_entropy(model(x), y)))
    assert max(losses) < before
    assert min(losses) <= aurac((1, 2, 4), losses) <= max(losses)
