"""Methods on models that share tensors, are adapted already or refuse: nothing reaches what it should not, nothing is left."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lora_edge
from helpers.methods import LABELS, METHODS, NAMES, REPARAMETRISED, begun
from helpers.networks import network, output, train
from lora_edge.nn.frozen_bn import FrozenNorm
from lora_edge.surgery.base_state import fingerprint_state
from lora_edge.tools import deltas, sparse_deltas, switch, switch_back


class Tied(nn.Module):
    """Convolutions of which two share a weight; S²FT adapts only one of these two, One-for-All as well."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv1d(4, 4, 3, padding=1)
        self.b = nn.Conv1d(4, 4, 3, padding=1, bias=False)
        self.b.weight = self.a.weight
        self.c = nn.Conv1d(4, 4, 3)
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(self.c(self.b(self.a(x).relu()).relu()).relu().mean(-1))


def tied():
    torch.manual_seed(0)
    return Tied().eval(), torch.randn(4, 4, 12)


@pytest.mark.parametrize("name", REPARAMETRISED)
def test_merging_leaves_a_shared_weight_to_those_without_the_update(name):
    base, x = tied()
    model, training = begun(base, name, x)
    train(model, x, training.parameters, steps=2)
    want = output(model.eval(), x)
    lora_edge.merge(model)
    torch.testing.assert_close(output(model, x), want, rtol=1e-4, atol=1e-5)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", ["lora_edge_source_bn", "memflora", "kernel_core"])
def test_a_shared_weight_is_switched_once(name):
    base, x = tied()
    model, training = begun(base, name, x)
    train(model, x, training.parameters, steps=2)
    update = sparse_deltas(model)
    assert {"a", "b"} <= update.keys()
    plain = copy.deepcopy(base)
    overwritten = switch(plain, update)
    lora_edge.merge(model)
    assert torch.equal(plain.a.weight, model.a.weight)
    switch_back(plain, overwritten)
    assert fingerprint_state(plain.state_dict()) == fingerprint_state(base.state_dict())


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("conv_lora", "a and b share one weight but have different updates; untie them first"),
        ("one_for_all", r"b\.weight is the weight of a, but has no update; untie them first"),
    ],
)
def test_different_updates_of_a_shared_weight_are_not_switched(name, text):
    base, x = tied()
    model, training = begun(base, name, x)
    train(model, x, training.parameters, steps=2)
    with pytest.raises(ValueError, match=text):
        switch(plain := copy.deepcopy(base), sparse_deltas(model))
    assert fingerprint_state(plain.state_dict()) == fingerprint_state(base.state_dict())


@pytest.mark.parametrize("again", NAMES)
@pytest.mark.parametrize("first", ["conv_lora", "lora_edge_source_bn", "one_for_all"])
def test_no_method_begins_on_an_adapted_model(first, again):
    base, x = network("1-D")
    model, _ = begun(base, first, x)
    before = fingerprint_state(model.state_dict())
    trained, kinds = [p.requires_grad for p in model.parameters()], [type(m) for m in model.modules()]
    with pytest.raises(RuntimeError, match="the model is already adapted; merge it first"):
        METHODS[again].begin(model, 2, x, LABELS[: len(x)])
    assert fingerprint_state(model.state_dict()) == before
    assert [p.requires_grad for p in model.parameters()] == trained
    assert [type(m) for m in model.modules()] == kinds


@pytest.mark.parametrize("name", sorted(name for name in NAMES if name.startswith(("lora_edge", "memflora", "kernel"))))
@pytest.mark.parametrize("wrong", ["rank", "labels", "dead"])
def test_a_refusal_leaves_the_statistics(name, wrong):
    """Of BatchNorm, which most forms move to the target's windows first."""
    base, x = network("1-D")
    labels = LABELS[: len(x)] + 7 * (wrong == "labels")
    if wrong == "dead":  # no gradient
        with torch.no_grad():
            base[-1].weight.zero_()
    rank = 0 if wrong == "rank" else 2
    before, own = fingerprint_state(base.state_dict()), [sorted(vars(module)) for module in base.modules()]
    refused: ValueError | None = None
    try:
        METHODS[name].begin(base, rank, x, labels)
    except ValueError as error:
        refused = error
    assert refused or wrong != "rank"
    if refused:
        assert "\n" not in str(refused)
        assert fingerprint_state(base.state_dict()) == before
        assert [sorted(vars(module)) for module in base.modules()] == own


@pytest.mark.parametrize("first", ["head_only", "bias_only", "full_frozen_bn"])
def test_after_a_baseline_another_method_merges_to_stock_layers(first):
    base, x = network("1-D")
    model, _ = begun(base, first, x)
    METHODS["conv_lora"].begin(model, 2, x, LABELS[: len(x)])
    lora_edge.merge(model.train())
    assert not any(isinstance(module, FrozenNorm) for module in model.modules())
    assert [type(m) for m in model.modules()] == [type(m) for m in base.modules()]
    assert all(module.training for module in model.modules())


def test_the_base_of_a_trained_projection_is_known():
    base, x = network("1-D")
    model, training = begun(base, "memflora_sg", x)
    train(model, x, training.parameters, steps=1)
    with torch.no_grad():
        training.parameters[0].add_(0.1)
    model.eval()
    with lora_edge.disabled(model):
        assert torch.equal(output(model, x), output(base, x))
    assert deltas(model)
