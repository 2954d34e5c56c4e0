"""Your training loop, unchanged, around ``adapt`` and ``merge``: a small image classifier moves to darker images."""

import torch
from torch import nn

import lora_edge

torch.manual_seed(0)
DARKER = 0.2  # the target's images are the source's times this


def images(count: int, brightness: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise with a brighter quadrant, which is the class."""
    x, y = torch.rand(count, 1, 16, 16), torch.randint(4, (count,))
    for image, k in zip(x, y.tolist(), strict=True):
        row, column = 8 * (k // 2), 8 * (k % 2)
        image[0, row : row + 8, column : column + 8] += 0.5
    return x * brightness, y


def train(model: nn.Module, parameters: list[nn.Parameter], lr: float, brightness: float, steps: int) -> None:
    optimizer = torch.optim.Adam(parameters, lr=lr)
    model.train()
    for _ in range(steps):
        x, y = images(32, brightness)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, brightness: float) -> float:
    x, y = images(256, brightness)
    return (model.eval()(x).argmax(dim=1) == y).float().mean().item()


model = nn.Sequential(
    nn.Conv2d(1, 16, 5, stride=2, padding=2),
    nn.BatchNorm2d(16),
    nn.ReLU(),
    nn.Conv2d(16, 16, 3, stride=2, padding=1),
    nn.BatchNorm2d(16),
    nn.ReLU(),
    nn.Flatten(),
    nn.Linear(16 * 4 * 4, 4),
)
train(model, list(model.parameters()), lr=1e-2, brightness=1.0, steps=40)
print(f"source model: {accuracy(model, 1.0):.2f} on its own images, {accuracy(model, DARKER):.2f} on the target's")
before = accuracy(model, DARKER)

lora_edge.adapt(model, rank=2)
print(lora_edge.summary(model))
train(model, list(lora_edge.trainable_parameters(model)), lr=2e-2, brightness=DARKER, steps=40)
lora_edge.save_adapter(model, "darker.safetensors")
lora_edge.merge(model)  # plain nn.Conv2d again
print(f"adapted and merged: {accuracy(model, DARKER):.2f} on the target's images")
assert accuracy(model, DARKER) > before
