"""train_head: the head is given by name or found by following the forward, and checked before anything changes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import lora_edge
from helpers.networks import network, output, train
from helpers.snapshots import assert_same, snapshot
from lora_edge.surgery.adapted import adapt_state

X = torch.randn(6, 3, 20)


class Gated(nn.Module):
    """A gate that is registered after the classifier and runs before it."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.fc, self.gate = nn.Conv1d(3, 8, 3), nn.Linear(8, 5), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c(x).mean(-1)
        return self.fc(x * self.gate(x).sigmoid())


class GateLast(Gated):
    """The gate runs after the classifier; only the classifier's output has the model's classes."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c(x).mean(-1)
        return self.fc(x) * self.gate(x).sigmoid()


class Reversed(nn.Module):
    """Registered from back to front, and counting its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.middle, self.c = nn.Linear(6, 4), nn.Linear(8, 6), nn.Conv1d(3, 8, 3)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.head(self.middle(self.c(x).mean(-1)).relu())


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c, self.out, self.attention = nn.Conv1d(3, 8, 3), nn.Linear(8, 4), nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c(x).transpose(1, 2)
        return self.out(self.attention(x, x, x)[0].mean(1))


@pytest.mark.parametrize(("make", "head"), [(Gated, "fc"), (GateLast, "fc"), (Reversed, "head"), (Attention, "out")])
def test_the_classifier_is_found_by_following_the_forward(make, head):
    torch.manual_seed(0)
    model = make()
    before, state = output(model.eval(), X), torch.get_rng_state()
    lora_edge.adapt(model, 2, train_head=True, batches=iter([(X, torch.zeros(6))]))
    assert torch.equal(torch.get_rng_state(), state)
    assert lora_edge.summary(model).heads == [head]
    assert f"trained head: {head}" in str(lora_edge.summary(model))
    trained = {name for name, p in model.named_parameters() if p.requires_grad and not name.endswith("core")}
    assert trained == {f"{head}.weight", f"{head}.bias"}
    assert torch.equal(output(model, X), before)
    assert not any(m._forward_hooks for m in model.modules())
    if make is Reversed:
        assert model.calls == 2, "the forward was followed on a copy"


@pytest.mark.parametrize(("make", "head"), [(Gated, "fc"), (Reversed, "head"), (Attention, "attention")])
def test_a_named_head(tmp_path, make, head):
    base = make().eval()
    model = lora_edge.adapt(copy.deepcopy(base), 2, train_head=head)
    train(model, X, list(lora_edge.trainable_parameters(model)))
    lora_edge.save_adapter(model.eval(), tmp_path / "a")
    loaded = lora_edge.load_adapter(copy.deepcopy(base), tmp_path / "a").eval()
    assert torch.equal(output(loaded, X), output(model, X))
    assert lora_edge.summary(loaded).heads == [head]
    with lora_edge.disabled(model):
        assert torch.equal(output(model, X), output(base, X))


def test_a_head_of_several_layers_with_batch_norm(tmp_path):
    base = nn.Sequential(
        nn.Sequential(nn.Conv1d(3, 8, 3), nn.AdaptiveAvgPool1d(1), nn.Flatten()),
        nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4)),
    ).eval()
    model = lora_edge.adapt(copy.deepcopy(base), 2, train_head="1")
    train(model, X, list(lora_edge.trainable_parameters(model)))
    lora_edge.save_adapter(model.eval(), tmp_path / "a")
    assert torch.equal(output(lora_edge.load_adapter(copy.deepcopy(base), tmp_path / "a").eval(), X), output(model, X))
    with lora_edge.disabled(model):
        assert torch.equal(output(model, X), output(base, X))


def test_a_convolution_as_the_head_is_excluded_from_adapting():
    model = nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU(), nn.Conv1d(8, 4, 1))
    before = snapshot(model)
    with pytest.raises(ValueError, match="train_head: 2 would be adapted and trained whole; exclude it"):
        lora_edge.adapt(model, 2, train_head="2")
    assert_same(before, snapshot(model))
    lora_edge.adapt(model, 2, train_head="2", exclude="2")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"0.core", "2.weight", "2.bias"}


@pytest.mark.parametrize(
    ("head", "options", "error", "text"),
    [
        ("classifier", {}, ValueError, "train_head: the model has no module 'classifier'; the closest are"),
        ("", {}, ValueError, "train_head: the model has no module ''"),
        ("relu", {}, ValueError, "train_head: relu has no parameters; name the classifier"),
        (1, {}, TypeError, "train_head is 1, a int; give a bool or a module's dotted name"),
        (None, {}, TypeError, "train_head is None"),
        (
            True,
            {"batches": [torch.randn(6, 4, 20)]},
            ValueError,
            r"batches: the model does not accept an input of \(2, 4, 20\)",
        ),
        (True, {"batches": []}, ValueError, "batches holds no samples"),
        (True, {"batches": 3}, TypeError, "batches is a int"),
    ],
)
def test_odd_heads_leave_the_model_as_it_was(head, options, error, text):
    model = Gated()
    model.relu = nn.ReLU()
    before = snapshot(model)
    with pytest.raises(error, match=text) as caught:
        lora_edge.adapt(model, 2, train_head=head, **options)
    assert "\n" not in str(caught.value)
    assert_same(before, snapshot(model))
    assert adapt_state(model) is None


def test_without_batches_the_head_is_the_last_layer_registered():
    assert lora_edge.summary(lora_edge.adapt(network("2-D")[0], 2, train_head=True)).heads == ["fc"]
    assert lora_edge.summary(lora_edge.adapt(network("2-D")[0], 2)).heads == []


class GatedBehind(nn.Module):
    """A classifier and a gate that is registered after it."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.conv, self.fc, self.gate, self.form = nn.Conv1d(3, 8, 3), nn.Linear(8, 4), nn.Linear(8, 4), form

    def forward(self, x):
        features = self.conv(x).relu().mean(-1)
        if self.form == "before":
            return self.fc(features * torch.sigmoid(self.gate(features)).repeat(1, 2))
        gate = torch.sigmoid(self.gate(features))
        return self.fc(features) * gate if self.form == "right" else gate * self.fc(features)


@pytest.mark.parametrize("form", ["before", "right", "left"])
def test_a_gate_registered_after_the_classifier_is_not_the_head(form):
    model = lora_edge.adapt(GatedBehind(form), 2, train_head=True)
    assert model.fc.weight.requires_grad
    assert not model.gate.weight.requires_grad
