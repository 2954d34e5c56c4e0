"""A budget of parameters is parsed, never exceeded, almost used up, and spread where the energy is."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lora_edge
from helpers.networks import network, output, train
from helpers.snapshots import assert_same, snapshot
from lora_edge.har.models import TResNet
from lora_edge.subspaces.budget import MOST_RANK, parse_budget, spread_ranks
from lora_edge.surgery.adapted import adapted_layers

MODEL = nn.Sequential(nn.Conv1d(10, 80, 1, bias=False), nn.Conv1d(80, 15, 1, bias=False))  # 2,000 parameters


@pytest.mark.parametrize(
    ("params", "count"),
    [
        ("0.5%", 10), ("100%", 2000), (" 5 % ", 100), (".1%", 2), ("20B", 5), ("0.4kB", 100), ("4KB", 1000), ("7b", 1), (1, 1),
        (2000, 2000),
    ],
)  # fmt: skip
def test_the_forms_of_a_budget(params, count):
    assert parse_budget(params, MODEL) == count


@pytest.mark.parametrize(
    ("params", "error", "text"),
    [
        (True, TypeError, "params is True, a bool; give a share"),
        (0.005, TypeError, "params is 0.005, a float"),
        ([1], TypeError, "a list"),
        ("", ValueError, "params is ''; give a share"),
        ("5", ValueError, "params is '5'; give a share"),
        ("five%", ValueError, "params is 'five%'"),
        ("-1%", ValueError, "params is '-1%'"),
        ("1e3kB", ValueError, "params is '1e3kB'"),
        ("nan%", ValueError, "params is 'nan%'"),
        ("1%%", ValueError, "params is '1%%'"),
        ("20 kiB", ValueError, "params is '20 kiB'"),
        ("0%", ValueError, "params='0%' is 0 of the model's 2,000 parameters"),
        ("3B", ValueError, "params='3B' is 0 of"),
        ("101%", ValueError, "params='101%' is 2,020 of"),
        (0, ValueError, "params=0 is 0 of"),
        (-4, ValueError, "params=-4 is -4 of"),
        (14, ValueError, "params allows 14 parameters, but the smallest core, of 1 at rank 1, has 15"),
    ],
)
def test_bad_budgets_leave_the_model_as_it_was(params, error, text):
    model = copy.deepcopy(MODEL)
    before, state = snapshot(model), torch.get_rng_state()
    with pytest.raises(error, match=text) as caught:
        lora_edge.adapt(model, params=params)
    assert "\n" not in str(caught.value)
    assert_same(before, snapshot(model))
    assert torch.equal(torch.get_rng_state(), state)


def test_bad_batches_with_a_budget_leave_the_model_as_it_was():
    model, _ = network("1-D")
    before = snapshot(model)
    with pytest.raises(ValueError, match="batches holds no samples"):
        lora_edge.adapt(model, params="10%", batches=[])
    batches = [(torch.full((4, 6, 50), float("nan")), torch.zeros(4).long())]
    for subspace, text in (("weight", "the loss is nan"), ("input", "the input of 0 holds NaN or Inf")):
        with pytest.raises(ValueError, match=text):
            lora_edge.adapt(model, params="10%", batches=batches, subspace=subspace)
    assert_same(before, snapshot(model))


def energies(**rows):
    return {name: torch.tensor(row) for name, row in rows.items()}


def test_spread_takes_the_best_gain_per_parameter():
    gains = energies(a=[9.0, 4.0, 1.0], b=[8.0, 6.0, 5.0])
    assert spread_ranks(gains, {"a": 10, "b": 10}, 40) == {"a": 1, "b": 3}
    assert spread_ranks(gains, {"a": 10, "b": 20}, 60) == {"a": 2, "b": 2}, "4 for 10 before 6 for 20"
    assert spread_ranks(gains, {"a": 10, "b": 10}, 1000) == {"a": 3, "b": 3}


def test_spread_gives_every_layer_a_rank_or_leaves_out_those_of_least_energy():
    gains = energies(a=[9.0, 8.0], b=[0.1, 0.1], c=[1.0, 0.5])
    assert spread_ranks(gains, dict.fromkeys("abc", 10), 30) == {"a": 1, "b": 1, "c": 1}
    assert spread_ranks(gains, dict.fromkeys("abc", 10), 29) == {"a": 2}
    assert spread_ranks(gains, {"a": 25, "b": 5, "c": 10}, 39) == {"a": 1, "c": 1}
    assert spread_ranks(energies(a=[1.0], b=[0.0, 0.0]), {"a": 10, "b": 10}, 99) == {"a": 1}, "no energy, no rank"
    with pytest.raises(ValueError, match="no layer has any energy"):
        spread_ranks(energies(a=[0.0]), {"a": 1}, 5)


def test_spread_never_exceeds_the_budget_and_leaves_less_than_a_column_unused():
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        names = [f"l{k}" for k in range(int(torch.randint(1, 9, (), generator=generator)))]
        gains = {n: torch.rand(8, generator=generator).sort(descending=True).values for n in names}
        costs = {n: int(torch.randint(1, 60, (), generator=generator)) for n in names}
        budget = int(torch.randint(min(costs.values()), 1000, (), generator=generator))
        ranks = spread_ranks(gains, costs, budget)
        used = sum(costs[n] * rank for n, rank in ranks.items())
        assert used <= budget
        assert all(ranks.get(n, 0) == 8 or costs[n] > budget - used for n in names)


def windows(count: int = 16):
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(count, 97, 60, generator=generator), torch.randint(17, (count,), generator=generator))]


@pytest.mark.parametrize("options", [{}, {"batches": True}, {"batches": True, "subspace": "gradient"}], ids=str)
def test_half_a_percent_of_t_resnet_is_used(tmp_path, options):
    torch.manual_seed(0)
    base = TResNet(97, 17).eval()
    options = {key: windows() if key == "batches" else value for key, value in options.items()}
    model = lora_edge.adapt(copy.deepcopy(base), params="0.5%", **options)
    trained = sum(p.numel() for p in lora_edge.trainable_parameters(model))
    assert 0.9 * 0.005 * 560_915 <= trained <= 0.005 * 560_915
    ranks = {name: layer.rank for name, layer in adapted_layers(model).items()}
    assert len(ranks) == 11, "every layer has at least rank 1"
    assert 1 < max(ranks.values()) <= MOST_RANK
    assert {name: layer.bond_cap for name, layer in adapted_layers(model).items()} == ranks

    x = windows(4)[0][0]
    assert torch.equal(output(model, x), output(base, x))
    train(model, x, list(lora_edge.trainable_parameters(model)), steps=2)
    want = output(model.eval(), x)
    lora_edge.save_adapter(model, tmp_path / "a")
    loaded = lora_edge.load_adapter(copy.deepcopy(base), tmp_path / "a")
    assert {name: layer.rank for name, layer in adapted_layers(loaded).items()} == ranks
    assert torch.equal(output(loaded.eval(), x), want)
    fresh = lora_edge.adapt(copy.deepcopy(base), params="0.5%", **options)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(output(fresh.eval(), x), want)


def test_bytes_are_those_of_the_cores():
    model = lora_edge.adapt(TResNet(97, 17), params="20kB")
    trained = sum(p.numel() * p.element_size() for p in lora_edge.trainable_parameters(model))
    assert 0.9 * 20_000 <= trained <= 20_000


def test_a_layer_without_a_rank_stays_frozen_and_is_named():
    model, x = network("1-D")
    base = copy.deepcopy(model)
    lora_edge.adapt(model, params=8)
    assert list(adapted_layers(model)) == ["3"], "only its 8 channels fit"
    assert lora_edge.summary(model).left_alone["0"] == "params=8 leaves no rank for it, frozen"
    train(model, x, list(lora_edge.trainable_parameters(model)))
    y = output(model.eval(), x)
    assert not torch.equal(y, output(base, x))
    torch.testing.assert_close(output(lora_edge.merge(model), x), y)
    assert torch.equal(model[0].weight, base[0].weight)


def test_ranks_follow_the_gradient():
    """A layer behind which the signal is scaled down has a small weight gradient and gets the fewer ranks."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loud, self.faint = nn.Conv1d(8, 16, 3), nn.Conv1d(8, 16, 3)
            self.head = nn.Linear(16, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head((self.loud(x).relu() + 1e-3 * self.faint(x).relu()).mean(dim=-1))

    torch.manual_seed(0)
    model = Scaled()
    batches = [(torch.randn(32, 8, 20), torch.randint(5, (32,)))]
    for subspace in ("weight", "gradient"):
        ranks = adapted_layers(lora_edge.adapt(copy.deepcopy(model), params=16 * 6, batches=batches, subspace=subspace))
        assert (ranks["loud"].rank, ranks["faint"].rank) == (5, 1)
