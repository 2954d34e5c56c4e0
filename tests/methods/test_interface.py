"""The general parts that methods are made of: joint layers, shared tensors, biases, gradients, ranks, updates, facts."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lora_edge
from helpers.methods import CONVS, LABELS, WEIGHTS, begun, small_base
from helpers.networks import BUILD, network, output, train
from lora_edge.methods import Method, Training
from lora_edge.methods.base import jointly, reparametrised
from lora_edge.methods.files import load_trained, save_trained, trained_state
from lora_edge.methods.parts.facts import dense_gradients, patches, second_moments
from lora_edge.nn.reparametrised import Reparametrisation, reparametrise, reparametrised_layers, share, zeros
from lora_edge.tools import at_rank, aurac, deltas, low_rank


class Base(nn.Module):
    """One trained vector of all layers."""

    def __init__(self):
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(3))
        self.register_buffer("signs", torch.tensor([1.0, -1.0, 1.0]))


class Shift(Reparametrisation):
    """Adds the sum of the shared vector to every weight, twice that in training, and its first element to the bias."""

    def delta(self):
        return (2 if self.training else 1) * (self.shared.theta * self.shared.signs).sum().expand(self.shape)

    def adapted_bias(self, bias):
        return bias + self.shared.theta[0]


class Nested(Reparametrisation):
    """Adds ``k`` times a trained number at rank k."""

    def __init__(self, conv, rank):
        super().__init__()
        self.ranks = tuple(range(1, rank + 1))
        self.value = zeros(conv, 1)
        self.shape = conv.weight.shape

    def delta(self):
        return ((self.active or max(self.ranks)) * self.value).expand(self.shape)


def shifts(model, convs, rank, inputs, labels):
    made = {name: Shift() for name in convs}
    for name, conv in convs.items():
        made[name].shape = conv.weight.shape
    share(made.values(), Base())
    return made


@pytest.fixture
def shifted():
    base, x = network("2-D")
    model = copy.deepcopy(base)
    parameters = jointly(shifts)(model, 1, x, LABELS[:4])
    return base, model, parameters, x


def test_a_shared_tensor_is_one_of_the_model(shifted, tmp_path):
    base, model, parameters, x = shifted
    assert [tuple(p.shape) for p in parameters] == [(3,)]
    assert lora_edge.summary(model).trainable == 3
    assert lora_edge.summary(model).parameters == sum(p.numel() for p in base.parameters())
    assert sum(value.numel() for value in trained_state(model).values()) == 6
    train(model, x, parameters, steps=1)
    twin = copy.deepcopy(model)
    kinds = list(reparametrised_layers(twin).values())
    assert len(kinds) == 3
    assert len({id(kind.shared) for kind in kinds}) == 1
    assert kinds[0].shared.theta is not parameters[0]
    twin.double()
    assert {kind.shared.signs.dtype for kind in kinds} == {torch.float64}
    save_trained(model, tmp_path / "shared")
    fresh = copy.deepcopy(base)
    jointly(shifts)(fresh, 1, x, LABELS[:4])
    load_trained(fresh, tmp_path / "shared")
    assert torch.equal(output(fresh.eval(), x), output(model.eval(), x))


def test_the_bias_and_the_form_of_evaluation_are_merged(shifted):
    base, model, _, x = shifted
    kind = next(iter(reparametrised_layers(model).values()))
    with torch.no_grad():
        kind.shared.theta.copy_(torch.tensor([0.1, 0.02, 0.0]))
    model.train()
    torch.testing.assert_close(model.stem.weight, base.stem.weight + 0.16)  # while training
    want = output(model.eval(), x)
    assert sorted(deltas(model)) == ["depthwise", "stem", "twice"]
    for update in deltas(model.train()).values():
        torch.testing.assert_close(update, torch.full_like(update, 0.08))
    assert model.stem.parametrizations.weight[0].training
    with lora_edge.disabled(model):
        assert torch.equal(model.stem.bias, base.stem.bias)
        assert torch.equal(output(model.eval(), x), output(base, x))
    lora_edge.merge(model.train())
    torch.testing.assert_close(model.stem.bias, base.stem.bias + 0.1)
    torch.testing.assert_close(output(model.eval(), x), want, rtol=1e-4, atol=1e-4)
    assert list(model.state_dict()) == list(base.state_dict())
    assert list(model.stem._parameters) == ["weight", "bias"]
    assert model.twice.bias is None


def test_a_nan_bias_is_not_merged(shifted):
    _, model, parameters, _ = shifted
    with torch.no_grad():
        parameters[0][1] = torch.nan
    with pytest.raises(ValueError, match=r"stem\.weight"):
        lora_edge.merge(model)
    assert len(reparametrised_layers(model)) == 3
    with torch.no_grad():
        parameters[0].copy_(torch.tensor([torch.inf, 0, 0]))
    with pytest.raises(ValueError, match="merge"):
        lora_edge.merge(model)


def test_layers_that_a_joint_method_leaves_out_stay_as_they_are():
    base, x = network("1-D")
    model = copy.deepcopy(base)

    def first(model, convs, rank, inputs, labels):
        name = next(iter(convs))
        return {name: Nested(convs[name], rank)}

    parameters = jointly(first)(model, 2, x, LABELS[:4])
    assert list(reparametrised_layers(model)) == [model[0]]
    train(model, x, parameters)
    lora_edge.merge(model)
    assert torch.equal(model[3].weight, base[3].weight)
    assert not torch.equal(model[0].weight, base[0].weight)


def test_the_dense_gradient_of_a_computed_weight_is_handed_over():
    conv = nn.Conv1d(3, 4, 3)
    want = torch.autograd.grad(conv(torch.ones(2, 3, 5)).square().sum(), conv.weight)[0]
    conv.requires_grad_(False)
    kind, seen = Nested(conv, 1), []
    reparametrise(conv, kind)
    conv(torch.ones(2, 3, 5)).square().sum().backward()
    kind.on_gradient = seen.append
    conv(torch.ones(2, 3, 5)).square().sum().backward()
    conv(torch.ones(2, 3, 5)).sum()  # without a backward
    with torch.no_grad():
        conv(torch.ones(2, 3, 5))
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], want)


def test_a_model_is_evaluated_and_merged_at_each_of_its_ranks():
    base, x = network("1-D")
    model = copy.deepcopy(base)
    reparametrised(Nested)(model, 3, x, LABELS[:4])
    with torch.no_grad():
        for kind in reparametrised_layers(model).values():
            kind.value.fill_(0.01)
    for rank in (1, 2, 3):
        with at_rank(model, rank):
            for update in deltas(model).values():
                torch.testing.assert_close(update, torch.full_like(update, 0.01 * rank))
            want = output(model.eval(), x)
            merged = lora_edge.merge(copy.deepcopy(model))
        torch.testing.assert_close(output(merged, x), want, rtol=1e-4, atol=1e-4)
    for update in deltas(model).values():
        torch.testing.assert_close(update, torch.full_like(update, 0.03))
    with pytest.raises(ValueError, match="at_rank: rank is 4; give one of 1, 2, 3"), at_rank(model, 4):
        pass
    with pytest.raises(ValueError, match="no layer of the model has several ranks"), at_rank(base, 1):
        pass


def test_aurac_by_hand():
    assert aurac([1, 2, 4], [0.2, 0.4, 0.8]) == pytest.approx((0.3 + 0.6) / 2)
    assert aurac([1, 2, 4], [0.2, 0.4, 0.8], log=False) == pytest.approx((0.3 + 2 * 0.6) / 3)
    for ranks, scores, text in (
        ([1, 2], [0.5], "2 ranks and 1 scores"),
        ([2, 1], [0.5, 0.5], "in increasing order"),
        ([1], [0.5], "at least two"),
    ):
        with pytest.raises(ValueError, match=text):
            aurac(ranks, scores)


@pytest.mark.parametrize("name", ["conv_lora", "lora_fa", "pissa", "lora_edge"])
def test_factors_give_the_update(name):
    base, x = small_base()
    model, training = begun(base, name, x)
    train(model, x, training.parameters, steps=2)
    updates = deltas(model)
    for layer, (b, a, scale) in low_rank(model).items():
        torch.testing.assert_close(scale * (b @ a.flatten(1)).view(updates[layer].shape), updates[layer], rtol=1e-4, atol=1e-6)
        assert b.shape[1] == (4 if name == "pissa" else 2)


def test_an_update_without_factors_is_truncated():
    base, x = small_base()
    model, training = begun(base, "dora", x)
    train(model, x, training.parameters, steps=2)
    with pytest.raises(ValueError, match=r"low_rank: the update of block1\.conv1 by DoRA is no product; give a rank"):
        low_rank(model)
    for layer, (b, a, scale) in low_rank(model, 3).items():
        update = deltas(model)[layer].flatten(1).double()
        left = torch.linalg.svdvals(update)[3:].square().sum().sqrt()
        torch.testing.assert_close((update - scale * (b @ a.flatten(1)).double()).norm(), left, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(b.square().sum(), a.square().sum(), rtol=1e-4, atol=0)


def test_updates_of_a_model_that_keeps_no_base():
    base, x = small_base()
    model, training = begun(base, "full", x)
    train(model, x, training.parameters, steps=1)
    with pytest.raises(RuntimeError, match="give base="):
        deltas(model)
    found = deltas(model, base.state_dict())
    assert len(found) == 11
    torch.testing.assert_close(found["block1.conv1"], (model.block1.conv1.weight - base.block1.conv1.weight).detach())
    with pytest.raises(ValueError, match=r"deltas: 0 is \(2, 3, 1\) in the base and \(4, 3, 1\) in the model"):
        deltas(nn.Sequential(nn.Conv1d(3, 4, 1)), nn.Sequential(nn.Conv1d(3, 2, 1)))


@pytest.mark.parametrize("kind", list(BUILD))
def test_dense_gradients_are_those_of_the_evaluated_model(kind):
    base, x = network(kind)
    labels = torch.arange(len(x)) % 2
    names = [name for name, m in base.named_modules() if isinstance(m, nn.modules.conv._ConvNd)]
    before = copy.deepcopy(base.state_dict())
    base.train()
    found = dense_gradients(base, names, x, labels)
    assert base.training
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())
    assert all(p.grad is None for p in base.parameters())
    nn.functional.cross_entropy(base.eval()(x), labels).backward()
    for name in names:
        torch.testing.assert_close(found[name], base.get_submodule(name).weight.grad)


@pytest.mark.parametrize(
    "conv",
    [
        *(make() for make, _ in CONVS.values()),
        *(make() for make in WEIGHTS.values()),
        nn.Conv1d(4, 6, 4, padding="same", dilation=2),
        nn.Conv2d(4, 6, 3, stride=2, padding=1, padding_mode="reflect", groups=2),
    ],
    ids=str,
)
def test_patches_are_what_an_output_reads(conv):
    conv = conv.double()
    x = torch.randn(3, conv.in_channels, *(9,) * (conv.weight.dim() - 2), dtype=torch.float64)
    rows = patches(conv, x)
    want = conv(x) if conv.bias is None else conv(x) - conv.bias.view(-1, *(1,) * (x.dim() - 2))
    got = rows @ conv.weight.unflatten(0, (conv.groups, -1)).flatten(2).transpose(1, 2)  # (g, N L', O/g)
    got = got.unflatten(1, (3, -1)).permute(1, 0, 3, 2).reshape(want.shape)
    torch.testing.assert_close(got, want)
    moments = second_moments(nn.Sequential(conv), ["0"], x)["0"]
    torch.testing.assert_close(moments, rows.transpose(1, 2) @ rows)


def test_a_method_that_needs_no_labels_is_given_none():
    seen = []

    def prepare(model, rank, inputs, labels):
        seen.append(labels)
        return list(model.parameters())

    training = Method("x", "x", 0.1, prepare, needs_labels=False).begin(nn.Linear(2, 3), 1, torch.ones(1, 2), LABELS)
    assert isinstance(training, Training)
    assert training.count == 9
    Method("x", "x", 0.1, prepare).begin(nn.Linear(2, 3), 1, torch.ones(1, 2), LABELS)
    assert [labels is None for labels in seen] == [True, False]
