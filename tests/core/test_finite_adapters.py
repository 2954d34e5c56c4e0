"""No NaN, infinity or negative variance is saved, loaded or merged: the tensor is named and nothing is changed."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch
from torch import nn

import lora_edge
from helpers.networks import network, output, train
from helpers.snapshots import assert_same, snapshot
from lora_edge.adapter_format import checksum, merge_state, read_adapter
from lora_edge.files.safetensors_file import write_safetensors


def poison(tensor: torch.Tensor, value: float) -> None:
    with torch.no_grad():
        tensor.reshape(-1)[0] = value


def overflow(model: nn.Module) -> None:
    model.depthwise.core.data.fill_(3e38)
    model.depthwise.scale = 1e3


BAD = {
    "core": (lambda m: poison(m.stem.core, float("nan")), r"stem\.(core|weight) holds NaN or infinity"),
    "overflow": (
        lambda m: [m.depthwise.core.data.fill_(3e38), setattr(m.depthwise, "scale", 1e3)],
        r"depthwise\.(core|weight) holds NaN or infinity",
    ),
    "head": (lambda m: poison(m.fc.bias, float("inf")), r"fc\.bias holds NaN or infinity"),
    "variance": (lambda m: poison(m.norm.running_var, -1.0), r"norm\.running_var holds a negative variance"),
    "mean": (lambda m: poison(m.bn.running_mean, float("nan")), r"(statistics|bn\.running_mean) holds NaN or infinity"),
}


def adapted():
    base, x = network("2-D")
    model = lora_edge.adapt(copy.deepcopy(base), 2, train_head=True)
    train(model, x, list(lora_edge.trainable_parameters(model)), steps=2)
    return base, model, x


@pytest.mark.parametrize("kind", list(BAD))
def test_save_and_merge_refuse(tmp_path, kind):
    _, model, _ = adapted()
    change, text = BAD[kind]
    change(model)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    types = [type(m) for m in model.modules()]
    calls = {"merge": lora_edge.merge}
    if kind != "overflow":
        calls["save"] = lambda m: lora_edge.save_adapter(m, tmp_path / "a")
    for call in calls.values():
        with pytest.raises(ValueError, match=text) as caught:
            call(model)
        assert "\n" not in str(caught.value)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, state[key], rtol=0, atol=0, equal_nan=True)
    assert [type(m) for m in model.modules()] == types
    assert not list(tmp_path.iterdir())


def rewritten(source, target, change) -> None:
    """Write a bad adapter as a valid file, with the right checksum."""
    adapter = read_adapter(source)
    change(adapter.tensors)
    metadata = {"format": "lora_edge adapter 2", "base": adapter.base}
    for key in ("layers", "norms", "options"):
        metadata[key] = json.dumps(dataclasses.asdict(adapter)[key])
    metadata["checksum"] = checksum(adapter.tensors, metadata)
    write_safetensors(adapter.tensors, target, metadata)


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("stem.core", float("nan"), r"stem\.core holds NaN or infinity"),
        ("twice.frozen.2", float("inf"), r"twice\.frozen\.2 holds NaN or infinity"),
        ("changed.fc.weight", float("-inf"), r"fc\.weight holds NaN or infinity"),
        ("statistics", float("nan"), r"(statistics|running_mean) holds NaN or infinity"),
        ("statistics", -1e3, r"running_var holds a negative variance"),
    ],
)
def test_load_and_merge_state_refuse(tmp_path, key, value, text):
    base, x = network("2-D")
    moved = lora_edge.calibrate_bn(copy.deepcopy(base), [x])
    lora_edge.save_adapter(lora_edge.adapt(moved, 2, train_head=True), tmp_path / "a")
    rewritten(tmp_path / "a", tmp_path / "b", lambda tensors: tensors[key].fill_(value))
    for target in (base, lora_edge.adapt(copy.deepcopy(base), 2, train_head=True)):
        before = snapshot(target)
        with pytest.raises(ValueError, match=text) as caught:
            lora_edge.load_adapter(target, tmp_path / "b")
        assert "\n" not in str(caught.value)
        assert_same(before, snapshot(target))
    with pytest.raises(ValueError, match=r"holds NaN or infinity|negative variance") as caught:
        merge_state(base.state_dict(), read_adapter(tmp_path / "b"), "b")
    assert "\n" not in str(caught.value)


def test_an_update_that_overflows_half_precision_is_not_merged():
    model = lora_edge.adapt(nn.Sequential(nn.Conv1d(3, 4, 3)).half(), 2)
    model[0].core.data.fill_(1e6)
    before = output(model, torch.randn(2, 3, 9).half())
    with pytest.raises(ValueError, match=r"0\.weight holds NaN or infinity"):
        lora_edge.merge(model)
    assert before.shape == (2, 4, 7)
    assert type(model[0]).__name__ == "LoRAEdgeConv1d"
