"""Small networks for the tests of adapting: 1-D, 2-D and 3-D, with groups, a shared module and a depthwise layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Residual(nn.Module):
    """A convolution block with a shortcut, a depthwise convolution, groups and a module that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect")
        self.bn = nn.BatchNorm2d(8)
        self.twice = nn.Conv2d(8, 8, 3, padding="same", groups=2, bias=False)
        self.again = self.twice
        self.depthwise = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8)
        self.norm = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.stem(x)).relu()
        x = x + self.again(self.twice(x).relu())
        return self.fc(self.norm(self.depthwise(x)).relu().mean(dim=(2, 3)))


def one_d() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(6, 16, 8, padding="same", bias=False),
        nn.BatchNorm1d(16),
        nn.ReLU(),
        nn.Conv1d(16, 8, 3, stride=2, padding=1),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


def three_d() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(2, 6, 3, padding=1), nn.BatchNorm3d(6), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(6, 4)
    )


INPUTS = {"1-D": (6, 50), "2-D": (3, 12, 10), "3-D": (2, 5, 6, 7)}
BUILD = {"1-D": one_d, "2-D": Residual, "3-D": three_d}


def network(name: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """A network in evaluation mode whose BatchNorm statistics are not the initial ones, and an input of batch 4."""
    torch.manual_seed(seed)
    model = BUILD[name]()
    x = torch.randn(4, *INPUTS[name])
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_()
        for _ in range(3):
            model.train()(torch.randn(16, *INPUTS[name]))
    return model.eval(), x


def train(model: nn.Module, x: Tensor, parameters: list[nn.Parameter], steps: int = 5) -> None:
    """Take a few Adam steps towards a fixed random target, in train mode."""
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    model.train()
    target = torch.randn_like(model(x).detach())
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - target).square().mean().backward()
        optimizer.step()


def output(model: nn.Module, x: Tensor) -> Tensor:
    """The model's output without gradients, which is bit-identical to the base model's after adapt."""
    with torch.no_grad():
        return model(x)
