"""S²FT against the gradients of full fine-tuning, and the pairs of channels that it may choose from."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from helpers.methods import LABELS, METHODS, WEIGHTS, begun, perturbed, small_base
from helpers.networks import Residual, output
from lora_edge.har.models import MobileNetV2, ResNet18, TResNet
from lora_edge.methods.base import NotApplicableError
from lora_edge.methods.parts.channel_pairs import channel_pairs
from lora_edge.methods.s2ft import S2FT
from lora_edge.nn.reparametrised import reparametrised_layers
from lora_edge.tools import deltas

NAMES = ["s2ft", "s2ft_columns", "s2ft_rows"]


def named_pairs(model, dims):
    convs = {name: m for name, m in model.named_modules() if isinstance(m, _ConvNd)}
    return [(p.producer, *p.between, p.consumer) for p in channel_pairs(model, convs, dims)]


def chosen(count, of):
    return torch.randperm(of)[:count].sort().values


@pytest.mark.parametrize("name", list(WEIGHTS))
def test_values_and_gradients_are_those_of_the_rows_and_columns_of_the_weight(name):
    conv = WEIGHTS[name]().double()
    made, read = chosen(2, conv.out_channels), chosen(min(2, conv.in_channels), conv.in_channels)
    method = S2FT(conv, made, read)
    assert bool((method.delta() == 0).all())
    layer = perturbed(conv, method)
    width, rows = conv.weight.shape[1], conv.out_channels // conv.groups
    want = conv.weight.detach().clone()
    for row, channel in zip(method.rows, made.tolist(), strict=True):
        want[channel] += row.detach()
    for column, channel in zip(method.columns, read.tolist(), strict=True):
        group = channel // width  # only the outputs of its group read an input channel
        want[group * rows : (group + 1) * rows, channel % width] += column.detach()
    torch.testing.assert_close(layer.weight, want)
    full = copy.deepcopy(conv)
    full.weight.data.copy_(want)
    x = torch.randn(3, conv.in_channels, *(9,) * (conv.weight.dim() - 2)).double()
    dy = torch.randn_like(full(x))
    full(x).backward(dy)
    layer(x).backward(dy)
    torch.testing.assert_close(method.rows.grad, full.weight.grad[made])
    by_input = full.weight.grad.unflatten(0, (conv.groups, -1)).transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(method.columns.grad, by_input[read])
    if conv.groups == 1:
        torch.testing.assert_close(method.columns.grad.transpose(0, 1), full.weight.grad[:, read])


def test_a_pointwise_layer_is_the_authors_two_linear_layers():
    """Column: y[..., S] += x s2ᵀ. Row: y += x[..., S] s2ᵀ."""
    conv = nn.Conv1d(7, 9, 1).double()
    made, read = torch.tensor([2, 5, 8]), torch.tensor([0, 6])
    method = S2FT(conv, made, read)
    layer, x = perturbed(conv, method), torch.randn(4, 7, 3).double()
    y = conv(x)
    y[:, made] += torch.einsum("sci,nil->nsl", method.rows.transpose(1, 2), x)
    y = y + torch.einsum("soc,nsl->nol", method.columns, x[:, read])
    torch.testing.assert_close(layer(x), y)
    confused = conv(x) + F.conv1d(x[:, made % 7], method.rows.transpose(0, 1)[:1].expand(9, -1, -1))
    assert not torch.allclose(layer(x), confused)


def test_the_pairs_of_t_resnet_are_inside_its_blocks():
    expected = [(f"block{k}.conv{i}", f"block{k}.conv{i + 1}") for k in (1, 2, 3) for i in (1, 2)]
    assert named_pairs(TResNet(6, 3), 3) == expected


def test_the_pairs_of_mobilenet_span_the_depthwise_layers():
    pairs = named_pairs(MobileNetV2(3), 4)
    blocks = [(f"features.{k}.conv.0.0", f"features.{k}.conv.1.0", f"features.{k}.conv.2") for k in range(2, 18)]
    assert set(blocks) <= set(pairs)
    # where no block adds its input, its projection too is read by the next layer alone
    assert set(pairs) - set(blocks) == {
        ("features.0.0", "features.1.conv.0.0", "features.1.conv.1"),
        ("features.1.conv.1", "features.2.conv.0.0"),
        ("features.17.conv.2", "features.18.0"),
    }


def test_the_pairs_of_resnet18_are_inside_its_blocks():
    expected = [(f"layer{k}.{i}.conv1", f"layer{k}.{i}.conv2") for k in (1, 2, 3, 4) for i in (0, 1)]
    assert named_pairs(ResNet18(), 4) == expected


@pytest.mark.parametrize("build", [lambda: (TResNet(6, 3), (2, 6, 40)), lambda: (MobileNetV2(3), (4, 3, 64, 64))])
def test_what_a_pairs_producer_makes_of_a_channel_reaches_the_output_only_through_its_consumer(build):
    """By the numbers: without the consumer's columns, nothing that happens to the producer's rows is seen."""
    torch.manual_seed(0)
    model, shape = build()
    x = torch.randn(shape)
    for norm in model.modules():
        if isinstance(norm, _BatchNorm):
            norm.momentum = None  # so that one batch sets the statistics, and the signal reaches the end
    model.train()(x)
    model.eval()
    for producer, *_, consumer in named_pairs(model, len(shape))[::3]:
        twin = copy.deepcopy(model)
        first, last = twin.get_submodule(producer), twin.get_submodule(consumer)
        channels = chosen(3, first.out_channels)
        with torch.no_grad():
            first.weight[channels] += 10
            assert not torch.equal(output(twin, x), output(model, x))
            last.weight[:, channels] = 0
            without = output(twin, x)
            first.weight[channels] = 0
        assert torch.equal(output(twin, x), without)


class Net(nn.Module):
    """Two convolutions and an activation; the subclass says how they are connected."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv1d(4, 4, 3, padding=1) for _ in range(3))
        self.relu: nn.Module = nn.ReLU()

    def head(self, x: Tensor) -> Tensor:
        return x.mean(dim=-1)


class Plain(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(F.max_pool1d(self.relu(self.a(x)).sigmoid(), 2)))


class Skips(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.a(x))
        return self.head(self.b(y) + y)


class AddsIntoTheHidden(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.relu(self.a(x) + x)))


class TwoReaders(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.head(self.b(y) * self.c(y))


class Shuffles(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x).flip(1)))


class Softmax(Net):
    """Its layer named as an activation mixes the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.Softmax(dim=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.relu(self.a(x))))


class ReturnsBoth(Net):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.a(x)
        return self.head(self.b(y)), y


class Twice(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.b(x)))


class SkipsInTraining(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        z = self.b(y)
        return self.head(z + y) if self.training else self.head(z)


class Opaque(Net):
    """A forward that cannot be read around a child that can."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), nn.ReLU(), nn.Conv1d(6, 4, 3))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autograd.set_grad_enabled(torch.is_grad_enabled()):
            return self.head(self.b(self.inner(self.a(x))))


@pytest.mark.parametrize("kind", [Skips, AddsIntoTheHidden, TwoReaders, Shuffles, Softmax, ReturnsBoth, Twice, SkipsInTraining])
@pytest.mark.parametrize("name", NAMES)
def test_a_network_without_a_pair_is_refused_by_name_and_unchanged(name, kind: Callable[[], nn.Module]):
    model, x = kind(), torch.randn(8, 4, 12)
    state, flags = copy.deepcopy(model.state_dict()), [p.requires_grad for p in model.parameters()]
    with pytest.raises(NotApplicableError, match=r"^S²FT: no convolution's channels are read by one other") as caught:
        METHODS[name].prepare(model, 2, x, LABELS)
    assert "\n" not in str(caught.value)
    assert not reparametrised_layers(model)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_pair_is_found_through_functions_and_in_the_children_of_an_opaque_forward():
    assert named_pairs(Plain(), 3) == [("a", "b")]
    assert named_pairs(Opaque(), 3) == [("inner.0", "inner.3")]
    assert named_pairs(Residual(), 4) == []


@pytest.mark.parametrize("name", NAMES)
def test_only_the_chosen_channels_change_and_both_sides_choose_the_same(name):
    base, x = MobileNetV2(3), torch.randn(8, 3, 32, 32)
    model, training = begun(base, name, x, rank=1)
    with torch.no_grad():
        for p in training.parameters:
            p.add_(torch.randn_like(p))
    names = {m: n for n, m in model.named_modules()}
    made = {names[conv]: kind.made.tolist() for conv, kind in reparametrised_layers(model).items()}
    read = {names[conv]: kind.read.tolist() for conv, kind in reparametrised_layers(model).items()}
    for layer, update in deltas(model).items():
        inside = torch.zeros(update.shape, dtype=torch.bool)
        inside[made[layer]] = True
        if read[layer]:
            inside[:, read[layer]] = True
        assert torch.equal(update != 0, inside)
        assert inside.any()
    for *makes, reads in named_pairs(base, 4):
        for layer in makes:
            if name == "s2ft":
                assert made.get(layer, []) == read.get(reads, [])
            assert name != "s2ft_columns" or not made.get(layer)
        assert name != "s2ft_rows" or not read.get(reads)
    assert any(len(channels) > 1 for channels in (*made.values(), *read.values()))


@pytest.mark.parametrize("rank", [1, 2, 5, 40])
@pytest.mark.parametrize("name", NAMES)
def test_the_budget_is_kept_and_used(name, rank):
    """At rank 2 T-ResNet's budget is 2,304 elements, and some 2 % remain at most."""
    base, x = small_base()
    count, budget = begun(base, name, x, rank)[1].count, rank * 1152
    assert budget - 368 < count <= budget
    assert rank != 2 or count >= 2250


def test_dead_channels_are_never_chosen_and_all_others_are_at_a_large_budget():
    base, x = small_base()
    with torch.no_grad():
        for block in (base.block1, base.block2, base.block3):
            for norm in (block.bn1, block.bn2):
                norm.bias[:5], norm.weight[:5] = -1.0, 0.0
                norm.bias[5:] = 3.0
    model, training = begun(base, "s2ft_columns", x, 10_000)
    live = sum(model.get_submodule(pair[-1]).weight[:, 5:].numel() for pair in named_pairs(base, 3))
    assert training.count == live
    for made in reparametrised_layers(model).values():
        assert made.read.tolist() == list(range(5, made.shape[1]))
    with torch.no_grad():
        for block in (base.block1, base.block2, base.block3):
            for norm in (block.bn1, block.bn2):
                norm.bias.fill_(-1.0)
                norm.weight.zero_()
    with pytest.raises(NotApplicableError):
        begun(base, "s2ft", x)
