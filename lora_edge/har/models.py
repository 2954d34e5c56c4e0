"""Backbones of the reference workloads: T-ResNet (W1), MobileNetV2 (W2) and ResNet-18 (W3); the last two also for windows."""

from __future__ import annotations

from torch import Tensor, nn


class TResNetBlock(nn.Module):
    """BN, three convolutions (8, 5, 3 taps) with BN, a shortcut, ReLU. ``(N, in_channels, L)`` to ``(N, maps, L)``."""

    def __init__(self, in_channels: int, maps: int) -> None:
        super().__init__()
        self.bn0 = nn.BatchNorm1d(in_channels)
        self.conv1 = nn.Conv1d(in_channels, maps, 8, padding="same", bias=False)
        self.bn1 = nn.BatchNorm1d(maps)
        self.conv2 = nn.Conv1d(maps, maps, 5, padding="same", bias=False)
        self.bn2 = nn.BatchNorm1d(maps)
        self.conv3 = nn.Conv1d(maps, maps, 3, padding="same", bias=False)
        self.bn3 = nn.BatchNorm1d(maps)
        self.relu = nn.ReLU()
        if in_channels == maps:
            self.shortcut: nn.Module = nn.BatchNorm1d(maps)
        else:
            self.shortcut = nn.Sequential(nn.Conv1d(in_channels, maps, 1, bias=False), nn.BatchNorm1d(maps))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(self.bn0(x))))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return self.relu(y + self.shortcut(x))


class TResNet(nn.Module):
    """The time-series ResNet of Wang, Yan and Oates (IJCNN 2017) in the form that the LoRA-Edge literature uses.

    Args:
        in_channels: sensor channels.
        num_classes: activities.

    Input ``(N, in_channels, L)``, output logits ``(N, num_classes)``. 97 channels and 17 classes: 560,915 parameters.
    """

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.block1 = TResNetBlock(in_channels, 64)
        self.block2 = TResNetBlock(64, 128)
        self.block3 = TResNetBlock(128, 128)
        self.head = nn.Linear(128, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block3(self.block2(self.block1(x))).mean(dim=-1))


class InvertedResidual(nn.Module):
    """MobileNetV2's block: pointwise expansion, depthwise 3x3, linear pointwise projection; a residual if the shapes match."""

    def __init__(self, in_channels: int, maps: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        layers: list[nn.Module] = [] if expansion == 1 else [conv_bn_relu6(in_channels, hidden, 1)]
        layers += [
            conv_bn_relu6(hidden, hidden, 3, stride, groups=hidden),
            nn.Conv2d(hidden, maps, 1, bias=False),
            nn.BatchNorm2d(maps),
        ]
        self.conv = nn.Sequential(*layers)
        self.residual = stride == 1 and in_channels == maps

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(nn.Module):
    """MobileNetV2 (Sandler et al., CVPR 2018) in the ImageNet layout, with torchvision's parameter names.

    Input ``(N, 3, H, W)``, output logits ``(N, num_classes)``.
    """

    # expansion, maps, repeats, first stride
    SETTINGS = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        features: list[nn.Module] = [conv_bn_relu6(3, 32, 3, 2)]
        channels = 32
        for expansion, maps, repeats, stride in self.SETTINGS:
            for repeat in range(repeats):
                features.append(InvertedResidual(channels, maps, stride if repeat == 0 else 1, expansion))
                channels = maps
        features.append(conv_bn_relu6(channels, 1280, 1))
        self.features = nn.Sequential(*features)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean(dim=(2, 3)))


def conv_bn_relu6(in_channels: int, maps: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Return a convolution without bias, BatchNorm and ReLU6, padded to keep the size at stride 1."""
    return nn.Sequential(
        nn.Conv2d(in_channels, maps, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(maps),
        nn.ReLU6(inplace=True),
    )


class BasicBlock(nn.Module):
    """ResNet's two 3x3 convolutions with a shortcut."""

    def __init__(self, in_channels: int, maps: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, maps, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(maps)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(maps, maps, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(maps)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != maps:
            self.downsample = nn.Sequential(nn.Conv2d(in_channels, maps, 1, stride, bias=False), nn.BatchNorm2d(maps))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + shortcut)


class ResNet18(nn.Module):
    """ResNet-18 (He et al., CVPR 2016) for 32x32 images: a 3x3 stem, no max-pool, torchvision's parameter names.

    Input ``(N, 3, 32, 32)``, output logits ``(N, num_classes)``.
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = nn.Sequential(BasicBlock(64, 64, 1), BasicBlock(64, 64, 1))
        self.layer2 = nn.Sequential(BasicBlock(64, 128, 2), BasicBlock(128, 128, 1))
        self.layer3 = nn.Sequential(BasicBlock(128, 256, 2), BasicBlock(256, 256, 1))
        self.layer4 = nn.Sequential(BasicBlock(256, 512, 2), BasicBlock(512, 512, 1))
        self.fc = nn.Linear(512, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean(dim=(2, 3)))


class WindowImages(nn.Module):
    """An image network on windows of three-axis sensors: the axes become colours, the sensors rows.

    Input ``(N, 3 * sensors, L)``, which the network reads as ``(N, 3, sensors, L)``; output: its logits.

    Raises:
        ValueError: the number of channels is not a multiple of three.
    """

    def __init__(self, network: nn.Module, in_channels: int) -> None:
        if in_channels % 3:
            raise ValueError(f"an image network needs three-axis sensors, got {in_channels} channels; give a multiple of 3")
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x.unflatten(1, (-1, 3)).transpose(1, 2))


def mobilenet_v2_on_windows(in_channels: int, num_classes: int) -> WindowImages:
    """Return MobileNetV2 (W2) for activity windows."""
    return WindowImages(MobileNetV2(num_classes), in_channels)


def resnet18_on_windows(in_channels: int, num_classes: int) -> WindowImages:
    """Return ResNet-18 (W3) for activity windows."""
    return WindowImages(ResNet18(num_classes), in_channels)


def pointwise(model: nn.Module) -> list[str]:
    """Return the names of the model's 1x1 convolutions, for ``targets`` of :func:`lora_edge.adapt`."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1
    ]
