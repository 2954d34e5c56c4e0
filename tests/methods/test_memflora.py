"""The trained-kernel methods: the formula, PaCA against full fine-tuning, the laws of the projections."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from helpers.methods import LABELS, METHODS, RANK, WEIGHTS
from helpers.tolerances import relative_error
from lora_edge.har.models import TResNet
from lora_edge.memory import SavedBytes, saved_bytes
from lora_edge.methods.memflora import balanced, gaussian
from lora_edge.methods.paca import channels
from lora_edge.methods.training import training_step
from lora_edge.subspaces.weight import common_norm, kernel_suffix
from lora_edge.tools import deltas, low_rank

FORMS = ["kernel_core", "memflora", "memflora_balanced", "paca"]


def layer_of(kind: str, name: str, rank: int = RANK) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """A float64 convolution, a copy of it prepared by the method with a random kernel, its kernel and its projection."""
    base = WEIGHTS[kind]().double()
    model = copy.deepcopy(base)
    (kernel,) = METHODS[name].begin(model, rank, torch.empty(0), LABELS).parameters
    with torch.no_grad():
        kernel.normal_()
    return base, model, kernel, model.suffix.detach().flatten(1)


def shape_of_input(base: nn.Module) -> tuple[int, ...]:
    return (4, base.in_channels, *[9] * (base.weight.dim() - 2))


def by_hand(base: nn.Module, kernel: Tensor, projection: Tensor) -> Tensor:
    """The update's defining sum, entry by entry of ``P``, in float64."""
    update = torch.zeros_like(base.weight)
    for q in range(projection.shape[0]):
        for i in range(projection.shape[1]):
            update[:, i] += kernel[:, q] * projection[q, i]
    return update


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("kind", list(WEIGHTS))
def test_value_and_gradients_by_the_formula(kind, name):
    """The dense oracle; and the authors' own form, a pointwise convolution by ``P`` and then one by ``U``."""
    base, model, kernel, projection = layer_of(kind, name)
    rank = min(RANK, base.weight.shape[1])
    assert kernel.shape == (base.out_channels, rank, *base.kernel_size)
    assert projection.shape == (rank, base.weight.shape[1])
    x = torch.randn(shape_of_input(base), dtype=torch.float64)
    free = kernel.detach().clone().requires_grad_()
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    dims = base.weight.dim() - 2
    conv = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[dims - 1]
    pointwise = projection.detach().repeat(base.groups, 1).view(-1, base.weight.shape[1], *[1] * dims)
    q = conv(theirs, pointwise, groups=base.groups)
    want = base(theirs) + conv(q, free, groups=base.groups)
    got = model(mine)
    assert relative_error(got, want) <= 1e-12
    assert relative_error(deltas(model)[""], by_hand(base, kernel.detach(), projection.detach())) <= 1e-12
    dy = torch.randn_like(want)
    for g, w in zip(torch.autograd.grad(got, [mine, kernel], dy), torch.autograd.grad(want, [theirs, free], dy), strict=True):
        assert relative_error(g, w) <= 1e-12


@pytest.mark.parametrize("kind", list(WEIGHTS))
def test_low_rank_is_the_update(kind):
    base, model, *_ = layer_of(kind, "memflora")
    b, a, scale = low_rank(model)[""]
    assert relative_error(scale * (b @ a.flatten(1)).view(base.weight.shape), deltas(model)[""]) <= 1e-12


@pytest.mark.parametrize("kind", list(WEIGHTS))
def test_pacas_gradient_is_full_fine_tunings_on_its_channels(kind):
    base, model, kernel, projection = layer_of(kind, "paca")
    with torch.no_grad():
        kernel.zero_()
    chosen = projection.argmax(dim=1)
    assert len(set(chosen.tolist())) == len(chosen)
    x = torch.randn(shape_of_input(base), dtype=torch.float64)
    assert torch.equal(model(x), base(x))
    y = base(x)
    dy = torch.randn_like(y)
    (full,) = torch.autograd.grad(y, base.weight, dy)
    (ours,) = torch.autograd.grad(model(x), kernel, dy)
    assert relative_error(ours, full[:, chosen]) <= 1e-12


def test_paca_at_all_channels_is_full_fine_tuning_of_the_layer():
    base, model, kernel, _ = layer_of("wide", "paca", rank=50)
    assert kernel.numel() == base.weight.numel()
    assert torch.linalg.matrix_rank(deltas(model)[""].flatten(1)) == base.out_channels


def test_a_kernel_that_is_shared_by_the_taps_is_another_method():
    """The mutant: conv LoRA with one column per row of ``P`` and no taps of its own."""
    base, _, kernel, projection = layer_of("wide", "memflora")
    oracle = by_hand(base, kernel.detach(), projection.detach())
    wrong = (kernel.detach().mean(dim=2) @ projection.detach())[..., None].expand_as(oracle)
    assert relative_error(wrong, oracle) > 0.1


def test_a_projection_that_differs_between_the_groups_is_another_method():
    """The mutant: the groups read ``P``'s columns by the layer's channel and not by the group's own."""
    base, model, kernel, projection = layer_of("groups", "memflora")
    x = torch.randn(shape_of_input(base), dtype=torch.float64)
    rows = projection.detach().repeat(2, 1)
    rows[RANK:] = rows[RANK:].flip(1)
    q = nn.functional.conv2d(x, rows[..., None, None], groups=2)
    assert relative_error(base(x) + nn.functional.conv2d(q, kernel, groups=2), model(x)) > 1e-2


@pytest.mark.parametrize("project", [balanced, kernel_suffix])
@pytest.mark.parametrize("kind", [*WEIGHTS, "zero"])
def test_the_balanced_law(kind, project):
    """Adam's first step changes each filter by ``rate / √2`` of the layer's usual filter norm if the rows are orthogonal."""
    weight = torch.zeros(5, 6, 7).double() if kind == "zero" else WEIGHTS[kind]().double().weight.detach()
    rows = project(weight, RANK).double()
    usual = 3**-0.5 if kind == "zero" else float(weight.norm()) / math.sqrt(len(weight))
    want = usual / math.sqrt(2 * len(rows) * weight[0, 0].numel())
    torch.testing.assert_close(rows.norm(dim=1), torch.full((len(rows),), want).double())
    if project is kernel_suffix:
        step = torch.einsum("qk,qi->ik", torch.ones(len(rows), weight[0, 0].numel()).double(), rows)
        torch.testing.assert_close(step.norm(), torch.tensor(usual / math.sqrt(2)).double())
        assert not math.isclose(float(rows[0].norm()), common_norm(weight, len(rows)), rel_tol=0.1)  # the mutant without taps


def test_kernel_suffix_spans_the_inputs_that_the_weight_reads():
    """Of all projections of this rank, that on its rows keeps most of the weight."""
    weight = torch.randn(9, 6, 5).double()
    vt = torch.linalg.svd(weight.transpose(1, 2).reshape(-1, 6), full_matrices=False)[2][:RANK]
    rows = kernel_suffix(weight, RANK)
    rows = rows / rows.norm(dim=1, keepdim=True)
    torch.testing.assert_close(rows.T @ rows, vt.T @ vt)
    wrong = torch.linalg.svd(weight.reshape(-1, 6), full_matrices=False)[2][:RANK]  # taps not moved to the outputs
    assert not torch.allclose(wrong.T @ wrong, vt.T @ vt, atol=1e-2)


def test_the_gaussians_size_and_the_drawn_channels():
    torch.manual_seed(0)
    drawn = gaussian(torch.empty(1, 4000, 1), 8)
    assert drawn.shape == (8, 4000)
    assert float(drawn.std()) == pytest.approx(8**-0.5, rel=0.02)
    one_hot = channels(torch.empty(1, 30, 1), 4)
    assert torch.equal(one_hot.sum(dim=1), torch.ones(4))
    assert float(one_hot.sum(dim=0).max()) == 1


class Odd(nn.Module):
    """Padding modes, groups, a module that is used twice, dropout, and a stride."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect")
        self.norm = nn.BatchNorm2d(8)
        self.twice = nn.Conv2d(8, 8, (3, 2), padding="same", groups=2)
        self.drop = nn.Dropout(0.3)
        self.last = nn.Conv2d(8, 5, 3, stride=2, dilation=2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = self.twice(self.drop(self.twice(x)).relu()) + x
        return self.last(x).mean(dim=(2, 3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)  # by the torch engine and by one with kernels
def test_sgs_projections_get_the_gradient_of_a_dense_backward(dtype):
    """The oracle saves every input: the suffix as an ordinary trained tensor."""
    torch.manual_seed(1)
    model = Odd().to(dtype)
    x, y = torch.randn(6, 3, 12, 11, dtype=dtype), torch.arange(6) % 5
    training = METHODS["memflora_sg"].begin(model, RANK, x, y)
    model.train()
    layers = [m for m in model.modules() if hasattr(m, "suffix")]
    with torch.no_grad():
        for layer in layers:
            layer.core.normal_(std=0.3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = []
    for dense in (False, True):
        for layer in layers:
            layer.trains_suffix = dense
        torch.manual_seed(2)
        loss = nn.functional.cross_entropy(model(x), y) if dense else training.loss(model, x, y)
        found.append((loss, torch.autograd.grad(loss, training.parameters), torch.rand(1)))
    (loss, ours, after), (want, oracle, after_one) = found
    assert relative_error(loss, want) <= 1e-6
    assert torch.equal(after, after_one), "the generator moves as in one forward"
    for g, w in zip(ours, oracle, strict=True):
        assert g.dtype == w.dtype
        assert relative_error(g, w) <= (1e-12 if dtype == torch.float64 else 1e-5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_sg_repeats_the_draws():
    """The mutant: a second forward with draws of its own meets other inputs."""
    torch.manual_seed(1)
    model, x, y = Odd().double(), torch.randn(6, 3, 12, 11).double(), torch.arange(6) % 5
    training = METHODS["memflora_sg"].begin(model, RANK, x, y)
    with torch.no_grad():
        for parameter in training.parameters:
            parameter.normal_(std=0.3)
    model.train()
    first = torch.autograd.grad(training.loss(model, x, y), training.parameters)
    second = torch.autograd.grad(training.loss(model, x, y), training.parameters)
    assert max(relative_error(a, b) for a, b in zip(first, second, strict=True)) > 1e-2


def test_sg_trains_the_projections_ten_times_as_fast():
    model = nn.Conv1d(6, 5, 7)
    training = METHODS["memflora_sg"].begin(model, RANK, torch.empty(0), LABELS)
    kernels, projections = training.optimizer(training.parameters, 1e-3).param_groups
    assert (kernels["lr"], projections["lr"]) == (1e-3, 1e-2)
    assert kernels["params"] == [model.core]
    assert projections["params"] == [model.suffix]


def test_sg_saves_what_memflora_saves_in_both_forwards():
    torch.manual_seed(0)
    base, x, y = TResNet(6, 3), torch.randn(8, 6, 40), torch.arange(8) % 3
    one, two = copy.deepcopy(base), copy.deepcopy(base)
    METHODS["memflora"].begin(one, RANK, x, y)
    training = METHODS["memflora_sg"].begin(two, RANK, x, y)
    want = saved_bytes(one.train(), x)
    assert saved_bytes(two.train(), x) == want
    with SavedBytes(two) as saved:
        training.loss(two, x, y)
    outputs = 8 * 3 * 4 + 8 * 8 + 4  # of the cross-entropy: log-probabilities, classes, a total weight
    assert saved.total <= want + outputs


@pytest.mark.parametrize("name", [*FORMS, "memflora_sg"])
def test_layers_that_share_a_weight_share_kernel_and_projection(name):
    model = nn.Sequential(nn.Conv1d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv1d(4, 4, 3, padding=1), nn.Flatten())
    model[2].weight = model[0].weight
    x, y = torch.randn(8, 4, 9), LABELS
    training = METHODS[name].begin(model, RANK, x, y)
    assert model[0].core is model[2].core
    assert model[0].suffix is model[2].suffix
    assert training.count == 4 * RANK * 3 + (RANK * 4 if name == "memflora_sg" else 0)
    training_step(model.train(), training, training.optimizer(training.parameters, 1e-2), x, y)
    updates = deltas(model)
    assert torch.equal(updates["0"], updates["2"])
    METHODS[name].finish(model)
    assert model[0].weight is model[2].weight
