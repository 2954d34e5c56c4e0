"""Uni-LoRA against peft on 1x1 convolutions, and against its projection as a matrix."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lora_edge
from helpers.methods import METHODS, WEIGHTS, prepared, small_base
from helpers.networks import output, train
from lora_edge.methods import unilora
from lora_edge.methods.files import load_trained, save_trained
from lora_edge.methods.unilora import from_one_vector, projection
from lora_edge.nn.reparametrised import reparametrised_layers
from lora_edge.tools import deltas, low_rank

NAMES = ["unilora", "unilora_exact"]


def assert_near(got, want):
    assert float((got - want).detach().norm()) <= 1e-5 * float(want.detach().norm())


def far(got, want):
    return float((got - want).detach().norm() / want.detach().norm()) > 0.5


def vector_of(model):
    return next(iter(reparametrised_layers(model).values())).shared


def every_shape(exact_start=False, length=101, rank=3):
    """A model, never run, of all the shapes in float64, prepared and moved from its start."""
    torch.manual_seed(0)
    model = nn.Sequential(*[make() for make in WEIGHTS.values()]).double()
    parameters = from_one_vector(length, exact_start)(model, rank, torch.empty(0), torch.empty(0))
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn_like(parameter))
    return model


def matrix_of(elements, length):
    """``P (D, d)``, from the projection's index alone."""
    one_hot = nn.functional.one_hot(projection(elements, length), length).double()
    return one_hot / one_hot.sum(0).sqrt()


def cut(elements, layers, rank, b_first=False):
    """The factors ``(A, B)`` of each layer of shape ``(O, J)``, cut from the flat elements."""
    factors, offset = [], 0
    for outs, terms in layers:
        sizes = [(outs, rank), (rank, terms)] if b_first else [(rank, terms), (outs, rank)]
        pair = []
        for rows, columns in sizes:
            pair.append(elements[offset : offset + rows * columns].view(rows, columns))
            offset += rows * columns
        factors.append(tuple(reversed(pair)) if b_first else tuple(pair))
    assert offset == len(elements)
    return factors


@pytest.mark.parametrize(("elements", "length"), [(10, 10), (10, 3), (1000, 256), (10732, 2304), (7, 6), (8, 1)])
def test_projection_is_pefts_and_isometric(elements, length):
    peft = pytest.importorskip("peft")
    assert torch.equal(projection(elements, length), peft.UniLoraModel.generate_index(elements, length, unilora.SEED))
    counts = projection(elements, length).bincount(minlength=length)
    assert int(counts.max() - counts.min()) <= 1
    matrix = matrix_of(elements, length)
    torch.testing.assert_close(matrix.T @ matrix, torch.eye(length, dtype=torch.float64))


def test_draws_of_numpy_are_those_that_files_were_written_with():
    """numpy promises no equal draws between versions; a file of another projection is refused, which this predicts."""
    assert projection(20, 6).tolist() == [0, 3, 5, 2, 5, 5, 2, 2, 3, 1, 0, 4, 4, 1, 3, 4, 4, 0, 1, 0]


@pytest.mark.parametrize("length", [5, 23, 55])
def test_two_layers_agree_with_peft(length):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(7, 5, 1), nn.Tanh(), nn.Conv1d(5, 11, 1))  # O < J, then O > J
    linear = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 11))
    with torch.no_grad():
        for place in (0, 2):
            linear[place].weight.copy_(model[place].weight.squeeze(2))
            linear[place].bias.copy_(model[place].bias)
    config = peft.UniLoraConfig(r=2, theta_d_length=length, proj_seed=unilora.SEED, target_modules=["0", "2"])
    torch.manual_seed(3)
    oracle = peft.get_peft_model(linear, config)
    torch.manual_seed(3)
    from_one_vector(length)(model, 2, torch.empty(0), torch.empty(0))
    mine, theirs = vector_of(model).theta, oracle.base_model.unilora_theta_d["default"]
    assert torch.equal(mine, theirs), "the same seed gives the same start"
    with torch.no_grad():
        mine.add_(torch.randn_like(mine))
        theirs.copy_(mine)
    layers = [m for m in oracle.modules() if hasattr(m, "get_delta_weight")]
    for update, layer in zip(deltas(model).values(), layers, strict=True):
        assert_near(update.squeeze(2), layer.get_delta_weight("default"))
    x = torch.randn(9, 7)
    y, want = model(x[:, :, None]).squeeze(2), oracle(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    want.backward(dy)
    assert_near(y, want)
    assert_near(mine.grad, theirs.grad)


@pytest.mark.parametrize("exact_start", [False, True])
def test_update_and_gradient_are_those_of_the_projections_matrix(exact_start):
    model = every_shape(exact_start)
    vector, kinds = vector_of(model), reparametrised_layers(model)
    sizes = [conv.weight.flatten(1).shape for conv in model]
    matrix = matrix_of(3 * sum(map(sum, sizes)), 101)
    flat = (matrix @ vector.theta.detach()).requires_grad_()
    factors = cut(flat, sizes, 3)
    weights = [torch.randn(size, dtype=torch.float64) for size in sizes]
    for (conv, kind), (a, b) in zip(kinds.items(), factors, strict=True):
        want = b @ a
        if exact_start:
            a0, b0 = cut(matrix @ vector.start, sizes, 3)[list(kinds).index(conv)]
            want = want - b0 @ a0
        torch.testing.assert_close(kind.delta(), want)
    sum((kind.delta() * dw).sum() for kind, dw in zip(kinds.values(), weights, strict=True)).backward()
    sum(((b @ a) * dw).sum() for (a, b), dw in zip(factors, weights, strict=True)).backward()
    torch.testing.assert_close(vector.theta.grad, matrix.T @ flat.grad)


def test_b_before_a_or_counts_of_a_layer_would_be_another_method():
    model = every_shape()
    theta, kinds = vector_of(model).theta.detach(), reparametrised_layers(model)
    sizes = [conv.weight.flatten(1).shape for conv in model]
    elements = 3 * sum(map(sum, sizes))
    flat, index = matrix_of(elements, 101) @ theta, projection(elements, 101)
    offset = 0
    for kind, size, (a, b), right in zip(
        kinds.values(), sizes, cut(flat, sizes, 3, b_first=True), cut(flat, sizes, 3), strict=True
    ):
        update, own = kind.delta(), index[offset : offset + 3 * sum(size)]
        torch.testing.assert_close(update, right[1] @ right[0])
        assert far(b @ a, update)
        by_layer = theta[own] / own.bincount(minlength=101)[own].double().sqrt()
        ((a, b),) = cut(by_layer, [size], 3)
        assert far(b @ a, update)
        offset += len(own)


@pytest.mark.parametrize("name", NAMES)
def test_one_vector_is_trained_for_all_layers(name):
    base, x = small_base()
    model, parameters = prepared(base, name, x)
    (theta,) = parameters
    assert theta is vector_of(model).theta
    assert len(theta) == 2304
    assert float(theta.detach().abs().max()) <= 0.02
    assert len({id(kind.shared) for kind in reparametrised_layers(model).values()}) == 1


def test_exact_start_is_the_base_and_the_papers_is_near_it():
    base, x = small_base()
    exact, _ = prepared(base, "unilora_exact", x)
    papers, _ = prepared(base, "unilora", x)
    assert not any(update.count_nonzero() for update in deltas(exact).values())
    for name, update in deltas(papers).items():
        assert 0 < float(update.norm()) < 0.01 * float(base.get_submodule(name).weight.detach().norm())


def test_a_start_at_zero_has_no_gradient():
    base, x = small_base()
    model, (theta,) = prepared(base, "unilora", x)
    with torch.no_grad():
        theta.zero_()
    model(x).square().sum().backward()
    assert not theta.grad.count_nonzero()
    model, (theta,) = prepared(base, "unilora_exact", x)
    model(x).square().sum().backward()
    assert theta.grad.count_nonzero()


@pytest.mark.parametrize("name", NAMES)
def test_factors_are_those_of_the_update(name):
    base, x = small_base()
    model, parameters = prepared(base, name, x)
    train(model, x, parameters, steps=2)
    updates = deltas(model)
    for layer, (b, a, scale) in low_rank(model).items():
        torch.testing.assert_close(scale * (b @ a.flatten(1)).view(updates[layer].shape), updates[layer], rtol=1e-3, atol=1e-6)


def test_file_holds_the_vector_and_refuses_another_projection(tmp_path, monkeypatch):
    base, x = small_base()
    model, parameters = prepared(base, "unilora", x)
    train(model, x, parameters, steps=1)
    path = tmp_path / "trained.safetensors"
    save_trained(model, path)
    assert path.stat().st_size < 4 * 2304 + 2000
    fresh, _ = prepared(base, "unilora", x)
    load_trained(fresh, path)
    assert torch.equal(output(fresh.eval(), x), output(model.eval(), x))
    monkeypatch.setattr(unilora, "SEED", 43)
    other, (theta,) = prepared(base, "unilora", x)
    before = theta.detach().clone()
    with pytest.raises(RuntimeError, match=r"are \[42, \d+\] in the file and \[43, \d+\] here; use the version of numpy"):
        load_trained(other, path)
    assert torch.equal(theta, before)


def test_a_vector_longer_than_the_factors_is_refused():
    base, x = small_base()
    before = copy.deepcopy(base.state_dict())
    elements = sum(m.out_channels + m.weight[0].numel() for m in base.modules() if isinstance(m, nn.Conv1d))
    with pytest.raises(
        ValueError, match=rf"length is {elements + 1:,}; give at most {elements:,}, the elements of the factors"
    ):
        from_one_vector(elements + 1)(base, 1, x, torch.zeros(8))
    assert list(base.state_dict()) == list(before)
    from_one_vector(elements)(base, 1, x, torch.zeros(8))
    assert METHODS["unilora"].finish(base) is base
    with pytest.raises(RuntimeError, match="not adapted"):
        lora_edge.merge(base)
