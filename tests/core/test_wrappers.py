"""Public functions on modules that hold adapted models: one, several, and in torch's own wrappers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import lora_edge
from helpers.networks import network, output, train
from helpers.snapshots import assert_same, snapshot


class Outer(nn.Module):
    """As a LightningModule holds its network, with a loss that has parameters of its own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.temperature = model, nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) * self.temperature


class Deep(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"backbone": nn.Sequential(Outer(model))})

    def forward(self, x: Tensor) -> Tensor:
        return self.parts["backbone"](x)


WRAP = {
    "outer": Outer,
    "deep": Deep,
    "AveragedModel": AveragedModel,
    "DataParallel": nn.DataParallel,
    "torch.compile": lambda m: torch.compile(m, backend="eager"),
}


@pytest.mark.parametrize("name", list(WRAP))
def test_every_function_finds_the_adapted_model(tmp_path, name):
    base, x = network("1-D")
    wrapped = WRAP[name](lora_edge.adapt(copy.deepcopy(base), 2, train_head=True))
    inner = next(m for m in wrapped.modules() if "_lora_edge" in m.__dict__)
    train(inner, x, list(lora_edge.trainable_parameters(wrapped)), steps=3)
    wrapped.eval()
    y, want = output(wrapped, x), output(base, x)
    lora_edge.save_adapter(wrapped, tmp_path / "a")
    assert torch.equal(output(lora_edge.load_adapter(copy.deepcopy(base), tmp_path / "a").eval(), x), output(inner, x))
    with lora_edge.disabled(wrapped):
        assert torch.equal(output(inner, x), want)
    rows = lora_edge.summary(wrapped, x)
    assert [row.weight_shape for row in rows.layers] == [(16, 6, 8), (8, 16, 3)]
    assert all(row.route for row in rows.layers)
    dict(wrapped.named_modules())  # every name exists
    assert torch.equal(output(lora_edge.calibrate_bn(wrapped, [x]), x), output(wrapped, x))
    y = output(wrapped, x)
    lora_edge.load_adapter(wrapped, tmp_path / "a")
    lora_edge.calibrate_bn(wrapped, [x])
    torch.testing.assert_close(output(wrapped, x), y)
    assert lora_edge.merge(wrapped) is wrapped
    torch.testing.assert_close(output(wrapped, x), y, rtol=1e-5, atol=1e-5)
    assert not any("_lora_edge" in m.__dict__ for m in wrapped.modules())
    assert [type(m) for m in inner.modules()] == [type(m) for m in base.modules()]
    assert all(p.requires_grad for p in inner.parameters())
    lora_edge.adapt(inner, 2)


def test_trainable_parameters_of_an_outer_module_include_its_own():
    model, _ = network("1-D")
    outer = Outer(lora_edge.adapt(model, 2))
    assert {n for n, p in outer.named_parameters() if p.requires_grad} == {"temperature", "model.0.core", "model.3.core"}
    assert len(list(lora_edge.trainable_parameters(outer))) == 3


@pytest.mark.parametrize("wrap", [Outer, Deep, nn.DataParallel], ids=["outer", "deep", "DataParallel"])
def test_load_adapter_finds_the_plain_base_inside(tmp_path, wrap):
    base, x = network("1-D")
    model = lora_edge.adapt(copy.deepcopy(base), 2)
    train(model, x, list(lora_edge.trainable_parameters(model)), steps=2)
    lora_edge.save_adapter(model, tmp_path / "a")
    wrapped = wrap(copy.deepcopy(base))
    assert lora_edge.load_adapter(wrapped, tmp_path / "a") is wrapped
    assert torch.equal(output(wrapped.eval(), x), output(model.eval(), x))


def test_two_adapted_models(tmp_path):
    base, x = network("1-D")
    pair = nn.ModuleDict({name: lora_edge.adapt(copy.deepcopy(base), 2, train_head=True) for name in ("student", "teacher")})
    for model in pair.values():
        train(model, x, list(lora_edge.trainable_parameters(model)), steps=2)
    pair.eval()
    with lora_edge.disabled(pair):
        assert all(torch.equal(output(model, x), output(base, x)) for model in pair.values())
    assert [row.name for row in lora_edge.summary(pair).layers] == ["student.0", "student.3", "teacher.0", "teacher.3"]
    assert lora_edge.summary(pair).heads == ["student.6", "teacher.6"]
    for function in (lora_edge.save_adapter, lora_edge.load_adapter):
        if function is lora_edge.load_adapter:
            lora_edge.save_adapter(pair["student"], tmp_path / "a")
        with pytest.raises(RuntimeError, match="2 adapted models are inside, at 'student', 'teacher'") as caught:
            function(pair, tmp_path / "a")
        assert "\n" not in str(caught.value)
    y = {name: output(model, x) for name, model in pair.items()}
    lora_edge.merge(pair)
    for name, model in pair.items():
        torch.testing.assert_close(output(model, x), y[name], rtol=1e-5, atol=1e-5)


def test_adapting_around_an_adapted_model_is_refused():
    base, _ = network("1-D")
    for wrap, text in ((Outer, "'model'"), (Deep, r"'parts\.backbone\.0\.model'"), (AveragedModel, "'module'")):
        wrapped = wrap(lora_edge.adapt(copy.deepcopy(base), 2))
        before = snapshot(wrapped)
        with pytest.raises(RuntimeError, match=f"a part of the model is already adapted, at {text}") as caught:
            lora_edge.adapt(wrapped, 2)
        assert "\n" not in str(caught.value)
        assert_same(before, snapshot(wrapped))


def test_a_part_of_an_adapted_model_is_refused(tmp_path):
    model, x = network("1-D")
    whole = lora_edge.adapt(nn.Sequential(model), 2)
    before = snapshot(whole)

    def enter(part):
        with lora_edge.disabled(part):
            pass

    for call in (lora_edge.merge, lambda m: lora_edge.save_adapter(m, tmp_path / "a"), enter):
        with pytest.raises(RuntimeError, match="larger model that was adapted") as caught:
            call(model)
        assert "\n" not in str(caught.value)
    assert_same(before, snapshot(whole))
    output(lora_edge.merge(whole), x)


@pytest.mark.parametrize("name", ["DataParallel", "torch.compile"])
def test_adapt_enters_a_wrapper_that_only_forwards_calls(tmp_path, name):
    base, x = network("1-D")
    wrapped = WRAP[name](copy.deepcopy(base))
    output(wrapped, x)
    assert lora_edge.adapt(wrapped, 2) is wrapped
    inner = next(m for m in wrapped.modules() if "_lora_edge" in m.__dict__)
    assert type(inner) is not type(wrapped)
    torch.testing.assert_close(output(wrapped, x), output(base, x))
    train(inner, x, list(lora_edge.trainable_parameters(wrapped)), steps=2)
    torch.testing.assert_close(output(wrapped.eval(), x), output(inner.eval(), x))
    lora_edge.save_adapter(wrapped, tmp_path / "a")
    assert torch.equal(output(lora_edge.load_adapter(base, tmp_path / "a").eval(), x), output(inner, x))


def test_an_argument_that_is_no_module_is_refused_in_one_line():
    for function in (lora_edge.merge, lora_edge.summary, lora_edge.trainable_parameters, lora_edge.adapt):
        with pytest.raises(TypeError, match="model is a dict") as caught:
            function({})
        assert "\n" not in str(caught.value)


def test_drop_in_layers_beside_an_adapted_model():
    base, x = network("1-D")
    built = nn.Sequential(lora_edge.LoRAEdgeConv1d(6, 6, 1, rank=2), Outer(lora_edge.adapt(base, 2)))
    with torch.no_grad():
        built[0].core.normal_()
    y = output(built, x)
    lora_edge.merge(built)
    torch.testing.assert_close(output(built, x), y, rtol=1e-5, atol=1e-5)
    assert type(built[0]) is nn.Conv1d
