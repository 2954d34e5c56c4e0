"""Models whose cores are trained kernels: start, lean blocks, saved bytes, merge, files, state dicts, copies, autocast."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lora_edge
from benchmarks.workloads import WORKLOADS
from helpers.methods import METHODS
from helpers.networks import BUILD, network, output, train
from helpers.tolerances import assert_near, relative_error
from lora_edge.adapt import LayerUpdate, install
from lora_edge.adapter_format import merge_state, read_adapter
from lora_edge.memory import saved_bytes
from lora_edge.methods.files import load_trained, save_trained
from lora_edge.methods.memflora import gaussian, trained_kernel
from lora_edge.nn.layers import LoRAEdgeConv
from lora_edge.subspaces.weight import kernel_suffix
from lora_edge.tools import deltas, low_rank

SMALL = (4, 80)
NOTHING = torch.empty(0)
by_weight = trained_kernel(kernel_suffix, subspace="weight")


def layers_of(model: nn.Module) -> list[LoRAEdgeConv]:
    return [m for m in model.modules() if isinstance(m, LoRAEdgeConv)]


def adapted(kind: str, rank: int = 2, steps: int = 3):
    """A network, a copy of it with trained kernels that were trained a few steps, and an input."""
    base, x = network(kind)
    model = copy.deepcopy(base)
    train(model, x, by_weight(model, rank, NOTHING, NOTHING), steps)
    return base, model.eval(), x


@pytest.mark.parametrize("kind", list(BUILD))
def test_start_training_disabled_and_merge(kind):
    base, x = network(kind)
    model = copy.deepcopy(base)
    parameters = by_weight(model, 2, NOTHING, NOTHING)
    for layer in layers_of(model):
        rank = min(2, layer.weight.shape[1])
        assert layer.core.shape == (layer.out_channels, rank, *layer.kernel_size)
        assert layer.form == "kernel"
    assert torch.equal(output(model.eval(), x), output(base, x)), "the start is the base, bit by bit"
    train(model, x, parameters)
    want = output(model.eval(), x)
    assert float((want - output(base, x)).abs().max()) > 1e-3
    with lora_edge.disabled(model):
        assert torch.equal(output(model, x), output(base, x))
    twin = copy.deepcopy(model)
    assert torch.equal(output(twin, x), want)
    summary = lora_edge.summary(model, x)
    assert summary.trainable == sum(p.numel() for p in parameters)
    assert {row.route for row in summary.layers} == {"factor"}
    assert "factor" in str(summary)
    updates = deltas(model)
    for layer, (b, a, scale) in low_rank(model).items():
        assert relative_error(scale * (b @ a.flatten(1)).view(updates[layer].shape), updates[layer]) <= 1e-5
    lora_edge.merge(model)
    assert_near(output(model, x), want, *SMALL)
    assert [type(m) for m in model.modules()] == [type(m) for m in base.modules()]
    assert list(model.state_dict()) == list(base.state_dict())
    for layer, update in deltas(model, base).items():
        torch.testing.assert_close(update, updates[layer], rtol=1e-5, atol=1e-6)
    assert torch.equal(output(twin, x), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_merged_in_float32_with_one_cast(dtype):
    base, x = network("2-D")
    base, x = base.to(dtype), x.to(dtype)
    model = copy.deepcopy(base)
    exact = torch.promote_types(dtype, torch.float32)
    for parameter in by_weight(model, 2, NOTHING, NOTHING):
        assert parameter.dtype == exact
        with torch.no_grad():
            parameter.normal_(std=0.3)
    want = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoRAEdgeConv):
            weight = base.get_submodule(name).weight.to(exact)
            update = torch.einsum("oqk,qi->oik", layer.core.flatten(2), layer.suffix.flatten(1))
            want[name] = (weight + update.view(weight.shape)).to(dtype)
    lora_edge.merge(model)
    for name, weight in want.items():
        assert torch.equal(model.get_submodule(name).weight, weight)


@pytest.mark.parametrize("kind", list(BUILD))
def test_the_adapter_file(kind, tmp_path):
    base, model, x = adapted(kind)
    want = output(model, x)
    path = tmp_path / "adapter.safetensors"
    lora_edge.save_adapter(model, path)
    fresh = lora_edge.load_adapter(copy.deepcopy(base), path)
    assert torch.equal(output(fresh.eval(), x), want)
    assert {layer.form for layer in layers_of(fresh)} == {"kernel"}
    again = copy.deepcopy(base)
    by_weight(again, 2, NOTHING, NOTHING)
    assert torch.equal(output(lora_edge.load_adapter(again, path).eval(), x), want)
    merged = copy.deepcopy(base)
    merged.load_state_dict(merge_state(base.state_dict(), read_adapter(path), "test"))
    assert_near(output(merged.eval(), x), want, *SMALL)
    save_trained(model, path)
    loaded = copy.deepcopy(base)
    by_weight(loaded, 2, NOTHING, NOTHING)
    assert torch.equal(output(load_trained(loaded, path).eval(), x), want)


def test_a_file_of_another_form_is_refused(tmp_path):
    base, model, _ = adapted("1-D")
    lora_edge.save_adapter(model, tmp_path / "kernel")
    core = lora_edge.adapt(copy.deepcopy(base), 2)
    lora_edge.save_adapter(core, tmp_path / "core")
    for into, file, form, own in ((core, "kernel", "kernel", "core"), (model, "core", "core", "kernel")):
        with pytest.raises(ValueError, match=f"has the form '{form}' in the file and '{own}' in the model") as caught:
            lora_edge.load_adapter(into, tmp_path / file)
        assert "\n" not in str(caught.value)
    wider = nn.Sequential(*[nn.Conv1d(6, 16, 9, padding="same", bias=False), *list(base)[1:]])
    with pytest.raises(ValueError, match=r"0 was adapted at weight \(16, 6, 8\), in this model it is \(16, 6, 9\)"):
        lora_edge.load_adapter(wider, tmp_path / "kernel")


def test_another_base_renews_the_directions_made_from_the_weight_alone():
    base, x = network("2-D")
    other = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    for prepare, renewed in ((by_weight, True), (trained_kernel(gaussian), False)):
        model, direct = copy.deepcopy(base), copy.deepcopy(other)
        parameters = prepare(model, 2, NOTHING, NOTHING)
        prepare(direct, 2, NOTHING, NOTHING)
        before = [layer.suffix.clone() for layer in layers_of(model)]
        model.load_state_dict(other.state_dict())
        for layer, old, wanted in zip(layers_of(model), before, layers_of(direct), strict=True):
            assert torch.equal(layer.suffix, wanted.suffix if renewed else old)
        assert torch.equal(output(model.eval(), x), output(other.eval(), x))
        train(model, x, parameters, steps=1)
        with pytest.raises(RuntimeError, match="is already trained for the old one"):
            model.load_state_dict(base.state_dict())


def test_saved_bytes_are_lora_edges_on_w1():
    """At equal rank and stride 1 ``q`` and ``h`` are of one size; memory that a stock layer keeps would show."""
    workload = WORKLOADS["W1"]
    x, _ = workload.batch(4)
    found = {}
    for name, prepare in (
        ("lora_edge", lambda m: lora_edge.adapt(m, 2)),
        ("memflora", lambda m: METHODS["memflora"].begin(m, 2, x, NOTHING)),
        ("kernel_core", lambda m: by_weight(m, 2, x, NOTHING)),
        ("paca", lambda m: METHODS["paca"].begin(m, 2, x, NOTHING)),
    ):
        model = workload.model()
        prepare(model)
        found[name] = saved_bytes(model.train(), x)
    assert len(set(found.values())) == 1, found
    stock = saved_bytes(workload.model().train(), x)
    assert stock > 20 * found["memflora"]


def test_autocast_and_train_agree_with_float32():
    _, model, x = adapted("2-D")
    want = output(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        y = model.train()(x)
        y.float().square().mean().backward()
    assert relative_error(y, want) <= 5e-2
    assert all(torch.isfinite(layer.core.grad).all() for layer in layers_of(model))


def test_functional_transforms_see_the_update():
    base, model, x = adapted("1-D")
    parameters = dict(model.named_parameters())

    def loss(parameters):
        return torch.func.functional_call(model, parameters, (x,)).square().mean()

    model.zero_grad()
    gradients = torch.func.grad(loss)(parameters)
    loss(parameters).backward()
    for name, parameter in model.named_parameters():
        if name.endswith(".core"):
            assert relative_error(gradients[name], parameter.grad) <= 1e-5
    assert float((output(model, x) - output(base, x)).abs().max()) > 1e-3


def test_a_suffix_that_does_not_fit_is_refused():
    conv = nn.Sequential(nn.Conv1d(4, 6, 3))
    for shape, text in (((2, 4, 3), r"give \(r1, 4, 1\)"), ((5, 4, 1), "give 1 to 4"), ((2, 3, 1), r"give \(r1, 4, 1\)")):
        with pytest.raises(ValueError, match=text):
            install(conv, {"0": LayerUpdate(torch.randn(shape), form="kernel")})
    assert type(conv[0]) is nn.Conv1d
