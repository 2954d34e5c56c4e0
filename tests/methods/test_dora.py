"""DoRA by its dense formula in every dtype, from its base on, and the kept ``‖W‖²`` of its frozen weight."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from helpers.methods import RANK, WEIGHTS, ours, perturbed
from helpers.tolerances import TOLERANCE, relative_error
from lora_edge.memory import StorageTracker
from lora_edge.methods import dora
from lora_edge.methods.dora import DoRA
from lora_edge.nn.reparametrised import reparametrise
from lora_edge.ops.engines.torch import dora_fuse as of_torch


def dense(weight, made):
    """The formula as it is written, the norm a constant."""
    rows = weight + (made.scaling * made.lora_B @ made.lora_A.flatten(1)).view(weight.shape)
    norms = rows.detach().flatten(1).norm(dim=1)
    return (made.magnitude / norms).view(-1, *[1] * (rows.dim() - 1)) * rows


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", WEIGHTS)
def test_by_its_formula(name, dtype):
    layer, made = ours(WEIGHTS[name]().to(dtype), DoRA, alpha=3.0)
    exact = copy.deepcopy(made).double()
    got, want = layer.weight, dense(layer.parametrizations.weight.original.double(), exact)
    assert got.dtype == dtype
    assert relative_error(got, want) <= TOLERANCE[dtype]
    dy = torch.randn_like(got)
    trained = ("lora_B", "lora_A", "magnitude")
    found = torch.autograd.grad(got, [getattr(made, each) for each in trained], dy)
    expected = torch.autograd.grad(want, [getattr(exact, each) for each in trained], dy.double())
    for g, w in zip(found, expected, strict=True):
        assert relative_error(g, w) <= TOLERANCE[made.lora_B.dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_starts_at_its_base_to_the_last_bit(dtype):
    conv = nn.Conv2d(8, 16, 3).to(dtype)
    weight = conv.weight.detach().clone()
    reparametrise(conv, DoRA(conv, RANK))
    assert torch.equal(conv.weight, weight)


def replace_values(conv):
    with torch.no_grad():
        conv.parametrizations.weight.original.mul_(2.0)


def write_under_data(conv):
    conv.parametrizations.weight.original.data.mul_(2.0)


def load_another(conv):
    state = {name: value.clone() for name, value in conv.state_dict().items()}
    state["parametrizations.weight.original"] *= 2.0
    conv.load_state_dict(state)


def other_memory(conv):
    conv.parametrizations.weight.original.data = 2.0 * conv.parametrizations.weight.original.data


@pytest.mark.parametrize("change", [replace_values, write_under_data, load_another, other_memory])
def test_the_kept_squares_follow_the_weight(change, monkeypatch):
    """A mutant: squares of the weight before it changed give other rows."""
    layer, made = ours(nn.Conv1d(6, 12, 5), DoRA)
    dora._squares.drop(made)  # registering has computed the weight
    counted = []
    monkeypatch.setattr(
        dora, "row_squares", lambda weight: counted.append(weight) or of_torch.row_squares(weight, weight.dtype)
    )
    for _ in range(3):
        torch.testing.assert_close(layer.weight, dense(layer.parametrizations.weight.original, made))
    assert len(counted) == 1
    stale = dora._kept_squares(made, layer.parametrizations.weight.original)
    change(layer)
    original = layer.parametrizations.weight.original
    want = dense(original, made)
    torch.testing.assert_close(layer.weight, want)
    assert len(counted) == 2
    with torch.no_grad():
        norms = of_torch.row_norms(original, made.lora_B, made.lora_A, made.scaling, stale)
        wrong = of_torch.compose(original, made.lora_B, made.lora_A, made.magnitude / norms, made.scaling)
    assert relative_error(wrong, want) > 1e-2


def test_copies_keep_their_own_squares():
    layer, _ = ours(nn.Conv1d(6, 12, 5), DoRA)
    before = layer.weight
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.parametrizations.weight.original.mul_(2.0)
    torch.testing.assert_close(other.weight, dense(other.parametrizations.weight.original, other.parametrizations.weight[0]))
    assert torch.equal(layer.weight, before)


def test_half_precision_makes_no_float32_weight():
    conv = perturbed(nn.Conv2d(512, 64, 3).bfloat16(), made := DoRA(nn.Conv2d(512, 64, 3).bfloat16(), RANK))
    own = [*conv.parameters(), conv.weight]
    with torch.no_grad(), StorageTracker(own) as tracker:
        weight = made(conv.parametrizations.weight.original)
    assert tracker.peak <= weight.nbytes + 2 * 4 * of_torch.AT_ONCE + 2**14 < 4 * weight.numel()


def test_under_torch_func_and_compile():
    layer, made = ours(nn.Conv1d(6, 12, 5), DoRA)
    want = torch.autograd.grad(layer.weight.square().sum(), made.magnitude)[0]
    names = {f"parametrizations.weight.0.{name}": p.detach() for name, p in made.named_parameters()}

    def loss(parameters, x):
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    x = torch.randn(2, 6, 9)
    got = torch.func.grad(loss)(names, x)["parametrizations.weight.0.magnitude"]
    torch.testing.assert_close(got, torch.autograd.grad(layer(x).square().sum(), made.magnitude)[0])
    torch._dynamo.reset()
    compiled = torch.compile(lambda: made(layer.parametrizations.weight.original), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled().square().sum(), made.magnitude)[0], want)
