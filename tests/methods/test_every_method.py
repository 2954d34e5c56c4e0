"""What every method of lora_edge.methods keeps: its start, what it trains, its result, its file, its refusals."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import lora_edge
from helpers.methods import (
    LABELS,
    METHODS,
    NAMES,
    RANK,
    REPARAMETRISED,
    begun,
    prepared,
    small_base,
)
from helpers.networks import BUILD, network, output, train
from helpers.tolerances import assert_near
from helpers.trained_counts import expected_trainable
from helpers.windows import own
from lora_edge.files.safetensors_file import write_safetensors
from lora_edge.har.data import load_npz, split
from lora_edge.har.main_job import adapt_by
from lora_edge.har.models import TResNet
from lora_edge.har.settings import Settings
from lora_edge.methods import files
from lora_edge.methods.base import NotApplicableError
from lora_edge.methods.files import load_trained, save_trained, trained_state
from lora_edge.methods.parts.backbone import move_statistics
from lora_edge.methods.training import training_step
from lora_edge.nn.bn_statistics import STATISTICS, base_statistics
from lora_edge.nn.frozen_bn import FrozenNorm
from lora_edge.nn.reparametrised import added_tensors, reparametrised_layers
from lora_edge.surgery.base_state import fingerprint_state
from lora_edge.tools import deltas

BASE, SMALL = (11, 776), (4, 80)  # convolutions in a row and the terms of the largest, of T-ResNet and of networks.py
MAY_RISE: set[str] = {  # a small step against the gradient need not lower their loss
    *("one_bit", "one_bit_2", "one_bit_4", "one_bit_8"),  # the gradient goes straight through the rounding
    *("salt", "salt_linear"),  # they start at the kink of their penalty, a norm at zero
}
DRAWS_CHANNELS = {"paca"}  # a layer whose drawn input channels are all dead, as a ReLU leaves some, learns nothing
# networks of BUILD in which a method has nothing to train
NOT_FOR: dict[str, set[str]] = {name: {"2-D", "3-D"} for name in ("s2ft", "s2ft_columns", "s2ft_rows")}
AT_BASE = [name for name in REPARAMETRISED if METHODS[name].starts_at_base]
MERGING = [name for name in NAMES if METHODS[name].merges]


@pytest.fixture(scope="module")
def trained_base():
    return small_base()


@pytest.fixture
def base(trained_base):
    return copy.deepcopy(trained_base[0])


@pytest.fixture
def x(trained_base):
    return trained_base[1]


def moves_statistics(model):
    """Whether the prepared model's BatchNorm moves in training."""
    return any(isinstance(m, _BatchNorm) and not isinstance(m, FrozenNorm) for m in model.modules())


def test_every_file_is_found_once():
    assert sorted(NAMES) == NAMES
    assert {"conv_lora", "dora", "lora_c", "lora_c_factors", "lora_fa", "pissa"} <= set(REPARAMETRISED)
    assert {"bias_only", "head_only", "lora_edge", *MAY_RISE, *DRAWS_CHANNELS, *NOT_FOR} <= set(NAMES)
    assert len({m.title for m in METHODS.values()}) == len(NAMES)


def test_every_reparametrisation_names_its_paper():
    assert [name for name in REPARAMETRISED if not METHODS[name].source.startswith("arXiv ")] == []


@pytest.mark.parametrize("name", NAMES)
def test_starts_as_the_base_model_and_trains_as_many_as_the_formula_says(name, base, x):
    model, training = begun(base, name, x)
    assert training.count == expected_trainable(base, name)
    trained = training.model or model
    assert {id(p) for p in training.parameters} == {id(p) for p in trained.parameters() if p.requires_grad}
    if METHODS[name].starts_at_base:
        assert_near(output(model.eval(), x), output(base, x), *BASE)


@pytest.mark.parametrize("name", AT_BASE)
def test_starting_weight_is_the_base_weight(name, base, x):
    model, _ = prepared(base, name, x)
    modules = dict(base.named_modules())
    names = {m: n for n, m in model.named_modules()}
    assert reparametrised_layers(model)
    for conv in reparametrised_layers(model):
        torch.testing.assert_close(conv.weight, modules[names[conv]].weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_training_changes_the_returned_parameters_and_nothing_else(name, base, x):
    model, training = begun(base, name, x)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trained = (training.model or model).train()
    optimizer = training.optimizer(training.parameters, 1e-2)
    for step in (1, 2, 3):
        training_step(trained, training, optimizer, x, LABELS, step, 3)
    named = {key for key, p in model.named_parameters() if any(p is q for q in training.parameters)}
    if moves_statistics(model):
        named |= {key for key in before if key.rpartition(".")[2].startswith(("running_", "num_batches"))}
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == named or (name in DRAWS_CHANNELS and set() < changed < named)


@pytest.mark.parametrize("name", sorted(set(NAMES) - MAY_RISE))
def test_a_training_step_lowers_the_loss(name, base, x):
    model, training = begun(base, name, x)
    model.train()
    labels = torch.arange(8) % 3

    def loss():
        torch.manual_seed(0)  # of the methods that draw
        return training.loss(model, x, labels)

    first = loss()
    gradients = torch.autograd.grad(first, training.parameters)
    norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
    with torch.no_grad():
        for parameter, gradient in zip(training.parameters, gradients, strict=True):
            parameter -= 1e-3 * gradient / norm
        assert loss() < first


@pytest.mark.parametrize("name", MERGING)
def test_finish_gives_the_plain_model_with_the_adapted_output(name, base, x):
    model, parameters = prepared(base, name, x)
    train(model, x, parameters, steps=3)
    want = output(model.eval(), x)
    updates = deltas(model, base)
    assert METHODS[name].finish(model) is model
    assert [type(m) for m in model.modules()] == [type(m) for m in base.modules()]
    assert list(model.state_dict()) == list(base.state_dict())
    assert all(p.requires_grad for p in model.parameters())
    assert_near(output(model.eval(), x), want, *BASE)
    assert float((want - output(base, x)).abs().max()) > 1e-3
    merged = deltas(model, base)
    assert merged.keys() == updates.keys()
    for layer, update in updates.items():
        torch.testing.assert_close(merged[layer], update, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", REPARAMETRISED)
def test_in_training_mode_too_the_form_for_evaluation_is_merged(name, base, x):
    model, parameters = prepared(base, name, x)
    train(model, x, parameters, steps=2)
    want = output(model.eval(), x)
    assert_near(output(lora_edge.merge(model.train()).eval(), x), want, *BASE)


@pytest.mark.parametrize("name", REPARAMETRISED)
@pytest.mark.parametrize("kind", list(BUILD))
def test_networks_of_every_dimension_with_groups_and_shared_modules(kind, name):
    """Networks with 1-D, 2-D and 3-D kernels, groups, a depthwise layer, a module used twice, and conv biases."""
    base, x = network(kind)
    base.get_parameter(next(n for n, _ in base.named_parameters())).requires_grad_(False)
    if kind in NOT_FOR.get(name, ()):
        assert_refused(base, name, x, RANK, NotApplicableError, None)
        return
    model, training = begun(base, name, x)
    parameters = training.parameters
    assert training.count == expected_trainable(base, name)
    if METHODS[name].starts_at_base:
        assert_near(output(model.eval(), x), output(base, x), *SMALL)
    train(model, x, parameters)
    assert lora_edge.summary(model).parameters == sum(p.numel() for p in base.parameters())
    want = output(model.eval(), x)
    with lora_edge.disabled(model):
        assert torch.equal(output(model, x), output(base, x))
    assert torch.equal(output(model, x), want)
    assert lora_edge.merge(model) is model
    assert_near(output(model, x), want, *SMALL)
    assert list(model.state_dict()) == list(base.state_dict())
    assert [type(m) for m in model.modules()] == [type(m) for m in base.modules()]
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in base.parameters()]
    with pytest.raises(RuntimeError, match="not adapted"):
        lora_edge.merge(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", REPARAMETRISED)
def test_merged_in_float32_with_one_cast(name, dtype, base, x):
    """A half-precision weight and the update of its float32 factors are added in float32 and rounded once."""
    base, x = base.to(dtype), x.to(dtype)
    model, parameters = prepared(base, name, x)
    for parameter in parameters:
        assert parameter.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        with torch.no_grad():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.eval()
    names = {m: n for n, m in model.named_modules()}
    exact = {}
    for conv, made in reparametrised_layers(model).items():
        weight = conv.parametrizations.weight.original
        exact[names[conv]] = made.adapted(weight.to(torch.promote_types(dtype, torch.float32))).to(dtype)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(conv.weight, exact[names[conv]])
    lora_edge.merge(model)
    for layer, want in exact.items():
        conv = model.get_submodule(layer)
        assert list(conv._parameters) == ["weight", "bias"]
        assert torch.equal(conv.weight, want)
    assert any(not torch.equal(model.get_submodule(layer).weight, base.get_submodule(layer).weight) for layer in exact)


@pytest.mark.parametrize("name", REPARAMETRISED)
def test_copies_are_finished_one_by_one(name, base, x):
    """A copy has tensors of its own, shared among its layers as in the original."""
    model, parameters = prepared(base, name, x)
    train(model, x, parameters, steps=1)
    want = output(model.eval(), x)
    twin = copy.deepcopy(model)
    assert not {id(t) for _, t in added_tensors(twin)} & {id(t) for _, t in added_tensors(model)}
    assert sum(p.numel() for p in twin.parameters()) == sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        for parameter in parameters:
            parameter.zero_()
    assert torch.equal(output(twin, x), want)
    assert_near(output(lora_edge.merge(twin), x), want, *BASE)
    lora_edge.merge(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in twin.modules()] == [type(m) for m in base.modules()]


def test_layers_that_share_a_weight_get_a_merged_weight_each():
    model = nn.Sequential(nn.Conv1d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv1d(4, 4, 3, padding=1))
    model[2].weight = model[0].weight
    x = torch.randn(2, 4, 9)
    train(model, x, METHODS["conv_lora"].prepare(model, 2, x, LABELS))
    want = output(model, x)
    torch.testing.assert_close(output(lora_edge.merge(model), x), want)
    assert model[2].weight is not model[0].weight


def test_other_computed_weights_are_left_alone():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3)))
    METHODS["conv_lora"].prepare(model, 2, torch.empty(0), LABELS)
    assert list(reparametrised_layers(model)) == [model[0]]
    lora_edge.merge(model)
    assert type(model[0]) is nn.Conv2d
    assert nn.utils.parametrize.is_parametrized(model[1], "weight")


@pytest.mark.parametrize(("count", "read"), [(1, [0]), (64, range(64)), (127, range(0, 127, 2))])
def test_statistics_move_by_one_batch_spread_over_the_windows(base, count, read):
    windows = torch.randn(count, 6, 50)
    moved, expected = copy.deepcopy(base), copy.deepcopy(base)
    move_statistics(moved, windows)
    lora_edge.calibrate_bn(expected, [windows[list(read)]], source_samples=16)
    for name, value in expected.state_dict().items():
        assert torch.equal(moved.state_dict()[name], value), name


@pytest.mark.parametrize("name", REPARAMETRISED)
def test_the_seed_governs_the_random_start(name, base, x):
    starts = []
    for _ in range(2):
        torch.manual_seed(5)
        starts.append([value.clone() for _, value in added_tensors(prepared(base, name, x)[0])])
    assert all(torch.equal(a, b) for a, b in zip(*starts, strict=True))


def test_bias_only_trains_every_bias_there_is(base):
    """BatchNorm's shifts and the head's bias; T-ResNet's convolutions have none and get none."""
    METHODS["bias_only"].prepare(base, RANK, torch.empty(0), LABELS)
    trained = {name for name, p in base.named_parameters() if p.requires_grad}
    norms = {name for name, m in base.named_modules() if isinstance(m, _BatchNorm)}
    assert trained == {f"{name}.bias" for name in norms} | {"head.bias"}
    with pytest.raises(ValueError, match="bias only: the model has no bias"):
        METHODS["bias_only"].prepare(nn.Conv1d(2, 2, 3, bias=False), RANK, torch.empty(0), LABELS)


def assert_refused(model, name, x, rank, error, text):
    """Assert that a method refuses the model in one line and leaves it as it was."""
    before = fingerprint_state(model.state_dict())
    kinds, trained = [type(m) for m in model.modules()], [p.requires_grad for p in model.parameters()]
    with pytest.raises(error, match=text) as caught:
        METHODS[name].begin(model, rank, x, LABELS[: len(x)])
    assert "\n" not in str(caught.value)
    assert fingerprint_state(model.state_dict()) == before
    assert [type(m) for m in model.modules()] == kinds
    assert [p.requires_grad for p in model.parameters()] == trained


@pytest.mark.parametrize("name", REPARAMETRISED)
def test_refuses_by_name_and_changes_nothing(name, base, x):
    assert_refused(base, name, x, 0, ValueError, "rank is 0; give an integer of at least 1")
    assert_refused(base, name, x, True, TypeError, "rank is True, a bool")
    assert_refused(nn.Linear(2, 2), name, x, 2, ValueError, "the model has no nn.Conv1d, nn.Conv2d or nn.Conv3d")
    with torch.no_grad():
        base.block3.conv2.weight[0, 0, 0] = math.nan
    assert_refused(base, name, x, 2, ValueError, r"block3\.conv2: the weight holds NaN or Inf")


def test_an_adapted_model_is_refused(base, x):
    model, _ = prepared(base, "conv_lora", x)
    for again in ("conv_lora", "lora_edge"):
        with pytest.raises(RuntimeError, match="the model is already adapted"):
            METHODS[again].prepare(model, 2, x, LABELS)
    with pytest.raises(RuntimeError, match=r"another method than LoRA-Edge; use lora_edge\.methods\.files\.save_trained"):
        lora_edge.save_adapter(model, "unused")


@pytest.mark.parametrize("name", NAMES)
def test_trained_tensors_are_saved_and_loaded(name, base, x, tmp_path):
    """Everything that a method added or moved is in the file, once."""
    path = tmp_path / "trained.safetensors"
    model, parameters = prepared(base, name, x)
    train(model, x, parameters, steps=2)
    save_trained(model, path)
    saved = trained_state(model)
    whole = model.state_dict(keep_vars=True)
    own = {id(p): p.numel() for p in parameters} | {id(t): t.numel() for _, t in added_tensors(model)}
    own |= {id(whole[key]): whole[key].numel() for key in whole if key.endswith((".core", ".suffix"))}
    moved = moves_statistics(model) or any(base_statistics(module) for module in model.modules())
    if moved:
        statistics = [key for key in whole if key.rpartition(".")[2] in STATISTICS]
        own |= {id(whole[key]): whole[key].numel() for key in statistics}
    assert sum(v.numel() for v in saved.values()) == sum(own.values())
    torch.manual_seed(7)
    fresh, _ = prepared(base, name, x)
    assert load_trained(fresh, path) is fresh
    assert torch.equal(output(fresh.eval(), x), output(model.eval(), x))


def test_a_file_that_repeats_a_shared_tensor_is_loaded(tmp_path):
    """As files were written before 30 November 2026."""
    base, x = network("2-D")
    model, parameters = prepared(base, "conv_lora", x)
    train(model, x, parameters)
    path = tmp_path / "trained.safetensors"
    repeated = {name: value for name, value in model.state_dict().items() if "parametrizations.weight.0." in name}
    once = trained_state(model)
    assert len(repeated) > len(once)
    metadata = {"format": files.FORMAT, "base": files._base(model, repeated.keys()), "checksum": fingerprint_state(repeated)}
    write_safetensors(repeated, path, metadata)
    torch.manual_seed(7)
    fresh, _ = prepared(base, "conv_lora", x)
    load_trained(fresh, path)
    assert torch.equal(output(fresh.eval(), x), output(model.eval(), x))


def test_a_wrong_file_is_refused_and_changes_nothing(base, x, tmp_path):
    path = tmp_path / "trained.safetensors"
    model, parameters = prepared(base, "conv_lora", x)
    train(model, x, parameters, steps=1)
    save_trained(model, path)
    damaged = bytearray(path.read_bytes())
    damaged[-5] ^= 1
    (tmp_path / "damaged").write_bytes(damaged)
    (tmp_path / "half").write_bytes(damaged[:100])
    lora_edge.save_adapter(prepared(base, "lora_edge", x)[0], tmp_path / "adapter")
    other = copy.deepcopy(base)
    with torch.no_grad():
        other.block1.conv1.weight[0, 0, 0] += 1
    for start, method, rank, file, error, text in (
        (base, "conv_lora", 3, path, ValueError, r"lora_A is \(2, 6, 8\) in the file and \(3, 6, 8\) in the model"),
        (base, "bias_only", 2, path, ValueError, "in the file and .* in the model; prepare by the same method"),
        (other, "conv_lora", 2, path, ValueError, "belongs to another base model"),
        (base, "conv_lora", 2, tmp_path / "damaged", ValueError, "damaged"),
        (base, "conv_lora", 2, tmp_path / "half", ValueError, "not a safetensors file, or damaged"),
        (base, "conv_lora", 2, tmp_path / "adapter", ValueError, "not written by save_trained"),
        (base, "conv_lora", 2, tmp_path / "none", FileNotFoundError, "no such file"),
    ):
        fresh, _ = prepared(start, method, x, rank)
        before = fingerprint_state(fresh.state_dict())
        with pytest.raises(error, match=text) as caught:
            load_trained(fresh, file)
        assert "\n" not in str(caught.value)
        assert fingerprint_state(fresh.state_dict()) == before


@pytest.mark.parametrize("name", NAMES)
def test_the_main_job_runs_every_method(name, tmp_path):
    task = split(load_npz(own(tmp_path / "own.npz")), 1)
    settings = Settings(data="own.npz", target_subject=1, out=tmp_path, steps=2)
    base = TResNet(4, 3)
    row = adapt_by(METHODS[name], base, task, settings, lambda *_: None)
    assert row.trainable == expected_trainable(base, name)
    assert row.saved_bytes > 0
    assert 0 <= row.f1 == row.curve.f1[-1]


def test_preparing_and_finishing_are_silent(base, x):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in REPARAMETRISED:
            model, _ = prepared(base, name, x)
            METHODS[name].finish(model)
