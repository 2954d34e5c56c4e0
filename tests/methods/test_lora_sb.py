"""LoRA-SB in float64: its start is the best approximation of the first Adam step, its gradient steps are projections."""

from __future__ import annotations

import pytest
import torch

from helpers.methods import METHODS, RANK, WEIGHTS, perturbed, small_base
from lora_edge.methods.lora_sb import FIRST_STEP, LoRASB
from lora_edge.methods.parts.facts import dense_gradients
from lora_edge.tools import deltas


def random_conv(name):
    torch.manual_seed(0)
    return WEIGHTS[name]().double()


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("name", list(WEIGHTS))
def test_lora_sb_starts_at_the_best_approximation_of_the_first_step(name, rank):
    conv = random_conv(name)
    gradient = torch.randn_like(conv.weight)
    made = LoRASB(conv, rank, gradient, step=0.01)
    first_step = -0.01 * torch.sign(gradient.flatten(1))
    start = made.delta()
    values = torch.linalg.svdvals(first_step)
    torch.testing.assert_close((start - first_step).norm(), values[rank:].norm())  # Eckart and Young's best
    assert int(torch.linalg.matrix_rank(start)) == rank
    torch.testing.assert_close(made.latent.detach(), values[:rank].diag())
    assert float((start.detach() * gradient.flatten(1)).sum()) < 0  # downhill
    eye = torch.eye(rank, dtype=torch.float64)
    torch.testing.assert_close(made.left.T @ made.left, eye)
    torch.testing.assert_close(made.right.flatten(1) @ made.right.flatten(1).T, eye)
    of_g = torch.linalg.svd(gradient.flatten(1), full_matrices=False)  # the careless form: G in the place of its sign
    wrong = -(of_g[0][:, :rank] * of_g[1][:rank]) @ of_g[2][:rank]
    wrong *= start.norm() / wrong.norm()
    assert (wrong - first_step).norm() > 1.001 * (start - first_step).norm()
    assert (wrong - start).norm() > 0.1 * start.norm()


@pytest.mark.parametrize("name", list(WEIGHTS))
def test_a_gradient_step_of_lora_sb_is_the_projection_of_the_gradient(name):
    conv = random_conv(name)
    made = LoRASB(conv, RANK, torch.randn_like(conv.weight))
    layer = perturbed(conv, made)
    before = layer.weight.detach().flatten(1)
    gradient = torch.randn_like(conv.weight)
    (layer.weight * gradient).sum().backward()
    with torch.no_grad():
        made.latent -= made.latent.grad
    b, a = made.left, made.right.flatten(1)
    torch.testing.assert_close(before - layer.weight.flatten(1), b @ b.T @ gradient.flatten(1) @ a.T @ a)


def test_at_full_rank_the_start_is_the_first_step_of_full_fine_tuning():
    base, x = small_base()
    base.double()
    x, labels = x.double(), torch.arange(8) % 3
    names = [name for name, module in base.named_modules() if isinstance(module, torch.nn.Conv1d)]
    gradients = dense_gradients(base, names, x, labels)
    METHODS["lora_sb"].begin(base, 10_000, x, labels)
    for name, update in deltas(base).items():
        torch.testing.assert_close(update, -FIRST_STEP * gradients[name].sign())
