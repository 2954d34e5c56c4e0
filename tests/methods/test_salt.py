"""SALT against the authors' formula: a matrix of singular coordinates, its ReLU, its penalty."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from helpers.methods import METHODS, RANK, WEIGHTS, assert_same, assert_update_is_a_product, begun, ours, small_base
from lora_edge.methods.files import load_trained, save_trained
from lora_edge.methods.salt import PENALTY, SALT
from lora_edge.nn.reparametrised import reparametrised_layers
from lora_edge.tools import low_rank


def recomputed(conv, made, relu):
    """The authors' forward on the unfolded weight: the parts written into a copy of diag(σ), in float64."""
    whole = conv.weight.detach().double().flatten(1)
    u, values, vt = torch.linalg.svd(whole, full_matrices=False)
    u, vt = made.u.double(), made.vt.double()  # signs of singular vectors are arbitrary
    k = max(1, int(0.1 * len(values)))
    trained = [p.detach().double().requires_grad_() for p in (made.scale, made.shift, made.lora_X, made.lora_Y)]
    a, b, x, y = trained
    coordinates = torch.diag(values).clone()
    coordinates[:k, :k] = torch.diag(a * values[:k] + b)
    coordinates[k:, k:] += x @ y
    if relu:
        coordinates = torch.relu(coordinates)
    return (u @ coordinates @ vt).view(conv.weight.shape), trained


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("name", list(WEIGHTS))
def test_values_and_gradients_are_those_of_the_formula(name, relu):
    conv = WEIGHTS[name]().double()
    layer, made = ours(conv, SALT, relu=relu)
    want, trained = recomputed(layer_base(layer), made, relu)
    torch.testing.assert_close(layer.weight, want)
    dw = torch.randn_like(want)
    gradients = torch.autograd.grad(want, trained, dw)
    layer.weight.backward(dw)
    for p, gradient in zip((made.scale, made.shift, made.lora_X, made.lora_Y), gradients, strict=True):
        torch.testing.assert_close(p.grad, gradient)
    others = recomputed(layer_base(layer), made, not relu)[0]
    assert not torch.allclose(layer.weight, others)  # the ReLU is of all coordinates


def layer_base(layer):
    twin = nn.Module()
    twin.weight = layer.parametrizations.weight.original
    return twin


@pytest.mark.parametrize("name", list(WEIGHTS))
def test_where_y_is_zero_only_the_leading_singular_values_change(name):
    conv = WEIGHTS[name]().double()
    layer, made = ours(conv, SALT)
    with torch.no_grad():
        made.lora_Y.zero_()
        k, values = made.scaled, made.values
        want = torch.cat([(made.scale * values[:k] + made.shift).relu(), values[k:]])
        got = torch.linalg.svdvals(layer.weight.flatten(1))
    torch.testing.assert_close(got, want.sort(descending=True).values)


def test_no_leading_direction_is_mixed_with_the_others():
    for relu in (True, False):
        layer, made = ours(nn.Conv1d(30, 40, 3).double(), SALT, relu=relu)
        assert made.scaled == 4
        coordinates = made.u.T @ made.delta() @ made.vt.T
        torch.testing.assert_close(coordinates[:4, 4:], torch.zeros(4, 36).double(), rtol=0, atol=1e-12)
        torch.testing.assert_close(coordinates[4:, :4], torch.zeros(36, 4).double(), rtol=0, atol=1e-12)
        assert bool((layer.weight != layer_base(layer).weight).all())


def test_relu_leaves_only_the_diagonal_a_gradient_at_the_start():
    """So ``Y``'s first gradient is that of the diagonal of ``X Y`` alone, and it is dense without the ReLU."""
    conv = nn.Conv1d(4, 7, 3).double()
    target = torch.randn_like(conv.weight)
    for relu in (True, False):
        made = SALT(conv, RANK, relu)
        (made.delta().view(target.shape) * target).sum().backward()
        inner = (made.u.T @ target.flatten(1) @ made.vt.T)[made.scaled :, made.scaled :]
        kept = torch.diag(inner.diagonal()) if relu else inner
        torch.testing.assert_close(made.lora_Y.grad, made.lora_X.detach().T @ kept)


def test_x_starts_as_the_authors_draw_it():
    torch.manual_seed(3)
    made = SALT(nn.Conv1d(40, 50, 3), 8)
    made_x = nn.init.kaiming_uniform_(torch.empty(45, 8), a=20**0.5, mode="fan_in", nonlinearity="relu")
    assert float(made.lora_X.detach().abs().max()) <= (6 / 8) ** 0.5
    torch.testing.assert_close(made.lora_X.std(), made_x.std(), rtol=0.1, atol=0)


@pytest.mark.parametrize("name", ["salt", "salt_linear"])
def test_the_loss_has_the_penalty_of_every_layer(name):
    base, x = small_base()
    model, training = begun(base, name, x)
    y = torch.arange(8) % 3
    start = training.loss(model, x, y)
    start.backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in training.parameters)  # of a norm at zero
    with torch.no_grad():
        for p in training.parameters:
            p.add_(0.1 * torch.randn_like(p))
    want = nn.functional.cross_entropy(model(x), y)
    for made in reparametrised_layers(model).values():
        leading = torch.diag(made.scale * made.values[: made.scaled] + made.shift) - torch.diag(made.values[: made.scaled])
        want = want + PENALTY * (torch.linalg.matrix_norm(leading) + torch.linalg.matrix_norm(made.lora_X @ made.lora_Y))
    torch.testing.assert_close(training.loss(model, x, y), want)


@pytest.mark.parametrize("name", ["salt", "salt_linear"])
def test_a_step_lowers_the_loss_where_the_penalty_is_smooth(name):
    """At the start it is the norm of zero, which rises in every direction and has the gradient zero."""
    base, x = small_base()
    model, training = begun(base, name, x)
    y = torch.arange(8) % 3
    with torch.no_grad():
        for p in training.parameters:
            p.add_(0.1 * torch.randn_like(p))
    first = training.loss(model, x, y)
    gradients = torch.autograd.grad(first, training.parameters)
    norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
    with torch.no_grad():
        for p, gradient in zip(training.parameters, gradients, strict=True):
            p -= 1e-3 * gradient / norm
        assert training.loss(model, x, y) < first


def test_without_relu_the_update_is_a_product():
    assert_update_is_a_product("salt_linear")
    base, x = small_base()
    with pytest.raises(ValueError, match="by SALT is no product"):
        low_rank(begun(base, "salt", x)[0])


def test_a_weight_of_one_singular_value_has_only_a_scale_and_a_shift(tmp_path):
    conv = nn.Conv1d(2, 2, 1, groups=2)
    x = torch.randn(3, 2, 5)
    layer, made = ours(conv, SALT)
    assert (made.lora_X.numel(), made.scale.numel()) == (0, 1)
    model, fresh = nn.Sequential(nn.Conv1d(2, 2, 1, groups=2)), nn.Sequential(nn.Conv1d(2, 2, 1, groups=2))
    fresh.load_state_dict(model.state_dict())
    for m in (model, fresh):
        METHODS["salt"].begin(m, RANK, x, torch.zeros(3, dtype=torch.long))
    with torch.no_grad():
        reparametrised_layers(model)[model[0]].scale.add_(1)
    save_trained(model, tmp_path / "trained")
    assert torch.equal(load_trained(fresh, tmp_path / "trained")(x), model(x))
    assert_same(layer, lambda x: nn.functional.conv1d(x, layer.weight.detach(), layer.bias, groups=2), x, [])
