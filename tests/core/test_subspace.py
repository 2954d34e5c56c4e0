"""Subspaces of the inputs and of the gradient: the right directions, and a model that is left untouched."""

from __future__ import annotations

import copy
import itertools
import random
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_edge
from helpers.networks import BUILD, network, output, train
from helpers.snapshots import assert_same, snapshot
from helpers.tolerances import assert_near
from lora_edge.har.models import TResNet
from lora_edge.subspaces.gradient import captured_energies, leading_gradients
from lora_edge.subspaces.inputs import leading_inputs
from lora_edge.subspaces.samples import MOST_BATCHES, few_samples
from lora_edge.subspaces.weight import gradient_suffix, suffix_along, weight_suffix
from lora_edge.surgery.adapted import adapted_layers
from lora_edge.tt import contract_suffix

CPU = torch.device("cpu")
NAMES = list(BUILD)


def task(name: str, dtype: torch.dtype = torch.float64):
    """A network, 24 labelled inputs, and the dense gradient of each convolution by plain autograd."""
    model, x = network(name)
    model = model.to(dtype)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(24, *x.shape[1:], generator=generator).to(dtype)
    y = torch.randint(3, (24,), generator=generator)
    return model, x, y, dense_gradients(model, x, y)


def dense_gradients(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    model = copy.deepcopy(model).eval().requires_grad_(True)
    F.cross_entropy(model(x), y).backward()
    return {name: module.weight.grad for name, module in model.named_modules() if isinstance(module, nn.modules.conv._ConvNd)}


def right_directions(matrix: Tensor, rank: int) -> Tensor:
    return torch.linalg.svd(matrix.flatten(1).double(), full_matrices=False).Vh[:rank]


def largest_angle(a: Tensor, b: Tensor) -> float:
    """Sine of the largest principal angle between the spans of orthonormal rows."""
    return float(torch.linalg.matrix_norm(b - (b @ a.T) @ a, 2))


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize(
    "name", NAMES
)  # 1-D with an even kernel; 2-D has groups, depthwise, strides and a layer used twice; 3-D
def test_directions_are_those_of_the_dense_gradient(name, rank):
    model, x, y, dense = task(name)
    found = leading_gradients(model, list(dense), rank, few_samples([(x, y)], CPU))
    for layer, gradient in dense.items():
        assert found[layer].shape[1:] == gradient.shape[1:]
        angle = largest_angle(right_directions(gradient, rank), right_directions(found[layer], rank))
        assert angle <= 1e-8, layer
        want = torch.linalg.svdvals(gradient.flatten(1))[:rank]
        torch.testing.assert_close(torch.linalg.svdvals(found[layer].flatten(1))[:rank], want)


def test_a_wide_layer_whose_gradient_has_a_low_rank():
    """The sketch has 48 rows and the layer 96 channels; after the mean, with five classes, the gradient's rank is 4."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(40, 96, 5), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(96, 5)).double()
    x, y = torch.randn(32, 40, 20).double(), torch.randint(5, (32,))
    gradient = dense_gradients(model, x, y)["0"]
    found = leading_gradients(model, ["0"], 4, few_samples([(x, y)], CPU))["0"]
    assert found.shape == (48, 40, 5)
    assert largest_angle(right_directions(gradient, 4), right_directions(found, 4)) <= 1e-8


@pytest.mark.parametrize("rank", [1, 2, 4, 16])
def test_the_sketch_of_a_wide_layer_captures_the_energy_of_the_gradient(rank):
    """T-ResNet's layers have up to 128 channels and the sketch 48 rows. Random inputs: the spectra fall slowly."""
    torch.manual_seed(0)
    model = TResNet(20, 7).double()
    x, y = torch.randn(32, 20, 40).double(), torch.randint(7, (32,))
    dense = dense_gradients(model, x, y)
    found = leading_gradients(model, list(dense), rank, few_samples([(x, y)], CPU))
    for name, gradient in dense.items():
        matrix = gradient.flatten(1)
        caught = (matrix @ right_directions(found[name], rank).T).square().sum()
        most = (matrix @ right_directions(gradient, rank).T).square().sum()
        assert caught >= 0.9 * most, name
        energy = float(found[name].square().sum() / matrix.square().sum())
        assert abs(energy - 1) <= (1e-9 if len(found[name]) == len(matrix) else 0.5), name


@pytest.mark.parametrize("name", NAMES)
def test_full_rank_spans_the_whole_gradient(name):
    model, x, y, dense = task(name)
    lora_edge.adapt(model, 64, subspace="gradient", batches=[(x, y)])
    for layer_name, layer in adapted_layers(model).items():
        rows = torch.linalg.qr(layer.suffix.detach().flatten(1).T)[0].T
        gradient = dense[layer_name].flatten(1)
        assert torch.linalg.matrix_rank(layer.suffix.detach().flatten(1)) == min(gradient.shape), layer_name
        assert float((gradient - gradient @ rows.T @ rows).norm()) <= 1e-8 * float(gradient.norm()), layer_name


def test_batches_are_averaged_and_micro_batches_do_not_change_the_sum():
    model, x, y, _ = task("2-D")
    found = leading_gradients(model, ["stem", "twice"], 1, few_samples([(x[:11], y[:11]), (x[12:20], y[12:20])], CPU))
    dense = dense_gradients(model, torch.cat([x[:6], x[12:18]]), torch.cat([y[:6], y[12:18]]))  # six of each: 11 in all
    for layer, gradient in found.items():
        assert largest_angle(right_directions(dense[layer], 1), right_directions(gradient, 1)) <= 1e-8


def test_few_samples_takes_equal_parts_of_the_first_batches():
    x, y = torch.randn(10, 2), torch.zeros(10, dtype=torch.long)
    endless = itertools.repeat((x, y))
    samples = few_samples(endless, CPU)
    assert [len(a) for a, _ in samples] == [3] * MOST_BATCHES
    assert [len(a) for a, _ in few_samples([(x, y)], CPU)] == [10]


def test_captured_energy_is_that_of_the_gradient_on_orthonormal_rows():
    model, x, y, dense = task("2-D")
    suffixes = {name: weight_suffix(model.get_submodule(name).weight, 3) for name in dense}
    found = captured_energies(model, suffixes, few_samples([(x, y)], CPU))
    for name, gradient in dense.items():
        rows = torch.linalg.qr(contract_suffix(suffixes[name]).flatten(1).T)[0]
        torch.testing.assert_close(found[name], (gradient.flatten(1) @ rows).square().sum(dim=0))


def covariances(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """``M (D, D)`` of each convolution by unfolding its inputs, over all its calls and groups."""
    patches: dict[str, list[Tensor]] = {}

    def keep(name: str, conv: nn.modules.conv._ConvNd, inputs: tuple[Tensor, ...]) -> None:
        eye = torch.eye(conv.weight[0].numel(), dtype=x.dtype).unflatten(1, conv.weight.shape[1:])
        one = copy.copy(conv)  # each output a pixel of the patch
        one._parameters = {"weight": nn.Parameter(eye.repeat(conv.groups, *[1] * (eye.dim() - 1))), "bias": None}
        read = type(conv)._conv_forward(one, inputs[0], one.weight, None).detach()
        patches.setdefault(name, []).append(read.unflatten(1, (conv.groups, -1)).transpose(0, 2).flatten(1))

    model = copy.deepcopy(model).eval()
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.conv._ConvNd):
            module.register_forward_pre_hook(lambda conv, inputs, name=name: keep(name, conv, inputs))
    model(x)
    return {
        name: torch.cov(torch.cat(found, dim=1), correction=0) * sum(f.shape[1] for f in found)
        for name, found in patches.items()
    }


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_directions_are_those_of_the_inputs_covariance(name, rank):
    model, x, _, _ = task(name)
    dense = covariances(model, x)
    found = leading_inputs(model, list(dense), rank, [x[:10], x[10:]])
    for layer, covariance in dense.items():
        rows = found[layer].flatten(1)
        values, vectors = torch.linalg.eigh(covariance)
        few = min(rank, len(values))
        if len(values) <= 15:  # as many rows as the sketch has
            torch.testing.assert_close(rows[:few].square().sum(dim=1), values.flip(0)[:few])
            if few < len(values) and values[-few] > 1.01 * values[-few - 1]:
                assert largest_angle(vectors.flip(1)[:, :few].T, right_directions(rows, few)) <= 1e-6, layer
        caught = torch.trace(right_directions(rows, few) @ covariance @ right_directions(rows, few).T)
        assert caught >= 0.8 * values.flip(0)[:few].sum(), layer  # random inputs: the flattest spectrum


def test_a_wide_layer_whose_inputs_have_a_low_rank():
    """The sketch has 15 rows and a patch 200 elements; the inputs consist of three directions and a mean."""
    torch.manual_seed(0)
    x = torch.randn(32, 3, 20).double() * torch.tensor([3.0, 2.0, 1.0]).double()[:, None]
    mixed = torch.einsum("dc,ncl->ndl", torch.linalg.qr(torch.randn(40, 3).double())[0], x) + 7.0
    model = nn.Sequential(nn.Conv1d(40, 64, 1)).double()
    found = leading_inputs(model, ["0"], 3, [mixed])["0"].flatten(1)
    values, vectors = torch.linalg.eigh(covariances(model, mixed)["0"])
    torch.testing.assert_close(found[:3].square().sum(dim=1), values.flip(0)[:3])
    assert largest_angle(vectors.flip(1)[:, :3].T, right_directions(found, 3)) <= 1e-8
    # The sums are rounded about zero, n terms of the raw moments' size; a row beyond the rank is that noise over the root of
    # the sketch's shift, eps times what is left about the mean (`_Sketch.eigenvectors`).
    eps, positions = torch.finfo(mixed.dtype).eps, len(mixed) * mixed.shape[2]
    noise = eps * positions**0.5 * float(mixed.square().sum())
    assert float(found[3:].norm(dim=1).max()) <= noise / (eps * float(values.sum())) ** 0.5


def test_a_layer_whose_input_does_not_vary_keeps_the_directions_of_the_weight():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.constant, self.unused = nn.Conv1d(3, 4, 3), nn.Conv1d(4, 4, 3), nn.Conv1d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.constant(self.used(x) * 0).mean(dim=-1)

    torch.manual_seed(0)
    model = Model()
    own = {name: contract_suffix(weight_suffix(model.get_submodule(name).weight, 2)) for name in ("constant", "unused")}
    lora_edge.adapt(model, 2, subspace="input", batches=[torch.randn(8, 3, 9)])
    for name, suffix in own.items():
        assert torch.equal(model.get_submodule(name).suffix, suffix)


def test_inputs_that_the_model_does_not_accept():
    model, _ = network("2-D")
    before = snapshot(model)
    for batches, text in (
        ([torch.randn(4, 2, 12, 10)], r"the model does not accept an input of \(4, 2, 12, 10\): .*channels"),
        ([X * float("nan")], "the input of stem holds NaN or Inf"),
        ([3], "batch 0 is a int; give x"),
        ([], "batches holds no samples"),
    ):
        with pytest.raises(ValueError, match=text) as caught:
            lora_edge.adapt(model, 2, subspace="input", batches=batches)
        assert "\n" not in str(caught.value)
        assert_same(before, snapshot(model))
    with pytest.raises(TypeError, match="batches is a int"):
        lora_edge.adapt(model, 2, subspace="input", batches=3)


@pytest.mark.parametrize("scaling", ["balanced", "paper"])
@pytest.mark.parametrize("make", [gradient_suffix, suffix_along])
def test_another_suffix_has_the_norm_of_the_suffix_of_the_weight(make, scaling):
    torch.manual_seed(0)
    weight = torch.randn(8, 4, 3, 3)
    for rows in (1e-9 * torch.randn(8, 4, 3, 3), torch.randn(5, 4, 3, 3)):
        cores = make(weight, rows, 3, scaling)
        assert [tuple(core.shape) for core in cores] == [(3, 4, 3), (3, 3, 3), (3, 3, 1)]
        own = contract_suffix(weight_suffix(weight, 3, scaling))
        torch.testing.assert_close(contract_suffix(cores).norm(), own.norm())


def test_rows_beyond_the_gradients_rank_come_from_the_weight():
    torch.manual_seed(0)
    weight = torch.randn(8, 4, 5)
    gradient = torch.outer(torch.randn(8), torch.randn(20)).reshape(8, 4, 5)
    rows = contract_suffix(gradient_suffix(weight, gradient, 8)).flatten(1).double()
    assert torch.linalg.matrix_rank(rows) == 8
    spanned = torch.linalg.qr(rows.T)[0].T
    assert largest_angle(spanned, right_directions(gradient, 1)) <= 1e-5
    both = right_directions(torch.cat([weight.flatten(1) / weight.norm(), gradient.flatten(1) / gradient.norm()]), 9)
    assert largest_angle(both, spanned) <= 1e-5, "nothing but the gradient's and the weight's directions"
    torch.testing.assert_close(rows.norm(dim=1), rows.norm(dim=1).mean().expand(8))


@pytest.mark.parametrize("subspace", ["input", "gradient"])
def test_the_state_of_the_model_is_left_alone(monkeypatch, subspace):
    """Finding the directions writes nothing of the model, and leaves its output and torch's generator as they were."""
    model, x, y, _ = task("2-D", torch.float32)
    model.train()
    model.bn.eval()
    next(iter(model.parameters())).requires_grad_(False)
    calls = []
    model.stem.register_forward_hook(lambda *_: calls.append(1))
    before, base = snapshot(model), copy.deepcopy(model).eval()
    hooks = dict(model.stem._forward_hooks)
    versions = [t._version for t in [*model.parameters(), *model.buffers()]]
    state = torch.get_rng_state()

    def stopped(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["lora_edge.adapt"], "install", stopped)  # the package's own adapt is the function
        with pytest.raises(KeyboardInterrupt):
            lora_edge.adapt(model, 2, subspace=subspace, batches=[(x, y)], bn="batch")
    assert_same(before, snapshot(model))
    assert [t._version for t in [*model.parameters(), *model.buffers()]] == versions
    assert dict(model.stem._forward_hooks) == hooks
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
    lora_edge.adapt(model, 2, subspace=subspace, batches=[(x, y)])
    assert torch.equal(output(model.eval(), x), output(base, x))


def test_directions_are_deterministic_and_not_those_of_the_weight():
    suffixes = []
    for seed in (0, 1):
        model, x, y, _ = task("1-D", torch.float32)
        torch.manual_seed(seed)
        lora_edge.adapt(model, 2, subspace="gradient", batches=iter([(x, y)]))
        suffixes.append(model[0].suffix.detach())
    assert torch.equal(*suffixes)
    weights = lora_edge.adapt(task("1-D", torch.float32)[0], 2)[0].suffix
    assert not torch.allclose(suffixes[0], weights)


def test_auto_and_the_default_are_the_subspace_of_the_weight():
    model, x, y, _ = task("1-D", torch.float32)
    want = lora_edge.adapt(copy.deepcopy(model), 2, subspace="weight")[0]
    for options in ({}, {"subspace": "auto"}, {"subspace": "auto", "batches": [(x, y)]}):
        layer = lora_edge.adapt(copy.deepcopy(model), 2, **options)[0]
        assert torch.equal(layer.suffix, want.suffix)
        assert layer.subspace == "weight"


def test_calibration_before_adapting_changes_the_gradient():
    model, x, y, _ = task("1-D", torch.float32)
    source = lora_edge.adapt(copy.deepcopy(model), 2, subspace="gradient", batches=[(x, y)])
    calibrated = lora_edge.adapt(lora_edge.calibrate_bn(model, [3 * x + 1]), 2, subspace="gradient", batches=[(3 * x + 1, y)])
    assert not torch.allclose(source[3].suffix, calibrated[3].suffix)


@pytest.mark.parametrize("subspace", ["input", "gradient"])
@pytest.mark.parametrize("name", NAMES)
def test_life_of_a_model_with_another_suffix_than_that_of_the_weight(tmp_path, name, subspace):
    model, x, y, _ = task(name, torch.float32)
    base = copy.deepcopy(model)
    lora_edge.adapt(model, 2, subspace=subspace, batches=[(x, y)])
    train(model, x, list(lora_edge.trainable_parameters(model)))
    want = output(model.eval(), x)
    lora_edge.save_adapter(model, tmp_path / "a")
    loaded = lora_edge.load_adapter(copy.deepcopy(base), tmp_path / "a")
    assert torch.equal(output(loaded.eval(), x), want)
    into_adapted = lora_edge.load_adapter(lora_edge.adapt(copy.deepcopy(base), 2), tmp_path / "a")
    assert torch.equal(output(into_adapted.eval(), x), want)
    for each in (loaded, into_adapted, copy.deepcopy(loaded)):
        assert {layer.subspace for layer in adapted_layers(each).values()} == {subspace}
    assert_near(output(lora_edge.merge(model), x), want, layers=4, terms=80)
    assert not any("subspace" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("subspace", ["input", "gradient"])
def test_another_base_is_an_error_even_before_training(subspace):
    model, x, y, _ = task("2-D", torch.float32)
    same = copy.deepcopy(model.state_dict())
    lora_edge.adapt(model, 2, subspace=subspace, batches=[(x, y)])
    suffix = model.stem.suffix.clone()
    model.load_state_dict(same)
    assert torch.equal(model.stem.suffix, suffix)
    with pytest.raises(RuntimeError, match=rf"stem\.suffix was made from {subspace}s of the old one"):
        model.load_state_dict(network("2-D", seed=1)[0].state_dict())


def test_a_layer_that_the_loss_does_not_reach():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Conv1d(3, 4, 3), nn.Conv1d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x).mean(dim=-1)

    torch.manual_seed(0)
    model, batches = Model(), [(torch.randn(8, 3, 9), torch.randint(4, (8,)))]
    with pytest.raises(ValueError, match=r"^unused: the batches yield no gradient for it"):
        lora_edge.adapt(model, 2, subspace="gradient", batches=batches)
    lora_edge.adapt(model, 2, subspace="gradient", batches=batches, exclude="unused")


def test_a_computed_weight_and_a_forward_that_draws():
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 0.01 * torch.randn_like(x)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        old = nn.utils.weight_norm(nn.Conv1d(3, 3, 3))
    model = nn.Sequential(old, Noisy(), nn.Conv1d(3, 4, 3), nn.AdaptiveAvgPool1d(1), nn.Flatten())
    x = torch.randn(8, 3, 9)
    model(x)  # leaves a weight that is no leaf, which deepcopy refuses
    state = torch.get_rng_state()
    lora_edge.adapt(model, 2, subspace="gradient", batches=[(x, torch.randint(4, (8,)))])
    assert list(adapted_layers(model)) == ["2"]
    torch.set_rng_state(state)


X, Y = torch.randn(4, 3, 12, 10), torch.tensor([0, 1, 2, 3])


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"subspace": "weights"}, ValueError, "subspace is 'weights'; give one of 'weight', 'input', 'gradient', 'auto'"),
        ({"subspace": True}, ValueError, "subspace is True; give one of"),
        ({"subspace": "gradient"}, ValueError, 'subspace="gradient" needs batches'),
        ({"subspace": "input"}, ValueError, 'subspace="input" needs batches; give a few inputs'),
        (
            {"batches": [X]},
            ValueError,
            'batches is given, but subspace="weight" uses it only with params',
        ),
        ({"subspace": "gradient", "batches": []}, ValueError, "batches holds no samples"),
        ({"subspace": "gradient", "batches": iter(())}, ValueError, "its iterator was already used up"),
        ({"subspace": "gradient", "batches": [(X[:0], Y[:0])]}, ValueError, "batches holds no samples"),
        ({"subspace": "gradient", "batches": 3}, TypeError, "batches is a int"),
        ({"subspace": "gradient", "batches": [X]}, ValueError, "batch 0 is a Tensor; give pairs"),
        ({"subspace": "gradient", "batches": [(X, Y), (X, None)]}, ValueError, "batch 1 is a tuple; give pairs"),
        ({"subspace": "gradient", "batches": [(X, Y[:2])]}, ValueError, "give one class per sample"),
        ({"subspace": "gradient", "batches": [(X, Y + 7)]}, ValueError, r"no cross-entropy of output \(\d, 5\) and y"),
        ({"subspace": "gradient", "batches": [(X, Y.int())]}, ValueError, "no cross-entropy of output"),
        ({"subspace": "gradient", "batches": [(X * float("nan"), Y)]}, ValueError, "the loss is nan"),
        ({"subspace": "gradient", "batches": [(X, Y), (X * float("inf"), Y)]}, ValueError, "the loss is"),
        ({"subspace": "gradient", "batches": [(X[:, :2], Y)]}, ValueError, "channels"),
    ],
)
def test_bad_arguments_leave_the_model_as_it_was(arguments, error, text):
    model, _ = network("2-D")
    model.train()
    before, states = snapshot(model), (torch.get_rng_state(), random.getstate())
    with pytest.raises(error, match=text) as caught:
        lora_edge.adapt(model, **arguments)
    assert "\n" not in str(caught.value)
    assert_same(before, snapshot(model))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert all(p.grad is None for p in model.parameters())


def test_an_iterator_that_raises_leaves_the_model_as_it_was():
    def broken():
        yield X, Y
        torch.rand(3)
        raise OSError("the disk is gone")

    model, _ = network("2-D")
    before, state = snapshot(model), torch.get_rng_state()
    with pytest.raises(OSError, match="the disk is gone"):
        lora_edge.adapt(model, 2, subspace="gradient", batches=broken())
    assert_same(before, snapshot(model))
    assert torch.equal(torch.get_rng_state(), state)


def test_zero_loss_and_nan_gradients():
    model, _ = network("2-D")
    with torch.no_grad():
        model.fc.weight.zero_()
        model.fc.bias.copy_(torch.tensor([1e4, 0, 0, 0, 0]))
    before = snapshot(model)
    with pytest.raises(ValueError, match="batches yield no gradient: it is zero in every layer") as caught:
        lora_edge.adapt(model, 2, subspace="gradient", batches=[(X, torch.zeros_like(Y))])
    assert "\n" not in str(caught.value)
    assert_same(before, snapshot(model))

    class Root(nn.Module):  # finite, its gradient not
        def forward(self, x: Tensor) -> Tensor:
            return (x - x).sqrt() + x

    model = nn.Sequential(nn.Conv1d(3, 4, 3), Root(), nn.AdaptiveAvgPool1d(1), nn.Flatten())
    before = snapshot(model)
    with pytest.raises(ValueError, match="the gradient of 0 holds NaN or Inf"):
        lora_edge.adapt(model, 2, subspace="gradient", batches=[(torch.randn(4, 3, 9), Y)])
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("subspace", ["input", "gradient"])
def test_peak_memory_on_w1_is_below_twice_that_of_a_training_step(subspace):
    pytest.importorskip("rich")  # in the extra har
    from benchmarks.subspace_pass import MOST_PEAK, actions, peak_bytes

    named, known = actions("W1", 64, 4)
    assert peak_bytes(named[subspace], known) <= MOST_PEAK * peak_bytes(named["step"], known)
