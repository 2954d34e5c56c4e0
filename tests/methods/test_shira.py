"""SHiRA against peft on the unfolded weight, its masks by their formulas, and switching to sparse updates and back."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lora_edge
from helpers.methods import METHODS, RANK, WEIGHTS, perturbed, prepared, small_base
from helpers.networks import network, output, train
from lora_edge.methods import shira
from lora_edge.methods.parts.facts import dense_gradients
from lora_edge.methods.shira import SHiRA, largest
from lora_edge.nn.reparametrised import reparametrised_layers
from lora_edge.tools import add_sparse, deltas, sparse_deltas, switch, switch_back
from lora_edge.tools.sparse import Entries

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # peft's update is a sparse tensor
NAMES = [name for name in METHODS if name.startswith("shira")]


def pefts_linear(conv, mask=None):
    """peft's SHiRA on a linear layer with the convolution's unfolded weight, at rank 1: ``O + J`` entries."""
    peft = pytest.importorskip("peft")
    linear = nn.Linear(conv.weight[0].numel(), len(conv.weight), bias=False)
    linear.weight = nn.Parameter(conv.weight.detach().flatten(1).clone())
    model = nn.Sequential()
    model.add_module("layer", linear)
    config = peft.ShiraConfig(r=1, random_seed=3, target_modules=["layer"])
    if mask is not None:
        config.mask_fn = lambda layer, r, **_: mask
    oracle = peft.get_peft_model(model, config)
    return oracle, next(m for m in oracle.modules() if hasattr(m, "shira_weight"))


def scored(conv, score, count, gradient=None):
    weight = conv.weight.detach()
    return largest(score(weight, gradient, count), count)


@pytest.mark.parametrize("name", list(WEIGHTS))
def test_random_mask_update_and_gradients_are_pefts(name):
    conv = WEIGHTS[name]()
    outs, terms = conv.weight.flatten(1).shape
    oracle, theirs = pefts_linear(conv)
    torch.manual_seed(3)
    made = SHiRA(conv, scored(conv, shira.at_random, outs + terms))
    layer = perturbed(conv, made)
    rows, columns = theirs.shira_indices["default"].long()
    assert torch.equal(made.index.long(), rows * terms + columns)
    values = theirs.shira_weight["default"]
    with torch.no_grad():
        values.copy_(made.values)
    assert torch.equal(made.delta().view(outs, terms), theirs.get_delta_weight("default").to_dense())
    x, dy = torch.randn(7, terms), torch.randn(7, outs)
    (x @ layer.weight.flatten(1).T * dy).sum().backward()
    (oracle(x) * dy).sum().backward()
    torch.testing.assert_close(made.values.grad, values.grad)
    torch.testing.assert_close(x @ layer.weight.flatten(1).T, oracle(x))


@pytest.mark.parametrize("name", ["wide", "tall", "groups"])
def test_mask_by_weight_is_that_of_a_mask_given_to_peft(name):
    conv = WEIGHTS[name]()
    outs, terms = conv.weight.flatten(1).shape
    threshold = conv.weight.detach().abs().flatten().kthvalue(outs * terms - outs - terms + 1).values
    _, theirs = pefts_linear(conv, mask=(conv.weight.detach().abs() >= threshold).flatten(1))
    rows, columns = theirs.shira_indices["default"].long()
    right = SHiRA(conv, scored(conv, shira.by_weight, outs + terms)).index
    assert torch.equal(right.long(), rows * terms + columns)
    signed = SHiRA(conv, largest(conv.weight.detach(), outs + terms)).index
    assert not torch.equal(signed, right), "the largest values are not the largest magnitudes"


@pytest.mark.parametrize("name", list(WEIGHTS))
def test_values_get_the_gradient_of_full_fine_tuning_at_their_entries(name):
    conv = WEIGHTS[name]().double()
    x = torch.randn(3, conv.in_channels, *[k + 2 for k in conv.kernel_size], dtype=torch.float64)
    layer = perturbed(conv, made := SHiRA(conv, scored(conv, shira.at_random, RANK * conv.out_channels)))
    full = copy.deepcopy(conv)
    with torch.no_grad():
        full.weight.copy_(layer.weight)
    for one in (layer, full):
        one(x).square().sum().backward()
    torch.testing.assert_close(made.values.grad, full.weight.grad.flatten()[made.index.long()])


def test_masks_by_gradient_and_snip():
    base, x = small_base()
    labels = torch.arange(8) % 2
    for name, conv in base.named_modules():
        if not isinstance(conv, nn.Conv1d):
            continue
        gradient = dense_gradients(base, [name], x, labels)[name]
        weight = conv.weight.detach()
        for method, score in (("shira_grad", gradient.abs()), ("shira_snip", (weight * gradient).abs())):
            model, _ = prepared(base, method, x)
            index = next(iter(reparametrised_layers(model.get_submodule(name)).values())).index.long()
            chosen = torch.zeros(weight.numel(), dtype=torch.bool).index_fill(0, index, True)
            assert len(index) == RANK * conv.out_channels
            assert float(score.flatten()[chosen].min()) >= float(score.flatten()[~chosen].max())


@pytest.mark.parametrize("name", list(WEIGHTS))
def test_structured_mask_is_the_diagonal_and_whole_columns(name):
    conv = WEIGHTS[name]()
    outs, terms = conv.weight.flatten(1).shape
    index = scored(conv, shira.by_structure, RANK * outs)
    mask = torch.zeros(outs * terms).index_fill(0, index, 1.0).view(outs, terms)
    assert mask.sum() == min(RANK * outs, outs * terms)
    assert bool((mask.diagonal() == 1).all())
    beside = mask.clone().fill_diagonal_(0).sum(0)
    room = outs - (torch.arange(terms) < outs).float()
    assert int(((beside > 0) & (beside < room)).sum()) <= 1, "at most one column is in part"
    assert torch.linalg.matrix_rank(torch.randn(outs, terms).double() * mask) == min(outs, terms)
    assert torch.linalg.matrix_rank(mask - torch.eye(outs, terms)) < min(outs, terms)


@pytest.mark.parametrize("method", NAMES)
def test_entries_are_distinct_and_at_most_the_whole_weight(method):
    base, x = network("2-D")
    model, parameters = prepared(base, method, x, rank=10**6)
    assert sum(p.numel() for p in parameters) == sum(k.values.numel() for k in reparametrised_layers(model).values())
    for conv, made in reparametrised_layers(model).items():
        assert made.index.dtype == torch.int32
        assert torch.equal(made.index, torch.arange(conv.weight.numel(), dtype=torch.int32))


@pytest.mark.parametrize("method", NAMES)
def test_merging_changes_exactly_the_chosen_entries(method):
    base, x = small_base()
    model, parameters = prepared(base, method, x)
    train(model, x, parameters)
    names = {module: name for name, module in model.named_modules()}
    kept = {names[conv]: made.index.clone() for conv, made in reparametrised_layers(model).items()}
    lora_edge.merge(model)
    for name, index in kept.items():
        moved = torch.ne(model.get_submodule(name).weight, base.get_submodule(name).weight)
        assert set(moved.flatten().nonzero().flatten().tolist()) <= set(index.tolist())
        assert moved.any()


def trained(base, method, x, seed):
    torch.manual_seed(seed)
    model, parameters = prepared(base, method, x)
    train(model, x, parameters, steps=3)
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["1-D", "2-D", "3-D"])
def test_switching_gives_the_merged_model_and_switching_back_every_bit(kind, dtype):
    base, x = network(kind)
    base, x = base.to(dtype), x.to(dtype)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    model = trained(base, "shira", x, 1)
    update = sparse_deltas(model)
    merged = lora_edge.merge(model)
    for _ in range(2):
        overwritten = switch(base, update)
        for got, want in zip(base.parameters(), merged.parameters(), strict=True):
            torch.testing.assert_close(got, want, rtol=4 * torch.finfo(dtype).eps, atol=0)
        switch_back(base, overwritten)
        assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert not all(torch.equal(*pair) for pair in zip(merged.parameters(), base.parameters(), strict=True))


def test_subtracting_the_update_would_not_give_the_bits_back():
    conv = nn.Conv1d(6, 8, 5)
    before = conv.weight.detach().clone()
    index = torch.arange(conv.weight.numel())
    update = {"": Entries(index, torch.randn(len(index)))}
    subtracted = copy.deepcopy(conv)
    switch(subtracted, update)
    switch(subtracted, {"": update[""]._replace(values=-update[""].values)})
    assert not torch.equal(subtracted.weight, before)
    switch_back(conv, switch(conv, update))
    assert torch.equal(conv.weight, before)


def test_a_weight_of_another_memory_format_is_switched_alike():
    conv = nn.Conv2d(6, 8, 3)
    other = copy.deepcopy(conv).to(memory_format=torch.channels_last)
    assert not other.weight.is_contiguous()
    update = {"": Entries(torch.tensor([5, 70, 431]), torch.tensor([1.0, -2.0, 3.0]))}
    overwritten = switch(other, update)
    switch(conv, update)
    assert torch.equal(other.weight, conv.weight)
    switch_back(other, overwritten)
    assert not torch.equal(other.weight, conv.weight)


def test_updates_are_fused_by_adding():
    base, x = small_base()
    one, two = (trained(base, "shira_wm", x, seed) for seed in (1, 2))  # the same entries
    three = trained(base, "shira", x, 3)
    fused = add_sparse(*map(sparse_deltas, (one, two, three)))
    want = {name: sum(deltas(model)[name] for model in (one, two, three)) for name in deltas(one)}
    switch(base, fused)
    moved = deltas(base, small_base()[0])
    assert moved.keys() == want.keys()
    for name, update in want.items():
        torch.testing.assert_close(moved[name], update, rtol=1e-5, atol=1e-7)
        assert fused[name].indices.unique().numel() == len(fused[name].indices)


def test_a_layer_that_only_one_update_has_is_kept():
    entries = Entries(torch.tensor([2]), torch.tensor([1.5]))
    fused = add_sparse({"a": entries}, {"b": entries})
    assert fused.keys() == {"a", "b"}
    assert torch.equal(fused["b"].values, entries.values)


def test_switching_is_refused_in_one_line_before_anything_changes():
    base, x = small_base()
    update = sparse_deltas(trained(base, "shira", x, 1))
    first, last = next(iter(update)), list(update)[-1]
    beyond = base.get_submodule(last).weight.numel()
    far = update[last]._replace(indices=update[last].indices + beyond)
    negative = update[last]._replace(indices=-update[last].indices - 1)
    before = copy.deepcopy(base.state_dict())
    for wrong, text in (
        ({first: update[first], last: negative}, rf"{last} has {beyond:,} entries, the update has entry -"),
        ({first: update[first], "block9.conv1": update[last]}, r"block9\.conv1 is not in the model"),
        ({first: update[first], "head": update[last]}, r"head is a Linear, not a plain convolution"),
        ({first: update[first], last: far}, rf"{last} has {beyond:,} entries, the update has entry"),
    ):
        with pytest.raises(ValueError, match=text) as caught:
            switch(base, wrong)
        assert "\n" not in str(caught.value)
        assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    for name in ("conv_lora", "lora_edge_as_worn"):
        with pytest.raises(ValueError, match="merge the model first"):
            switch(prepared(base, name, x)[0], update)


def test_switching_reaches_the_output():
    base, x = small_base()
    model = trained(base, "shira", x, 1)
    want, plain = output(model, x), output(base, x)
    overwritten = switch(base, sparse_deltas(model))
    torch.testing.assert_close(output(base, x), want, rtol=1e-4, atol=1e-4)
    switch_back(base, overwritten)
    assert torch.equal(output(base, x), plain)
