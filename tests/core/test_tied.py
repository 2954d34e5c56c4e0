"""Convolutions that share a weight share their core, or are refused; a module under two names is adapted once."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import lora_edge
from helpers.networks import output, train
from helpers.snapshots import assert_same, snapshot
from lora_edge.adapter_format import merge_state, read_adapter


class Tied(nn.Module):
    """Two convolutions of different dilation with one weight, a third one between."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv1d(4, 4, 3, padding=1)
        self.between = nn.Conv1d(4, 4, 1)
        self.b = nn.Conv1d(4, 4, 3, padding=2, dilation=2)
        self.b.weight = self.a.weight
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(torch.relu(self.between(self.a(x)))).mean(-1))


class Siamese(nn.Module):
    """Two Parameters that share memory, and three uses of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.convs[1].weight = self.convs[0].weight
        self.convs[2].weight = nn.Parameter(self.convs[0].weight.data)
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = torch.relu(conv(x))
        return self.head(x.mean((2, 3)))


class Grouped(nn.Module):
    """One weight in a grouped and a plain convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped, self.plain = nn.Conv1d(8, 4, 3, groups=2), nn.Conv1d(4, 4, 3)
        self.plain.weight = self.grouped.weight
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.plain(self.grouped(x)).mean(-1))


NETS = {"two": (Tied, (5, 4, 20)), "three": (Siamese, (5, 3, 8, 7)), "grouped": (Grouped, (5, 8, 20))}
OPTIONS = [{}, {"params": 40}, {"subspace": "input"}, {"subspace": "gradient"}, {"params": 40, "subspace": "gradient"}]


def twin(make, base: nn.Module) -> nn.Module:
    """The same model again; a deepcopy would separate two Parameters that share memory."""
    model = make()
    model.load_state_dict(base.state_dict())
    return model


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", list(NETS))
def test_a_shared_weight_has_one_update(tmp_path, name, options):
    make, shape = NETS[name]
    base, x = make(), torch.randn(shape)
    batches = [(x, torch.arange(5) % 3)] if "subspace" in options else None
    model = lora_edge.adapt(twin(make, base), 2, batches=batches, **options)
    train(model, x, list(lora_edge.trainable_parameters(model)))
    y = output(model.eval(), x)
    assert lora_edge.summary(model).parameters == sum(p.numel() for p in base.parameters())
    lora_edge.save_adapter(model, tmp_path / "a")
    for start in (twin(make, base), lora_edge.adapt(twin(make, base), 2, batches=batches, **options)):
        assert torch.equal(output(lora_edge.load_adapter(start, tmp_path / "a").eval(), x), y)
    merged = merge_state(base.state_dict(), read_adapter(tmp_path / "a"), "a")
    fresh = make()
    fresh.load_state_dict(merged)
    torch.testing.assert_close(output(fresh.eval(), x), y, rtol=1e-5, atol=1e-5)
    assert len({value.data_ptr() for value in merged.values()}) == len(merged)
    lora_edge.merge(model)
    torch.testing.assert_close(output(model, x), y, rtol=1e-5, atol=1e-5)
    weights = {n: p.data_ptr() for n, p in model.named_parameters(remove_duplicate=False)}
    before = {n: p.data_ptr() for n, p in base.named_parameters(remove_duplicate=False)}
    same = {(m, n) for m in weights for n in weights if weights[m] == weights[n]}
    assert same == {(m, n) for m in before for n in before if before[m] == before[n]}
    again = make()
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(output(again.eval(), x), y, rtol=1e-5, atol=1e-5)


def test_copies_stay_tied_and_the_budget_counts_a_shared_core_once():
    model = lora_edge.adapt(Tied(), 2)
    for twin in (model, copy.deepcopy(model), copy.deepcopy(model).double()):
        assert twin.a.core is twin.b.core
        assert twin.a.suffix is twin.b.suffix
    assert sum(p.numel() for p in lora_edge.trainable_parameters(model)) == 2 * 4 * 2
    assert lora_edge.summary(model).trainable == 16


def with_linear() -> nn.Module:
    model = nn.Sequential(nn.Conv1d(4, 4, 1), nn.Linear(4, 4))
    model[1].weight = nn.Parameter(model[0].weight.data[:, :, 0])
    return model


def with_transposed() -> nn.Module:
    model = nn.Sequential(nn.Conv1d(4, 4, 3), nn.ConvTranspose1d(4, 4, 3))
    model[1].weight = model[0].weight
    return model


def with_slice() -> nn.Module:
    model = nn.Sequential(nn.Conv1d(4, 8, 3), nn.Conv1d(4, 4, 3))
    model[1].weight = nn.Parameter(model[0].weight.data[:4])
    return model


def with_own_name() -> nn.Module:
    model = nn.Sequential(nn.Conv1d(4, 4, 3))
    model.register_parameter("kernel", model[0].weight)
    return model


@pytest.mark.parametrize(
    ("make", "options", "names"),
    [
        (Tied, {"targets": "a"}, ("a.weight", "b.weight")),
        (Tied, {"exclude": "a"}, ("a.weight", "b.weight")),
        (Siamese, {"exclude": "convs.2"}, ("convs.0.weight", "convs.2.weight")),
        (with_linear, {}, ("0.weight", "1.weight")),
        (with_transposed, {}, ("0.weight", "1.weight")),
        (with_slice, {}, ("0.weight", "1.weight")),
        (with_own_name, {}, ("0.weight", "kernel")),
    ],
)
def test_a_weight_that_something_else_uses_is_refused_and_both_are_named(make, options, names):
    model = make()
    before = snapshot(model)
    with pytest.raises(ValueError, match="adapt both or neither, or untie them") as caught:
        lora_edge.adapt(model, 2, **options)
    assert all(name in str(caught.value) for name in names)
    assert "\n" not in str(caught.value)
    assert_same(before, snapshot(model))
    if make is Tied:
        lora_edge.adapt(model, 2, targets="between")


class Aliased(nn.Module):
    """One convolution, one BatchNorm and one head, each under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(3, 8, 3, padding=1)
        self.encoder = self.stem
        self.norm = self.again = nn.BatchNorm1d(8)
        self.head = self.classifier = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.relu(self.again(self.encoder(x))).mean(-1))


def test_one_module_under_two_names_has_both_in_the_merged_state(tmp_path):
    base, x = Aliased(), torch.randn(6, 3, 20)
    lora_edge.calibrate_bn(base, [x])
    plain = copy.deepcopy(base)
    for norm in (plain.norm, base.norm):
        norm.__dict__.pop("_base_statistics", None)
    model = lora_edge.adapt(copy.deepcopy(base), 2, train_head=True, bn="batch")
    train(model, x, list(lora_edge.trainable_parameters(model)))
    y = output(model.eval(), x)
    lora_edge.save_adapter(model, tmp_path / "a")
    merged = merge_state(plain.state_dict(), read_adapter(tmp_path / "a"), "a")
    for one, other in (("stem", "encoder"), ("norm", "again"), ("head", "classifier")):
        for key in (k for k in merged if k.startswith(f"{one}.")):
            assert torch.equal(merged[key], merged[key.replace(one, other)]), key
    fresh = Aliased()
    fresh.load_state_dict(merged)
    torch.testing.assert_close(output(fresh.eval(), x), y, rtol=1e-5, atol=1e-5)
    assert torch.equal(output(lora_edge.load_adapter(plain, tmp_path / "a").eval(), x), y)


def test_a_file_with_two_updates_of_one_weight_is_refused(tmp_path):
    apart = Tied()
    apart.b.weight = nn.Parameter(apart.a.weight.detach().clone())
    tied = Tied()
    tied.load_state_dict(apart.state_dict())
    model = lora_edge.adapt(apart, 2)
    train(model, torch.randn(5, 4, 20), list(lora_edge.trainable_parameters(model)))
    lora_edge.save_adapter(model, tmp_path / "a")
    for target in (tied, lora_edge.adapt(copy.deepcopy(tied), 2)):
        before = snapshot(target)
        with pytest.raises(ValueError, match="a and b share one weight"):
            lora_edge.load_adapter(target, tmp_path / "a")
        assert_same(before, snapshot(target))
