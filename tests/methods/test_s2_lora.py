"""S2-LoRA against peft's VeRA with unit lambda_b; its sparse coefficients and fixed norms."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers.methods import LABELS, WEIGHTS, begun, peft_vera, perturbed, small_base
from helpers.networks import output
from lora_edge.methods.s2_lora import METHOD, PENALTY, Pair, S2LoRA, Sparse
from lora_edge.methods.training import training_step
from lora_edge.nn.reparametrised import reparametrised_layers, share

RANK = 3


def layers_of(convs: list[nn.Module], larger: nn.Module | None = None) -> list[tuple[nn.Module, S2LoRA]]:
    """The convolutions with one pair, which also fits a ``larger`` one; coefficients are moved from zero."""
    kinds = [S2LoRA(conv, RANK) for conv in convs]
    share(kinds, Pair([*convs, *([larger] if larger else [])], RANK))
    return [(perturbed(conv, kind), kind) for conv, kind in zip(convs, kinds, strict=True)]


def vera(sizes: dict[str, tuple[int, int]], a: torch.Tensor, b: torch.Tensor) -> dict[str, nn.Module]:
    """peft's VeRA on linear layers ``(out, in)``, with ``a (r, in)`` and ``b (out, r)`` for its shared projections."""
    found = dict(zip(sizes, peft_vera(sizes.values(), RANK), strict=True))
    for layer in found.values():
        layer.vera_A["default"], layer.vera_B["default"] = a, b
        nn.init.ones_(layer.vera_lambda_b["default"])
    return found


def assert_agree(got, want, mine, theirs):
    """Assert that updates agree, and their gradients by each pair of tensors."""
    dys = [torch.randn_like(update) for update in got]
    losses = [sum((u * dy).sum() for u, dy in zip(updates, dys, strict=True)) for updates in (got, want)]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(torch.autograd.grad(losses[0], mine), torch.autograd.grad(losses[1], theirs), strict=True):
        torch.testing.assert_close(a, b.view(a.shape))


@pytest.mark.parametrize("weight", list(WEIGHTS))
def test_agrees_with_vera_on_the_unfolded_weight(weight):
    conv = WEIGHTS[weight]().double()
    ((layer, made),) = layers_of([conv])
    a, b = (p.detach().clone().requires_grad_() for p in (made.shared.lora_A.flatten(1), made.shared.lora_B))
    oracle = vera({"layer": (len(b), a.shape[1])}, a, b)["layer"]
    scales = oracle.vera_lambda_d["default"]
    with torch.no_grad():
        scales.copy_(made.coefficients)
    assert_agree(
        [layer.weight - conv.weight.detach()],
        [oracle.get_delta_weight("default").view(conv.weight.shape)],
        [made.coefficients, made.shared.lora_A, made.shared.lora_B],
        [scales, a, b],
    )


def test_layers_of_several_sizes_share_as_in_vera():
    """Where the kernels have one size, the crops of the axes are vera's crops of the unfolded factors."""
    convs = [nn.Conv1d(6, 5, 3).double(), nn.Conv1d(4, 9, 3).double()]
    made = layers_of(convs)
    shared = made[0][1].shared
    a, b = (p.detach().clone().requires_grad_() for p in (shared.lora_A.flatten(1), shared.lora_B))
    assert (a.shape, b.shape) == ((RANK, 18), (9, RANK))
    oracle = vera({"one": (5, 18), "two": (9, 12)}, a, b)
    scales = [layer.vera_lambda_d["default"] for layer in oracle.values()]
    with torch.no_grad():
        for theirs, (_, kind) in zip(scales, made, strict=True):
            theirs.copy_(kind.coefficients)
    assert_agree(
        [layer.weight - conv.weight.detach() for conv, (layer, _) in zip(convs, made, strict=True)],
        [layer.get_delta_weight("default").view(conv.weight.shape) for conv, layer in zip(convs, oracle.values(), strict=True)],
        [*(kind.coefficients for _, kind in made), shared.lora_A, shared.lora_B],
        [*scales, a, b],
    )


def test_kernels_of_other_sizes_are_cropped_by_axis():
    """The first elements of the unfolded ``A`` would mix taps and channels."""
    conv, larger = nn.Conv2d(2, 4, (1, 3)), nn.Conv2d(6, 8, 3)
    ((layer, made),) = layers_of([conv], larger)
    a, b = made.shared.lora_A, made.shared.lora_B
    update = (layer.weight - conv.weight).detach()
    want = torch.einsum("oq,q,qihw->oihw", b[:4], made.coefficients, a[:, :2, :1, :3]).detach()
    torch.testing.assert_close(update, want)
    wrong = ((b[:4] * made.coefficients) @ a.flatten(1)[:, :6]).view(update.shape).detach()
    assert float((update - wrong).norm()) > 0.5 * float(update.norm())


def test_at_zero_the_layer_is_the_base_and_only_its_coefficients_have_a_gradient():
    conv = WEIGHTS["groups"]().double()
    made = S2LoRA(conv, RANK)
    share([made], Pair([conv], RANK))
    layer = perturbed(conv, made, size=0.0)
    assert torch.equal(layer.weight, conv.weight)
    dw = torch.randn_like(conv.weight)
    pair = made.shared
    found = torch.autograd.grad((layer.weight * dw).sum(), [made.coefficients, pair.lora_A, pair.lora_B])
    torch.testing.assert_close(found[0], torch.einsum("oiyx,oq,qiyx->q", dw, pair.lora_B, pair.lora_A).detach())
    assert not found[1].count_nonzero()
    assert not found[2].count_nonzero()


def test_dimensions_have_a_pair_each():
    model = nn.Sequential(nn.Conv2d(3, 4, (3, 1)), nn.Flatten(2), nn.Conv1d(4, 5, 2), nn.Conv1d(5, 6, 3))
    METHOD.begin(model, RANK, torch.empty(0), LABELS)
    pairs = [kind.shared for kind in reparametrised_layers(model).values()]
    assert [pair.lora_A.shape for pair in pairs] == [(RANK, 3, 3, 1), (RANK, 5, 3), (RANK, 5, 3)]
    assert pairs[0] is not pairs[1] is pairs[2]


def state_of(model: nn.Module) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The coefficients and the updates of every layer."""
    kinds = reparametrised_layers(model).values()
    return [k.coefficients.detach().clone() for k in kinds], [k.delta().detach().clone() for k in kinds]


def test_a_step_is_adams_and_then_a_soft_threshold():
    base, x = small_base()
    x = x.double()
    model, training = begun(base.double(), "s2_lora", x, RANK)
    plain = copy.deepcopy(model)
    optimizer = training.optimizer(training.parameters, 0.02)
    kinds = list(reparametrised_layers(plain).values())
    adam = torch.optim.Adam([p for p in plain.parameters() if p.requires_grad], lr=0.02)
    for step in range(1, 6):
        training_step(model.train(), training, optimizer, x, LABELS, step, 5)
        adam.zero_grad()
        F.cross_entropy(plain.train()(x), LABELS).backward()
        adam.step()
        pair = kinds[0].shared
        with torch.no_grad():
            moved = pair.lora_A.flatten(1).norm(dim=1) * pair.lora_B.norm(dim=0) / math.sqrt(len(pair.lora_B))
            pair.lora_A /= pair.lora_A.flatten(1).norm(dim=1)[:, None, None]
            pair.lora_B *= math.sqrt(len(pair.lora_B)) / pair.lora_B.norm(dim=0)
            for kind in kinds:
                size = moved * kind.coefficients
                kind.coefficients.copy_(size.sign() * (size.abs() - PENALTY * 0.02).clamp_min(0))
    for mine, theirs in zip(state_of(model)[0], state_of(plain)[0], strict=True):
        torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(output(model.eval(), x), output(plain.eval(), x))


def prepared_model(penalty: float) -> tuple[nn.Module, list[S2LoRA], Sparse]:
    base, x = small_base()
    model, training = begun(base, "s2_lora", x, RANK)
    with torch.no_grad():
        for parameter in training.parameters:
            parameter.add_(0.1 * torch.randn_like(parameter))
    kinds = list(reparametrised_layers(model).values())
    sparse = Sparse(kinds, penalty)
    sparse.adam(training.parameters, 1.0)
    return model, kinds, sparse


def test_the_norms_move_into_the_coefficients_and_the_updates_stay():
    model, kinds, sparse = prepared_model(0.0)
    before = state_of(model)
    sparse.shrink(1, 1)
    for mine, theirs in zip(state_of(model)[1], before[1], strict=True):
        torch.testing.assert_close(mine, theirs)
    pair = kinds[0].shared
    torch.testing.assert_close(pair.lora_A.flatten(1).norm(dim=1), torch.ones(RANK))
    torch.testing.assert_close(pair.lora_B.square().mean(dim=0), torch.ones(RANK))
    assert not torch.allclose(state_of(model)[0][0], before[0][0])


def test_zeros_are_exact_and_growing_factors_do_not_evade_the_penalty():
    """Updates of an ``A`` ten times as large and a tenth of the coefficients shrink as much; without the norms, they do not."""
    model, _, sparse = prepared_model(0.05)
    other = copy.deepcopy(model)
    others = list(reparametrised_layers(other).values())
    same = Sparse(others, 0.05)
    same.adam([others[0].coefficients], 1.0)
    with torch.no_grad():
        others[0].shared.lora_A.mul_(10)
        for kind in others:
            kind.coefficients.div_(10)
    evading = [10 * F.softshrink(kind.coefficients.detach(), 0.05) for kind in others]
    sparse.shrink(1, 1)
    same.shrink(1, 1)
    mine, theirs = torch.cat(state_of(model)[0]), torch.cat(state_of(other)[0])
    torch.testing.assert_close(mine, theirs)
    zeros = int((mine == 0).sum())
    assert 0 < zeros < len(mine)
    assert not torch.allclose(torch.cat(evading), mine, atol=1e-3)
