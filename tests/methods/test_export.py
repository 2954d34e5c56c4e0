"""``to_peft``: PEFT loads the adapter of any method into the base model and computes the same; what it cannot is refused."""

from __future__ import annotations

import copy
import json
import os
import warnings

import pytest
import torch
from torch import nn

import lora_edge
from helpers.methods import LABELS, METHODS, prepared, small_base
from helpers.networks import network, output, train
from lora_edge.files.safetensors_file import read_safetensors
from lora_edge.tools import low_rank, to_peft

peft = pytest.importorskip("peft")
EXACT = ["conv_lora", "lora_edge", "lora_edge_as_worn", "lora_edge_batch_bn", "lora_ga", "lora_sb", "lora_xs", "loldu", "pissa"]
BY_SVD = ["dora", "lora_c", "pissa_4bit"]  # their updates are no product of the factors


def two_d():
    """2-D kernels of several shapes in nested modules, one a part of the other's name, and a 1x1 kernel."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Sequential(nn.Conv2d(8, 6, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, (1, 3), stride=2)),
        nn.Conv2d(6, 4, 3, padding="same"), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2),
    )  # fmt: skip
    return model.eval(), torch.randn(4, 3, 9, 8)


BASES = {"1-D": small_base, "2-D": two_d, "3-D": lambda: network("3-D")}


def loaded(base, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()


def trained(base, name, x):
    torch.manual_seed(0)
    model, parameters = prepared(base, name, x)
    train(model, x, parameters, steps=3)
    return model.eval()


def assert_same_output(model, base, folder, x):
    want, before = output(model, x), output(base, x)
    got = loaded(base, folder)
    moved = (want - before).norm()
    assert moved > 1e-3 * before.norm()
    assert (output(got, x) - want).norm() < 1e-4 * moved
    with got.disable_adapter():
        torch.testing.assert_close(output(got, x), before)
    return got


@pytest.mark.parametrize("name", [*EXACT, *BY_SVD])
@pytest.mark.parametrize("kind", list(BASES))
def test_peft_computes_what_the_model_does(kind, name, tmp_path):
    torch.manual_seed(0)
    base, x = BASES[kind]()
    base, x = base.double(), x.double()
    model = trained(base, name, x)
    to_peft(model, tmp_path, rank=1000 if name in BY_SVD else None)
    got = assert_same_output(model, base, tmp_path, x)
    if name == "conv_lora":
        merged = output(got.merge_and_unload(), x)
        torch.testing.assert_close(merged, output(lora_edge.merge(model), x))


@pytest.mark.parametrize("kind", list(BASES))
def test_the_names_in_the_file_are_those_that_peft_writes(kind, tmp_path):
    base, x = BASES[kind]()
    to_peft(trained(base, "lora_edge_batch_bn", x), tmp_path / "ours")
    loaded(base, tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    ours, theirs = (read_safetensors(tmp_path / who / "adapter_model.safetensors")[0] for who in ("ours", "theirs"))
    assert {name: value.shape for name, value in ours.items()} == {name: value.shape for name, value in theirs.items()}
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert any(name.endswith("running_var") for name in ours)


def test_a_truncated_adapter_is_the_best_of_its_rank(tmp_path):
    base, x = small_base()
    model = trained(base, "dora", x)
    to_peft(model, tmp_path, rank=3)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (3, 3)
    peft_layers = {n: m for n, m in loaded(base, tmp_path).named_modules() if hasattr(m, "lora_A")}
    for name, (b, a, _) in low_rank(model, 3).items():
        theirs = peft_layers[f"base_model.model.{name}"].get_delta_weight("default")
        torch.testing.assert_close(theirs, (b @ a.flatten(1)).view(theirs.shape), rtol=1e-4, atol=1e-6)


def test_each_layer_has_its_own_rank(tmp_path):
    """PiSSA's is capped by the weight; the pattern of a short name must not match a longer one that ends with it."""
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Conv1d(2, 4, 1), nn.Sequential(nn.Conv1d(4, 6, 3))), torch.randn(4, 2, 9)
    model = copy.deepcopy(base)
    train(model, x, METHODS["pissa"].prepare(model, 5, x, LABELS[:4]), steps=3)
    to_peft(model, tmp_path)
    got = assert_same_output(model, base, tmp_path, x)
    assert [layer.r["default"] for layer in got.modules() if hasattr(layer, "lora_A")] == [4, 10]


def conv(**options):
    return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, **options)))


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (conv(groups=2), r"to_peft: 1\.0 has groups=2, which PEFT's lora_A mixes; use lora_edge\.merge"),
        (conv(groups=4), r"1\.0 has groups=4"),
        (conv(dilation=2), r"1\.0 has dilation=\(2, 2\)"),
        (conv(padding_mode="reflect"), r"1\.0 has padding_mode='reflect'"),
        (nn.Conv2d(4, 4, 3), "the model is itself a convolution"),
    ],
)
def test_what_peft_computes_otherwise_is_refused_by_name(model, text, tmp_path):
    METHODS["conv_lora"].prepare(model, 2, torch.randn(2, 4, 7, 7), LABELS[:2])
    with pytest.raises(ValueError, match=text) as caught:
        to_peft(model, tmp_path / "none")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "none").exists()


def test_peft_does_mix_groups_and_ignores_dilation():
    """The reason for the refusals, so that they can go when PEFT changes."""
    for options in ({"groups": 2}, {"dilation": 2, "padding": 2}, {"padding_mode": "circular", "padding": 1}):
        base = nn.Sequential(nn.Conv2d(4, 4, 3, **options))
        config = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = peft.get_peft_model(base, config)
        layer = adapted.base_model.model[0]
        a = layer.lora_A["default"]
        assert a.groups == 1
        assert a.dilation == (1, 1)
        assert a.padding_mode == "zeros"


def test_changes_that_peft_has_no_place_for_are_refused(tmp_path):
    used = nn.Conv2d(4, 4, 3, padding=1)
    twice = nn.Sequential(used, nn.ReLU(), used)
    METHODS["conv_lora"].prepare(twice, 2, torch.randn(2, 4, 7, 7), LABELS[:2])
    with pytest.raises(ValueError, match="0 is also 2, where PEFT does not adapt it"):
        to_peft(twice, tmp_path)
    model = conv()
    METHODS["conv_lora"].prepare(model, 2, torch.randn(2, 4, 7, 7), LABELS[:2])
    model[1][0].bias.requires_grad_(True)
    with pytest.raises(ValueError, match=r"1\.0 has a changed bias"):
        to_peft(model, tmp_path)
    named = nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.Sequential(nn.Identity(), nn.Conv1d(4, 4, 3)))
    METHODS["lora_edge_batch_bn"].prepare(named, 2, torch.randn(2, 2, 9), LABELS[:2])
    with pytest.raises(ValueError, match=r"PEFT would save all of 2\.1 for a module whose name it ends with; rename one"):
        to_peft(named, tmp_path)
    with pytest.raises(RuntimeError, match="nothing in the model is adapted"):
        to_peft(nn.Conv1d(2, 2, 3), tmp_path)
    base, x = small_base()
    with pytest.raises(ValueError, match=r"the update of block1\.conv1 by DoRA is no product; give a rank"):
        to_peft(trained(base, "dora", x), tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_head_that_was_trained_too_is_in_the_adapter(tmp_path):
    base, x = small_base()
    model = lora_edge.adapt(copy.deepcopy(base), 2, train_head=True)
    train(model, x, lora_edge.trainable_parameters(model), steps=3)
    to_peft(model.eval(), tmp_path)
    assert_same_output(model, base, tmp_path, x)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == ["head"]
