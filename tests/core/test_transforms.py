"""``torch.func``, forward-mode AD, tracing, export and second derivatives of an adapted model that is not merged."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, fx, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacrev, jvp, stack_module_state, vmap

import lora_edge

X = torch.randn(4, 3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def adapted(lean: bool, padding_mode: str = "zeros") -> nn.Module:
    """Every kind of re-classed layer, in float64, with cores that are not zero."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(3, 6, 3, padding=1, padding_mode=padding_mode), nn.BatchNorm1d(6), nn.ReLU(), nn.MaxPool1d(2),
        nn.Conv1d(6, 6, 3, groups=2), nn.Hardtanh(), nn.Dropout(0.5), nn.Conv1d(6, 4, 1), nn.Flatten(), nn.Linear(24, 2),
    ).double().eval()  # fmt: skip
    lora_edge.adapt(model, 2, exclude="7", lean=lean)
    for core in lora_edge.trainable_parameters(model):
        nn.init.normal_(core, 0, 0.3)
    return model


@pytest.fixture(params=[True, False], ids=["lean", "lean=False"])
def model(request) -> nn.Module:
    return adapted(request.param)


@pytest.fixture
def plain(model) -> nn.Module:
    return lora_edge.merge(copy.deepcopy(model))


def test_grad_of_functional_call(model):
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    found = grad(lambda p: functional_call(model, p, (X,)).square().sum())(parameters)
    model(X).square().sum().backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(found[name], p.grad)
        if name.endswith("suffix"):
            assert not found[name].any()


def test_gradients_of_each_sample(model):
    cores = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    each = vmap(grad(lambda c, x: functional_call(model, c, (x[None],)).sum()), in_dims=(None, 0))(cores, X)
    for k in range(len(X)):
        model.zero_grad()
        model(X[k : k + 1]).sum().backward()
        for name in cores:
            torch.testing.assert_close(each[name][k], model.get_parameter(name).grad)


def test_vmap(model, plain):
    torch.testing.assert_close(vmap(lambda x: model(x[None])[0])(X), plain(X))
    with torch.no_grad():
        torch.testing.assert_close(vmap(lambda x: model(x[None])[0])(X), plain(X))


def test_an_ensemble_by_vmap(model):
    other = copy.deepcopy(model)
    for core in lora_edge.trainable_parameters(other):
        nn.init.normal_(core)
    parameters, buffers = stack_module_state([model, other])
    found = vmap(lambda p, b: functional_call(model, (p, b), (X,)))(parameters, buffers)
    torch.testing.assert_close(found, torch.stack([model(X), other(X)]))


@pytest.mark.parametrize("derivative", [jacrev, hessian], ids=["jacrev", "hessian"])
def test_derivatives_with_respect_to_the_input(model, plain, derivative):
    x = X[:1, :, :16]
    torch.testing.assert_close(
        derivative(lambda x: model(x).square().sum())(x), derivative(lambda x: plain(x).square().sum())(x)
    )


def test_forward_mode(model, plain):
    torch.testing.assert_close(jvp(model, (X,), (X,))[1], jvp(plain, (X,), (X,))[1])
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(model(forward_ad.make_dual(X, X))).tangent
    torch.testing.assert_close(tangent, jvp(plain, (X,), (X,))[1])


@pytest.mark.parametrize("mode", ["reflect", "circular"])
def test_padding_modes(mode):
    model = adapted(True, mode)
    torch.testing.assert_close(vmap(lambda x: model(x[None])[0])(X), lora_edge.merge(copy.deepcopy(model))(X))


def test_after_a_transform_the_lean_path_runs_again(model):
    vmap(lambda x: model(x[None])[0])(X)
    model(X).sum().backward()
    assert all(core.grad is not None for core in lora_edge.trainable_parameters(model))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("grad_enabled", [True, False])
def test_jit_trace_can_be_saved(model, plain, grad_enabled):
    with torch.set_grad_enabled(grad_enabled):
        traced, file = torch.jit.trace(model, X), io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(X), plain(X))


@pytest.mark.filterwarnings("ignore")
def test_jit_script_is_refused_in_one_line(model):
    for scripted in (model, model[0]):
        with pytest.raises(RuntimeError, match=r"^torch.jit.script cannot compile .* lora_edge.merge\(model\) first$"):
            torch.jit.script(scripted)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("grad_enabled", [True, False])
def test_export(model, plain, grad_enabled):
    with torch.set_grad_enabled(grad_enabled):
        exported = torch.export.export(model, (X,)).module()
    torch.testing.assert_close(exported(X), plain(X))


def penalty_on_the_input(model: nn.Module) -> Tensor:
    x = X.clone().requires_grad_()
    return torch.autograd.grad(model(x).sum(), x, create_graph=True)[0].square().sum()


def penalty_on_a_core(model: nn.Module) -> Tensor:
    return torch.autograd.grad(model(X).sum(), model[0].core, create_graph=True)[0].square().sum()


def second_derivative_of_a_core(model: nn.Module) -> Tensor:
    return torch.autograd.grad(model(X).square().sum(), model[4].core, create_graph=True)[0].sum()


@pytest.mark.parametrize("second", [penalty_on_the_input, penalty_on_a_core, second_derivative_of_a_core])
def test_a_second_derivative_is_an_error_even_among_other_terms(model, second):
    loss = model(X).sum() + second(model)
    with pytest.raises(RuntimeError, match=r"cannot be differentiated again .*merge\(model\) first"):
        loss.backward()


def test_a_graph_that_is_not_differentiated_changes_no_gradient(model):
    twin = copy.deepcopy(model)
    model(X).square().sum().backward(create_graph=True)
    twin(X).square().sum().backward()
    for a, b in zip(lora_edge.trainable_parameters(model), lora_edge.trainable_parameters(twin), strict=True):
        torch.testing.assert_close(a.grad.detach(), b.grad)


LAYERS = [nn.Conv1d(3, 4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.MaxPool1d(2), nn.Dropout(0.5), nn.Hardsigmoid(), nn.LeakyReLU()]


@pytest.mark.parametrize("adapt_it", [True, False], ids=["adapted", "beside an adapted one"])
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
def test_layers_accept_their_input_by_name(layer, adapt_it):
    model = nn.Sequential(copy.deepcopy(layer), nn.Conv1d(3, 3, 3)).eval()
    x = X.float().requires_grad_()
    want = layer.eval()(input=x)
    lora_edge.adapt(model, 2, exclude=None if adapt_it or not isinstance(layer, nn.Conv1d) else "0")
    torch.testing.assert_close(model[0](input=x), want)
    with torch.no_grad():
        torch.testing.assert_close(model[0](input=x), want)


@pytest.mark.parametrize("first", [nn.Conv1d(3, 3, 1), nn.BatchNorm1d(3), nn.ReLU()], ids=lambda layer: type(layer).__name__)
def test_fx_is_refused_in_one_line_and_traces_what_is_merged(first):
    model = (
        nn.Sequential(copy.deepcopy(first), nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.MaxPool1d(2), nn.Dropout(0.5))
        .double()
        .eval()
    )
    lora_edge.adapt(model, 2)
    with pytest.raises(RuntimeError, match=r"torch.fx cannot trace an adapted model; call lora_edge.merge\(model\) first"):
        fx.symbolic_trace(model)
    merged = lora_edge.merge(model)
    torch.testing.assert_close(fx.symbolic_trace(merged)(X), merged(X))
