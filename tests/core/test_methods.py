"""Every method of lora_edge.methods: its start, what it trains, its result, its file; LoRA methods against peft and loralib."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

import lora_edge
from helpers.networks import BUILD, network, output, train
from helpers.tolerances import assert_near
from helpers.windows import own
from lora_edge.har.data import load_npz, split
from lora_edge.har.main_job import adapt_by
from lora_edge.har.models import TResNet
from lora_edge.har.settings import Settings
from lora_edge.methods import methods
from lora_edge.methods.base import move_statistics, trained_state
from lora_edge.methods.conv_lora import ConvLoRA
from lora_edge.methods.dora import DoRA
from lora_edge.methods.files import load_trained, save_trained
from lora_edge.methods.lora_c import LoRAC
from lora_edge.methods.lora_c_factors import LoRACFactors
from lora_edge.methods.lora_fa import LoRAFA
from lora_edge.methods.pissa import PiSSA
from lora_edge.nn.bn_statistics import base_statistics
from lora_edge.nn.reparametrised import reparametrise, reparametrised_layers
from lora_edge.surgery.base_state import fingerprint_state

RANK = 2
BASE, SMALL = (11, 776), (4, 80)  # convolutions in a row and the terms of the largest, of T-ResNet and of networks.py
LABELS = torch.arange(8) % 2
METHODS = methods()
NAMES = list(METHODS)
TURNED = "_turned"  # in the name of a method that is another one on turned axes
BATCH_BN = {"full", "target_only", "bn_only", "lora_edge_batch_bn"}  # their statistics move in training
BATCH_BN |= {name for name in NAMES if name.removesuffix(TURNED) in BATCH_BN}
ON_THE_SOURCES_BN = {"lora_edge_paper", "lora_edge_source_bn"}  # the others may leave it at the start
OTHER_START = {
    "target_only",
    "full_frozen_bn",
    *(name for name in NAMES if name.startswith("lora_edge")),
} - ON_THE_SOURCES_BN  # than the base


def _reparametrises(name):
    model = nn.Sequential(nn.Conv1d(4, 4, 3), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(8, 2))
    METHODS[name].prepare(model, 1, torch.randn(2, 4, 4), LABELS[:2])
    return bool(reparametrised_layers(model))


REPARAMETRISED = [name for name in NAMES if not name.endswith(TURNED) and _reparametrises(name)]


def _elements(out, into, kernel, groups):
    """The number of elements that each reparametrisation trains in one convolution, from the papers' shapes."""
    *leading, last = kernel
    lora = RANK * (into // groups * math.prod(kernel) + out)
    return {
        "conv_lora": lora,
        "dora": lora + out,
        "lora_c": RANK * last * (into * last + out // groups * math.prod(leading)),
        "lora_c_factors": RANK * (into // groups * last + out * math.prod(leading)),
        "lora_fa": RANK * out,
        "pissa": lora,
        **dict.fromkeys([name for name in NAMES if name.startswith("lora_edge")], RANK * out),
    }


def expected_trainable(model, name):
    """The number of elements that a method trains at rank 2, for a model whose weights attain that rank."""
    maps = sum(m.num_features for m in model.modules() if isinstance(m, _BatchNorm))
    head = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    counts = {
        **dict.fromkeys(["full", "target_only"], sum(p.numel() for p in model.parameters())),
        "head_only": (head.in_features + 1) * head.out_features,
        "full_frozen_bn": sum(p.numel() for p in model.parameters()) - 2 * maps,
        "bn_only": 2 * maps,
        "bias_only": sum(m.bias.numel() for m in model.modules() if getattr(m, "bias", None) is not None),
    }
    name = name.removesuffix(TURNED)
    if name in counts:
        return counts[name]
    convs = [m for m in model.modules() if isinstance(m, _ConvNd)]
    return sum(_elements(m.out_channels, m.in_channels, m.kernel_size, m.groups)[name] for m in convs)


@pytest.fixture(scope="module")
def trained_base():
    """A small T-ResNet whose BatchNorm is not at its initial values, and a batch."""
    torch.manual_seed(1)
    base, x = TResNet(6, 3), torch.randn(8, 6, 40)
    with torch.no_grad():
        for norm in base.modules():
            if isinstance(norm, _BatchNorm):
                norm.weight.uniform_(0.5, 1.5)
                norm.bias.normal_()
    for _ in range(3):
        base.train()(torch.randn(8, 6, 40))
    return base.eval(), x


@pytest.fixture
def base(trained_base):
    return copy.deepcopy(trained_base[0])


@pytest.fixture
def x(trained_base):
    return trained_base[1]


def prepared(base, name, x, rank=RANK):
    model = copy.deepcopy(base)
    return model, METHODS[name].prepare(model, rank, x, LABELS)


def test_every_file_is_found_once():
    assert sorted(NAMES) == NAMES
    assert {"conv_lora", "dora", "lora_c", "lora_c_factors", "lora_fa", "pissa"} <= set(REPARAMETRISED)
    assert set(REPARAMETRISED) | BATCH_BN | OTHER_START | {"bias_only", "head_only", "lora_edge"} <= set(NAMES)
    assert len({m.title for m in METHODS.values()}) == len(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_starts_as_the_base_model_and_trains_as_many_as_the_formula_says(name, base, x):
    model, parameters = prepared(base, name, x)
    assert sum(p.numel() for p in parameters) == expected_trainable(base, name)
    assert {id(p) for p in parameters} == {id(p) for p in model.parameters() if p.requires_grad}
    if name not in OTHER_START:
        assert_near(output(model.eval(), x), output(base, x), *BASE)


@pytest.mark.parametrize("name", REPARAMETRISED)
def test_starting_weight_is_the_base_weight(name, base, x):
    model, _ = prepared(base, name, x)
    pairs = list(zip(reparametrised_layers(model), (m for m in base.modules() if isinstance(m, _ConvNd)), strict=True))
    assert len(pairs) == 11
    for conv, stock in pairs:
        if name == "dora":  # m / ‖W‖ · W rounds
            torch.testing.assert_close(conv.weight, stock.weight, rtol=1e-6, atol=0)
        else:
            assert torch.equal(conv.weight, stock.weight)


@pytest.mark.parametrize("name", NAMES)
def test_training_changes_the_returned_parameters_and_nothing_else(name, base, x):
    model, parameters = prepared(base, name, x)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    train(model, x, parameters, steps=3)
    named = {key for key, p in model.named_parameters() if any(p is q for q in parameters)}
    if name in BATCH_BN:
        named |= {key for key in before if key.rpartition(".")[2].startswith(("running_", "num_batches"))}
    assert {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])} == named


@pytest.mark.parametrize("name", NAMES)
def test_a_training_step_lowers_the_loss(name, base, x):
    model, parameters = prepared(base, name, x)
    model.train()
    labels = torch.arange(8) % 3

    def loss():
        return nn.functional.cross_entropy(model(x), labels)

    first = loss()
    gradients = torch.autograd.grad(first, parameters)
    norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter -= 1e-3 * gradient / norm
        assert loss() < first


@pytest.mark.parametrize("name", NAMES)
def test_finish_gives_the_plain_model_with_the_adapted_output(name, base, x):
    model, parameters = prepared(base, name, x)
    train(model, x, parameters, steps=3)
    want = output(model.eval(), x)
    assert METHODS[name].finish(model) is model
    assert [type(m) for m in model.modules()] == [type(m) for m in base.modules()]
    assert list(model.state_dict()) == list(base.state_dict())
    assert all(p.requires_grad for p in model.parameters())
    assert_near(output(model.eval(), x), want, *BASE)
    assert float((want - output(base, x)).abs().max()) > 1e-3


@pytest.mark.parametrize("name", REPARAMETRISED)
@pytest.mark.parametrize("kind", list(BUILD))
def test_networks_of_every_dimension_with_groups_and_shared_modules(kind, name):
    """Networks with 1-D, 2-D and 3-D kernels, groups, a depthwise layer, a module used twice, and conv biases."""
    base, x = network(kind)
    base.get_parameter(next(n for n, _ in base.named_parameters())).requires_grad_(False)
    model, parameters = prepared(base, name, x)
    convs = [m for m in base.modules() if isinstance(m, _ConvNd)]
    assert sum(p.numel() for p in parameters) == sum(
        _elements(m.out_channels, m.in_channels, m.kernel_size, m.groups)[name] for m in convs
    )
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
def test_merged_in_float32_with_one_cast(name, dtype):
    """A half-precision weight and the update of its float32 factors are added in float32 and rounded once."""
    conv = nn.Conv2d(4, 6, 3, dtype=dtype)
    weight = conv.weight.detach().clone()
    for parameter in METHODS[name].prepare(conv, RANK, torch.empty(0), LABELS):
        assert parameter.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        with torch.no_grad():
            parameter.add_(0.1 * torch.randn_like(parameter))
    exact = conv.parametrizations.weight[0].adapted(weight.to(torch.promote_types(dtype, torch.float32)))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(conv.weight, exact.to(dtype))
    lora_edge.merge(conv)
    assert type(conv) is nn.Conv2d
    assert list(conv._parameters) == ["weight", "bias"]
    assert torch.equal(conv.weight, exact.to(dtype))
    assert not torch.equal(conv.weight, weight)


@pytest.mark.parametrize("name", REPARAMETRISED)
def test_copies_are_finished_one_by_one(name, base, x):
    model, parameters = prepared(base, name, x)
    train(model, x, parameters, steps=1)
    want = output(model.eval(), x)
    twin = copy.deepcopy(model)
    for either in (model, twin):
        assert_near(output(lora_edge.merge(either), x), want, *BASE)


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


@pytest.mark.parametrize("name", sorted(set(REPARAMETRISED) - {"pissa"}))
def test_the_seed_governs_the_random_start(name, base, x):
    starts = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        model, _ = prepared(base, name, x)
        starts.append(torch.cat([kind.lora_A.detach().flatten() for kind in reparametrised_layers(model).values()]))
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


def test_bias_only_trains_every_bias_there_is(base):
    """BatchNorm's shifts and the head's bias; T-ResNet's convolutions have none and get none."""
    METHODS["bias_only"].prepare(base, RANK, torch.empty(0), LABELS)
    trained = {name for name, p in base.named_parameters() if p.requires_grad}
    norms = {name for name, m in base.named_modules() if isinstance(m, _BatchNorm)}
    assert trained == {f"{name}.bias" for name in norms} | {"head.bias"}
    with pytest.raises(ValueError, match="bias only: the model has no bias"):
        METHODS["bias_only"].prepare(nn.Conv1d(2, 2, 3, bias=False), RANK, torch.empty(0), LABELS)


def test_dora_keeps_a_dead_channel_dead():
    conv = nn.Conv1d(3, 4, 3, bias=False)
    with torch.no_grad():
        conv.weight[1] = 0.0
    x = torch.randn(2, 3, 9)
    parameters = METHODS["dora"].prepare(conv, RANK, x, LABELS)
    train(conv, x, parameters)
    assert all(bool(torch.isfinite(p).all()) for p in parameters)
    assert bool(torch.isfinite(conv.weight).all())


def test_pissas_rank_is_at_most_the_rank_of_the_weight():
    conv = nn.Conv1d(2, 6, 2)
    made = PiSSA(conv, 50)
    assert made.lora_B.shape == (6, 4)
    torch.testing.assert_close((made.lora_B @ made.lora_A.flatten(1)).view(conv.weight.shape), conv.weight)
    assert not made.delta().count_nonzero()


@pytest.mark.parametrize("name", REPARAMETRISED)
def test_refuses_by_name_and_changes_nothing(name, base, x):
    def refused(model, rank, error, text):
        before = fingerprint_state(model.state_dict())
        kinds = [type(m) for m in model.modules()]
        with pytest.raises(error, match=text) as caught:
            METHODS[name].prepare(model, rank, x, LABELS)
        assert "\n" not in str(caught.value)
        assert fingerprint_state(model.state_dict()) == before
        assert [type(m) for m in model.modules()] == kinds
        assert all(p.requires_grad for p in model.parameters())

    refused(base, 0, ValueError, "rank is 0; give an integer of at least 1")
    refused(base, True, TypeError, "rank is True, a bool")
    refused(nn.Linear(2, 2), 2, ValueError, "the model has no nn.Conv1d, nn.Conv2d or nn.Conv3d")
    with torch.no_grad():
        base.block3.conv2.weight[0, 0, 0] = math.nan
    refused(base, 2, ValueError, r"block3\.conv2: the weight holds NaN or Inf")


def test_an_adapted_model_is_refused(base, x):
    model, _ = prepared(base, "conv_lora", x)
    for again in ("conv_lora", "lora_edge"):
        with pytest.raises(RuntimeError, match="the model is already adapted"):
            METHODS[again].prepare(model, 2, x, LABELS)
    with pytest.raises(RuntimeError, match=r"another method than LoRA-Edge; use lora_edge\.methods\.files\.save_trained"):
        lora_edge.save_adapter(model, "unused")


@pytest.mark.parametrize("name", NAMES)
def test_trained_tensors_are_saved_and_loaded(name, base, x, tmp_path):
    path = tmp_path / "trained.safetensors"
    model, parameters = prepared(base, name, x)
    train(model, x, parameters, steps=2)
    save_trained(model, path)
    added = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in base.parameters())
    factors = sum(v.numel() for v in trained_state(model).values() if v.is_floating_point())
    moved = name in BATCH_BN or any(base_statistics(module) for module in model.modules())
    statistics = expected_trainable(base, "bn_only") if moved else 0
    doubled = 2 if name == "pissa" else 1  # with the start of its factors
    assert factors == statistics + doubled * (added if added else sum(p.numel() for p in parameters))
    torch.manual_seed(7)
    fresh, _ = prepared(base, name, x)
    assert load_trained(fresh, path) is fresh
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


CONVS = {
    "1-D": (lambda: nn.Conv1d(6, 12, 5, stride=2, padding=2), (4, 6, 21)),
    "2-D": (lambda: nn.Conv2d(6, 12, (3, 5), padding=(1, 2)), (4, 6, 9, 8)),
    "2-D stride": (lambda: nn.Conv2d(6, 12, 3, stride=2, padding=1, bias=False), (4, 6, 9, 8)),
    "3-D": (lambda: nn.Conv3d(3, 8, 3, padding=1), (2, 3, 5, 6, 4)),
}


def peft_layer(layer, **options):
    """Wrap the layer in peft's LoRA at rank 2 and alpha 3; return both."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=RANK, lora_alpha=3, target_modules=["layer"], lora_dropout=0.0, **options)
    model = nn.Sequential()
    model.add_module("layer", copy.deepcopy(layer))
    oracle = peft.get_peft_model(model, config)
    return oracle, next(m for m in oracle.modules() if hasattr(m, "lora_A"))


def ours(conv, kind):
    """Reparametrise the convolution at rank 2 and alpha 3 and train it a little, since every update starts at zero."""
    conv = copy.deepcopy(conv).requires_grad_(False)
    reparametrise(conv, kind(conv, RANK, alpha=3.0))
    made = conv.parametrizations.weight[0]
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return conv, made


def assert_same(layer, oracle, x, pairs):
    """Assert that outputs, input gradients and the gradients of ``pairs`` of parameters agree with those of ``oracle(x)``."""
    x_ours, x_theirs = (x.clone().requires_grad_() for _ in range(2))
    y, want = layer(x_ours), oracle(x_theirs)
    dy = torch.randn_like(y)
    y.backward(dy)
    want.backward(dy)
    checked = [(y, want), (x_ours.grad, x_theirs.grad)]
    checked += [(mine.grad, theirs.grad.view(mine.shape)) for mine, theirs in pairs]
    for got, expected in checked:
        assert float((got - expected).detach().norm() / expected.detach().norm()) <= 1e-5


def assert_pefts_conv_lora(name, kind):
    """Assert that the layer agrees with PEFT's at the same factors; ``lora_A`` is trained or frozen in both."""
    make, shape = CONVS[name]
    conv = make()
    oracle, theirs = peft_layer(conv)
    layer, mine = ours(conv, kind)
    a, b = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    a.requires_grad_(mine.lora_A.requires_grad)
    with torch.no_grad():
        a.copy_(mine.lora_A)
        b.copy_(mine.lora_B.view(b.shape))
    trained = [(mine.lora_A, a)] if a.requires_grad else []
    assert_same(layer, oracle, torch.randn(shape), [*trained, (mine.lora_B, b)])
    return mine


@pytest.mark.parametrize("name", list(CONVS))
def test_conv_lora_agrees_with_peft(name):
    assert assert_pefts_conv_lora(name, ConvLoRA).lora_A.grad is not None


@pytest.mark.parametrize("name", list(CONVS))
def test_conv_lora_starts_as_in_peft(name):
    """With the same seed, both draw the same random ``A``."""
    conv = CONVS[name][0]()
    _, theirs = peft_layer(conv)
    torch.manual_seed(3)
    theirs.reset_lora_parameters("default", init_lora_weights=True)
    torch.manual_seed(3)
    assert torch.equal(ConvLoRA(conv, RANK).lora_A, theirs.lora_A["default"].weight)


@pytest.mark.parametrize("name", list(CONVS))
def test_lora_fa_agrees_with_peft_where_a_is_frozen(name):
    assert assert_pefts_conv_lora(name, LoRAFA).lora_A.grad is None


@pytest.mark.parametrize("name", list(CONVS))
def test_dora_agrees_with_peft(name):
    make, shape = CONVS[name]
    conv = make()
    oracle, theirs = peft_layer(conv, use_dora=True)
    start = DoRA(conv, RANK)
    magnitude = theirs.lora_magnitude_vector["default"].weight
    torch.testing.assert_close(start.magnitude, magnitude.flatten())
    layer, mine = ours(conv, DoRA)
    a, b = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    with torch.no_grad():
        a.copy_(mine.lora_A)
        b.copy_(mine.lora_B.view(b.shape))
        magnitude.copy_(mine.magnitude.view(magnitude.shape))
    pairs = [(mine.lora_A, a), (mine.lora_B, b), (mine.magnitude, magnitude)]
    assert_same(layer, oracle, torch.randn(shape), pairs)


@pytest.mark.parametrize("name", ["1-D", "2-D", "2-D stride"])
def test_pissa_agrees_with_peft_on_the_unfolded_convolution(name):
    """peft has PiSSA only for linear layers; a convolution is a linear layer on its unfolded input."""
    make, shape = CONVS[name]
    conv = make()
    linear = nn.Linear(conv.weight[0].numel(), conv.out_channels, bias=conv.bias is not None)
    linear.weight = nn.Parameter(conv.weight.detach().flatten(1).clone())
    if conv.bias is not None:
        linear.bias = conv.bias
    oracle, theirs = peft_layer(linear, init_lora_weights="pissa")
    a, b = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    start = PiSSA(conv, RANK, alpha=3.0)
    values = torch.linalg.svdvals(conv.weight.detach().flatten(1).double())
    turned = torch.finfo(a.dtype).eps * linear.in_features**0.5 * float(values[0] / (values[RANK - 1] - values[RANK]))
    rounding = 4 * turned * float(values[0])  # rounding turns singular vectors by its size over the gap between their values
    torch.testing.assert_close(start.lora_B @ start.lora_A.flatten(1), b @ a, rtol=0, atol=rounding)
    torch.testing.assert_close(start.lora_A.square().sum(), a.square().sum())  # halves of equal weight
    layer, mine = ours(conv, PiSSA)
    with torch.no_grad():
        a.copy_(mine.lora_A.flatten(1))
        b.copy_(mine.lora_B)
    kernel, stride, padding = (
        [1] * (2 - len(t)) + list(t) if i < 2 else [0] * (2 - len(t)) + list(t)
        for i, t in enumerate((conv.kernel_size, conv.stride, conv.padding))
    )

    def unfolded(x):
        image = x if x.dim() == 4 else x.unsqueeze(2)
        columns = nn.functional.unfold(image, kernel, stride=stride, padding=padding)
        return oracle(columns.transpose(1, 2)).transpose(1, 2).reshape(conv(x).shape)

    assert_same(layer, unfolded, torch.randn(shape), [(mine.lora_A, a), (mine.lora_B, b)])


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kernel", [1, 3])
def test_lora_c_agrees_with_loralib(kernel, groups):
    loralib = pytest.importorskip("loralib")
    oracle = loralib.Conv2d(6, 8, kernel, r=RANK, lora_alpha=3, merge_weights=False, padding=1, groups=groups)
    start = LoRAC(oracle.conv, RANK)
    assert start.lora_A.shape == oracle.lora_A.shape
    assert start.lora_B.shape == oracle.lora_B.shape
    layer, mine = ours(oracle.conv, LoRAC)
    with torch.no_grad():
        oracle.lora_A.copy_(mine.lora_A)
        oracle.lora_B.copy_(mine.lora_B)
    pairs = [(mine.lora_A, oracle.lora_A), (mine.lora_B, oracle.lora_B)]
    assert_same(layer, oracle, torch.randn(3, 6, 9, 8), pairs)


@pytest.mark.parametrize(
    ("conv", "a", "b"),
    [
        (nn.Conv2d(6, 8, 3), (6, 18), (24, 6)),  # loralib's own: (r·K, I·K) and (O·K, r·K)
        (nn.Conv1d(6, 8, 5), (10, 30), (8, 10)),
        (nn.Conv1d(6, 8, 5, groups=2), (10, 30), (4, 10)),
        (nn.Conv2d(6, 8, (3, 5), groups=2), (10, 30), (12, 10)),
        (nn.Conv3d(4, 6, 3), (6, 12), (54, 6)),
    ],
)
def test_lora_c_by_its_formula(conv, a, b):
    layer, mine = ours(conv, LoRAC)
    assert (mine.lora_A.shape, mine.lora_B.shape) == (a, b)
    want = conv.weight + 3 / RANK * (mine.lora_B @ mine.lora_A).view(conv.weight.shape)
    torch.testing.assert_close(layer.weight, want)


@pytest.mark.parametrize("groups", [1, 2])
def test_lora_c_factors_by_its_formula(groups):
    for conv, formula in (
        (nn.Conv1d(6, 8, 5, groups=groups), "ohq,qiw->oiw"),
        (nn.Conv2d(6, 8, (3, 5), groups=groups), "ohq,qiw->oihw"),
        (nn.Conv3d(6, 8, (2, 3, 5), groups=groups), "odhq,qiw->oidhw"),
    ):
        layer, mine = ours(conv, LoRACFactors)
        want = conv.weight + 3 / RANK * torch.einsum(formula, mine.lora_B, mine.lora_A)
        torch.testing.assert_close(layer.weight, want)


def test_lora_c_factors_in_one_dimension_is_conv_lora():
    conv = nn.Conv1d(6, 8, 5)
    layer, mine = ours(conv, LoRACFactors)
    twin, other = ours(conv, ConvLoRA)
    with torch.no_grad():
        other.lora_A.copy_(mine.lora_A)
        other.lora_B.copy_(mine.lora_B.squeeze(1))
    torch.testing.assert_close(layer.weight, twin.weight)


def test_preparing_and_finishing_are_silent(base, x):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in REPARAMETRISED:
            model, _ = prepared(base, name, x)
            METHODS[name].finish(model)
