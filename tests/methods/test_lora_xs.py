"""LoRA-XS against its formula in float64: factors, weight, gradient; the cap of its rank."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from helpers.methods import RANK, WEIGHTS, perturbed
from lora_edge.methods.lora_xs import LoRAXS


def random_conv(name):
    torch.manual_seed(0)
    return WEIGHTS[name]().double()


def leading(matrix, rank):
    """Left vectors, values and right vectors of the ``rank`` largest singular values, by the eigenvectors of ``M Mᵀ``."""
    m = matrix.numpy()
    values, vectors = np.linalg.eigh(m @ m.T)
    order = np.argsort(values)[::-1][:rank]
    sigma = np.sqrt(values[order])
    u = vectors[:, order]
    return torch.from_numpy(u.copy()), torch.from_numpy(sigma), torch.from_numpy((m.T @ u / sigma).T.copy())


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("name", list(WEIGHTS))
def test_lora_xs_weight_and_gradient(name, rank):
    conv = random_conv(name)
    weight = conv.weight.detach().flatten(1)
    made = LoRAXS(conv, rank, alpha=3.0)
    assert not made.latent.count_nonzero()
    layer = perturbed(conv, made)
    u, sigma, vt = leading(weight, rank)
    signs = torch.diagonal(u.T @ made.left).sign()  # singular vectors are given up to a sign
    b, a = u * signs, signs[:, None] * sigma[:, None] * vt
    torch.testing.assert_close(made.left, b)
    torch.testing.assert_close(made.right.flatten(1), a)
    torch.testing.assert_close(layer.weight.flatten(1), weight + 3.0 / rank * b @ made.latent @ a)
    gradient = torch.randn_like(conv.weight)
    (layer.weight * gradient).sum().backward()
    torch.testing.assert_close(made.latent.grad, 3.0 / rank * b.T @ gradient.flatten(1) @ a.T)
    product = made.low_rank()
    torch.testing.assert_close(product[2] * product[0] @ product[1].flatten(1), made.delta())


@pytest.mark.parametrize("name", list(WEIGHTS))
def test_lora_xs_with_the_values_on_both_sides_is_another_method(name):
    """As peft's TinyLoRA splits them; the gradient of ``R``, so the path of training, differs."""
    conv = random_conv(name)
    with torch.no_grad():
        conv.weight[0] *= 5.0  # singular values that differ
    made = LoRAXS(conv, RANK)
    u, sigma, vt = torch.linalg.svd(conv.weight.detach().flatten(1), full_matrices=False)
    gradient = torch.randn_like(conv.weight).flatten(1)
    right = u[:, :RANK].T @ gradient @ (sigma[:RANK, None] * vt[:RANK]).T
    roots = sigma[:RANK].sqrt()
    split = (u[:, :RANK] * roots).T @ gradient @ (roots[:, None] * vt[:RANK]).T
    ours = made.left.T @ gradient @ made.right.flatten(1).T
    torch.testing.assert_close(ours, right)
    assert (split - ours).norm() > 0.1 * ours.norm()


def test_rank_is_capped_by_the_smaller_side():
    made = LoRAXS(random_conv("depthwise"), 50)
    assert made.latent.shape == (5, 5)
    assert made.right.shape == (5, 1, 5)
