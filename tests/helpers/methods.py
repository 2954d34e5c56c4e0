"""What the tests of methods share: the list, a trained base, a reparametrised convolution, comparison with an oracle."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from helpers.trained_counts import RANK, convolutions
from lora_edge.har.models import TResNet
from lora_edge.methods import Training, methods
from lora_edge.nn.reparametrised import Reparametrisation, reparametrise, reparametrised_layers
from lora_edge.tools import deltas, low_rank

LABELS = torch.arange(8) % 2
METHODS = methods()
NAMES = list(METHODS)
CONVS: dict[str, tuple[Callable[[], _ConvNd], tuple[int, ...]]] = {  # and the shape of an input
    "1-D": (lambda: nn.Conv1d(6, 12, 5, stride=2, padding=2), (4, 6, 21)),
    "2-D": (lambda: nn.Conv2d(6, 12, (3, 5), padding=(1, 2)), (4, 6, 9, 8)),
    "2-D stride": (lambda: nn.Conv2d(6, 12, 3, stride=2, padding=1, bias=False), (4, 6, 9, 8)),
    "3-D": (lambda: nn.Conv3d(3, 8, 3, padding=1), (2, 3, 5, 6, 4)),
}
# O < J and O > J of the unfolded weight (O, J), groups, depthwise: for formulas
WEIGHTS: dict[str, Callable[[], _ConvNd]] = {
    "wide": lambda: nn.Conv1d(6, 5, 7),
    "tall": lambda: nn.Conv2d(2, 13, (1, 3)),
    "groups": lambda: nn.Conv2d(6, 8, 3, groups=2),
    "depthwise": lambda: nn.Conv1d(6, 6, 5, groups=6),
    "3-D": lambda: nn.Conv3d(2, 6, (2, 3, 2)),
}
ALSO_TURNED = "_turned"  # in the name of a method that is another one on turned axes
REPARAMETRISED: list[str] = []  # filled below: methods that compute the weights of convolutions


def small_base() -> tuple[nn.Module, Tensor]:
    """A small T-ResNet whose BatchNorm is not at its initial values, and a batch of 8."""
    torch.manual_seed(1)
    model, x = TResNet(6, 3), torch.randn(8, 6, 40)
    with torch.no_grad():
        for norm in model.modules():
            if isinstance(norm, _BatchNorm):
                norm.weight.uniform_(0.5, 1.5)
                norm.bias.normal_()
    for _ in range(3):
        model.train()(torch.randn(8, 6, 40))
    return model.eval(), x


def begun(base: nn.Module, name: str, x: Tensor, rank: int = RANK) -> tuple[nn.Module, Training]:
    """A copy of the base prepared by a method, and what it trains."""
    model = copy.deepcopy(base)
    return model, METHODS[name].begin(model, rank, x, LABELS[: len(x)])


def prepared(base: nn.Module, name: str, x: Tensor, rank: int = RANK) -> tuple[nn.Module, list[nn.Parameter]]:
    """A copy of the base prepared by a method, and the parameters that it trains."""
    model, training = begun(base, name, x, rank)
    return model, training.parameters


def perturbed(conv: _ConvNd, made: Reparametrisation, size: float = 0.3) -> _ConvNd:
    """A frozen copy of the convolution, computed by ``made``, whose trained parameters are moved at random."""
    conv = copy.deepcopy(conv).requires_grad_(False)
    reparametrise(conv, made)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn_like(parameter))
    return conv


def ours(conv: _ConvNd, kind: Callable[..., Reparametrisation], **options: Any) -> tuple[_ConvNd, Any]:
    """The convolution reparametrised by ``kind`` at rank 2, moved from its start, and what computes its weight."""
    made = kind(conv, RANK, **options)
    return perturbed(conv, made), made


def peft_layer(layer: nn.Module, **options: Any) -> tuple[nn.Module, Any]:
    """Wrap the layer in peft's LoRA at rank 2 and alpha 3; return both."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=RANK, lora_alpha=3, target_modules=["layer"], lora_dropout=0.0, **options)
    model = nn.Sequential()
    model.add_module("layer", copy.deepcopy(layer))
    oracle = peft.get_peft_model(model, config)
    return oracle, next(m for m in oracle.modules() if hasattr(m, "lora_A"))


def peft_vera(sizes: Iterable[tuple[int, int]], rank: int) -> list[Any]:
    """peft's VeRA in float64 on linear layers of these sizes ``(out, in)``."""
    peft = pytest.importorskip("peft")
    model = nn.Sequential(*(nn.Linear(into, out) for out, into in sizes))
    names = [str(place) for place in range(len(model))]
    wrapped = peft.get_peft_model(model, peft.VeraConfig(r=rank, target_modules=names)).double()
    return [wrapped.base_model.model.get_submodule(name) for name in names]


def assert_update_is_a_product(name: str) -> None:
    """Assert that the factors of a method's trained layers have the update as their product."""
    base, x = small_base()
    model, training = begun(base, name, x)
    with torch.no_grad():
        for p in training.parameters:
            p.add_(0.1 * torch.randn_like(p))
    updates = deltas(model)
    for layer, (b, a, scale) in low_rank(model).items():
        torch.testing.assert_close(scale * torch.tensordot(b, a, 1), updates[layer])


def assert_same(
    layer: Callable[[Tensor], Tensor], oracle: Callable[[Tensor], Tensor], x: Tensor, pairs: Iterable[tuple[Any, Any]]
) -> None:
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


def _reparametrises(name: str) -> bool:
    base, x = small_base()
    METHODS[name].begin(base, RANK, x, LABELS)
    return bool(reparametrised_layers(base))


REPARAMETRISED += [name for name in NAMES if not name.endswith(ALSO_TURNED) and _reparametrises(name)]
__all__ = [
    "CONVS", "LABELS", "METHODS", "NAMES", "RANK", "REPARAMETRISED", "WEIGHTS", "assert_same", "assert_update_is_a_product",
    "begun", "convolutions", "ours", "peft_layer", "peft_vera", "perturbed", "prepared", "small_base",
]  # fmt: skip
