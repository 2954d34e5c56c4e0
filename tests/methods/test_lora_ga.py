"""LoRA-GA in float64: its factors, its first step, which is the truncation of the gradient, its start, its rank."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from helpers.methods import METHODS, RANK, WEIGHTS, perturbed, small_base
from lora_edge.methods.conv_lora import ConvLoRA
from lora_edge.methods.lora_ga import LoRAGA
from lora_edge.methods.parts.facts import dense_gradients
from lora_edge.nn.reparametrised import reparametrise, reparametrised_layers
from lora_edge.tools import deltas


def case(name):
    """A convolution in float64 and a gradient of its weight."""
    torch.manual_seed(0)
    conv = WEIGHTS[name]().double()
    return conv, torch.randn_like(conv.weight)


def truncation(matrix, rank):
    """The best approximation of a rank, by projection on eigenvectors of ``M Mᵀ``."""
    vectors = torch.linalg.eigh(matrix @ matrix.T).eigenvectors[:, -rank:]
    return vectors @ vectors.T @ matrix


def step(b, a, gradient):
    """What one gradient step of both factors moves the weight by, to first order, per rate."""
    return gradient @ a.T @ a + b @ b.T @ gradient


@pytest.mark.parametrize("name", list(WEIGHTS))
def test_the_first_step_is_the_truncated_gradient(name):
    conv, gradient = case(name)
    made = LoRAGA(conv, RANK, gradient, alpha=3.0)
    layer = conv.requires_grad_(False)
    reparametrise(layer, made)
    (layer.weight * gradient).sum().backward()
    b, a, dense = made.lora_B.detach(), made.lora_A.detach().flatten(1), gradient.flatten(1)
    moved = made.scaling * (made.lora_B.grad @ a + b @ made.lora_A.grad.flatten(1))
    want = truncation(dense, 2 * RANK)
    unit = made.scaling**2 * conv.out_channels**0.5 / 16  # both factors have the authors' scale O^(1/4)/√16
    torch.testing.assert_close(moved, unit * want)
    torch.testing.assert_close(moved, made.scaling**2 * step(b, a, dense))


@pytest.mark.parametrize("name", list(WEIGHTS))
def test_the_same_directions_in_both_or_pefts_factors_are_no_truncation(name):
    conv, gradient = case(name)
    dense = gradient.flatten(1)
    u, values, vt = torch.linalg.svd(dense, full_matrices=False)
    r = RANK
    want = truncation(dense, 2 * r)
    same = step(u[:, :r], vt[:r], dense)
    pefts = step(u[:, r : 2 * r] * values[r : 2 * r], vt[:r], dense)
    for wrong in (same, pefts):
        cosine = (wrong * want).sum() / (wrong.norm() * want.norm())
        assert cosine < 0.98
    ours = LoRAGA(conv, r, gradient)
    torch.testing.assert_close(step(ours.lora_B, ours.lora_A.flatten(1), dense), want * conv.out_channels**0.5 / 16)


@pytest.mark.parametrize("name", list(WEIGHTS))
def test_starts_at_the_base_and_trains_as_conv_lora(name):
    conv, gradient = case(name)
    made = LoRAGA(conv, RANK, gradient, alpha=3.0)
    assert not made.delta().count_nonzero()
    before = made.scaling * made.lora_B.detach() @ made.lora_A.detach().flatten(1)
    torch.testing.assert_close(made.lora_B.norm(), made.lora_A.norm())
    layer = perturbed(conv, made)
    after = made.scaling * made.lora_B @ made.lora_A.flatten(1)
    torch.testing.assert_close(layer.weight.flatten(1), conv.weight.flatten(1) + after - before)
    b, a, scale = made.low_rank()
    assert (b.shape[1], len(a)) == (2 * RANK, 2 * RANK)
    torch.testing.assert_close(scale * b @ a.flatten(1), after - before)


def test_a_small_step_of_the_model_follows_the_full_gradient():
    """In every layer of a network, by the gradient of its own loss; as a plain LoRA's does not."""
    base, x = small_base()
    base.double()
    x, labels = x.double(), torch.arange(8) % 3
    names = [name for name, module in base.named_modules() if isinstance(module, nn.Conv1d)]
    gradients = dense_gradients(base, names, x, labels)
    training = METHODS["lora_ga"].begin(base, RANK, x, labels)
    training.loss(base.train(), x, labels).backward()
    with torch.no_grad():
        for parameter in training.parameters:
            parameter -= 1e-6 * parameter.grad
    for name, update in deltas(base).items():
        want = -truncation(gradients[name].flatten(1), 2 * RANK)
        cosine = (update.flatten(1) * want).sum() / (update.norm() * want.norm())
        assert cosine > 0.9999


def test_the_rank_is_at_most_half_of_what_the_gradient_can_have():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(3, 4, 1), nn.Conv1d(4, 4, 1, groups=4), nn.Flatten(), nn.Linear(20, 2))
    x = torch.randn(4, 3, 5)
    METHODS["lora_ga"].begin(model, 9, x, torch.arange(4) % 2)
    kinds = list(reparametrised_layers(model).values())
    assert [type(kind) for kind in kinds] == [LoRAGA, ConvLoRA]  # three inputs; one per group, so no second direction
    assert [kind.lora_A.shape[0] for kind in kinds] == [1, 1]
